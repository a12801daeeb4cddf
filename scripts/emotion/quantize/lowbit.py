"""Weights of 2, 3 or 4 bits in one ONNX file that answers at the speed of INT8.

A row of weights shares a scale and a group of the row a small integer (two-level scales: Dai et al., "VS-Quant:
Per-vector Scaled Quantization for Accurate Low-Precision Neural Network Inference", MLSys 2021):

    weight = scale of the row x multiplier of the group x level        levels at 2 bits: -3, -1, 1, 3

Multiplier times level is an integer of 7 bits, so that the layer multiplies in INT8 like any other. The file holds the
levels' codes, packed, and the few operators that unpack them. ONNX Runtime runs those once, while it opens the file
(constant folding); of the embeddings it unpacks the rows that a text looks up.
"""

from dataclasses import dataclass
from pathlib import Path

from emotion.common.errors import UserError
from emotion.quantize.int8_onnx import quantize_onnx
from emotion.quantize.layers import Layers
from emotion.quantize.levels import LEVELS

import numpy as np
import torch

PLANES = {2: ((2, 0),), 3: ((2, 0), (1, 2)), 4: ((4, 0),)}  # bits -> (bits of a code, from which one on) in one array
LARGEST_WEIGHT, LARGEST_MULTIPLIER = 64, 16  # of 7 bits; of what 4 bits count
CLIPPING = torch.linspace(0.4, 1.1, 15)  # shares of a group's largest weight at which its range may end


@dataclass(frozen=True)
class Scales:
    """How a matrix (rows, columns) is rounded, or some of its rows; the columns are cut into groups.

    ``row``: float32 (..., 1); ``multiplier``: float32 (..., groups), whole numbers from 1 on.
    """

    bits: int
    row: torch.Tensor
    multiplier: torch.Tensor

    @property
    def step(self) -> torch.Tensor:
        """What a level of 1 is worth, (..., groups, 1)."""
        return (self.row * self.multiplier).unsqueeze(-1)


def check_group_size(name: str, columns: int, group_size: int) -> None:
    """Raises `UserError` if a row cannot be cut into such groups, or a group into whole bytes."""
    if group_size < 8 or group_size % 8:
        raise UserError(f"--group_size {group_size}: it takes a multiple of 8")
    if columns % group_size:
        raise UserError(f"--group_size {group_size}: {name} has rows of {columns} weights, which it does not divide")


