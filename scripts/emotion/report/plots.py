"""Pictures in one style, as PNG and SVG: colours that the colour-blind tell apart, no dates, the same bytes again.

What is compared has a colour by its variant and a marker by its format, in every picture.
"""

import contextlib
from pathlib import Path

from emotion.common.files import whole_file
from emotion.report.pages import _cells

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn

matplotlib.use("Agg")
STYLE = {"style": "ticks", "context": "notebook", "palette": "colorblind"}
MARKERS = {"pytorch": "o", "bf16": "s", "torchao": "D", "nf4": "P", "onnx": "^", "openvino": "v"}
OTHER = "0.45"  # grey, for what is not ours
matplotlib.rcParams["svg.hashsalt"] = "emotion"  # names inside an SVG are random without it


@contextlib.contextmanager
def styled():
    with seaborn.axes_style(STYLE["style"]), seaborn.plotting_context(STYLE["context"]):
        yield


def colors_of(variants) -> dict[str, tuple]:
    names = list(dict.fromkeys(variants))
    return dict(zip(names, seaborn.color_palette(STYLE["palette"], len(names)), strict=True))


def save_figure(figure, path: Path) -> None:
    """Writes ``path``.png and ``path``.svg without dates or versions in them; letters are drawn as shapes."""
    for form, nothing in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        with whole_file(path.with_name(f"{path.name}.{form}")) as partial:
            figure.savefig(partial, dpi=110, bbox_inches="tight", format=form, metadata=nothing)
    plt.close(figure)


