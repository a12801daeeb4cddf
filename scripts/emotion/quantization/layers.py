"""Which layers are quantized: the encoder's linear layers, found by type, and its embeddings; the rows to calibrate.

Pooler and head lie outside the encoder's layers and stay in float: they are small, and their errors reach the logits
at once.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from emotion.data.tokenization import TextEncoder
from emotion.utils.command import Bar
from emotion.utils.errors import UserError


@dataclass(frozen=True)
class Layers:
    """Names of the modules that are quantized."""

    linear: list[str]
    embeddings: list[str]


@dataclass(frozen=True)
class Plan:
    """A fine-tuned float model, and which of its layers become integers.

    Attributes:
        folder: where it is saved, with its FP32 file for ONNX Runtime.
        model: the same, opened in PyTorch.
        scales: below 8 bits, the `Scales` of each layer; at 8 bits each runtime chooses its own.
        compensated: below 8 bits, weights that lowbit.py has moved, to be rounded in place of the model's own.
        outliers: for ONNX Runtime, the second layer of a feed-forward pair -> its outlier channels, which stay in
            float; see outlier_channels.py.
        cls_only: the linear layers that see the [CLS] token alone in that file; see graph_passes.py.
        ranges: the range of each linear layer's inputs in that file; empty for dynamic ranges. See
            activation_ranges.py.
    """

    folder: Path
    model: torch.nn.Module
    layers: Layers
    scales: dict = field(default_factory=dict)
    compensated: dict[str, torch.Tensor] = field(default_factory=dict)
    outliers: dict[str, list[int]] = field(default_factory=dict)
    cls_only: list[str] = field(default_factory=list)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class CalibrationRows:
    """Rows of train that calibrate static activation ranges: their token ids, and the encoder that pads them."""

    encoder: TextEncoder
    token_ids: list[list[int]]


def watch_inputs(model, names: list[str], rows: CalibrationRows, see, texts: int | None = None) -> None:
    """Answers the rows one by one, and shows the inputs of layers.

    Args:
        names: the layers to watch.
        see: is called with a layer's name and its inputs for one text, float (tokens, width).
        texts: how many rows to answer; all if not given.
    """

    def hook_for(name):
        """A hook of its own for each layer: a hook is not told the name of the layer it hangs on."""
        return lambda _, inputs: see(name, inputs[0].detach().flatten(0, -2))

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    model.eval()
    with torch.inference_mode():
        for ids in Bar(rows.token_ids[:texts], desc="activations"):  # one by one: padding would count as input
            arrays = rows.encoder.pad([ids])
            inputs = {name: torch.from_numpy(array) for name, array in arrays.items() if rows.encoder.takes(name)}
            model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
    for hook in hooks:
        hook.remove()


def find_stack(model) -> str:
    """The name of the module list that holds the encoder's layers.

    Raises:
        UserError: if the model has no such list.
    """
    stacks = {name: len(part) for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)}
    if not stacks:
        raise UserError(f"{type(model).__name__} has no list of layers")
    # The longest list: a layer may hold lists of its own, but none has as many members as the encoder has layers.
    return max(stacks, key=stacks.get)


def find_layers(model, modules_to_not_convert: list[str] = ()) -> Layers:
    """The linear layers of the encoder and its embeddings, but for some.

    Args:
        modules_to_not_convert: beginnings of the names of layers that stay in float.

    Raises:
        UserError: if one of them fits no layer, or the encoder has no linear layers.
    """
    stack, width = f"{find_stack(model)}.", model.get_input_embeddings().embedding_dim
    linear, embeddings = [], []
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and stack in name:
            linear.append(name)
        # Token types have two rows, and relative positions (MPNet) one number per head: nothing to save there.
        elif isinstance(part, torch.nn.Embedding) and part.embedding_dim == width and part.num_embeddings > 2:
            embeddings.append(name)
    if not linear:
        raise UserError(f"{type(model).__name__} has no torch.nn.Linear to quantize, but layers of another kind")
    for prefix in modules_to_not_convert:
        if not any(name.startswith(prefix) for name in linear + embeddings):
            raise UserError(f"--modules_to_not_convert {prefix}: no such layer; they are {', '.join(linear[:6])}, ...")
    kept = tuple(modules_to_not_convert)  # startswith takes several beginnings
    linear = [name for name in linear if not name.startswith(kept)]
    return Layers(linear, [name for name in embeddings if not name.startswith(kept)])


def names_in_float(model, layers: Layers) -> list[str]:
    """The linear layers and embeddings of the model that stay in float."""
    quantized, kinds = {*layers.linear, *layers.embeddings}, torch.nn.Linear | torch.nn.Embedding
    return [name for name, part in model.named_modules() if isinstance(part, kinds) and name not in quantized]


def float_reasons(model, layers: Layers, modules_to_not_convert: list[str]) -> dict[str, str]:
    """Each layer that stays in float, and why."""
    named = tuple(modules_to_not_convert)
    reasons = {True: "named in modules_to_not_convert", False: "outside the encoder's layers"}
    return {name: reasons[name.startswith(named)] for name in names_in_float(model, layers)}
