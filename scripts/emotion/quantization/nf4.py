"""Linear layers in NF4: which layers, an adapter that starts from the rounding error, and a better rounding.

NF4 has 16 levels. Each block of 64 weights of a row has a scale, and these scales are rounded to 8 bits in turn
(double quantization: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023).
"""

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from emotion.inference.pretrained import build_config, load_trained_classifier
from emotion.quantization.gptq import compensate, multiply_inputs, nearest_codes, steps_of
from emotion.quantization.layers import CalibrationRows, find_layers
from emotion.utils.errors import UserError

BLOCK = 64  # weights that share a scale


def nf4_options(base: str, labels: list[str], bf16: bool) -> dict:
    """The options of `from_pretrained` that load the encoder's linear layers in NF4 and all others in float.

    Args:
        base: Hub id or folder of the model.
        bf16: whether the layers compute in bfloat16; in float32 otherwise.

    Raises:
        UserError: if the model has no layer that bitsandbytes can take.
    """
    with torch.device("meta"):  # shapes without weights: only the names and sizes of the layers are needed
        skeleton = AutoModelForSequenceClassification.from_config(build_config(base, labels, None))
    linear = {name: part for name, part in skeleton.named_modules() if isinstance(part, torch.nn.Linear)}
    # The kernel for processors takes inputs whose width is a multiple of the block's.
    int4 = {name for name in find_layers(skeleton).linear if linear[name].in_features % BLOCK == 0}
    if not int4:
        raise UserError(f"{base}: the width of no layer is a multiple of {BLOCK}, as bitsandbytes wants it")
    kept = [name for name in linear if name not in int4]
    # The option is valid for layers of 4 bits too, whatever its name says.
    return {"quantization_config": nf4_config(bf16, llm_int8_skip_modules=kept)}


def nf4_config(bf16: bool, **options) -> BitsAndBytesConfig:
    """Transformers' configuration for linear layers in NF4 with double quantization.

    Args:
        bf16: whether the layers compute in bfloat16; in float32 otherwise.
        options: more options of the configuration.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        **options,
    )


def start_from_rounding_error(model: PeftModel, exact) -> None:
    """Starts the adapter, in place, as the best low-rank copy of the error of rounding to 4 bits.

    This is LoftQ with one step (Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
    ICLR 2024). PEFT's own needs a GPU and leaves alpha / rank out of account.

    Args:
        exact: the same model in float, without the adapter.
    """
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and isinstance(layer.base_layer, Linear4bit):
            rounded = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            error = exact.get_submodule(name).weight.to(rounded) - rounded
            u, s, v = torch.linalg.svd(error, full_matrices=False)  # singular values in descending order
            # PEFT adds scaling x B A to the layer, so the singular values are divided by the scaling. A and B take
            # a square root of them each, which makes both equally large.
            rank, root = layer.r["default"], (s / layer.scaling["default"]).sqrt()
            layer.lora_A["default"].weight.data.copy_((root[:, None] * v)[:rank])
            layer.lora_B["default"].weight.data.copy_((u * root)[:, :rank])


def open_in_float32(folder: Path):
    """Opens a saved classifier, of 4 bits too, so that every processor multiplies in float32 and answers alike."""
    model = load_trained_classifier(folder, dtype=torch.float32)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # the kernel of these processors multiplies in bfloat16
    return model


def round_to_nf4(folder: Path, rows: CalibrationRows, options: dict):
    """Opens a float model in NF4, with codes that keep the outputs of each layer rather than each weight (gptq.py).

    An adapter changes most weights by less than half a step: rounding to the nearest level would undo much of it.
    The scales are bitsandbytes' own.

    Args:
        folder: the float model, saved.
        rows: they show what the layers' inputs look like.
        options: those of `nf4_options`.

    Returns:
        The model in NF4.
    """
    model = load_trained_classifier(folder, dtype=torch.float32, **options)
    exact = load_trained_classifier(folder)
    rounded = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    products = multiply_inputs(exact.to(model.device), list(rounded), rows)
    for name, layer in rounded.items():
        state = layer.weight.quant_state
        # Undoes the double quantization: the scales as bitsandbytes will read them, not those before rounding.
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        weight = exact.get_submodule(name).weight.detach()
        scales = scales.view(len(weight), -1)
        weight = compensate(weight, products[name], scales, state.code)
        codes = nearest_codes(weight, steps_of(scales, weight.shape[1]), state.code).to(torch.uint8).flatten()
        # Two codes in a byte, the first one in the upper half, as bitsandbytes packs them.
        layer.weight.data = (codes[0::2] << 4 | codes[1::2]).view_as(layer.weight.data)
    return model
