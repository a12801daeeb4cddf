"""The pictures of the pages: PNGs in one style, with colors that the color-blind can tell apart.

A variant has the same color and a format the same marker in every picture of an encoder.
"""

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy import stats

from emotion.data.metrics import CALIBRATION_BINS, softmax
from emotion.evaluation.record import read_predictions
from emotion.evaluation.schema import Bits, Measurement, Record, read_study
from emotion.hub.comparison import REFERENCE, Family, find_reference, processors_of
from emotion.hub.model_card import order, variants_with_card
from emotion.hub.render import PALETTE, complete, plot_confusion_matrix, save_figure, styled
from emotion.utils.machine import PROCESSORS
from report.pages import families_of

MARKERS = {"pytorch": "o", "bf16": "s", "torchao": "D", "nf4": "P", "onnx": "^", "openvino": "v"}
GRAY = "0.45"  # for marks that belong to no variant
COLUMNS = 4  # of small pictures side by side
PIXEL_TOLERANCE = 1e-5  # of full brightness, in the mean over all pixels


def list_pictures(family: Family) -> dict:
    """Path of each PNG of a comparison -> the function that draws it."""
    # A peer of another size and score would press all others into a corner.
    peers = {peer["name"] for peer in family.comparison["about"]["peers"]}
    records = [record for record in family.records if record.name not in peers]
    variants = sorted({record.variant for record in records})
    colors = dict(zip(variants, seaborn.color_palette(PALETTE, len(variants)), strict=True))
    figures = family.folder / "figures"
    return {
        figures / "pareto.png": partial(plot_pareto, family.comparison, colors),
        figures / "reliability.png": partial(plot_reliability, one_per_variant(records), colors, family.folder),
    }


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
    pictures, families = {}, families_of(results)
    for family in families:
        for name, draw in (("dataset", plot_dataset), ("ptq_sensitivity", plot_sensitivity), ("bits", plot_bits)):
            path = family / f"{name}.json"
            if path.is_file():
                pictures[path.with_suffix(".png")] = partial(complete(path)(draw), read_study(path))
    if families[0] / "bits.png" in pictures:  # it explains what the study measures
        pictures[families[0] / "rounding.png"] = plot_rounding
    return pictures


def same_picture(fresh: Path, kept: Path) -> bool:
    """Whether two PNGs show the same: equal pixels, except for what another processor may round otherwise."""
    if not kept.is_file():
        return False
    if fresh.read_bytes() == kept.read_bytes():  # nearly always; reading the pixels takes longer
        return True
    pixels, kept_pixels = plt.imread(fresh), plt.imread(kept)  # float32 (height, width, colors), 0 to 1
    return pixels.shape == kept_pixels.shape and float(np.abs(pixels - kept_pixels).mean()) < PIXEL_TOLERANCE


def one_per_variant(records: list[Record]) -> list[Record]:
    """The reference, and for every other variant its ONNX file, or else its first format."""
    shown = {}
    for record in records:
        if record.variant not in shown or record.format == "onnx":
            shown[record.variant] = record
    reference = find_reference(records)
    del shown[reference.variant]
    return [reference, *shown.values()]


