"""The pictures of the comparison: what a reader sees faster than in a table."""

from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy import stats

from emotion.data.metrics import CALIBRATION_BINS, softmax
from emotion.evaluation.predictions import read_predictions
from emotion.evaluation.schema import Benchmark, Record, read_study
from emotion.hub.comparison import REFERENCE, Family, processors_of
from emotion.hub.confusion_matrix import (
    MOST_NAMED,
    draw_cells,
    draw_confusion,
    plot_confusion_matrix,
    save_figure,
    styled,
)
from emotion.hub.model_card import order, variants_with_card
from emotion.utils.processor import TITLES
from report.pages import families_of
from report.plots import (
    MARKERS,
    OTHER,
    colors_of,
    grid,
    plot_bits,
    plot_dataset,
    plot_rounding,
    plot_sensitivity,
    plot_sweep,
    plt,
    seaborn,
)

COLUMNS = 4  # of small pictures side by side
SQUARE = 3.3  # inches, a small picture
PIXEL_TOLERANCE = 1e-5  # of full brightness, in the mean over all pixels


def list_pictures(family: Family) -> dict:
    """Path of each PNG of a comparison -> the function that draws it; what was not measured has no picture."""
    results = family.folder
    # A guest of another size and score would press all others into a corner.
    peers = {one["name"] for one in family.comparison["about"]["peers"]}
    records = [record for record in family.records if record.name not in peers]
    figures, shown = results / "figures", one_a_variant(records)
    # What was timed may have no record, and what was scored may not have been timed.
    variants = {record.variant for record in records}
    for run in family.benchmarks.values():
        variants |= set(map(variant_of, run.artifacts))
    colors = colors_of(sorted(variants))  # one palette for all pictures
    pictures = {figures / "pareto.png": partial(plot_pareto, family.comparison, colors)}
    for processor, run in family.benchmarks.items():
        pictures[figures / f"latency_{processor}.png"] = partial(plot_latency, run, TITLES[processor], colors)
    return pictures | {
        figures / "per_class_f1.png": partial(plot_classes, records, colors),
        figures / "confusion.png": partial(plot_confusions, shown),
        figures / "reliability.png": partial(plot_reliability, shown, colors, results),
    }


def list_card_pictures(family: Family) -> dict:
    """Path of each card's PNG -> the function that draws it: the matrix of its variant's first record."""
    pictures = {}
    for variant in variants_with_card(family.records):
        record = order(family.records, variant)[0]
        path = family.folder / "confusion_matrices" / f"{record.name}.png"
        pictures[path] = partial(plot_confusion_matrix, record)
    return pictures


def list_study_pictures(results: Path) -> dict:
    """Path of each study's PNG -> the function that draws it there, of the studies whose JSON file is there."""
    drawers = {
        "dataset": plot_dataset,
        "ptq_sensitivity": plot_sensitivity,
        "bits": plot_bits,
        "qlora_sweep": plot_sweep,
    }
    pictures, families = {}, families_of(results)
    for family in families:
        for name, draw in drawers.items():
            if (family / f"{name}.json").is_file():
                pictures[family / f"{name}.png"] = partial(draw, read_study(family / f"{name}.json"))
    if families[0] / "bits.png" in pictures:  # it explains what the study measures, from no number of it
        pictures[families[0] / "rounding.png"] = plot_rounding
    return pictures


def same_picture(fresh: Path, kept: Path) -> bool:
    """Whether two PNGs show the same: equal pixels, but for what another processor may round otherwise."""
    if not kept.is_file():
        return False
    if fresh.read_bytes() == kept.read_bytes():  # nearly always; reading the pixels takes longer
        return True
    one, other = plt.imread(fresh), plt.imread(kept)  # float32 (height, width, colours), 0 to 1
    return one.shape == other.shape and float(np.abs(one - other).mean()) < PIXEL_TOLERANCE


def one_a_variant(records: list[Record]) -> list[Record]:
    """The reference, and of every other variant its ONNX form, which all have, or else the first."""
    shown = {}
    for record in records:
        # One form each, of one runtime: a picture with all would show the runtimes more than the variants.
        if record.variant not in shown or record.format == "onnx":
            shown[record.variant] = record
    reference = next(record for record in records if record.name == REFERENCE)
    del shown[reference.variant]
    return [reference, *shown.values()]