def choose_scales(weight: torch.Tensor, bits: int, group_size: int) -> Scales:
    """The scales that change the weights least, in squares: for each group the best end of its range, then the row's.

    Args:
        weight: float (rows, columns).
    """
    levels, rows = LEVELS[bits], []
    largest_multiplier = min(LARGEST_MULTIPLIER, LARGEST_WEIGHT // -levels[0])
    for part in weight.detach().float().split(1024):  # of a size that stays in the processor's cache
        groups = part.unflatten(1, (-1, group_size))
        largest = groups.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
        best, least = torch.empty_like(largest), torch.full_like(largest, float("inf"))
        for share in CLIPPING.tolist():
            step = largest * (share / -levels[0])
            error = (round_groups(groups, step, bits) - groups).square().sum(dim=-1, keepdim=True)
            best, least = torch.where(error < least, step, best), torch.minimum(error, least)
        row = best.amax(dim=1) / largest_multiplier
        rows.append((row, (best.squeeze(-1) / row).round().clamp(1, largest_multiplier)))
    return Scales(bits, *(torch.cat(parts) for parts in zip(*rows, strict=True)))


def nearest_levels(groups: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    """The level of each weight, a float; ``groups`` (..., groups, size), ``step`` (..., groups, 1)."""
    levels = LEVELS[bits]
    nearest = groups / (step * levels.step)  # then in place: this is run in each step of a training
    nearest = nearest.sub_(levels[0] / levels.step).round_().clamp_(0, len(levels) - 1)
    return nearest.mul_(levels.step).add_(levels[0])


def round_groups(groups: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    """Each weight as its level gives it back: the level times the step."""
    return nearest_levels(groups, step, bits).mul_(step)


def integers_of(weight: torch.Tensor, scales: Scales) -> torch.Tensor:
    """The integers that stand for a matrix, or for rows of it (..., columns): multiplier times level, as floats."""
    groups = weight.unflatten(-1, (scales.multiplier.shape[-1], -1))
    levels = nearest_levels(groups, scales.step, scales.bits)
    return levels.mul_(scales.multiplier.unsqueeze(-1)).flatten(-2)


def round_matrix(weight: torch.Tensor, scales: Scales) -> torch.Tensor:
    """The matrix as the file will give it back."""
    return integers_of(weight, scales).mul_(scales.row)


def codes_of(weight: torch.Tensor, scales: Scales) -> np.ndarray:
    """The number of each weight's level, uint8 (rows, groups, size)."""
    levels, groups = LEVELS[scales.bits], weight.detach().unflatten(1, (scales.multiplier.shape[1], -1))
    numbers = nearest_levels(groups, scales.step, scales.bits).sub_(levels[0]).div_(levels.step)
    return numbers.to(torch.uint8).numpy()


def write_lowbit_onnx(model, float_graph: Path, path: Path, layers: Layers, scales: dict[str, Scales]) -> None:
    """Writes the file: INT8 as `quantize_onnx` makes it, with packed weights in the place of its own.

    Args:
        model: the classifier in PyTorch; its weights are rounded here.
        float_graph: the FP32 file of `export_onnx`.
        scales: of each layer in ``layers``.
    """
    import onnx

    quantize_onnx(model, float_graph, path, Layers(layers.linear, []))
    graph = onnx.load(path)
    packer = Packer(graph.graph)
    weights = {name: model.get_submodule(name).weight for name in scales}
    codes = {name: codes_of(weights[name], scales[name]) for name in scales}
    constants = {tensor.name for tensor in graph.graph.initializer}
    for node in list(graph.graph.node):
        names = node.name.removesuffix("_quant").split()  # three where attention takes query, key and value at once
        old = [name for name in node.input if name in constants and name.endswith("_quantized")]
        if names and old and set(names) <= set(layers.linear):
            packer.replace_weight(old[0], [codes[name] for name in names], [scales[name] for name in names])
        elif node.op_type == "Gather" and node.name in layers.embeddings:
            packer.replace_look_up(node, codes[node.name], scales[node.name])
    packer.finish()
    onnx.checker.check_model(graph)
    onnx.save(graph, path)


class Packer:
    """Puts packed weights into an ONNX graph. A table of 256 rows turns each byte into its levels."""

    def __init__(self, graph):
        self.graph, self.before, self.tables = graph, [], {}

    def replace_weight(self, old: str, codes: list[np.ndarray], scales: list[Scales]) -> None:
        """The INT8 constant ``old`` (columns, rows) becomes what its packed form unpacks to; so do its scales."""
        from onnx import TensorProto, numpy_helper

        packed, row = np.concatenate(codes), np.concatenate([one.row.squeeze(1).numpy() for one in scales])
        multiplier = np.concatenate([one.multiplier.numpy() for one in scales])
        levels = self._levels(old, packed, multiplier, scales[0].bits)
        flat = self._node("Reshape", [levels, self._constant(old, "shape", np.array([len(row), -1]))], old)
        integers = self._node("Cast", [flat], old, to=TensorProto.INT8)
        self._node("Transpose", [integers], old, output=old, perm=[1, 0])
        scale = old.removesuffix("_quantized") + "_scale"
        for tensor in list(self.graph.initializer):
            if tensor.name == old:
                self.graph.initializer.remove(tensor)
            elif tensor.name == scale:
                tensor.CopyFrom(numpy_helper.from_array(row.astype(np.float32), scale))

    def replace_look_up(self, gather, codes: np.ndarray, scales: Scales) -> None:
        """The rows that ``gather`` takes from a float table are unpacked one by one, whatever the shape of the ids."""
        table, ids = gather.input
        name, output = gather.name, gather.output[0]
        start = len(self.before)
        levels = self._levels(name, codes, scales.multiplier.numpy(), scales.bits, ids)
        row = scales.row.numpy().reshape(-1, 1, 1, 1, 1, 1)
        row = self._node("Gather", [self._constant(name, "scales", row), ids], name)
        values = self._node("Mul", [levels, row], name)
        width = self._constant(name, "width", np.array([codes.shape[1] * codes.shape[2]]))
        shape = self._node("Concat", [self._node("Shape", [ids], name), width], name, axis=0)
        self._node("Reshape", [values, shape], name, output=output)
        place = list(self.graph.node).index(gather)
        self.graph.node.remove(gather)
        for node in reversed(self.before[start:]):
            self.graph.node.insert(place, node)
        del self.before[start:]
        if not any(table in node.input for node in self.graph.node):
            for tensor in [tensor for tensor in self.graph.initializer if tensor.name == table]:
                self.graph.initializer.remove(tensor)

    def finish(self) -> None:
        """What unpacks weights comes first, since a graph lists its nodes in the order in which they run."""
        for node in reversed(self.before):
            self.graph.node.insert(0, node)

    def _levels(self, name: str, codes: np.ndarray, multiplier: np.ndarray, bits: int, ids: str | None = None) -> str:
        """Levels times multipliers, float32 (..., groups / 2, 2, size / 8, n, 8 / n)."""
        rows, groups, size = codes.shape
        pair = 2 - groups % 2  # two multipliers a byte
        parts = []
        for width, shift in PLANES[bits]:
            plane = pack((codes >> shift) & (2**width - 1), width).reshape(
                rows, groups // pair, pair, size // 8, width
            )
            first = LEVELS[bits][0] if shift == 0 else 0
            values = first + LEVELS[bits].step * (np.arange(2**width) << shift)
            if width == 1:  # its table gives the eight levels in the same two dimensions as the other plane does
                plane = plane.squeeze(-1)
            parts.append(self._look_up(name, f"codes{shift}", plane, values, width, ids, (2, 4) if width == 1 else ()))
        levels = parts[0] if len(parts) == 1 else self._node("Add", parts, name)
        packed = pack(multiplier.astype(np.uint8) - 1, 8 // pair).reshape(rows, groups // pair)
        values = np.arange(1, 2 ** (8 // pair) + 1)
        factors = self._look_up(name, "multipliers", packed, values, 8 // pair, ids)
        axes = self._constant("unpack", "axes", np.array([-3, -2, -1]))
        return self._node("Mul", [levels, self._node("Unsqueeze", [factors, axes], name)], name)

    def _look_up(self, name: str, kind: str, packed: np.ndarray, values: np.ndarray, width: int, ids, shape=()) -> str:
        """Turns packed bytes, or those of the rows ``ids``, into ``values`` by a table that equal uses share."""
        from onnx import TensorProto

        shifts = np.arange(0, 8, width)
        table = values[(np.arange(256)[:, None] >> shifts) & (2**width - 1)].astype(np.float32)
        table = table.reshape(256, *(shape or (-1,)))
        key = self.tables.setdefault(table.tobytes(), f"unpack/table{len(self.tables)}")
        source = self._constant(name, kind, packed)
        source = self._node("Gather", [source, ids], name) if ids else source
        index = self._node("Cast", [source], name, to=TensorProto.INT32)
        return self._node("Gather", [self._constant("", key, table), index], name)

    def _constant(self, name: str, kind: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        full = f"{name}/{kind}" if name else kind
        if full not in {tensor.name for tensor in self.graph.initializer}:
            self.graph.initializer.append(numpy_helper.from_array(array, full))
        return full

    def _node(self, kind: str, inputs: list[str], name: str, output: str | None = None, **attributes) -> str:
        from onnx import helper

        unique = f"{name}/unpack{len(self.before)}"
        output = output or unique
        self.before.append(helper.make_node(kind, inputs, [output], name=unique, **attributes))
        return output


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """Codes of so many bits, uint8 of any shape, into bytes (n,); the first lies in the lowest bits."""
    parts = codes.reshape(-1, 8 // width)
    return (parts << np.arange(0, 8, width, dtype=np.uint8)).sum(axis=1).astype(np.uint8)
