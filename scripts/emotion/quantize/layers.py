"""Which layers are quantized: the linear layers of the encoder, by type, and the embeddings."""

from dataclasses import dataclass

from emotion.common.errors import UserError
from emotion.quantize.scheme import SchemeArguments

import torch


def find_stack(model) -> str:
    """The name of the module list that holds the encoder's layers: the longest one."""
    stacks = {name: len(part) for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)}
    if not stacks:
        raise UserError(f"{type(model).__name__} has no list of layers")
    return max(stacks, key=stacks.get)


@dataclass(frozen=True)
class Layers:
    """Names of the modules that become INT8."""

    linear: list[str]
    embeddings: list[str]


def find_layers(model, keep_float: list[str] = ()) -> Layers:
    """The linear layers of the encoder and its embeddings, without those whose name begins as one of ``keep_float``.

    Raises:
        UserError: if a name of `keep_float` fits no layer.
    """
    stack = f"{find_stack(model)}."
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and stack in name]
    width = model.get_input_embeddings().embedding_dim
    embeddings = [
        name
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Embedding) and part.embedding_dim == width and part.num_embeddings > 2
    ]
    for prefix in keep_float:
        if not any(name.startswith(prefix) for name in linear + embeddings):
            raise UserError(f"--keep_float {prefix}: no layer has such a name; they are {', '.join(linear[:6])}, ...")
    kept = tuple(keep_float)
    return Layers(*([name for name in names if not name.startswith(kept)] if kept else names
                    for names in (linear, embeddings)))  # fmt: skip


def names_in_float(model, layers: Layers) -> list[str]:
    """The linear layers and embeddings of the model that do not become INT8."""
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    int8 = {*layers.linear, *layers.embeddings}
    return [name for name, part in model.named_modules() if isinstance(part, kinds) and name not in int8]


def explain_float(model, layers: Layers, arguments: SchemeArguments) -> dict[str, str]:
    """Each layer that stays in float, and why."""
    kept = tuple(arguments.keep_float)
    return {
        name: "named in keep_float" if name.startswith(kept) and kept else "outside the encoder's layers"
        for name in names_in_float(model, layers)
    }
