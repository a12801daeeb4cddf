"""INT8 for Transformers, by torchao."""

from dataclasses import replace
from pathlib import Path

from emotion.model.pretrained import load_trained_classifier
from emotion.quantize.layers import Layers

import torch


def quantize_torchao(baseline: Path, folder: Path, layers: Layers, reduce_range: bool = True) -> torch.nn.Module:
    """Writes `model.safetensors` and `config.json` with INT8 weights, and INT8 activations scaled token by token.

    Args:
        reduce_range: weights of 7 bits. A processor without VNNI adds two products of 8 bits in 16 bits, where
            full-range weights overflow (2 x 255 x 127 > 32767); with 7 bits every processor gives the same answer.

    Returns:
        The quantized model, as it was before it was saved.
    """
    from torchao.quantization import (
        FqnToConfig,
        Int8DynamicActivationInt8WeightConfig,
        IntxWeightOnlyConfig,
        PerAxis,
    )
    from transformers import TorchAoConfig

    linear = Int8DynamicActivationInt8WeightConfig(reduce_range=reduce_range)
    table = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    schemes = {f"{name}.weight": linear for name in layers.linear}
    schemes |= {f"{name}.weight": table for name in layers.embeddings}
    config = TorchAoConfig(FqnToConfig(schemes), include_input_output_embeddings=True)
    # It must be quantized while it is loaded: a model quantized in place cannot be saved.
    model = load_trained_classifier(baseline, quantization_config=config, dtype=torch.float32)
    for name in layers.linear:  # torchao reduces the activations too, which halves their precision and is not needed
        weight = model.get_submodule(name).weight
        weight.act_quant_kwargs = replace(weight.act_quant_kwargs, reduce_range=False)
    model.save_pretrained(folder)
    return model
