"""Quantization-aware training in torchao's three moves: prepare, train, convert.

Preparing puts a fake quantizer before and into each layer. It rounds as the shipped form does, and the layer
multiplies the whole numbers that come out of it: in floats, which hold them exactly, so that the sums are those of the
integers to the last digit. Rounding has no useful slope, so its gradient passes straight through (Bengio, Léonard and
Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013).

Each runtime measures activations in its own way, and so does its fake quantizer: torchao token by token (8 bits), ONNX
Runtime with one range for all tokens of a batch (below 8 bits). torchao's own fake quantizers have neither these two
nor the levels of lowbit.py, and multiply what they have scaled back; hence those below.
"""

from functools import partial

from emotion.quantize.layers import Layers
from emotion.quantize.lowbit import Scales, integers_of, round_matrix

import torch
from torch.nn import functional
from torchao.quantization import quantize_
from torchao.quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear, IntxFakeQuantizeConfig, QATConfig
from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

EPSILON = torch.finfo(torch.float32).eps  # torchao's smallest scale


def round_rows(values: torch.Tensor, span: tuple[int, int] = (-128, 127)) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row (the last dimension) to symmetric integers, as torchao does it for INT8.

    Returns:
        The integers, as floats, and what 1 is worth: float32 (..., 1).
    """
    scale = values.abs().amax(dim=-1, keepdim=True).float() / ((span[1] - span[0]) / 2)
    scale = scale.clamp_(min=EPSILON)
    return (values * (1.0 / scale)).round_().clamp_(*span), scale


def round_all(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All values to the 256 integers of one range around zero, as ONNX Runtime's DynamicQuantizeLinear does it.

    Returns:
        The integers without their zero point, floats from -255 to 255, and what 1 is worth: float32, one number.
    """
    values = values.float()  # under autocast too: a quotient of bfloat16 would be rounded twice
    lowest, highest = torch.aminmax(values)
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    scale = (highest - lowest) / 255
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-lowest / scale).round()
    return (values / scale).round_().add_(zero).clamp_(0, 255).sub_(zero), scale


class Rounding(FakeQuantizerBase):
    """One of the functions above, which measures the values anew each time."""

    def __init__(self, config: IntxFakeQuantizeConfig, function):
        super().__init__()
        self.config, self.enabled, self.function = config, True, function

    def round(self, values: torch.Tensor, ids=None) -> tuple[torch.Tensor, torch.Tensor]:
        """The values to integers, whichever ids looked them up; and their scale."""
        return self.function(values)


