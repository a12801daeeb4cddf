"""Weights of 2 or 4 bits in one ONNX file that answers at the speed of INT8.

Each row of a matrix has a scale, and each group of weights in the row has a small integer, its multiplier (two-level
scales: Dai et al., "VS-Quant: Per-vector Scaled Quantization for Accurate Low-Precision Neural Network Inference",
MLSys 2021):

    weight = scale of the row x multiplier of the group x level        levels at 2 bits: -3, -1, 1, 3

Multiplier times level is an integer of 7 bits, so the layer multiplies in INT8 like any other. The file stores each
level as its number, the code, with several codes packed into a byte, and it holds the operators that unpack them.

- The weights of linear layers are unpacked once, while ONNX Runtime opens the file. Their operators depend on
  constants alone, and ONNX Runtime computes such operators in advance (constant folding).
- Embeddings of words stay packed in memory. Their operators depend on the token ids, so they run for every text, on
  the few rows that the text looks up. The small table of positions is unpacked once.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from emotion.export.graph_passes import modules_of
from emotion.inference.model_folder import LARGEST_SAFE_WEIGHT, LEVELS
from emotion.quantization.int8 import quantize_onnx
from emotion.quantization.layers import CalibrationRows, Layers, Plan, watch_inputs
from emotion.quantization.outlier_channels import weight_without_outliers
from emotion.utils.command import Bar
from emotion.utils.errors import UserError

LARGEST_MULTIPLIER = 16  # multipliers from 1 to 16 are stored less one, as 0 to 15: 4 bits, two in a byte
# Shares of a group's largest weight at which its range may end. Below 1 the largest weights are cut off, and all
# others are rounded more finely.
CLIPPING = torch.linspace(0.4, 1.1, 15)
SMALL_TABLE = 1024  # rows: positions, not words
ROWS_AT_ONCE = 1024  # a part of a matrix that stays in the processor's cache while all of `CLIPPING` is tried
# Columns whose errors are passed on to all later ones together, as in section 3 of the paper. Column by column, all
# later weights would be read and written each time.
COLUMNS_AT_ONCE = 128
DAMPING = 0.01  # share of the inputs' mean square that is added, so that the matrix of their products has an inverse


@dataclass(frozen=True)
class Scales:
    """How a matrix (rows, columns), or some of its rows, is rounded; each row is cut into groups of equal size.

    Attributes:
        bits: of a level.
        row: float32 (..., 1), one scale per row.
        multiplier: float32 (..., groups), whole numbers from 1 on.
    """

    bits: int
    row: torch.Tensor
    multiplier: torch.Tensor

    @property
    def step(self) -> torch.Tensor:
        """The weight that a level of 1 stands for: float32 (..., groups, 1)."""
        return (self.row * self.multiplier).unsqueeze(-1)


def check_group_size(name: str, columns: int, group_size: int) -> None:
    """Raises `UserError` if a row cannot be cut into such groups, or a group into whole bytes."""
    # Eight codes fill whole bytes at each number of bits.
    if group_size % 8:
        raise UserError(f"--group_size {group_size}: it takes a multiple of 8")
    if columns % group_size:
        raise UserError(f"--group_size {group_size}: {name} has rows of {columns} weights, which it does not divide")


def choose_scales(weight: torch.Tensor, bits: int, group_size: int) -> Scales:
    """The scales that change a matrix least, by the sum of squared differences.

    Each group gets its best step on its own. The row's scale is then chosen so that the largest of these steps has
    the largest multiplier, and the other steps are rounded to multiples of the scale.

    Args:
        weight: float (rows, columns).
        group_size: weights of a row that share a multiplier; it divides the columns (`check_group_size`).
    """
    # The product of multiplier and level must not leave the seven bits of a safe INT8 weight.
    largest_multiplier = min(LARGEST_MULTIPLIER, LARGEST_SAFE_WEIGHT // -LEVELS[bits][0])
    row_scales, multipliers = [], []
    for part in weight.detach().float().split(ROWS_AT_ONCE):
        step = _best_steps(part.unflatten(1, (-1, group_size)), bits)
        row = step.amax(dim=1) / largest_multiplier  # (rows, 1)
        multiplier = (step.squeeze(-1) / row).round()  # (rows, groups)
        row_scales.append(row)
        multipliers.append(multiplier.clamp(1, largest_multiplier))
    return Scales(bits, torch.cat(row_scales), torch.cat(multipliers))


def _best_steps(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """The step of each group that rounds it best, of those in `CLIPPING`: float32 (rows, groups, 1)."""
    largest = groups.abs().amax(dim=-1, keepdim=True)
    largest = largest.clamp(min=torch.finfo(torch.float32).eps)  # a group of zeros must not lead to a division by zero
    best, least_error = torch.empty_like(largest), torch.full_like(largest, float("inf"))
    for share in CLIPPING.tolist():
        step = largest * (share / -LEVELS[bits][0])
        rounded = nearest_levels(groups, step, bits).mul_(step)
        error = (rounded - groups).square().sum(dim=-1, keepdim=True)
        best = torch.where(error < least_error, step, best)
        least_error = torch.minimum(error, least_error)
    return best


def nearest_levels(groups: torch.Tensor, step: torch.Tensor, bits: int) -> torch.Tensor:
    """The level nearest to each weight, as a float; ``groups`` is (..., groups, size), ``step`` (..., groups, 1)."""
    levels = LEVELS[bits]
    # Levels are evenly spaced: the nearest one follows from rounding, without a search. All but the first operation
    # change the array in place, since training with fake quantizers runs this in every step.
    nearest = groups / (step * levels.step)
    nearest = nearest.sub_(levels[0] / levels.step).round_().clamp_(0, len(levels) - 1)  # now the codes
    return nearest.mul_(levels.step).add_(levels[0])


def integers_of(weight: torch.Tensor, scales: Scales) -> torch.Tensor:
    """The integers of a matrix, or of rows of it: multiplier times level, as floats of the shape (..., columns)."""
    groups = weight.unflatten(-1, (scales.multiplier.shape[-1], -1))
    levels = nearest_levels(groups, scales.step, scales.bits)
    return levels.mul_(scales.multiplier.unsqueeze(-1)).flatten(-2)


def round_matrix(weight: torch.Tensor, scales: Scales) -> torch.Tensor:
    """The matrix with the weights that the file will give back, float32 (..., columns)."""
    return integers_of(weight, scales).mul_(scales.row)


def apply_gptq(plan: Plan, rows: CalibrationRows) -> Plan:
    """The plan with linear layers rounded by GPTQ, so that their outputs change least for the rows.

    Scales, size and speed stay as they are.
    """
    products, compensated = multiply_inputs(plan.model, plan.layers.linear, rows), {}
    for name in Bar(plan.layers.linear, desc="GPTQ"):
        scales = plan.scales[name]
        levels, step = torch.tensor(LEVELS[scales.bits], dtype=torch.float32), scales.step.squeeze(-1)
        # Outlier channels are no inputs of the integers: their large activations must not guide the rounding.
        channels = plan.outliers.get(name, [])
        products[name][channels], products[name][:, channels] = 0, 0
        compensated[name] = compensate(weight_without_outliers(plan, name), products[name], step, levels)
    return replace(plan, compensated=compensated)


def multiply_inputs(model, names: list[str], rows: CalibrationRows) -> dict[str, torch.Tensor]:
    """The products of the inputs of linear layers with each other, summed over all word pieces of the rows.

    Returns:
        Name of a layer -> float32 (width, width), symmetric.
    """
    widths = {name: model.get_submodule(name).in_features for name in names}
    products = {name: torch.zeros(width, width, device=model.device) for name, width in widths.items()}

    def see(name, inputs):
        products[name].addmm_(inputs.T, inputs)

    watch_inputs(model, names, rows, see)
    return products


def compensate(weight: torch.Tensor, products: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor):
    """GPTQ, column by column: columns still to be rounded make up for the errors of those before them in their row.

    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023.

    Args:
        weight: float32 (rows, columns).
        products: of the layer's inputs with each other, float32 (columns, columns).
        scales: float32 (rows, groups).
        levels: float32, ascending.

    Returns:
        A matrix whose nearest levels change the layer's outputs least, for the inputs shown: float32 (rows, columns).

    Raises:
        torch.linalg.LinAlgError: if the products are not positive definite, for instance when they are not finite.
    """
    weight, products = weight.clone(), products.clone()
    # Inputs that never vary, or vary together, would make the matrix singular: each gets some variance of its own.
    products.diagonal().add_(DAMPING * products.diagonal().mean())
    # The upper Cholesky factor of the inverse. Its row i holds what the paper recomputes after each column: how far
    # the columns after i must move, for an error in column i, once all before i are fixed.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(products)), upper=True)
    steps = steps_of(scales, weight.shape[1])
    for start in range(0, weight.shape[1], COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, weight.shape[1])
        errors = torch.empty(len(weight), end - start, device=weight.device)
        for column in range(start, end):
            wanted, step = weight[:, column], steps[:, column]  # for all rows: they do not depend on each other
            error = (wanted - levels[nearest_codes(wanted, step, levels)] * step) / inverse[column, column]
            errors[:, column - start] = error
            # The columns still to come take over the error, each by what its inputs have in common with this one's.
            weight[:, column + 1 : end] -= error[:, None] * inverse[column, column + 1 : end]
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return weight


def steps_of(scales: torch.Tensor, columns: int) -> torch.Tensor:
    """The scale of each weight, float32 (rows, columns), from one per group, (rows, groups)."""
    # A group of zeros has the scale 0: the smallest positive number avoids 0 / 0.
    return scales.clamp(min=torch.finfo(torch.float32).tiny).repeat_interleave(columns // scales.shape[1], dim=1)


def nearest_codes(weight: torch.Tensor, steps: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The number of the level nearest to each weight, int64, in the shape of ``weight`` and ``steps``."""
    middles = (levels[1:] + levels[:-1]) / 2  # between two of these, one level is the nearest
    return torch.bucketize(weight / steps, middles)


