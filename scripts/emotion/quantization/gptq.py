"""Rounding that keeps the outputs of a layer rather than each weight.

The weights that are still to be rounded make up for the errors of those before them in their row (GPTQ: Frantar et
al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023).
"""

import torch

from emotion.quantization.layers import CalibrationRows, watch_inputs

# Columns whose errors are passed on to all later ones together, as in section 3 of the paper. Column by column, all
# later weights would be read and written each time.
COLUMNS_AT_ONCE = 128
DAMPING = 0.01  # share of the inputs' mean square that is added, so that the matrix of their products has an inverse


def multiply_inputs(model, names: list[str], rows: CalibrationRows) -> dict[str, torch.Tensor]:
    """The products of each layer's inputs with each other, summed over all word pieces of the rows.

    Args:
        model: the float model.
        names: the linear layers.

    Returns:
        Name of a layer -> float32 (width, width), symmetric.
    """
    products = {}
    for name in names:
        width = model.get_submodule(name).in_features
        products[name] = torch.zeros(width, width, device=model.device)

    def see(name, inputs):
        products[name].addmm_(inputs.T, inputs)

    watch_inputs(model, names, rows, see)
    return products


def compensate(weight: torch.Tensor, products: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor):
    """GPTQ, column by column: each column makes up for the rounding errors of those before it.

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
