"""Linear layers in NF4: which layers, an adapter that starts from the rounding error, and a better rounding.

NF4 has 16 levels. Each block of 64 weights of a row has a scale, and these scales are rounded to 8 bits in turn
(double quantization: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023).
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
DAMPING = 0.01  # share of the inputs' mean square that is added, so that the matrix of their products has an inverse


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
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
            # Valid for layers of 4 bits too, whatever its name says.
            llm_int8_skip_modules=[name for name in linear if name not in int4],
        )
    }


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


def round_to_nf4(folder: Path, tokenizer, texts: list[str], dtype: torch.dtype, options: dict):
    """Opens a float model in NF4, with codes that keep the outputs of each layer rather than each weight.

    An adapter changes most weights by less than half a step: rounding to the nearest level would undo much of it.
    Here the weights that are still to be rounded make up for the errors of those before them in their row (GPTQ:
    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023).
    The scales are bitsandbytes' own.

    Args:
        folder: the float model, saved.
        texts: rows of train, which show what the layers' inputs look like.
        dtype: of the layers that stay in float.
        options: those of `nf4_options`.

    Returns:
        The model in NF4.
    """
    model, exact = load_trained_classifier(folder, dtype=dtype, **options), load_trained_classifier(folder)
    rounded = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    products = multiply_inputs(exact.to(model.device), list(rounded), tokenizer, texts)
    for name, layer in rounded.items():
        state = layer.weight.quant_state
        # Undoes the double quantization: the scales as bitsandbytes will read them, not those before rounding.
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        weight = exact.get_submodule(name).weight.detach()
        codes = choose_codes(weight, products[name], scales.view(len(weight), -1), state.code).flatten()
        # Two codes in a byte, the first one in the upper half, as bitsandbytes packs them.
        layer.weight.data = (codes[0::2] << 4 | codes[1::2]).view_as(layer.weight.data)
    return model


def multiply_inputs(model, names: list[str], tokenizer, texts: list[str]) -> dict[str, torch.Tensor]:
    """The products of each layer's inputs with each other, summed over all word pieces of the texts.

    Args:
        model: the float model.
        names: the linear layers.

    Returns:
        Name of a layer -> float32 (width, width), symmetric.
    """
    products = dict.fromkeys(names, 0)

    def add(name):
        """A hook of its own for each layer: a hook is not told the name of the layer it hangs on."""

        def hook(_, inputs):
            rows = inputs[0].flatten(0, -2)  # (texts, tokens, width) -> (all tokens, width)
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
    """GPTQ: rounds a matrix column by column, so that the layer's outputs change least for the inputs shown.

    Args:
        weight: float32 (rows, columns).
        products: of the layer's inputs with each other, float32 (columns, columns).
        scales: float32 (rows, columns / 64).
        levels: the 16 levels, float32, ascending, from -1 to 1.

    Returns:
        The number of the level of each weight, uint8 (rows, columns).

    Raises:
        torch.linalg.LinAlgError: if the products are not positive definite, for instance when they are not finite.
    """
    weight, products = weight.clone(), products.clone()
    # Inputs that never vary, or vary together, would make the matrix singular: each gets some variance of its own.
    products.diagonal().add_(DAMPING * products.diagonal().mean())
    # The upper Cholesky factor of the inverse. Its row i holds what the paper recomputes after each column: how far
    # the columns after i must move, for an error in column i, once all before i are fixed.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(products)), upper=True)
    # A block of zeros has the scale 0: the smallest positive number avoids 0 / 0.
    steps = scales.clamp(min=torch.finfo(torch.float32).tiny).repeat_interleave(BLOCK, dim=1)
    middles = (levels[1:] + levels[:-1]) / 2  # between two of these, one level is the nearest
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for column in range(weight.shape[1]):
        wanted, step = weight[:, column], steps[:, column]  # for all rows at once: rows do not depend on each other
        codes[:, column] = torch.bucketize(wanted / step, middles)
        error = (wanted - levels[codes[:, column].int()] * step) / inverse[column, column]
        # The columns still to come take over the error, each by what its inputs have in common with this column's.
        weight[:, column + 1 :] -= error[:, None] * inverse[column, column + 1 :]
    return codes