def plot_pareto(comparison: dict, colors: dict, path: Path) -> None:
    """Macro F1 against the latency on each kind of processor and against size: no record lies above the line.

    Bars: 95 % of the paired change.
    """
    rows = [row for row in comparison["rows"] if row["kind"] == "record"]
    reference = next(row["macro_f1"] for row in rows if row["name"] == REFERENCE)
    margin = comparison["tests"]["margin"]
    # A patch of its own for the legend: the band is drawn twice and would be named twice.
    band = Patch(color="0.93", label=f"FP32 ± {100 * margin:.1f} points")
    shown = {}  # label of an axis -> the rows, with their places on it
    for one in processors_of(rows):
        timed = [row for row in rows if row["speeds"].get(one, {}).get("p50_ms")]
        if timed:
            shown[f"p50, ms, {TITLES[one]}"] = [row | {"place": row["speeds"][one]["p50_ms"]} for row in timed]
    shown["to serve, MB"] = [row | {"place": row["megabytes"]} for row in rows]
    with styled():
        figure, (panels,) = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4.4), sharey=True, squeeze=False)
        for axes, (label, placed) in zip(panels, shown.items(), strict=True):
            # Of two equally fast ones the better comes first, so that the line does not step back.
            placed.sort(key=lambda row: (row["place"], -row["macro_f1"]))
            axes.axhspan(100 * (reference - margin), 100 * (reference + margin), color="0.93")
            axes.axhline(100 * reference, color=OTHER, linewidth=1, linestyle=":")
            draw_front(axes, placed)
            for row in placed:
                color = colors[row["variant"]]
                if row["tests"]:  # the interval of the change, put where FP32 is
                    low, high = row["tests"]["change_ci95"]
                    ends = 100 * (reference + low), 100 * (reference + high)
                    axes.vlines(row["place"], *ends, color=color, linewidth=1.2, alpha=0.4)
                look = {"color": color, "markersize": 9, "markeredgecolor": "white"}
                axes.plot(row["place"], 100 * row["macro_f1"], MARKERS[row["format"]], **look)
            axes.set(xlabel=label, xscale="log")
            plain_ticks(axes, [row["place"] for row in placed])
        panels[0].set(ylabel="macro F1, %")
        add_legend(figure, colors, {row[key] for row in rows for key in ("variant", "format")}, band)
        seaborn.despine(figure)
        save_figure(figure, path)


def draw_front(axes, placed: list[dict]) -> None:
    """The Pareto front: from left to right, each row that scores as high as any before it.

    Args:
        placed: rows sorted by their `place`; of equal ones the best first.
    """
    front, highest = [], 0
    for row in placed:
        if row["macro_f1"] >= highest:
            front.append((row["place"], 100 * row["macro_f1"]))
            highest = row["macro_f1"]
    front.append((placed[-1]["place"], front[-1][1]))  # on to the right edge
    axes.step(*zip(*front, strict=True), where="post", color=OTHER, linewidth=1.2, zorder=1)


def plain_ticks(axes, values: list[float]) -> None:
    """Sets ticks at 1, 2, 5, 10, ... on a logarithmic axis, written as they are."""
    inside = []
    for power in range(-2, 5):  # from 0.01 to 50,000: milliseconds and megabytes alike
        for step in (1, 2, 5):
            place = step * 10.0**power
            if min(values) / 2 <= place <= 2 * max(values):
                inside.append(place)
    axes.set_xticks(inside, [f"{place:g}" for place in inside])
    axes.minorticks_off()


def variant_of(name: str) -> str:
    """The variant of an artifact, by the name that run_benchmark.py gives it."""
    return Path(name.rsplit(":", 1)[0]).name


def add_legend(figure, colors: dict, shown: set[str], *others) -> None:
    """Adds colours for the variants and, below them, markers for the formats, to the right of the pictures.

    Args:
        shown: the variants and formats that are in a picture.
    """
    entries = []
    for name, color in colors.items():
        if name in shown:
            entries.append(Line2D([], [], marker="s", linestyle="", color=color, label=name))
    for name, marker in MARKERS.items():
        if name in shown:
            entries.append(Line2D([], [], marker=marker, linestyle="", color="0.2", label=name))
    figure.legend(handles=[*entries, *others], loc="center left", bbox_to_anchor=(0.92, 0.5), frameon=False)


def plot_latency(benchmark: Benchmark, processor: str, colors: dict, path: Path) -> None:
    """How the latencies of single texts are spread: median, middle half, 5th to 95th percentile, and the 99th."""
    # The slowest first, since the axis begins at the bottom.
    timed = sorted(benchmark.artifacts.items(), key=lambda item: -item[1].latency_ms.p50)
    names, ends = [], []
    with styled():
        figure, axes = plt.subplots(figsize=(9, 1.2 + 0.36 * len(timed)))
        for place, (name, one) in enumerate(timed):
            latency, color = one.latency_ms, colors[variant_of(name)]
            axes.plot([latency.p5, latency.p95], [place, place], color=color, linewidth=1.5)
            # "butt": round caps would make the middle half look wider than it is.
            middle = {"linewidth": 7, "alpha": 0.5, "solid_capstyle": "butt"}
            axes.plot([latency.p25, latency.p75], [place, place], color=color, **middle)
            axes.plot(latency.p50, place, "o", color=color, markeredgecolor="white")
            axes.plot(latency.p99, place, "|", color=color, markersize=9, markeredgewidth=2)
            names.append(name.removeprefix("weights/"))
            ends += [latency.p5, latency.p99]
        axes.set_yticks(range(len(timed)), names)
        axes.set(xscale="log", xlabel=f"ms, one text, {processor}: median, middle half, 5 % to 95 %, tick at 99 %")
        plain_ticks(axes, ends)
        axes.grid(axis="x", color="0.9")
        seaborn.despine(figure)
        save_figure(figure, path)