def plot_pareto(comparison: dict, colors: dict, path: Path) -> None:
    """Macro F1 against the latency on each kind of processor, and against size, with the Pareto front.

    Bars: 95 % interval of the paired change.
    """
    rows = [row for row in comparison["rows"] if row["kind"] == "record"]
    reference = next(row["macro_f1"] for row in rows if row["name"] == REFERENCE)
    margin = comparison["tests"]["margin"]
    panels = {}  # label of an axis -> rows with their `x`
    for processor in processors_of(rows):
        if timed := [row for row in rows if row["speeds"].get(processor, {}).get("p50_ms")]:
            label = f"p50, ms, {PROCESSORS[processor]}"
            panels[label] = [row | {"x": row["speeds"][processor]["p50_ms"]} for row in timed]
    panels["to serve, MB"] = [row | {"x": row["megabytes"]} for row in rows]
    with styled():
        size = 5.5 * len(panels), 4.4
        figure, (all_axes,) = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
        for axes, (label, points) in zip(all_axes, panels.items(), strict=True):
            axes.axhspan(100 * (reference - margin), 100 * (reference + margin), color="0.93")
            axes.axhline(100 * reference, color=GRAY, linewidth=1, linestyle=":")
            draw_points(axes, points, reference, colors)
            axes.set(xlabel=label, xscale="log")
            plain_ticks(axes, [row["x"] for row in points])
        all_axes[0].set(ylabel="macro F1, %")
        # A patch of its own for the legend: the band is drawn in each panel and would be named more than once.
        band = Patch(color="0.93", label=f"FP32 ± {100 * margin:.1f} points")
        add_legend(figure, colors, {row[key] for row in rows for key in ("variant", "format")}, band)
        seaborn.despine(figure)
        save_figure(figure, path)


def draw_points(axes, rows: list[dict], reference: float, colors: dict) -> None:
    """Draws the rows at their `x`, with the interval of the change around the reference's score, and the front."""
    # Of two equally fast ones the better comes first, so that the line does not step back.
    rows.sort(key=lambda row: (row["x"], -row["macro_f1"]))
    front = 100 * np.maximum.accumulate([row["macro_f1"] for row in rows])
    axes.step([row["x"] for row in rows], front, where="post", color=GRAY, linewidth=1.2, zorder=1)
    for row in rows:
        color = colors[row["variant"]]
        if row["tests"]:
            interval = [100 * (reference + end) for end in row["tests"]["change_ci95"]]
            axes.vlines(row["x"], *interval, color=color, linewidth=1.2, alpha=0.4)
        look = {"color": color, "markersize": 9, "markeredgecolor": "white"}
        axes.plot(row["x"], 100 * row["macro_f1"], MARKERS[row["format"]], **look)


def plain_ticks(axes, values: list[float]) -> None:
    """Sets ticks at 1, 2, 5, 10, ... on a logarithmic axis, without powers of ten."""
    steps = [step * 10.0**power for power in range(-2, 5) for step in (1, 2, 5)]
    inside = [step for step in steps if min(values) / 2 <= step <= 2 * max(values)]
    axes.set_xticks(inside, [f"{step:g}" for step in inside])
    axes.minorticks_off()


def add_legend(figure, colors: dict, shown: set[str], *others) -> None:
    """Adds the colors of the variants and the markers of the formats that are ``shown``, on the right."""
    entries = [Line2D([], [], marker="s", linestyle="", color=colors[name], label=name) for name in colors]
    entries += [Line2D([], [], marker=MARKERS[name], linestyle="", color="0.2", label=name) for name in MARKERS]
    entries = [entry for entry in entries if entry.get_label() in shown]
    figure.legend(handles=[*entries, *others], loc="center left", bbox_to_anchor=(0.92, 0.5), frameon=False)