def grid(count: int, columns: int, size: float, rows_of: int = 1):
    """A figure with ``rows_of`` blocks of ``count`` square axes; those too many are switched off."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows_of * rows, columns, figsize=(size * columns, size * rows_of * rows), squeeze=False
    )
    blocks = [block.ravel() for block in np.split(axes, rows_of)]
    for block in blocks:
        for unused in block[count:]:
            unused.axis("off")
    return figure, blocks


def plot_confusion_matrix(record: dict, path: Path) -> None:
    """Counts in the cells, colour by the share of the true class."""
    quality = record["quality"]
    with styled():
        size = 2.2 + 0.75 * len(quality["labels"])
        figure, axes = plt.subplots(figsize=(size + 0.8, size))
        draw_confusion(axes, quality["confusion_matrix"], quality["labels"], cbar=True)
        axes.set_title(
            f"{record['variant']}-{record['format']}, {quality['split']}: {quality['examples']} texts, "
            f"macro F1 {quality['macro_f1']:.3f}",
            fontsize="medium",
        )
        save_figure(figure, path)


def draw_confusion(axes, counts, labels: list[str], cbar: bool = False, **options) -> None:
    """One matrix, coloured by the share of the true class."""
    counts = np.array(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    bar = {"cbar_kws": {"label": "share of the true class", "shrink": 0.8}} if cbar else {}
    draw_cells(axes, shares, counts, labels, fmt="d", cmap="Blues", vmin=0, vmax=1, cbar=cbar, **bar, **options)


def draw_cells(axes, values, numbers, labels: list[str], **options) -> None:
    """A square heat map with numbers, true classes down and predicted ones across."""
    seaborn.heatmap(values, annot=numbers, square=True, linewidths=0.5, xticklabels=labels, yticklabels=labels,
                    ax=axes, **options)  # fmt: skip
    axes.set(xlabel="predicted", ylabel="true")
    axes.tick_params(axis="y", rotation=0)
    axes.tick_params(axis="x", rotation=30)


def plot_sensitivity(layers: list[dict], path: Path) -> None:
    """How far the logits move when one layer alone is quantized; ``layers`` are those of ptq_sensitivity.json."""
    shifts = {(one["kind"], one["layer"]): one["mean_logit_shift"] for one in layers if one["layer"] is not None}
    kinds, layers = (list(dict.fromkeys(key[index] for key in shifts)) for index in (0, 1))
    cells = np.array([[shifts.get((kind, layer), np.nan) for layer in layers] for kind in kinds])
    with styled():
        figure, axes = plt.subplots(figsize=(3.6 + 0.8 * len(layers), 1.4 + 0.5 * len(kinds)))
        seaborn.heatmap(cells, annot=True, fmt=".3f", cmap="Blues", vmin=0, linewidths=0.5, xticklabels=layers,
                        yticklabels=kinds, ax=axes, cbar_kws={"label": "mean shift of a logit"})  # fmt: skip
        axes.set(xlabel="layer", ylabel="")
        axes.tick_params(axis="y", rotation=0)
        save_figure(figure, path)


def plot_dataset(counts: dict[str, np.ndarray], lengths: dict[str, np.ndarray], labels: list[str], path: Path) -> None:
    """Share of each class in each split, and how the lengths of the texts are spread."""
    with styled():
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
        colors = seaborn.color_palette(STYLE["palette"])
        width = 0.8 / len(counts)
        for index, (split, values) in enumerate(counts.items()):
            places = np.arange(len(labels)) + (index - (len(counts) - 1) / 2) * width
            left.bar(places, 100 * values / values.sum(), width, label=split, color=colors[index])
            bins = np.arange(0, max(v.max() for v in lengths.values()) + 4, 4)
            right.hist(lengths[split], bins=bins, density=True, histtype="step", linewidth=1.8, color=colors[index])
        left.set_xticks(range(len(labels)), labels)
        left.set(ylabel="share of the split in %")
        left.legend(frameon=False)
        right.set(xlabel="word pieces a text", ylabel="density")
        seaborn.despine(figure)
        save_figure(figure, path)


def plot_sweep(sweep: dict, path: Path) -> None:
    """Validation macro F1 and loss of each candidate, best on top; the chosen one stands out."""
    candidates = dict(sorted(sweep["candidates"].items(), key=lambda item: item[1]["validation_macro_f1"]))
    places, colors = np.arange(len(candidates)), seaborn.color_palette(STYLE["palette"])
    shades = [colors[1] if name == sweep["chosen"] else colors[0] for name in candidates]
    with styled():
        figure, axes = plt.subplots(1, 2, figsize=(11, 1 + 0.38 * len(candidates)), sharey=True)
        for part, key, factor, title in zip(axes, ("validation_macro_f1", "validation_loss"), (100, 1),
                                            ("macro F1 in %", "loss"), strict=True):  # fmt: skip
            values = [factor * one[key] for one in candidates.values()]
            part.hlines(places, min(values), values, color="0.85", linewidth=2, zorder=1)
            part.scatter(values, places, c=shades, s=60, zorder=2)
            part.set(xlabel=f"validation {title}")
        axes[0].set_yticks(places, candidates)
        seaborn.despine(figure)
        save_figure(figure, path)


def plot_rounding(path: Path) -> None:
    """What rounding makes of a weight at 4 and at 2 bits, and what its gradient takes it for."""
    from emotion.quantize.lowbit import choose_scales, round_matrix
    from emotion.report.plots import STYLE, save_figure, styled

    import torch

    weights = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0)).sort().values
    with styled():
        figure, both = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
        colors = seaborn.color_palette(STYLE["palette"])
        for axes, bits in zip(both, (4, 2), strict=True):
            rounded = round_matrix(weights, choose_scales(weights, bits, weights.shape[1]))
            axes.hist(weights[0], bins=60, density=True, color="0.88")
            axes.step(weights[0], rounded[0], where="mid", color=colors[0], label="forward: rounded")
            axes.plot(weights[0], weights[0], color=colors[1], linestyle="--", label="backward: straight through")
            axes.set(title=f"{bits} bits", xlabel="weight, in standard deviations")
        both[0].set(ylabel="what the layer multiplies with")
        both[0].legend(frameon=False, loc="upper left")
        seaborn.despine(figure)
        save_figure(figure, path)


def plot_bits(study: dict, path: Path) -> None:
    """Macro F1 against megabytes: a line a method, FP32 as the level to reach."""
    from emotion.report.plots import STYLE, save_figure, styled

    with styled():
        figure, axes = plt.subplots(figsize=(7, 4.2))
        colors = seaborn.color_palette(STYLE["palette"])
        for method, color in (("ptq", colors[1]), ("qat", colors[0])):
            cells = _cells(study, method)[::-1]  # the smallest first
            axes.errorbar(
                [cell["megabytes"] for cell in cells], [100 * cell["change"]["mean"] for cell in cells],
                yerr=[100 * (cell["change"]["standard_deviation"] or 0) for cell in cells], color=color, marker="o",
                capsize=3, label=method.upper())  # fmt: skip
            for cell in cells if method == "qat" else ():
                above = cell["change"]["mean"] + (cell["change"]["standard_deviation"] or 0)
                axes.annotate(f"{cell['bits']} bits", (cell["megabytes"], 100 * above),
                              xytext=(0, 7), textcoords="offset points", ha="center", fontsize="small")  # fmt: skip
        axes.axhline(0, color="0.5", linewidth=1, linestyle="--", label="FP32")
        axes.set(xlabel="megabytes to serve", ylabel="macro F1 against FP32, points")
        axes.legend(frameon=False)
        seaborn.despine(figure)
        save_figure(figure, path)
