"""INT8 for Transformers, by torchao: weights per channel, activations scaled token by token as they come."""

from dataclasses import replace
from pathlib import Path

from emotion.model.pretrained import load_trained_classifier
from emotion.quantize.layers import Plan

import torch


def quantize_torchao(plan: Plan, folder: Path, reduce_range: bool = True) -> torch.nn.Module:
    """Writes `model.safetensors` and `config.json`.

    Args:
        reduce_range: weights of 7 bits, with which every processor gives the same answer; see levels.py.

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
    # Keys that name a module would quantize its bias too; these name weights.
    schemes = {f"{name}.weight": linear for name in plan.layers.linear}
    schemes |= {f"{name}.weight": table for name in plan.layers.embeddings}
    config = TorchAoConfig(FqnToConfig(schemes), include_input_output_embeddings=True)
    # It must be quantized while it is loaded: a model quantized in place cannot be saved.
    model = load_trained_classifier(plan.folder, quantization_config=config, dtype=torch.float32)
    # torchao reduces the range of the activations too, which halves their precision and is not needed.
    for name in plan.layers.linear:
        weight = model.get_submodule(name).weight
        weight.act_quant_kwargs = replace(weight.act_quant_kwargs, reduce_range=False)
    model.save_pretrained(folder)
    return model