def plot_classes(records: list[Record], colors: dict, path: Path) -> None:
    """F1 of each class, one marker per record; below each class its number of texts."""
    quality = records[0].quality
    labels, support = quality.labels, np.sum(quality.confusion_matrix, axis=1)  # a row: all texts of a class
    with styled():
        figure, axes = plt.subplots(figsize=(11, 4.4))
        for index, record in enumerate(records):
            # Side by side over 0.7 of the space between two classes, the middle one above the name.
            shift = 0.7 * ((index + 0.5) / len(records) - 0.5)
            values = [100 * record.quality.per_class_f1[label] for label in labels]
            look = {"color": colors[record.variant], "markersize": 8, "markeredgecolor": "white"}
            axes.plot(np.arange(len(labels)) + shift, values, MARKERS[record.format], **look)
        names = [f"{name}\n{count} texts" for name, count in zip(labels, support, strict=True)]
        if len(labels) <= MOST_NAMED:
            axes.set_xticks(range(len(labels)), names)
        axes.set(ylabel="F1, %")
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)  # the grid under the markers
        add_legend(figure, colors, {name for record in records for name in (record.variant, record.format)})
        seaborn.despine(figure)
        save_figure(figure, path)


def plot_confusions(records: list[Record], path: Path) -> None:
    """The matrices of several records, and below them what each changes against the first one."""
    matrices = np.array([record.quality.confusion_matrix for record in records])
    differences = matrices - matrices[0]  # (records, true, predicted)
    largest = max(1, np.abs(differences).max())  # one scale of colours for all; 1 where nothing changes
    labels = records[0].quality.labels
    small = {"annot_kws": {"fontsize": "x-small"}}
    scale = {"cmap": "PuOr", "vmin": -largest, "vmax": largest, "cbar": False, "linecolor": "0.85"}
    with styled():
        figure, (above, below) = grid(len(records), COLUMNS, SQUARE, rows_of=2)
        for axes, record in zip(above, records, strict=False):  # a block may have more axes than there are records
            draw_confusion(axes, record.quality.confusion_matrix, labels, **small)
            axes.set_title(record.name, fontsize="medium")
        # The first differs from itself by nothing: its place explains the others.
        below[0].axis("off")
        below[0].text(0.5, 0.5, f"change against\n{records[0].name}:\ntexts in a cell", ha="center")
        for axes, record, difference in zip(below[1:], records[1:], differences[1:], strict=False):
            # No zeros: what did not change should not draw the eye.
            written = np.where(difference == 0, "", np.char.mod("%+d", difference))
            draw_cells(axes, difference, written, labels, fmt="", **scale, **small)
            axes.set_title(record.name, fontsize="medium")
        for axes in (*above, *below):
            axes.label_outer()
            axes.tick_params(labelsize="small")
        below[min(1, len(records) - 1)].tick_params(labelleft=True)  # the first one is text
        figure.tight_layout()
        save_figure(figure, path)


def plot_reliability(records: list[Record], colors: dict, results: Path, path: Path) -> None:
    """Accuracy, with its 95 % interval, against confidence in the bins of the calibration error.

    The area of a dot shows how many texts its bin holds.
    """
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    with styled():
        figure, (panels,) = grid(len(records), COLUMNS, SQUARE)
        for axes, record in zip(panels, records, strict=False):
            labels, logits = read_predictions(results / "predictions" / f"{record.name}.parquet")
            probabilities = softmax(logits)
            confidence, right = probabilities.max(axis=-1), probabilities.argmax(axis=-1) == labels
            # The inner edges alone: a confidence of exactly 1 belongs to the last bin, not behind it.
            bins = np.digitize(confidence, edges[1:-1])
            color = colors[record.variant]
            axes.plot([0, 1], [0, 1], color=OTHER, linewidth=1, linestyle=":")  # where both agree
            for one in np.unique(bins):
                place, hits = confidence[bins == one].mean(), right[bins == one]
                # Wilson's interval stays within 0 and 1, also for a bin with few texts.
                interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
                axes.vlines(place, *interval, color=color, linewidth=1.5, alpha=0.4)
                area = 25 + 200 * len(hits) / len(labels)
                axes.scatter(place, hits.mean(), s=area, zorder=3, color=color, edgecolor="white")
            error = record.quality.expected_calibration_error
            axes.set_title(f"{record.name}\ncalibration error {100 * error:.1f} %", fontsize="medium")
            axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1.04), ylim=(0, 1.04), aspect="equal")
            axes.label_outer()
        seaborn.despine(figure)
        figure.tight_layout()
        save_figure(figure, path)
