"""Fake quantizers for quantization-aware training in torchao's three steps: prepare, train, convert.

Each layer gets a fake quantizer for its activations and one for its weights, which round as the saved file does. The
layer then multiplies integers, in floats that hold them exactly, so that the sums are those of the integers to the
last digit. The slope of rounding is zero almost everywhere, so the gradient passes straight through (Bengio, Léonard
and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation", 2013).

The file for ONNX Runtime rounds activations by one range for all tokens that it computes ([CLS] tokens alone behind
the last attention) and keeps outlier channels in float; the file for Transformers keeps all activations in float.
torchao's own fake quantizers have neither of these nor the levels of lowbit.py, and they multiply dequantized values.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional
from torchao.quantization import quantize_
from torchao.quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear, IntxFakeQuantizeConfig, QATConfig
from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

from emotion.inference.model_folder import LARGEST_SAFE_WEIGHT
from emotion.quantization.activation_ranges import scale_of
from emotion.quantization.int8 import TABLE_DTYPE
from emotion.quantization.layers import Plan
from emotion.quantization.lowbit import Scales, integers_of
from emotion.quantization.outlier_channels import find_pairs

EPSILON = torch.finfo(torch.float32).eps  # torchao's smallest scale
# Smallest and largest integer of a weight in each runtime's file
FULL_SPAN = (-128, 127)  # torchao's
ONNX_SPAN = (-127, 127)
REDUCED_SPAN = (-LARGEST_SAFE_WEIGHT, LARGEST_SAFE_WEIGHT)  # ONNX Runtime's at 7 bits: no processor's sums overflow
MOMENTUM = 0.01  # of a moving range: the weight of a batch, that of PyTorch's MovingAverageMinMaxObserver


def round_rows(
    values: torch.Tensor, whole: torch.Tensor | None = None, span: tuple[int, int] = FULL_SPAN
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each row of float (..., columns) to the symmetric integers of a span, as torchao does it for INT8.

    Returns:
        The integers as floats, (..., columns), and their scale (the value of the integer 1): float32 (..., 1).
    """
    # Half the span is 127.5 at 8 bits, not 127. This is torchao's choice; a largest value above zero is clamped.
    scale = values.abs().amax(dim=-1, keepdim=True).float() / ((span[1] - span[0]) / 2)
    scale = scale.clamp_(min=EPSILON)  # a row of zeros has no range of its own
    # Times the reciprocal, as torchao: a division would round some values on an edge to the other integer.
    return (values * (1.0 / scale)).round_().clamp_(*span), scale


