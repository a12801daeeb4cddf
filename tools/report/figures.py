"""The pictures of the pages: PNGs in one style, with colors that the color-blind can tell apart.

A method has the same color in every picture. They are transparent, and readable on white and on dark pages.
"""

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn

from emotion.evaluation.schema import Measurement
from emotion.hub.comparison import Family, processors_of
from emotion.hub.model_card import order, variants_with_card
from emotion.hub.render import INK, PALETTE, complete, plot_confusion_matrix, save_figure, styled
from emotion.utils.machine import PROCESSORS
from report.pages import families_of, list_lines

# As light as INK, blue, orange and green of the palette for the color-blind
COLORS = {"qat": "#2f81d6", "ptq": "#c2741a", "qlora": "#1a9370", "baseline": INK}
LARGEST_LOSS = 6  # points: what loses more is drawn at the edge
PIXEL_TOLERANCE = 1e-5  # of full brightness, in the mean over all pixels


def list_pictures(family: Family) -> dict:
    """Path of each PNG of a comparison -> the function that draws it."""
    figures, lines = family.folder / "figures", list_lines(family.comparison)
    pictures = {figures / "pareto.png": partial(plot_pareto, lines)}
    if any(line["per_class_f1"] for line in lines):
        pictures[figures / "classes.png"] = partial(plot_classes, lines)
    if any(line["speeds"] for line in lines):
        pictures[figures / "speed.png"] = partial(plot_speed, lines)
    return pictures


def list_card_pictures(family: Family) -> dict:
    """Path of each card's PNG -> the function that draws it: the confusion matrix of the variant's first record."""
    pictures = {}
    for variant in variants_with_card(family.records):
        record = order(family.records, variant)[0]
        path = family.folder / "confusion_matrices" / f"{record.name}.png"
        pictures[path] = partial(plot_confusion_matrix, record)
    return pictures


def list_study_pictures(results: Path) -> dict:
    """Path of each study's PNG -> the function that draws it, for the studies in ``results``."""
    pictures = {}
    for family in families_of(results):
        for name, draw in (("dataset", plot_dataset), ("ptq_sensitivity", plot_sensitivity)):
            path = family / f"{name}.json"
            if path.is_file():
                pictures[path.with_suffix(".png")] = partial(complete(path)(draw), Measurement.read(path))
    if pictures:  # it explains what they and the report speak of
        pictures[families_of(results)[0] / "rounding.png"] = plot_rounding
    return pictures


def same_picture(fresh: Path, kept: Path) -> bool:
    """Whether two PNGs show the same: equal pixels, except for what another processor may round otherwise."""
    if not kept.is_file():
        return False
    if fresh.read_bytes() == kept.read_bytes():  # nearly always; reading the pixels takes longer
        return True
    pixels, kept_pixels = plt.imread(fresh), plt.imread(kept)  # float32 (height, width, colors), 0 to 1
    return pixels.shape == kept_pixels.shape and float(np.abs(pixels - kept_pixels).mean()) < PIXEL_TOLERANCE


def color_of(variant: str) -> str:
    """The color of a variant's method."""
    return COLORS.get(variant.partition("-")[0], INK)


