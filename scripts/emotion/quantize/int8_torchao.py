"""INT8 for Transformers, by torchao: weights per channel, activations scaled token by token as they come."""

from dataclasses import replace
from pathlib import Path

from emotion.model.pretrained import load_trained_classifier
from emotion.quantize.layers import Plan

import torch

# How the file holds the embedding tables: floats of 8 bits. Transformers widens them to float32 when it opens the
# file, and a text looks its rows up in a plain table. torchao's own INT8 tables are restored whole for each look-up,
# all 30,522 rows of BERT's vocabulary: a text took seven times as long as in FP32.
TABLE_DTYPE = torch.float8_e4m3fn


def quantize_torchao(plan: Plan, folder: Path, reduce_range: bool = True) -> torch.nn.Module:
    """Writes `model.safetensors`, with INT8 linear layers and float8 embedding tables, and `config.json`.

    Args:
        reduce_range: weights of 7 bits, with which every processor gives the same answer; see levels.py.

    Returns:
        The quantized model as `from_pretrained` opens it: its tables are float32, with the values of the file.
    """
    from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    linear = Int8DynamicActivationInt8WeightConfig(reduce_range=reduce_range)
    # Keys that name a module would quantize its bias too; these name weights.
    config = TorchAoConfig(FqnToConfig({f"{name}.weight": linear for name in plan.layers.linear}))
    # It must be quantized while it is loaded: a model quantized in place cannot be saved.
    model = load_trained_classifier(plan.folder, quantization_config=config, dtype=torch.float32)
    # torchao reduces the range of the activations too, which halves their precision and is not needed.
    for name in plan.layers.linear:
        weight = model.get_submodule(name).weight
        weight.act_quant_kwargs = replace(weight.act_quant_kwargs, reduce_range=False)
    _save(model, folder, [model.get_submodule(name) for name in plan.layers.embeddings])
    return model


def _save(model, folder: Path, tables: list[torch.nn.Embedding]) -> None:
    """Saves the model with its tables in `TABLE_DTYPE`; the model keeps them in float32, rounded."""
    for table in tables:
        table.weight.data = table.weight.data.to(TABLE_DTYPE)
    model.save_pretrained(folder)
    for table in tables:
        table.weight.data = table.weight.data.float()
    # The type that Transformers computes in: it took that of the first weight, a table.
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