def codes_of(weight: torch.Tensor, scales: Scales) -> np.ndarray:
    """The code of each weight, its level's number counted from the lowest one: uint8 (rows, groups, size)."""
    levels = LEVELS[scales.bits]
    groups = weight.detach().unflatten(1, (scales.multiplier.shape[1], -1))
    codes = nearest_levels(groups, scales.step, scales.bits).sub_(levels[0]).div_(levels.step)
    return codes.to(torch.uint8).numpy()


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """Packs codes of ``width`` bits, uint8 of any shape, into bytes, uint8 (n,); the first code takes the lowest bits.

    Args:
        width: 1, 2, 4 or 8; the number of codes fills whole bytes.
    """
    per_byte = codes.reshape(-1, 8 // width)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return (per_byte << shifts).sum(axis=1).astype(np.uint8)


def byte_table(values: np.ndarray, width: int) -> np.ndarray:
    """The values of the codes in each possible byte: float32 (256, codes in a byte). It undoes `pack`.

    Args:
        values: the value of each code, (2**width,).
    """
    shifts = np.arange(0, 8, width)
    codes = (np.arange(256)[:, None] >> shifts) & (2**width - 1)
    return values[codes].astype(np.float32)


def write_lowbit_onnx(plan: Plan, path: Path) -> None:
    """Writes the ONNX file of a plan below 8 bits, with packed linear layers and embeddings, to ``path``.

    The file is the INT8 file of `quantize_onnx`, with packed weights in place of its INT8 constants.
    """
    layers, scales = plan.layers, plan.scales
    # The INT8 file keeps the embeddings in float. Nothing multiplies them, so the INT8 form would be of no use here.
    quantize_onnx(replace(plan, layers=Layers(layers.linear, [])), path)
    graph = onnx.load(path)
    packer = Packer(graph.graph)
    codes = {name: codes_of(weight_without_outliers(plan, name), scales[name]) for name in scales}
    constants = {tensor.name for tensor in graph.graph.initializer}
    for node in list(graph.graph.node):  # a copy of the list, since the packer changes the graph's own
        # `name_nodes` has named the nodes: the attention operator has three names, of query, key and value.
        names = modules_of(node.name)
        int8_weights = [name for name in node.input if name in constants and name.endswith("_quantized")]
        if names and int8_weights and set(names) <= set(layers.linear):
            constants.remove(int8_weights[0])  # another node may share it
            packer.replace_weight(int8_weights[0], [codes[name] for name in names], [scales[name] for name in names])
        elif node.op_type == "Gather" and node.name in layers.embeddings:
            packer.replace_look_up(node, codes[node.name], scales[node.name])
    packer.finish()
    onnx.checker.check_model(graph)
    onnx.save(graph, path)


class Packer:
    """Puts packed weights into an ONNX graph, and the operators that unpack them.

    A byte has 256 values. A table of 256 rows therefore lists the levels of every byte, and one look-up (`Gather`)
    does the shifting, the masking and the step from codes to levels.

    Names are read elsewhere: `evaluation/inspection.py` finds packed matrices by ``<name>/codes0`` and
    ``<name>/multipliers``, and passes over nodes named ``<name>/unpack...``.

    Args:
        graph: an `onnx.GraphProto`, changed in place.
    """

    def __init__(self, graph):
        self.graph = graph
        self.pending = []  # nodes that are made but not in the graph yet
        self.tables = {}  # content of a table -> its name, so that layers share their tables

    def replace_weight(self, int8_name: str, codes: list[np.ndarray], scales: list[Scales]) -> None:
        """Replaces an INT8 constant by nodes that compute it from packed codes, and its scales by the rows' scales.

        Args:
            int8_name: name of the constant, int8 (columns, rows): ONNX stores a weight transposed.
            codes: `codes_of` each layer that the constant holds; attention holds query, key and value.
        """
        # In PyTorch's order the layers lie below each other.
        rows, multipliers = torch.cat([one.row for one in scales]), torch.cat([one.multiplier for one in scales])
        integers = self._unpack(int8_name, np.concatenate(codes), Scales(scales[0].bits, rows, multipliers))
        shape = self._constant(f"{int8_name}/shape", np.array([len(rows), -1]))
        matrix = self._node("Reshape", [integers, shape], int8_name)  # (rows, columns)
        matrix = self._node("Cast", [matrix], int8_name, to=TensorProto.INT8)
        # The last node takes over the constant's name, so the layer that multiplies with it needs no change. The
        # constant's zero points need none either: they are 0, as for all symmetric weights.
        self._node("Transpose", [matrix], int8_name, output=int8_name, perm=[1, 0])
        self._remove_constant(int8_name)
        scale_name = int8_name.removesuffix("_quantized") + "_scale"
        for tensor in self.graph.initializer:
            if tensor.name == scale_name:
                # The sign is kept: before a residual sum a layer gives the negative of its result (graph_passes.py).
                signed = np.copysign(rows.squeeze(1).numpy(), numpy_helper.to_array(tensor))
                tensor.CopyFrom(numpy_helper.from_array(signed, scale_name))

    def replace_look_up(self, gather, codes: np.ndarray, scales: Scales) -> None:
        """Replaces a look-up in a float table by nodes that look up packed rows and unpack only those.

        A small table is unpacked once instead, like the weights: that takes little memory, and no text waits for it.

        Args:
            gather: the node; the shape of its ids is (texts, tokens).
            codes: `codes_of` the table, uint8 (rows, groups, size).
        """
        table, ids = gather.input
        name = gather.name
        if len(codes) <= SMALL_TABLE:
            columns = self._constant(f"{name}/shape", np.array([len(codes), -1]))
            levels = self._node("Reshape", [self._unpack(name, codes, scales), columns], name)
            row_scales = self._constant(f"{name}/scales", scales.row.numpy())
            # Under the old table's name: the look-up itself stays.
            self._node("Mul", [levels, row_scales], name, output=table)
            self._remove_constant(table)
            return
        start = len(self.pending)
        row_scales = self._constant(f"{name}/scales", scales.row.numpy().reshape(-1, 1, 1, 1, 1, 1))
        row_scales = self._node("Gather", [row_scales, ids], name)
        values = self._unpack(name, codes, scales, ids, row_scales)  # (texts, tokens, and five dimensions)
        # The five dimensions become the columns again; 0 keeps a dimension as it is.
        shape = self._constant(f"{name}/shape", np.array([0, 0, -1]))
        self._node("Reshape", [values, shape], name, output=gather.output[0])

        # These nodes stand where the old one stood: behind the nodes that compute the ids, before those that read the
        # result. ONNX demands that order.
        position = list(self.graph.node).index(gather)
        self.graph.node.remove(gather)
        self._insert(position, self.pending[start:])
        del self.pending[start:]
        if not any(table in node.input for node in self.graph.node):  # two look-ups may share a table
            self._remove_constant(table)

    def finish(self) -> None:
        """Puts the nodes that unpack weights into the graph.

        A graph lists its nodes in the order in which they run. These depend on constants alone, and a layer needs each
        result: so they come first.
        """
        self._insert(0, self.pending)

    def _unpack(
        self, name: str, codes: np.ndarray, scales: Scales, ids: str | None = None, row_scales: str | None = None
    ) -> str:
        """Makes the nodes that compute multiplier times level from packed bytes.

        Args:
            codes: uint8 (rows, groups, size).
            ids: name of the ids of the rows to unpack; all rows if not given.
            row_scales: name of the scales of these rows, with five dimensions behind the rows, to be multiplied too.

        Returns:
            The name of a float32 tensor. Its six dimensions, in the order of the weights, are (rows, groups / pair,
            pair, size / 8, n, 8 / n), with n bytes for eight codes; the shape of ``ids`` takes the place of the rows.
        """
        rows, groups, size = codes.shape
        # A byte holds the multipliers of a pair of groups. It must not hold those of two rows, since rows are looked
        # up one by one: with an odd number of groups a row has one multiplier per byte.
        pair = 2 - groups % 2
        width, lowest = scales.bits, LEVELS[scales.bits][0]
        # Eight codes of so many bits fill as many bytes. A level is the lowest one plus the spacing times the code.
        packed = pack(codes, width).reshape(rows, groups // pair, pair, size // 8, width)
        table = byte_table(lowest + LEVELS[width].step * np.arange(2**width), width)
        source = self._bytes(name, "codes0", packed, ids)
        levels = self._look_up(name, source, table)  # (rows, groups / pair, pair, size / 8, n, 8 / n)

        packed = pack(scales.multiplier.numpy().astype(np.uint8) - 1, 8 // pair).reshape(rows, groups // pair)
        # The table has the levels' last three dimensions, so that its results need no operator that adds them.
        table = byte_table(np.arange(1, 2 ** (8 // pair) + 1), 8 // pair).reshape(256, pair, 1, 1, 1)
        source = self._bytes(name, "multipliers", packed, ids)
        factors = self._look_up(name, source, table)  # (rows, groups / pair, pair, 1, 1, 1)
        if row_scales:  # before the levels, of which there are many more
            factors = self._node("Mul", [factors, row_scales], name)
        return self._node("Mul", [levels, factors], name)

    def _bytes(self, name: str, kind: str, packed: np.ndarray, ids: str | None) -> str:
        """Stores packed bytes, uint8 (rows, ...); returns the tensor of all of them, or of the rows ``ids``, int32."""
        source = self._constant(f"{name}/{kind}", packed)
        if ids is not None:
            source = self._node("Gather", [source, ids], name)
        return self._node("Cast", [source], name, to=TensorProto.INT32)  # Gather takes no smaller integers as indices

    def _look_up(self, name: str, source: str, table: np.ndarray) -> str:
        """Looks up each byte of the tensor ``source`` in a table; the table's dimensions come last in the result."""
        key = table.shape, table.tobytes()
        table_name = self.tables.setdefault(key, f"unpack/table{len(self.tables)}")
        return self._node("Gather", [self._constant(table_name, table), source], name)

    def _constant(self, name: str, array: np.ndarray) -> str:
        """Stores a constant, unless one of that name is there; returns the name."""
        if name not in {tensor.name for tensor in self.graph.initializer}:
            self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _remove_constant(self, name: str) -> None:
        for tensor in list(self.graph.initializer):
            if tensor.name == name:
                self.graph.initializer.remove(tensor)

    def _node(self, kind: str, inputs: list[str], name: str, output: str | None = None, **attributes) -> str:
        """Makes an operator for the matrix ``name``, to be put into the graph later; returns its output's name."""
        unique = f"{name}/unpack{len(self.pending)}"
        self.pending.append(helper.make_node(kind, inputs, [output or unique], name=unique, **attributes))
        return output or unique

    def _insert(self, position: int, nodes: list) -> None:
        for node in reversed(nodes):  # each is put before the one that came last
            self.graph.node.insert(position, node)
