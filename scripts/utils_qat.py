"""Quantization-aware training in torchao's three moves: prepare, train, convert.

Preparing puts a fake quantizer before and into each layer: it rounds exactly as the shipped form does, but goes on in
floats. Rounding has no useful slope, so its gradient passes straight through (Bengio, Léonard and Courville,
"Estimating or Propagating Gradients Through Stochastic Neurons", 2013). torchao's own quantizers cost more time and
have neither INT8 activations that are symmetric per token nor the levels of utils_lowbit.py; hence those below.
"""

from functools import partial

import torch
from torch.nn import functional
from torchao.quantization import Int8Tensor, PerRow, quantize_
from torchao.quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear, IntxFakeQuantizeConfig, QATConfig
from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase
from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs
from utils_int8 import Layers
from utils_lowbit import Scales, round_groups, round_matrix

INT7 = (-64, 63)  # of the weights at 8 bits; see quantize_torchao
EPSILON = torch.finfo(torch.float32).eps  # torchao's smallest scale


class StraightThrough(torch.autograd.Function):
    """Rounds with the function given; the gradient passes as if nothing had been rounded."""

    @staticmethod
    def forward(ctx, values, rounding):
        return rounding(values)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def round_rows(values: torch.Tensor, span: tuple[int, int]) -> torch.Tensor:
    """Each row (the last dimension) to symmetric integers and back, as torchao does it for INT8."""
    scale = values.abs().amax(dim=-1, keepdim=True).float() / ((span[1] - span[0]) / 2)
    scale = scale.clamp_(min=EPSILON)
    return (values * (1.0 / scale)).round_().clamp_(*span).mul_(scale)


class Int8Rows(FakeQuantizerBase):
    """INT8 with a scale a row, measured anew each time: of activations that is a scale a token."""

    def __init__(self, config: IntxFakeQuantizeConfig, span: tuple[int, int] = (-128, 127)):
        super().__init__()
        self.config, self.enabled, self.span = config, True, span

    def forward(self, values: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        return StraightThrough.apply(values, partial(round_rows, span=self.span)) if self.enabled else values


class LowBitGroups(FakeQuantizerBase):
    """2 to 4 bits with the two-level scales of utils_lowbit.py, which stay as they were chosen before the training.

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

    def forward(self, weight: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """All rows of a weight, or those that ``ids`` looked up, (..., columns)."""
        if not self.enabled:
            return weight
        step = self.scales.step if ids is None else self.scales.step[ids]

        def rounding(weight):
            return round_groups(weight.unflatten(-1, (step.shape[-2], -1)), step, self.bits).flatten(-2)

        return StraightThrough.apply(weight, rounding)


class LookedUpRows(FakeQuantizedEmbedding):
    """An embedding that rounds the rows it looks up, not its whole table: the result is the same."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = functional.embedding(ids, self.weight, self.padding_idx)
        return self.weight_fake_quantizer(rows, ids)


def prepare(model, layers: Layers, scales: dict[str, Scales]) -> None:
    """Makes the layers fake-quantized, in place: INT8 as torchao ships it, or with the scales given."""
    linear, embeddings = set(layers.linear), set(layers.embeddings)
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=True)
    weights = IntxFakeQuantizeConfig(torch.int7, "per_channel", is_symmetric=True)
    table = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    quantize_(model, QATConfig(None, activations, weights, step="prepare"), lambda _, name: name in linear)
    quantize_(model, QATConfig(None, None, table, step="prepare"), lambda _, name: name in embeddings)
    for name, part in model.named_modules():
        if isinstance(part, FakeQuantizedLinear):
            part.activation_fake_quantizer = Int8Rows(activations)
            rounding = LowBitGroups(weights, scales[name]) if scales else Int8Rows(weights, INT7)
            part.weight_fake_quantizer = rounding
        elif isinstance(part, FakeQuantizedEmbedding):
            part.__class__ = LookedUpRows
            part.weight_fake_quantizer = LowBitGroups(table, scales[name]) if scales else Int8Rows(table)


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
    """The plain model with real integers below 8 bits, in place: torchao's INT8 of what the packed file holds."""
    for name in layers.linear:
        part = model.get_submodule(name)
        rounded = round_matrix(part.weight.detach(), scales[name])
        weight = Int8Tensor.from_hp(
            rounded, PerRow(), scale=scales[name].row, act_quant_kwargs=QuantizeTensorToInt8Kwargs(PerRow())
        )
        part.weight = torch.nn.Parameter(weight, requires_grad=False)
    for name in layers.embeddings:
        part = model.get_submodule(name)
        part.weight.data = round_matrix(part.weight.data, scales[name])
    return model