def round_all(values: torch.Tensor, whole: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """As `round_in_range`, by the values' own range or that of ``whole``, as ONNX's DynamicQuantizeLinear does."""
    return round_in_range(values, *torch.aminmax((values if whole is None else whole).float()))


def round_in_range(
    values: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds float values to the 256 integers of a range, as ONNX's QuantizeLinear does; what lies beyond is clipped.

    Returns:
        The integers less their zero point, as floats from -255 to 255, in the shape of the values; and their scale.
    """
    values = values.float()  # under autocast too: a quotient of bfloat16 would be rounded twice
    scale, zero = scale_of(lowest, highest)
    return (values / scale).round_().add_(zero).clamp_(0, 255).sub_(zero), scale


def round_by_cls_token(values: torch.Tensor, whole: torch.Tensor | None = None):
    """As `round_all`, with the range of the [CLS] tokens of (texts, tokens, width): the file computes no others."""
    return round_all(values, values[:, :1])


def keep_floats(values: torch.Tensor, whole: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves float values as they are, with the scale 1, as a product does whose weights alone are integers."""
    return values, torch.ones((), device=values.device)


def round_float8(values: torch.Tensor, whole: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each value to the floats of 8 bits in which the torchao file holds embedding tables; the scale is 1."""
    return values.to(TABLE_DTYPE).to(values.dtype), torch.ones((), device=values.device)


class Rounding(FakeQuantizerBase):
    """A fake quantizer that measures the values anew each time, with one of the functions above."""

    def __init__(self, config: IntxFakeQuantizeConfig, function):
        super().__init__()
        self.config, self.enabled, self.function = config, True, function

    def round(self, values: torch.Tensor, ids=None, whole=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the integers, as floats, and their scale; ``ids`` is not used, as no row has scales of its own."""
        return self.function(values, whole)


class MovingRange(FakeQuantizerBase):
    """A fake quantizer of activations with the fixed range that the file will have.

    The range starts as calibration found it. It follows the extremes of the batches by a moving average, then stays
    (section 3.1 of Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018).
    """

    def __init__(self, config: IntxFakeQuantizeConfig, span: tuple[float, float], cls_only: bool):
        super().__init__()
        self.config, self.enabled, self.cls_only, self.following = config, True, cls_only, True
        # A buffer: a checkpoint holds it, and it moves to the GPU with the model.
        self.register_buffer("range", torch.tensor(span, dtype=torch.float32))

    def clip(self, values: torch.Tensor) -> torch.Tensor:
        """Follows the range of float (texts, tokens, channels) while training; returns the values within the range.

        A clipped value gets no gradient.
        """
        if self.training and self.following:
            observed = values.detach()[:, :1] if self.cls_only else values.detach()
            lowest, highest = torch.aminmax(observed.float())
            batch = torch.stack([lowest.clamp(max=0), highest.clamp(min=0)])
            self.range.lerp_(batch, MOMENTUM)
        return values.clamp(*self.range.to(values.dtype))

    def round(self, values: torch.Tensor, ids=None, whole=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the integers, as floats, and their scale; ``ids`` and ``whole`` are not used."""
        return round_in_range(values, *self.range)


class LowBitGroups(FakeQuantizerBase):
    """A fake quantizer of 2 to 4 bits, with the two-level scales of lowbit.py.

    The scales stay as they were chosen before the training.
    """

    def __init__(self, config: IntxFakeQuantizeConfig, scales: Scales):
        super().__init__()
        self.config, self.enabled, self.bits = config, True, scales.bits
        # Buffers: a checkpoint holds them, and they move to the GPU with the model.
        self.register_buffer("row", scales.row)
        self.register_buffer("multiplier", scales.multiplier)

    @property
    def scales(self) -> Scales:
        """The scales of the whole weight."""
        return Scales(self.bits, self.row, self.multiplier)

    def round(self, weight: torch.Tensor, ids=slice(None), whole=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the integers of the rows, as floats (..., columns), and the scales of the rows, float32 (..., 1).

        ``ids``, int64 (...), are the numbers of the rows, where they were looked up.
        """
        scales = Scales(self.bits, self.row[ids], self.multiplier[ids])
        return integers_of(weight, scales), scales.row


class StraightThrough(torch.autograd.Function):
    """Rounds values and scales them back; the gradient passes as if nothing had been rounded."""

    @staticmethod
    def forward(ctx, values, rounding):
        """Returns the rounded values, in the shape of ``values``; ``rounding`` gives integers and their scale."""
        integers, scale = rounding(values)
        return integers.mul_(scale)  # in place: the integers are a new tensor, which nobody else holds

    @staticmethod
    def backward(ctx, gradient):
        """Returns one gradient per argument of `forward`; a function has none."""
        return gradient, None


class IntegerProduct(torch.autograd.Function):
    """A linear layer of rounded values (..., columns) and a rounded weight (rows, columns).

    The sums are exact up to 2^24. A float32 sum reaches that with 1,028 columns of the largest integers (255 x 64) at
    the earliest; real ones have both signs and cancel. Under autocast to bfloat16 the integers are still exact, and
    the sums keep eight binary digits.

    A plain linear layer would sum values that are scaled back already, and differ in the last digits. This one scales
    after summing, as the runtimes do. Autograd would find the slope of rounding, zero, so the backward pass is written
    out: that of a linear layer of the rounded values and the rounded weight.
    """

    @staticmethod
    def forward(ctx, values, weight, bias, round_values, round_weight):
        """Returns float (..., rows). The last two arguments give the integers of a tensor and their scale."""
        (left, scale), (right, row) = round_values(values), round_weight(weight)
        device = values.device.type
        # The cast of autocast, done by hand: the tensors kept for the backward pass are then half as large.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype
        left, right, row = left.to(dtype), right.to(dtype), row.flatten()  # one scale per output: (rows,)
        ctx.save_for_backward(left, scale, right, row)
        ctx.has_bias = bias is not None
        product = functional.linear(left, right).mul_(scale).mul_(row)  # in torchao's order, for the last digit
        return product.add_(bias) if ctx.has_bias else product

    @staticmethod
    def backward(ctx, gradient):
        """Returns one gradient per argument of `forward`; None where none is needed.

        The layer is y = (scale x left) (row x right)^T + bias. With "straight through", the gradient of a rounded
        tensor counts as that of the tensor before it was rounded.
        """
        left, scale, right, row = ctx.saved_tensors
        for_values = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            # The gradient is scaled, not the weight: no float copy of all scaled weights is made.
            for_values = (gradient * row.to(gradient.dtype)) @ right
        if ctx.needs_input_grad[1]:
            scaled = gradient * scale.to(gradient.dtype)
            # All texts and tokens become one dimension, over which the product sums: (rows, columns).
            for_weight = scaled.reshape(-1, scaled.shape[-1]).T @ left.reshape(-1, left.shape[-1])
        if ctx.has_bias and ctx.needs_input_grad[2]:
            for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0)
        return for_values, for_weight, for_bias, None, None


@dataclass(frozen=True)
class ChannelSplit:
    """The outlier channels of a layer, which it computes in floats beside its integers; see outlier_channels.py.

    Attributes:
        channels: their numbers; none in most layers.
        axis: 0 if they are outputs, as in the first product of a pair; 1 if they are inputs, as in the second.
    """

    channels: list[int]
    axis: int = 0

    def without_channels(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight (rows, columns) with zeros in the place of the channels."""
        if not self.channels:
            return weight
        return weight.index_fill(self.axis, torch.tensor(self.channels, device=weight.device), 0)

    def take(self, weight: torch.Tensor) -> torch.Tensor:
        """The channels' part of the weight: (channels, columns) or (rows, channels)."""
        return weight[self.channels] if self.axis == 0 else weight[:, self.channels]

    def multiply(self, values: torch.Tensor, part: torch.Tensor, product) -> torch.Tensor:
        """The layer's output for ``values`` (..., columns).

        Args:
            part: of `take`.
            product: computes all but the channels from such values, with weights of `without_channels`.
        """
        if not self.channels:
            return product(values)
        if self.axis == 0:
            found, channels = product(values), torch.tensor(self.channels, device=values.device)
            return found.index_add(-1, channels, functional.linear(values, part).to(found.dtype))
        # The channels would widen the range of all the others, so they are taken out before it is measured.
        rest = values.index_fill(-1, torch.tensor(self.channels, device=values.device), 0)
        return product(rest) + functional.linear(values[..., self.channels], part)


def channel_splits(plan: Plan) -> dict[str, ChannelSplit]:
    """Name of a layer -> its `ChannelSplit`, for the layers of the plan that have outlier channels."""
    if not plan.outliers:
        return {}
    splits, pairs = {}, find_pairs(plan.model, plan.layers.linear)
    for second, channels in plan.outliers.items():
        splits[second], splits[pairs[second]] = ChannelSplit(channels, axis=1), ChannelSplit(channels, axis=0)
    return splits


class RoundedLinear(FakeQuantizedLinear):
    """A linear layer that multiplies integers and scales the sums; torchao's multiplies values scaled back already."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Returns float (..., outputs) for ``values`` (..., inputs)."""
        if not self.weight_fake_quantizer.enabled:
            return functional.linear(values, self.weight, self.bias)
        rounding = self.activation_fake_quantizer.round, self.weight_fake_quantizer.round
        weight, part = self.split.without_channels(self.weight), self.split.take(self.weight)
        clip = getattr(self.activation_fake_quantizer, "clip", lambda rest: rest)

        def product(rest):
            return IntegerProduct.apply(clip(rest), weight, self.bias, *rounding)

        return self.split.multiply(values, part, product)


class RoundedEmbedding(FakeQuantizedEmbedding):
    """An embedding that rounds only the rows it looks up; rounding its whole table would give the same result."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns float (..., columns) for ``ids`` (...)."""
        rows, quantizer = functional.embedding(ids, self.weight, self.padding_idx), self.weight_fake_quantizer
        if not quantizer.enabled:
            return rows
        # Below 8 bits each row of the table has scales of its own. ONNX Runtime has one range for its INT8 table; the
        # float8 of torchao's file needs neither.
        return StraightThrough.apply(rows, partial(quantizer.round, ids=ids, whole=self.weight.detach()))


class IntegerLinear(torch.nn.Module):
    """A linear layer as ONNX Runtime computes it: uint8 activations times int8 weights, summed in int32.

    Args:
        layer: a `RoundedLinear`, trained.
    """

    def __init__(self, layer: RoundedLinear):
        super().__init__()
        self.split, weight = layer.split, layer.weight.detach()
        integers, row = layer.weight_fake_quantizer.round(self.split.without_channels(weight))
        # Integers in float64, whose sums are exact; PyTorch's own integer product takes minutes without VNNI.
        self.weight, self.row, self.bias = integers.double(), row.flatten(), layer.bias
        self.channels = self.split.take(weight)
        self.round = layer.activation_fake_quantizer.round

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Returns float32 (..., rows) for ``values`` (..., columns)."""
        return self.split.multiply(values, self.channels, self.multiply)

    def multiply(self, values: torch.Tensor) -> torch.Tensor:
        """The same without the outlier channels."""
        integers, scale = self.round(values)
        sums = (integers.double() @ self.weight.T).float()
        product = sums.mul_(scale).mul_(self.row)
        return product if self.bias is None else product.add_(self.bias)


def prepare(plan: Plan, runtime: str = "onnx", reduce_range: bool = True) -> None:
    """Makes the layers of the plan's model fake-quantized, in place, with the plan's scales and outlier channels.

    Args:
        runtime: whose rounding is trained for: 'onnx' or 'torchao'; below 8 bits it is always 'onnx'.
        reduce_range: whether INT8 weights for ONNX Runtime have 7 bits; see `LARGEST_SAFE_WEIGHT`.
    """
    model, layers, splits, onnx = plan.model, plan.layers, channel_splits(plan), runtime == "onnx"
    # torchao asks for these when it swaps the layers, and gives each one quantizers of its own, which are replaced
    # below. From then on the configurations compute nothing; torchao's conversion still looks at them.
    activations = IntxFakeQuantizeConfig(torch.uint8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int7, "per_channel", is_symmetric=True)
    table = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    quantize_(model, QATConfig(None, activations, weights, step="prepare"), lambda _, name: name in layers.linear)
    quantize_(model, QATConfig(None, None, table, step="prepare"), lambda _, name: name in layers.embeddings)
    span = (REDUCED_SPAN if reduce_range else ONNX_SPAN) if onnx else FULL_SPAN
    round_weight, round_table = partial(round_rows, span=span), round_all if onnx else round_float8
    for name, part in model.named_modules():
        # torchao has no way to name another class for its layer. Giving the finished layer a subclass changes its
        # `forward` alone: parameters, their names and torchao's own conversion back to a plain layer stay as they are.
        if isinstance(part, FakeQuantizedLinear):
            part.__class__, part.split = RoundedLinear, splits.get(name, ChannelSplit([]))
            part.activation_fake_quantizer = _quantizer_of_activations(plan, name, activations, onnx)
            part.weight_fake_quantizer = _quantizer_of_weights(plan, name, weights, round_weight)
        elif isinstance(part, FakeQuantizedEmbedding):
            # A look-up multiplies nothing that could overflow: all 8 bits are used.
            part.__class__ = RoundedEmbedding
            part.weight_fake_quantizer = _quantizer_of_weights(plan, name, table, round_table)


def _quantizer_of_weights(plan: Plan, name: str, config: IntxFakeQuantizeConfig, function) -> FakeQuantizerBase:
    """The fake quantizer of a layer's weights: by the plan's scales below 8 bits, by a rounding function at 8."""
    return LowBitGroups(config, plan.scales[name]) if plan.scales else Rounding(config, function)


def _quantizer_of_activations(plan: Plan, name: str, config: IntxFakeQuantizeConfig, onnx: bool) -> FakeQuantizerBase:
    """The fake quantizer of a linear layer's inputs: fixed or dynamic ranges for ONNX Runtime, floats for torchao."""
    if not onnx:
        return Rounding(config, keep_floats)
    if name in plan.ranges:
        return MovingRange(config, plan.ranges[name], cls_only=name in plan.cls_only)
    return Rounding(config, round_by_cls_token if name in plan.cls_only else round_all)


def follow_ranges(model, following: bool) -> None:
    """Lets the ranges of activations follow the batches, or keeps them as they are."""
    for part in model.modules():
        if isinstance(part, MovingRange):
            part.following = following


def switch(model, enabled: bool) -> None:
    """Turns all fake quantizers of the model on or off; while they are off, the model computes in floats."""
    for part in model.modules():
        if isinstance(part, FakeQuantizerBase):
            part.enabled = enabled


def convert(model) -> tuple[dict[str, Scales], dict[str, tuple[float, float]]]:
    """Turns the fake-quantized layers back into plain ones, in place, with the float weights that were trained.

    Returns:
        Name of a layer -> the scales to round its weights with, empty at 8 bits; and the range of its inputs, empty
        where ranges are dynamic.
    """
    scales, ranges = {}, {}  # read first: the conversion drops the quantizers that hold them
    for name, part in model.named_modules():
        if isinstance(part, LowBitGroups):
            scales[name.removesuffix(".weight_fake_quantizer")] = part.scales
        elif isinstance(part, MovingRange):
            ranges[name.removesuffix(".activation_fake_quantizer")] = tuple(part.range.tolist())
    quantize_(model, QATConfig(step="convert"), lambda part, _: isinstance(part, torch.nn.Linear | torch.nn.Embedding))
    return scales, ranges


def to_integers(model):
    """A copy of a fake-quantized model as ONNX Runtime computes it: real integers in its linear layers.

    Its embeddings hold the values that the file gives back.
    """
    model = copy.deepcopy(model)
    for name, part in list(model.named_modules()):
        if isinstance(part, RoundedLinear):
            model.set_submodule(name, IntegerLinear(part))
        elif isinstance(part, RoundedEmbedding):
            with torch.inference_mode():
                rows = part(torch.arange(part.num_embeddings))
            model.set_submodule(name, torch.nn.Embedding.from_pretrained(rows))
    return model