def plot_reliability(records: list[Record], colors: dict, results: Path, path: Path) -> None:
    """Reliability diagrams: accuracy, with its 95 % interval, against confidence in the bins of the calibration error.

    The area of a dot shows how many texts its bin has.
    """
    columns = min(COLUMNS, len(records))
    rows = -(-len(records) // columns)  # rounded up
    with styled():
        figure, panels = plt.subplots(rows, columns, figsize=(3.3 * columns, 3.3 * rows), squeeze=False)
        for unused in panels.ravel()[len(records) :]:
            unused.axis("off")
        for axes, record in zip(panels.ravel(), records, strict=False):
            draw_reliability(axes, record, results / "predictions" / f"{record.name}.parquet", colors[record.variant])
        seaborn.despine(figure)
        figure.tight_layout()
        save_figure(figure, path)


def draw_reliability(axes, record: Record, predictions: Path, color) -> None:
    """Draws the reliability diagram of a record."""
    labels, logits = read_predictions(predictions)
    probabilities = softmax(logits)
    confidence, correct = probabilities.max(axis=-1), probabilities.argmax(axis=-1) == labels
    # The inner edges only: a confidence of exactly 1 belongs to the last bin, not behind it.
    bins = np.digitize(confidence, np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1])
    axes.plot([0, 1], [0, 1], color=GRAY, linewidth=1, linestyle=":")  # perfect calibration
    for index in np.unique(bins):
        x, hits = confidence[bins == index].mean(), correct[bins == index]
        # Wilson's interval stays within 0 and 1, also for a bin with few texts.
        interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
        axes.vlines(x, *interval, color=color, linewidth=1.5, alpha=0.4)
        area = 25 + 200 * len(hits) / len(labels)
        axes.scatter(x, hits.mean(), s=area, zorder=3, color=color, edgecolor="white")
    error = record.quality.expected_calibration_error
    axes.set_title(f"{record.name}\ncalibration error {100 * error:.1f} %", fontsize="medium")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.04), ylim=(0, 1.04), aspect="equal")
    axes.label_outer()


def plot_sensitivity(study: Measurement, path: Path) -> None:
    """A heat map of the mean logit shift when one layer is quantized."""
    shifts = {(one["kind"], one["layer"]): one["mean_logit_shift"] for one in study.layers if one["layer"]}
    kinds, layers = (list(dict.fromkeys(names)) for names in zip(*shifts, strict=True))
    # Embeddings are in no layer: their cells stay empty.
    cells = [[shifts.get((kind, layer), np.nan) for layer in layers] for kind in kinds]
    with styled():
        figure, axes = plt.subplots(figsize=(3.6 + 0.8 * len(layers), 1.4 + 0.5 * len(kinds)))
        look = {"annot": True, "fmt": ".3f", "cmap": "Blues", "vmin": 0, "linewidths": 0.5}
        bar = {"label": "mean logit shift"}
        seaborn.heatmap(cells, xticklabels=layers, yticklabels=kinds, ax=axes, cbar_kws=bar, **look)
        axes.set(xlabel="layer", ylabel="")
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
        left.set(ylabel="share of the split in %")
        left.legend(frameon=False)
        right.set(xlabel="tokens per text", ylabel="density")
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


def plot_bits(study: Bits, path: Path) -> None:
    """The change of macro F1 against size, a line per method; bars: standard deviation over the seeds."""
    with styled():
        figure, axes = plt.subplots(figsize=(7.5, 3.4))  # low: the README shows it below its table
        colors = seaborn.color_palette(PALETTE)
        for method, color in (("ptq", colors[1]), ("qat", colors[0])):
            cells = study.cells_of(method)[::-1]  # the smallest first
            sizes = [cell.megabytes for cell in cells]
            changes = 100 * np.array([cell.change.mean for cell in cells])  # points
            deviations = 100 * np.array([cell.change.standard_deviation or 0 for cell in cells])  # 0: one seed
            look = {"color": color, "marker": "o", "capsize": 3, "label": method.upper()}
            axes.errorbar(sizes, changes, yerr=deviations, **look)
            if method == "qat":  # one line of labels is enough: both methods have the same sizes
                for cell, size, top in zip(cells, sizes, changes + deviations, strict=True):
                    offset = {"xytext": (0, 7), "textcoords": "offset points"}
                    axes.annotate(f"{cell.bits} bits", (size, top), ha="center", fontsize="small", **offset)
        axes.axhline(0, color="0.5", linewidth=1, linestyle="--", label="FP32")
        axes.set(xlabel="size, MB", ylabel="macro F1 against FP32, points")
        axes.legend(frameon=False)
        seaborn.despine(figure)
        save_figure(figure, path)
