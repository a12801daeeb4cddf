"""Fixed ranges of activations, so that a text gets the same answer alone and in any batch.

ONNX Runtime's dynamic INT8 takes one range for all tokens of a batch, so the answer to a text depends on its
neighbors. Each product has a constant range instead. PTQ measures it on calibration texts; QAT follows it by a
moving average (see fake_quantizers.py). In the file, `QuantizeLinear` with a constant scale and zero point takes the
place of the search for the range.
"""

import numpy as np
import torch
from onnx import helper, numpy_helper

from emotion.export.graph_passes import MICROSOFT, modules_of, tidy
from emotion.quantization.layers import CalibrationRows, Plan, watch_inputs

# How a range is chosen from the activations that the calibration texts show: their extremes, the range whose rounding
# and clipping cause the least squared error, or the middle 99.99 %.
RULES = ("minmax", "mse", "percentile")
BINS = 2048
TAIL = 0.00005  # share of the activations beyond each end of 'percentile'
SHARES = np.linspace(0.2, 1, 33)  # of an extreme: the ends that 'mse' tries


def measure_ranges(plan: Plan, rows: CalibrationRows, rule: str = "minmax") -> dict[str, tuple[float, float]]:
    """The range of the inputs of each linear layer of the plan, over calibration texts answered one by one.

    Args:
        rule: one of `RULES`.

    Returns:
        Name of a layer -> its lowest and highest activation, a range that holds 0. Outlier channels do not count, nor
        do tokens that the file does not compute.
    """
    ranges = {}

    def widen(name, inputs):
        lowest, highest = torch.aminmax(_seen(plan, name, inputs))
        before = ranges.get(name, (0.0, 0.0))
        ranges[name] = min(before[0], float(lowest)), max(before[1], float(highest))

    watch_inputs(plan.model, plan.layers.linear, rows, widen)
    if rule == "minmax":
        return ranges
    counts = {name: torch.zeros(BINS) for name in ranges}

    def count(name, inputs):
        lowest, highest = ranges[name]
        counts[name] += torch.histc(_seen(plan, name, inputs).float(), BINS, lowest, highest).cpu()

    watch_inputs(plan.model, plan.layers.linear, rows, count)
    choose = {"mse": _least_error, "percentile": _without_tails}[rule]
    return {name: choose(counts[name].double().numpy(), *ranges[name]) for name in ranges}


def _seen(plan: Plan, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """The part of a layer's inputs, float (tokens, channels), that its INT8 product multiplies."""
    if name in plan.cls_only:
        inputs = inputs[:1]
    if channels := plan.outliers.get(name):
        inputs = inputs.index_fill(1, torch.tensor(channels, device=inputs.device), 0)
    return inputs


def _least_error(counts: np.ndarray, lowest: float, highest: float) -> tuple[float, float]:
    """The range with the least squared error of rounding and clipping, of shares of both ends."""
    width = (highest - lowest) / BINS
    centers = lowest + width * (np.arange(BINS) + 0.5)
    best, least = (lowest, highest), np.inf
    for low in SHARES * lowest if lowest < 0 else [0.0]:
        for high in SHARES * highest if highest > 0 else [0.0]:
            scale, zero = (number.item() for number in scale_of(*torch.tensor([low, high], dtype=torch.float32)))
            rounded = (np.clip(np.round(centers / scale) + zero, 0, 255) - zero) * scale
            error = float((counts * (rounded - centers) ** 2).sum())
            if error < least:
                best, least = (float(low), float(high)), error
    return best


def _without_tails(counts: np.ndarray, lowest: float, highest: float) -> tuple[float, float]:
    """The range without a share `TAIL` of the activations at each end."""
    shares, edges = np.cumsum(counts) / counts.sum(), np.linspace(lowest, highest, BINS + 1)
    low, high = edges[np.searchsorted(shares, TAIL)], edges[np.searchsorted(shares, 1 - TAIL) + 1]
    return min(0.0, float(low)), max(0.0, float(high))


def scale_of(lowest: torch.Tensor, highest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The value of the integer 1 and the zero point of a range of 256 integers, as `DynamicQuantizeLinear` has them.

    All are float32, one number each. The range is widened to hold 0, as ONNX wants it.
    """
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    scale = (highest - lowest) / 255
    scale = torch.where(scale == 0, 1.0, scale)  # all values are 0
    return scale, (-lowest / scale).round()


def fix_ranges(graph, ranges: dict[str, tuple[float, float]]) -> None:
    """Gives the dynamic INT8 products of a graph constant ranges, in place.

    Args:
        graph: ONNX Runtime's `OnnxModel`, after `merge_products`, with its nodes named after the layers.
        ranges: those of `measure_ranges`. A product of several layers has one input, and so one range.
    """
    producers = graph.output_name_to_node()
    for node in graph.get_nodes_by_op_type("DynamicQuantizeMatMul"):
        states, weight, scales, _, bias = node.input
        integers, scale, zero = _quantize(graph, states, ranges[modules_of(node.name)[0]])
        inputs, options = [integers, weight, scale, scales, zero, "", bias], {"name": node.name, "domain": MICROSOFT}
        graph.remove_node(node)
        graph.add_node(helper.make_node("MatMulIntegerToFloat", inputs, list(node.output), **options))
    for node in graph.get_nodes_by_op_type("QAttention"):
        rounding = producers[node.input[0]]
        integers, scale, zero = _quantize(graph, rounding.input[0], ranges[modules_of(node.name)[0]])
        node.input[0], node.input[3], node.input[6] = integers, scale, zero
    tidy(graph)


def _quantize(graph, states: str, span: tuple[float, float]) -> tuple[str, str, str]:
    """Rounds a tensor by a range, once for all that read it; returns the names of integers, scale and zero point."""
    scale, zero = (number.numpy() for number in scale_of(*torch.tensor(span, dtype=torch.float32)))
    key = f"{scale.tobytes().hex()}-{int(zero)}"  # two ranges of one tensor may share their scale alone
    names = [f"{states}/{kind}/{key}" for kind in ("quantized", "scale", "zero_point")]
    if graph.get_initializer(names[1]) is None:
        graph.add_initializer(numpy_helper.from_array(scale, names[1]))
        graph.add_initializer(numpy_helper.from_array(zero.astype(np.uint8), names[2]))
        graph.add_node(helper.make_node("QuantizeLinear", [states, *names[1:]], [names[0]], name=names[0]))
    return tuple(names)