def plot_pareto(lines: list[dict], path: Path) -> None:
    """Macro F1 against size, with the Pareto front; bars: standard deviation over the seeds."""
    floor = 100 * lines[0]["macro_f1"]["mean"] - LARGEST_LOSS
    with styled():
        figure, axes = plt.subplots(figsize=(8, 3.6))
        best = sorted(lines, key=lambda line: (line["megabytes"], -line["macro_f1"]["mean"]))
        front = 100 * np.maximum.accumulate([line["macro_f1"]["mean"] for line in best])
        axes.step([line["megabytes"] for line in best], front, where="post", color=INK, linewidth=1, linestyle=":")
        for line in lines:
            size, score, name = line["megabytes"], 100 * line["macro_f1"]["mean"], line["title"]
            deviation = 100 * (line["macro_f1"]["standard_deviation"] or 0)  # 0: one seed
            if score < floor:
                score, deviation, name = floor, 0, f"{name}: {score:.1f} %"
            look = {"color": color_of(line["variant"]), "capsize": 3, "elinewidth": 1, "markersize": 8}
            axes.errorbar(size, score, yerr=deviation, fmt="o" if score > floor else "v", **look)
            # QAT above and to the right, the others below, so that labels of one size do not meet
            above = line["variant"].startswith("qat") or line["variant"] == "baseline"
            offset = {"xytext": (8, 9 if above else -14), "textcoords": "offset points"}
            axes.annotate(name, (size, score), fontsize="small", color=look["color"], **offset)
        axes.set(
            xlabel="size of all files, MB",
            ylabel="macro F1, %",
            xscale="log",
            xlim=(None, 1.4 * lines[0]["megabytes"]),
        )
        axes.margins(y=0.15)  # for the labels
        axes.set_title("Macro F1 against size: the means over training seeds", fontsize="medium", loc="left")
        plain_ticks(axes, [line["megabytes"] for line in lines])
        seaborn.despine(figure)
        save_figure(figure, path)


def plain_ticks(axes, values: list[float]) -> None:
    """Sets ticks at 1, 2, 5, 10, ... on a logarithmic axis, without powers of ten."""
    steps = [step * 10.0**power for power in range(-2, 5) for step in (1, 2, 5)]
    inside = [step for step in steps if min(values) / 1.5 <= step <= 1.5 * max(values)]
    axes.set_xticks(inside, [f"{step:g}" for step in inside])
    axes.minorticks_off()


def plot_speed(lines: list[dict], path: Path) -> None:
    """The median latency of one text on each kind of processor, with the speedup over FP32 of the same run."""
    processors = processors_of(lines)
    with styled():
        size = 5.2 * len(processors), 1.2 + 0.36 * len(lines)
        figure, panels = plt.subplots(1, len(processors), figsize=size, sharey=True, squeeze=False)
        for axes, processor in zip(panels[0], processors, strict=True):
            for index, line in enumerate(lines):
                speed = line["speeds"].get(processor)
                if not speed or not speed["p50_ms"]:
                    axes.text(0, index, " not measured", va="center", fontsize="small")
                    continue
                axes.barh(index, speed["p50_ms"], height=0.6, linewidth=0, color=color_of(line["variant"]))
                ratio = speed["times_faster_at_batch_1"]
                label = f" {speed['p50_ms']:.2f}" + (f" ({ratio['median']:.1f}x)" if ratio else "")
                axes.text(speed["p50_ms"], index, label, va="center", fontsize="small")
            axes.set(xlabel="ms per text, median; in brackets times FP32's speed", xlim=(0, 1.35 * axes.get_xlim()[1]))
            axes.set_title(PROCESSORS[processor], fontsize="medium", loc="left")
        panels[0][0].set_yticks(range(len(lines)), [line["title"] for line in lines])
        panels[0][0].invert_yaxis()
        seaborn.despine(figure)
        figure.tight_layout()
        save_figure(figure, path)


