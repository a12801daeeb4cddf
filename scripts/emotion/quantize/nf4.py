"""Linear layers in NF4: which they are, an adapter that starts from what rounding took away, and a better rounding.

NF4 has 16 levels, a scale for each block of 64 weights of a row, and rounds those scales to 8 bits in turn (double
quantization: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023).
"""

from pathlib import Path

from emotion.common.errors import UserError
from emotion.model.pretrained import build_config, load_trained_classifier
from emotion.quantize.layers import find_layers

import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

BLOCK = 64  # weights that share a scale
DAMPING = 0.01  # of the mean square of a layer's inputs, so that the matrix of their products can be inverted


def nf4_options(base: str, labels: list[str], bf16: bool) -> dict:
    """What loads a model with the linear layers of its encoder in NF4, and all others in float."""
    with torch.device("meta"):
        skeleton = AutoModelForSequenceClassification.from_config(build_config(base, labels, None))
    linear = {name: part for name, part in skeleton.named_modules() if isinstance(part, torch.nn.Linear)}
    # The kernel for processors takes inputs whose width is a multiple of the block's.
    int4 = {name for name in find_layers(skeleton).linear if linear[name].in_features % BLOCK == 0}
    if not int4:
        raise UserError(f"{base}: the width of no layer is a multiple of {BLOCK}, as bitsandbytes wants it")
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
            llm_int8_skip_modules=[name for name in linear if name not in int4],
        )
    }


def start_from_rounding_error(model: PeftModel, exact) -> None:
    """LoftQ with one step: the adapter begins as the best low-rank copy of what rounding to 4 bits took away.

    Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR 2024. PEFT's own needs a
    GPU and leaves alpha / rank out of account.
    """
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and isinstance(layer.base_layer, Linear4bit):
            rounded = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            u, s, v = torch.linalg.svd(exact.get_submodule(name).weight.to(rounded) - rounded, full_matrices=False)
            rank, root = layer.r["default"], (s / layer.scaling["default"]).sqrt()
            layer.lora_A["default"].weight.data.copy_((root[:, None] * v)[:rank])
            layer.lora_B["default"].weight.data.copy_((u * root)[:, :rank])


def round_to_nf4(folder: Path, tokenizer, texts: list[str], dtype: torch.dtype, options: dict):
    """Opens a float model in NF4, with codes that keep what the layers answer rather than each weight.

    An adapter changes most weights by less than half a step: rounding to the nearest level would take much of it
    back. Here each weight also makes up for the errors of those before it in its row, by what the layer's inputs have
    in common (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    ICLR 2023). The scales are bitsandbytes' own.

    Args:
        folder: the float model, saved.
        texts: what shows the layers' inputs; rows of train.
        dtype: of what stays in float.
        options: of `nf4_options`.
    """
    model, exact = load_trained_classifier(folder, dtype=dtype, **options), load_trained_classifier(folder)
    rounded = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    products = multiply_inputs(exact.to(model.device), list(rounded), tokenizer, texts)
    for name, layer in rounded.items():
        state = layer.weight.quant_state
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        weight = exact.get_submodule(name).weight.detach()
        codes = choose_codes(weight, products[name], scales.view(len(weight), -1), state.code).flatten()
        layer.weight.data = (codes[0::2] << 4 | codes[1::2]).view_as(layer.weight.data)
    return model


def multiply_inputs(model, names: list[str], tokenizer, texts: list[str]) -> dict[str, torch.Tensor]:
    """The products of each layer's inputs with themselves, summed over all word pieces: float32 (width, width)."""
    products = dict.fromkeys(names, 0)

    def add(name):
        def hook(_, inputs):
            rows = inputs[0].flatten(0, -2)
            products[name] = products[name] + rows.T @ rows

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(add(name)) for name in names]
    model.eval()
    with torch.inference_mode():
        for text in texts:  # one by one: padding would count as input
            model(**tokenizer(text, truncation=True, return_tensors="pt").to(model.device))
    for hook in hooks:
        hook.remove()
    return products


def choose_codes(weight: torch.Tensor, products: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor):
    """The number of the level of each weight, uint8 (rows, columns), chosen column by column.

    Args:
        weight: float32 (rows, columns).
        products: of the layer's inputs, (columns, columns).
        scales: (rows, columns / 64).
        levels: the 16 levels, ascending, from -1 to 1.
    """
    weight, products = weight.clone(), products.clone()
    products.diagonal().add_(DAMPING * products.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(products)), upper=True)
    steps = scales.clamp(min=torch.finfo(torch.float32).tiny).repeat_interleave(BLOCK, dim=1)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for column in range(weight.shape[1]):
        wanted, step = weight[:, column], steps[:, column]
        codes[:, column] = torch.bucketize(wanted / step, middles)
        error = (wanted - levels[codes[:, column].int()] * step) / inverse[column, column]
        weight[:, column + 1 :] -= error[:, None] * inverse[column, column + 1 :]
    return codes