class LowBitGroups(FakeQuantizerBase):
    """2 to 4 bits with the two-level scales of lowbit.py, which stay as they were chosen before the training.

    The scales are buffers, so that a checkpoint holds them.
    """

    def __init__(self, config: IntxFakeQuantizeConfig, scales: Scales):
        super().__init__()
        self.config, self.enabled, self.bits = config, True, scales.bits
        self.register_buffer("row", scales.row)
        self.register_buffer("multiplier", scales.multiplier)

    @property
    def scales(self) -> Scales:
        return Scales(self.bits, self.row, self.multiplier)

    def round(self, weight: torch.Tensor, ids=slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows of a weight, or those that ``ids`` looked up, (..., columns), to integers; and their scales."""
        scales = Scales(self.bits, self.row[ids], self.multiplier[ids])
        return integers_of(weight, scales), scales.row


class StraightThrough(torch.autograd.Function):
    """Integers times their scale; the gradient passes as if nothing had been rounded."""

    @staticmethod
    def forward(ctx, values, rounding):
        integers, scale = rounding(values)
        return integers.mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class IntegerProduct(torch.autograd.Function):
    """A linear layer of rounded values (..., columns) and a rounded weight (rows, columns).

    The sums are exact below 2^24: for more than 1,000 columns of the largest integers (255 x 64), and those cancel.
    Under autocast to bfloat16 the integers are exact still, and the sums keep eight binary digits.
    """

    @staticmethod
    def forward(ctx, values, weight, bias, round_values, round_weight):
        (left, scale), (right, row) = round_values(values), round_weight(weight)
        device = values.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values.dtype
        left, right, row = left.to(dtype), right.to(dtype), row.flatten()
        ctx.save_for_backward(left, scale, right, row)
        ctx.has_bias = bias is not None
        product = functional.linear(left, right).mul_(scale).mul_(row)  # in torchao's order
        return product.add_(bias) if ctx.has_bias else product

    @staticmethod
    def backward(ctx, gradient):
        left, scale, right, row = ctx.saved_tensors
        for_values = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_values = (gradient * row.to(gradient.dtype)) @ right
        if ctx.needs_input_grad[1]:
            scaled = gradient * scale.to(gradient.dtype)
            for_weight = scaled.reshape(-1, scaled.shape[-1]).T @ left.reshape(-1, left.shape[-1])
        if ctx.has_bias and ctx.needs_input_grad[2]:
            for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0)
        return for_values, for_weight, for_bias, None, None


class RoundedLinear(FakeQuantizedLinear):
    """A linear layer that multiplies integers where torchao's multiplies what they are worth."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if not self.weight_fake_quantizer.enabled:
            return functional.linear(values, self.weight, self.bias)
        rounding = self.activation_fake_quantizer.round, self.weight_fake_quantizer.round
        return IntegerProduct.apply(values, self.weight, self.bias, *rounding)


class RoundedEmbedding(FakeQuantizedEmbedding):
    """An embedding that rounds the rows it looks up, not its whole table: the result is the same."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows, quantizer = functional.embedding(ids, self.weight, self.padding_idx), self.weight_fake_quantizer
        return StraightThrough.apply(rows, partial(quantizer.round, ids=ids)) if quantizer.enabled else rows


class IntegerLinear(torch.nn.Module):
    """What ONNX Runtime makes of a layer below 8 bits: uint8 activations times int8 weights, summed in int32."""

    def __init__(self, layer: torch.nn.Linear, scales: Scales):
        super().__init__()
        integers = integers_of(layer.weight.detach(), scales).to(torch.int8)
        self.weight, self.row, self.bias = integers, scales.row.flatten(), layer.bias
        self.sums = integers.sum(dim=1, dtype=torch.int32)  # of each row: what an activation of 1 everywhere gives

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        integers, scale = round_all(values)
        lowest = integers.amin().clamp(max=0)  # taken off, all fit into uint8
        sums = torch._int_mm((integers - lowest).to(torch.uint8).flatten(0, -2), self.weight.T)
        sums += lowest.int() * self.sums
        product = (sums * scale).mul_(self.row).unflatten(0, values.shape[:-1])
        return product if self.bias is None else product.add_(self.bias)


def prepare(model, layers: Layers, scales: dict[str, Scales], reduce_range: bool = True) -> None:
    """Makes the layers fake-quantized, in place: INT8 for torchao, or with the scales given, for ONNX Runtime.

    Args:
        reduce_range: INT8 weights of 7 bits, as `quantize_torchao` makes them.
    """
    round_weight = partial(round_rows, span=(-64, 63)) if reduce_range else round_rows
    linear, embeddings = set(layers.linear), set(layers.embeddings)
    # torchao asks for these and gives each layer quantizers of its own, in whose place come those of this file.
    activations = IntxFakeQuantizeConfig(torch.uint8 if scales else torch.int8, "per_token", is_symmetric=not scales)
    weights = IntxFakeQuantizeConfig(torch.int7, "per_channel", is_symmetric=True)
    table = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    quantize_(model, QATConfig(None, activations, weights, step="prepare"), lambda _, name: name in linear)
    quantize_(model, QATConfig(None, None, table, step="prepare"), lambda _, name: name in embeddings)
    for name, part in model.named_modules():
        if isinstance(part, FakeQuantizedLinear):
            part.__class__ = RoundedLinear
            part.activation_fake_quantizer = Rounding(activations, round_all if scales else round_rows)
            part.weight_fake_quantizer = (
                LowBitGroups(weights, scales[name]) if scales else Rounding(weights, round_weight)
            )
        elif isinstance(part, FakeQuantizedEmbedding):
            part.__class__ = RoundedEmbedding
            part.weight_fake_quantizer = LowBitGroups(table, scales[name]) if scales else Rounding(table, round_rows)


def switch(model, enabled: bool) -> None:
    """Turns all fake quantizers on or off; off, the model computes in floats."""
    for part in model.modules():
        if isinstance(part, FakeQuantizerBase):
            part.enabled = enabled


def convert(model) -> dict[str, Scales]:
    """Gives the layers back as plain ones, in place, with the float weights that were trained.

    Returns:
        The scales to round them with; none at 8 bits.
    """
    scales = {
        name.removesuffix(".weight_fake_quantizer"): part.scales
        for name, part in model.named_modules()
        if isinstance(part, LowBitGroups)
    }
    quantize_(model, QATConfig(step="convert"), lambda part, _: isinstance(part, torch.nn.Linear | torch.nn.Embedding))
    return scales


def to_integers(model, layers: Layers, scales: dict[str, Scales]):
    """The plain model below 8 bits, in place: layers of real integers, and embeddings as the file gives them back."""
    for name in layers.linear:
        model.set_submodule(name, IntegerLinear(model.get_submodule(name), scales[name]))
    for name in layers.embeddings:
        table = model.get_submodule(name).weight
        table.data = round_matrix(table.data, scales[name])
    return model