def plot_classes(lines: list[dict], path: Path) -> None:
    """The F1 of each class, a panel per class; bars: standard deviation over the seeds."""
    lines = [line for line in lines if line["per_class_f1"]]
    labels = list(lines[0]["per_class_f1"])
    columns = min(3, len(labels))
    rows = -(-len(labels) // columns)  # rounded up
    with styled():
        size = 3.6 * columns, rows * (1 + 0.27 * len(lines))
        figure, panels = plt.subplots(rows, columns, figsize=size, sharey=True, sharex=True, squeeze=False)
        for axes, label in zip(panels.ravel(), labels, strict=False):
            for index, line in enumerate(lines):
                mean, deviation = line["per_class_f1"][label].values()
                look = {"color": color_of(line["variant"]), "fmt": "o", "capsize": 2, "elinewidth": 1}
                axes.errorbar(100 * mean, index, xerr=100 * (deviation or 0), **look)
            axes.axvline(100 * lines[0]["per_class_f1"][label]["mean"], color=INK, linewidth=1, linestyle=":")
            axes.set_title(label, fontsize="medium", loc="left")
        for axes in panels[-1]:
            axes.set(xlabel="F1, %")
        panels[0][0].set_yticks(range(len(lines)), [line["title"] for line in lines])
        panels[0][0].invert_yaxis()
        seaborn.despine(figure)
        figure.tight_layout()
        save_figure(figure, path)


def plot_sensitivity(study: Measurement, path: Path) -> None:
    """A heat map of the mean logit shift when one layer is quantized."""
    shifts = {(one["kind"], one["layer"]): one["mean_logit_shift"] for one in study.layers if one["layer"]}
    kinds, layers = (list(dict.fromkeys(names)) for names in zip(*shifts, strict=True))
    # Embeddings are in no layer: their cells stay empty.
    cells = [[shifts.get((kind, layer), np.nan) for layer in layers] for kind in kinds]
    with styled():
        figure, axes = plt.subplots(figsize=(3.6 + 0.8 * len(layers), 1.4 + 0.5 * len(kinds)))
        look = {"annot": True, "fmt": ".3f", "cmap": "Blues", "vmin": 0, "linewidths": 0.5}
        bar = {"label": "mean shift of the logits"}
        seaborn.heatmap(cells, xticklabels=layers, yticklabels=kinds, ax=axes, cbar_kws=bar, **look)
        axes.set(xlabel="encoder layer", ylabel="")
        axes.set_title("Sensitivity: one layer in INT8, all others in FP32", fontsize="medium", loc="left")
        axes.tick_params(axis="y", rotation=0)
        save_figure(figure, path)


def plot_dataset(study: Measurement, path: Path) -> None:
    """The share of each class in each split, and the distribution of the lengths."""
    with styled():
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
        colors = seaborn.color_palette(PALETTE)
        width = 0.8 / len(study.splits)  # of a bar; the rest is the gap between two classes
        for index, (name, split) in enumerate(study.splits.items()):
            counts, lengths = np.array(split["class_counts"]), np.array(split["length_counts"])
            # Side by side, centered above the name of the class
            x = np.arange(len(study.labels)) + (index - (len(study.splits) - 1) / 2) * width
            left.bar(x, 100 * counts / counts.sum(), width, label=name, color=colors[index])
            of_texts = np.repeat(np.arange(len(lengths)), lengths)
            bins = np.arange(0, max(len(one["length_counts"]) for one in study.splits.values()) + 3, 4)
            right.hist(of_texts, bins=bins, density=True, histtype="step", linewidth=1.8, color=colors[index])
        left.set_xticks(range(len(study.labels)), study.labels)
        left.set(title="Classes", ylabel="share of the split, %")
        left.legend(frameon=False)
        right.set(title="Lengths", xlabel="tokens per text", ylabel="density")
        seaborn.despine(figure)
        save_figure(figure, path)


def plot_rounding(path: Path) -> None:
    """Fake quantization of normally distributed weights at 4 and 2 bits, and the straight-through gradient."""
    import torch

    from emotion.quantization.lowbit import choose_scales, round_matrix

    # Sorted, so that they can be drawn as a line; (1, 2048), since a layer's weights are a matrix.
    weights = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0)).sort().values
    with styled():
        figure, both = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
        colors = seaborn.color_palette(PALETTE)
        for axes, bits in zip(both, (4, 2), strict=True):
            # All weights share one scale here, as those of one row or group do in a layer.
            rounded = round_matrix(weights, choose_scales(weights, bits, weights.shape[1]))
            axes.hist(weights[0], bins=60, density=True, color="0.88")
            axes.step(weights[0], rounded[0], where="mid", color=colors[0], label="forward: fake-quantized")
            axes.plot(weights[0], weights[0], color=colors[1], linestyle="--", label="backward: straight-through")
            axes.set(title=f"{bits} bits", xlabel="weight, in standard deviations")
        both[0].set(ylabel="weight in the matrix product")
        both[0].legend(frameon=False, loc="upper left")
        seaborn.despine(figure)
        save_figure(figure, path)
