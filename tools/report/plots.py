"""Pictures in one style: colours that the colour-blind tell apart, no dates, the same bytes again.

Each is kept as a PNG. A variant has the same colour and a format the same marker in every picture.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn

from emotion.evaluation.schema import Bits, Dataset, PtqSensitivity, QloraSweep
from emotion.hub.confusion_matrix import STYLE, save_figure, styled

MARKERS = {"pytorch": "o", "bf16": "s", "torchao": "D", "nf4": "P", "onnx": "^", "openvino": "v", "adapter": "X"}
OTHER = "0.45"  # grey, for marks that belong to no variant


def colors_of(variants) -> dict[str, tuple]:
    """Variant -> its colour, in the order of the variants; the same variants have the same colours again."""
    names = list(dict.fromkeys(variants))
    return dict(zip(names, seaborn.color_palette(STYLE["palette"], len(names)), strict=True))


def grid(count: int, columns: int, size: float, rows_of: int = 1):
    """A figure with ``rows_of`` blocks of ``count`` square axes, ``size`` inches wide; surplus axes are switched off.

    Returns:
        The figure, and for each block its axes in one flat array.
    """
    columns = min(columns, count)
    rows = -(-count // columns)  # rounded up
    figure, axes = plt.subplots(
        rows_of * rows, columns, figsize=(size * columns, size * rows_of * rows), squeeze=False
    )
    blocks = [block.ravel() for block in np.split(axes, rows_of)]
    for block in blocks:
        for unused in block[count:]:
            unused.axis("off")
    return figure, blocks


def plot_sensitivity(study: PtqSensitivity, path: Path) -> None:
    """How far the logits move when one layer alone is quantized; all of a kind at once are no cell of it."""
    shifts = {(one.kind, one.layer): one.mean_logit_shift for one in study.layers if one.layer is not None}
    kinds = list(dict.fromkeys(kind for kind, _ in shifts))
    places = list(dict.fromkeys(place for _, place in shifts))
    # Not every kind is in every place: embeddings have no layer. Those cells stay empty.
    cells = np.full((len(kinds), len(places)), np.nan)
    for (kind, place), shift in shifts.items():
        cells[kinds.index(kind), places.index(place)] = shift
    with styled():
        figure, axes = plt.subplots(figsize=(3.6 + 0.8 * len(places), 1.4 + 0.5 * len(kinds)))
        look = {"annot": True, "fmt": ".3f", "cmap": "Blues", "vmin": 0, "linewidths": 0.5}
        bar = {"label": "mean shift of a logit"}
        seaborn.heatmap(cells, xticklabels=places, yticklabels=kinds, ax=axes, cbar_kws=bar, **look)
        axes.set(xlabel="layer", ylabel="")
        axes.tick_params(axis="y", rotation=0)
        save_figure(figure, path)


def plot_dataset(study: Dataset, path: Path) -> None:
    """Share of each class in each split, and how the lengths of the texts are spread; from dataset.json."""
    labels, splits = study.labels, study.splits
    longest = max(one.longest for one in splits.values())
    with styled():
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
        colors = seaborn.color_palette(STYLE["palette"])
        width = 0.8 / len(splits)  # of a bar; the rest is the gap between two classes
        for index, (split, one) in enumerate(splits.items()):
            counts, lengths = np.array(one.class_counts), np.array(one.length_counts)
            # Beside each other, the middle one of the splits above the name of the class.
            places = np.arange(len(labels)) + (index - (len(splits) - 1) / 2) * width
            left.bar(places, 100 * counts / counts.sum(), width, label=split, color=colors[index])
            # The place of a count is the length that it counts: each length, as often as a text has it.
            every_length = np.repeat(np.arange(len(lengths)), lengths)
            bins = np.arange(0, longest + 4, 4)
            right.hist(every_length, bins=bins, density=True, histtype="step", linewidth=1.8, color=colors[index])
        left.set_xticks(range(len(labels)), labels)
        left.set(ylabel="share of the split in %")
        left.legend(frameon=False)
        right.set(xlabel="word pieces a text", ylabel="density")
        seaborn.despine(figure)
        save_figure(figure, path)


def plot_sweep(sweep: QloraSweep, path: Path) -> None:
    """Validation macro F1 and loss of each candidate, best on top; small dots are single seeds."""
    candidates = dict(sorted(sweep.candidates.items(), key=lambda item: item[1].validation_macro_f1.mean))
    places, colors = np.arange(len(candidates)), seaborn.color_palette(STYLE["palette"])
    shades = [colors[1] if name == sweep.chosen else colors[0] for name in candidates]
    panels = (("validation_macro_f1", 100, "macro F1 in %"), ("validation_loss", 1, "loss"))
    with styled():
        figure, both = plt.subplots(1, 2, figsize=(11, 1 + 0.38 * len(candidates)), sharey=True)
        for axes, (key, factor, title) in zip(both, panels, strict=True):
            values = factor * np.array([getattr(one, key).mean for one in candidates.values()])
            # A line from the lowest value, not from zero: the candidates differ by a few points only.
            axes.hlines(places, min(values), values, color="0.85", linewidth=2, zorder=1)
            axes.scatter(values, places, c=shades, s=60, zorder=2)
            for place, one in zip(places, candidates.values(), strict=True):
                seeds = [factor * getattr(run, key) for run in one.runs]
                axes.scatter(seeds, [place] * len(seeds), color="0.6", s=12, zorder=1)
            axes.set(xlabel=f"validation {title}")
        both[0].set_yticks(places, candidates)
        seaborn.despine(figure)
        save_figure(figure, path)


def plot_rounding(path: Path) -> None:
    """How rounding changes a weight at 4 and at 2 bits, and the identity that its gradient assumes.

    It shows the rounding of QAT itself, on weights drawn from a normal distribution: it needs no result.
    """
    import torch

    from emotion.quantization.lowbit import choose_scales, round_matrix

    # Sorted, so that they can be drawn as a line; (1, 2048), since a layer's weights are a matrix.
    weights = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0)).sort().values
    with styled():
        figure, both = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
        colors = seaborn.color_palette(STYLE["palette"])
        for axes, bits in zip(both, (4, 2), strict=True):
            # All weights share one scale here, as those of one row or group do in a layer.
            rounded = round_matrix(weights, choose_scales(weights, bits, weights.shape[1]))
            axes.hist(weights[0], bins=60, density=True, color="0.88")
            axes.step(weights[0], rounded[0], where="mid", color=colors[0], label="forward: rounded")
            axes.plot(weights[0], weights[0], color=colors[1], linestyle="--", label="backward: straight through")
            axes.set(title=f"{bits} bits", xlabel="weight, in standard deviations")
        both[0].set(ylabel="what the layer multiplies with")
        both[0].legend(frameon=False, loc="upper left")
        seaborn.despine(figure)
        save_figure(figure, path)


def plot_bits(study: Bits, path: Path) -> None:
    """Macro F1 against megabytes: a line per method, FP32 as the level to reach; bars: deviation over the seeds."""
    with styled():
        figure, axes = plt.subplots(figsize=(7.5, 3.4))  # low: the README shows it below its table
        colors = seaborn.color_palette(STYLE["palette"])
        for method, color in (("ptq", colors[1]), ("qat", colors[0])):
            cells = study.cells_of(method)[::-1]  # the smallest first
            sizes = [cell.megabytes for cell in cells]
            changes = 100 * np.array([cell.change.mean for cell in cells])  # points
            deviations = 100 * np.array([cell.change.standard_deviation or 0 for cell in cells])  # 0: one seed
            look = {"color": color, "marker": "o", "capsize": 3, "label": method.upper()}
            axes.errorbar(sizes, changes, yerr=deviations, **look)
            if method == "qat":  # one line of labels is enough: both methods have the same sizes
                for cell, size, top in zip(cells, sizes, changes + deviations, strict=True):
                    offset = {"xytext": (0, 7), "textcoords": "offset points"}  # just above the bar
                    axes.annotate(f"{cell.bits} bits", (size, top), ha="center", fontsize="small", **offset)
        axes.axhline(0, color="0.5", linewidth=1, linestyle="--", label="FP32")
        axes.set(xlabel="megabytes to serve", ylabel="macro F1 against FP32, points")
        axes.legend(frameon=False)
        seaborn.despine(figure)
        save_figure(figure, path)
