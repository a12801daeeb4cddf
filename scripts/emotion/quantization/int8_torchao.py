"""INT8 weights for Transformers, by torchao: one scale per output channel, activations in float."""

from pathlib import Path

import torch

from emotion.inference.pretrained import load_trained_classifier, save_compact
from emotion.quantization.layers import Plan

# How the file holds the embedding tables: floats of 8 bits. Transformers widens them to float32 when it opens the
# file, and a text looks its rows up in a plain table. torchao's own INT8 tables are restored whole for each look-up,
# all 30,522 rows of BERT's vocabulary: a text took seven times as long as in FP32.
TABLE_DTYPE = torch.float8_e4m3fn


def quantize_torchao(plan: Plan, folder: Path) -> torch.nn.Module:
    """Writes `model.safetensors`, with INT8 linear layers and float8 embedding tables, and `config.json`.

    Activations stay in float: an eager product of integers pays on no processor, and without VNNI it takes 8 to 25
    times as long as one of floats.

    Returns:
        The quantized model as `from_pretrained` opens it: its tables are float32, with the values of the file.
    """
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    # Without the settings of torch.compile, which would be those of every model of the process that opens the file.
    linear = Int8WeightOnlyConfig(set_inductor_config=False)
    # Keys that name a module would quantize its bias too; these name weights.
    config = TorchAoConfig(FqnToConfig({f"{name}.weight": linear for name in plan.layers.linear}))
    # It must be quantized while it is loaded: a model quantized in place cannot be saved.
    model = load_trained_classifier(plan.folder, quantization_config=config, dtype=torch.float32)
    _save(model, folder, [model.get_submodule(name) for name in plan.layers.embeddings])
    return model


def _save(model, folder: Path, tables: list[torch.nn.Embedding]) -> None:
    """Saves the model with its tables in `TABLE_DTYPE`; the model keeps them in float32, rounded."""
    for table in tables:
        table.weight.data = table.weight.data.to(TABLE_DTYPE)
    save_compact(model, folder)
    for table in tables:
        table.weight.data = table.weight.data.float()
