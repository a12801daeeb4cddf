"""NF4, the 4-bit format of bitsandbytes: the layers it can hold, the LoftQ start of an adapter, and GPTQ rounding.

NF4 has 16 levels. Each block of 64 weights of a row shares a scale, and the scales are quantized to 8 bits in turn
(double quantization: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023).
"""

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from emotion.inference.model_folder import build_config, load_trained_classifier
from emotion.quantization.layers import CalibrationRows, find_layers
from emotion.quantization.lowbit import compensate, multiply_inputs, nearest_codes, steps_of
from emotion.utils.errors import UserError

BLOCK = 64  # weights that share a scale


def find_float_modules(base: str, labels: list[str]) -> list[str]:
    """Returns the linear layers that stay in float: those outside the encoder, and those too narrow for NF4.

    Raises:
        UserError: if NF4 can hold no layer of the model.
    """
    with torch.device("meta"):  # shapes without weights
        model = AutoModelForSequenceClassification.from_config(build_config(base, labels, None))
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    # The kernel for CPUs takes inputs whose width is a multiple of the block's.
    int4 = {name for name in find_layers(model).linear if linear[name].in_features % BLOCK == 0}
    if not int4:
        raise UserError(f"{base}: bitsandbytes needs a layer whose width is a multiple of {BLOCK}")
    return [name for name in linear if name not in int4]


def initialize_loftq(model: PeftModel, float_model) -> None:
    """Initializes the adapter, in place, as the best low-rank approximation of the quantization error.

    This is LoftQ with one step (Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
    ICLR 2024). PEFT's own needs a GPU and ignores the scaling alpha / rank. ``float_model`` has no adapter.
    """
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and isinstance(layer.base_layer, Linear4bit):
            quantized = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            error = float_model.get_submodule(name).weight.to(quantized) - quantized
            u, s, v = torch.linalg.svd(error, full_matrices=False)  # singular values in descending order
            # PEFT adds scaling x B A to the layer. A and B get a square root of the singular values each, which makes
            # both equally large.
            rank, root = layer.r["default"], (s / layer.scaling["default"]).sqrt()
            layer.lora_A["default"].weight.data.copy_((root[:, None] * v)[:rank])
            layer.lora_B["default"].weight.data.copy_((u * root)[:, :rank])


def open_in_float32(folder: Path):
    """Opens a saved classifier, also one in NF4, so that it computes in float32 and answers alike on every CPU."""
    model = load_trained_classifier(folder, dtype=torch.float32)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # that kernel multiplies in bfloat16
    return model


def round_to_nf4(folder: Path, rows: CalibrationRows, config: BitsAndBytesConfig):
    """Loads a float model in NF4, with codes chosen by GPTQ to keep the outputs of each layer (see lowbit.py).

    An adapter changes most weights by less than half a step: rounding to the nearest level would undo much of it.
    The scales are those of bitsandbytes.

    Args:
        folder: the float model.
        rows: calibration samples, which show the inputs of the layers.
        config: of the layers in NF4.
    """
    model = load_trained_classifier(folder, dtype=torch.float32, quantization_config=config)
    float_model = load_trained_classifier(folder)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    products = multiply_inputs(float_model.to(model.device), list(layers), rows)
    for name, layer in layers.items():
        state = layer.weight.quant_state
        # The scales as bitsandbytes reads them, after double quantization.
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        weight = float_model.get_submodule(name).weight.detach()
        scales = scales.view(len(weight), -1)
        weight = compensate(weight, products[name], scales, state.code)
        codes = nearest_codes(weight, steps_of(scales, weight.shape[1]), state.code).to(torch.uint8).flatten()
        # Two codes in a byte, the first one in the upper half, as bitsandbytes packs them.
        layer.weight.data = (codes[0::2] << 4 | codes[1::2]).view_as(layer.weight.data)
    return model
