"""The pictures of the comparison: what a reader sees faster than in a table."""

import re
from pathlib import Path

from emotion.common.files import read_json
from emotion.measure.record import read_predictions, record_name
from emotion.report.comparison import MAIN_RUN, REFERENCE
from emotion.report.plots import (
    MARKERS,
    OTHER,
    colors_of,
    draw_cells,
    draw_confusion,
    grid,
    plot_bits,
    plot_confusion_matrix,
    plot_sensitivity,
    plot_sweep,
    plt,
    save_figure,
    seaborn,
    styled,
)
from emotion.task.scores import CALIBRATION_BINS, softmax

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy import stats

COLUMNS = 4
SQUARE = 3.3  # inches
PIXEL_TOLERANCE = 1e-5  # of full brightness, in the mean over all pixels
SHAPE_TOLERANCE = 1e-4  # points of 1/72 inch


def list_pictures(comparison: dict, records: list[dict], benchmarks: dict[str, dict], results: Path) -> dict:
    """Path without ending -> the function that draws it there. What was not measured has no picture."""
    figures, shown, run = results / "figures", one_a_variant(records), benchmarks.get(MAIN_RUN)
    timed = {variant_of(name) for name in run["artifacts"]} if run else set()
    colors = colors_of(sorted(timed | {record["variant"] for record in records}))  # one for all pictures
    pictures = {figures / "pareto": lambda path: plot_pareto(comparison, colors, path)}
    if run:
        pictures[figures / "latency"] = lambda path: plot_latency(run, colors, path)
    pictures |= {
        figures / "per_class_f1": lambda path: plot_classes(records, colors, path),
        figures / "confusion": lambda path: plot_confusions(shown, path),
        figures / "reliability": lambda path: plot_reliability(shown, colors, results, path),
    }
    if (results / "ptq_sensitivity.json").is_file():
        layers = read_json(results / "ptq_sensitivity.json")["layers"]
        pictures[results / "ptq_sensitivity"] = lambda path: plot_sensitivity(layers, path)
    for name, draw in (("bits", plot_bits), ("qlora_sweep", plot_sweep)):
        if (results / f"{name}.json").is_file():
            study = read_json(results / f"{name}.json")
            pictures[results / name] = lambda path, draw=draw, study=study: draw(study, path)
    for record in records:
        name = results / "confusion_matrices" / record_name(record)
        pictures[name] = lambda path, record=record: plot_confusion_matrix(record, path)
    return pictures


def same_picture(fresh: Path, kept: Path, ending: str) -> bool:
    """Whether two files show the same: equal pixels or shapes, but for what another processor may round otherwise."""
    fresh, kept = (path.with_name(f"{path.name}{ending}") for path in (fresh, kept))
    if not kept.is_file():
        return False
    if fresh.read_bytes() == kept.read_bytes():
        return True
    if ending == ".png":
        images = [plt.imread(path) for path in (fresh, kept)]
        return images[0].shape == images[1].shape and float(np.abs(images[0] - images[1]).mean()) < PIXEL_TOLERANCE
    numbers = re.compile(r"-?\d+\.\d+")
    texts = [path.read_text(encoding="utf-8") for path in (fresh, kept)]
    if numbers.sub("", texts[0]) != numbers.sub("", texts[1]):
        return False
    values = [np.array(numbers.findall(text), dtype=float) for text in texts]
    return len(values[0]) == len(values[1]) and bool(np.allclose(*values, rtol=0, atol=SHAPE_TOLERANCE))


def one_a_variant(records: list[dict]) -> list[dict]:
    """The reference, and of every other variant its ONNX form, which all have, or else the first."""
    shown = {}
    for record in records:
        if record["variant"] not in shown or record["format"] == "onnx":
            shown[record["variant"]] = record
    reference = [record for record in records if record_name(record) == REFERENCE]
    return reference + [record for variant, record in shown.items() if variant != reference[0]["variant"]]


def plot_pareto(comparison: dict, colors: dict, path: Path) -> None:
    """Macro F1 against latency and against size: no record lies above the line. Bars: 95 % of the paired change."""
    rows = [row for row in comparison["rows"] if row["macro_f1"] is not None]
    reference = next(row for row in rows if row["name"] == REFERENCE)
    margin = comparison["tests"]["margin"]
    band = Patch(color="0.93", label=f"FP32 ± {100 * margin:.1f} points")
    with styled():
        figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
        for axes, key, label in zip(panels, ("p50_ms", "megabytes"), ("p50, ms", "to serve, MB"), strict=True):
            placed = sorted(
                (row for row in rows if row[key] is not None), key=lambda row: (row[key], -row["macro_f1"])
            )
            axes.axhspan(*(100 * (reference["macro_f1"] + side * margin) for side in (-1, 1)), color="0.93")
            axes.axhline(100 * reference["macro_f1"], color=OTHER, linewidth=1, linestyle=":")
            best = np.maximum.accumulate([row["macro_f1"] for row in placed])
            front = [row for row, highest in zip(placed, best, strict=True) if row["macro_f1"] == highest]
            axes.step([row[key] for row in [*front, placed[-1]]],
                      [100 * row["macro_f1"] for row in [*front, front[-1]]],
                      where="post", color=OTHER, linewidth=1.2, zorder=1)  # fmt: skip
            for row in placed:
                if row["tests"]:
                    bounds = [100 * (reference["macro_f1"] + bound) for bound in row["tests"]["change_ci95"]]
                    axes.vlines(row[key], *bounds, color=colors[row["variant"]], linewidth=1.2, alpha=0.4)
                axes.plot(row[key], 100 * row["macro_f1"], MARKERS[row["format"]], color=colors[row["variant"]],
                          markersize=9, markeredgecolor="white")  # fmt: skip
            axes.set(xlabel=label, xscale="log")
            plain_ticks(axes, [row[key] for row in placed])
        panels[0].set(ylabel="macro F1, %")
        add_legend(figure, colors, rows, band)
        seaborn.despine(figure)
        save_figure(figure, path)


def plain_ticks(axes, values: list[float]) -> None:
    """Ticks at 1, 2, 5, 10, ... on a logarithmic axis, written as they are."""
    steps = [step * 10.0**power for power in range(-2, 5) for step in (1, 2, 5)]
    inside = [step for step in steps if min(values) / 2 <= step <= 2 * max(values)]
    axes.set_xticks(inside, [f"{step:g}" for step in inside])
    axes.minorticks_off()


def variant_of(name: str) -> str:
    """The variant of an artifact, by the name that run_benchmark.py gives it."""
    return Path(name.rsplit(":", 1)[0]).name


def add_legend(figure, colors: dict, shown: list[dict], *others) -> None:
    """Colours for the variants and, below them, markers for the formats, to the right of the pictures."""
    variants, formats = ({one[key] for one in shown} for key in ("variant", "format"))
    entries = [Line2D([], [], marker="s", linestyle="", color=color, label=name)
               for name, color in colors.items() if name in variants]  # fmt: skip
    entries += [Line2D([], [], marker=marker, linestyle="", color="0.2", label=name)
                for name, marker in MARKERS.items() if name in formats]  # fmt: skip
    figure.legend(handles=[*entries, *others], loc="center left", bbox_to_anchor=(0.92, 0.5), frameon=False)


def plot_latency(benchmark: dict, colors: dict, path: Path) -> None:
    """How the latencies of single texts are spread: median, middle half, 5th to 95th percentile, and the 99th."""
    timed = sorted(benchmark["artifacts"].items(), key=lambda item: -item[1]["latency_ms"]["p50"])
    with styled():
        figure, axes = plt.subplots(figsize=(9, 1.2 + 0.36 * len(timed)))
        for place, (name, one) in enumerate(timed):
            latency, color = one["latency_ms"], colors[variant_of(name)]
            axes.plot([latency["p5"], latency["p95"]], [place, place], color=color, linewidth=1.5)
            axes.plot([latency["p25"], latency["p75"]], [place, place], color=color, linewidth=7, alpha=0.5,
                      solid_capstyle="butt")  # fmt: skip
            axes.plot(latency["p50"], place, "o", color=color, markeredgecolor="white")
            axes.plot(latency["p99"], place, "|", color=color, markersize=9, markeredgewidth=2)
        axes.set_yticks(range(len(timed)), [name.removeprefix("weights/") for name, _ in timed])
        axes.set(xscale="log", xlabel="ms, one text: median, middle half, 5 % to 95 %, tick at 99 %")
        plain_ticks(axes, [one["latency_ms"][key] for _, one in timed for key in ("p5", "p99")])
        axes.grid(axis="x", color="0.9")
        seaborn.despine(figure)
        save_figure(figure, path)


def plot_classes(records: list[dict], colors: dict, path: Path) -> None:
    """F1 of each class, one marker a record; below each class how many texts it has."""
    quality = records[0]["quality"]
    labels, support = quality["labels"], np.sum(quality["confusion_matrix"], axis=1)
    with styled():
        figure, axes = plt.subplots(figsize=(11, 4.4))
        for index, record in enumerate(records):
            shift = 0.7 * ((index + 0.5) / len(records) - 0.5)
            values = [100 * record["quality"]["per_class_f1"][label] for label in labels]
            axes.plot(np.arange(len(labels)) + shift, values, MARKERS[record["format"]],
                      color=colors[record["variant"]], markersize=8, markeredgecolor="white")  # fmt: skip
        axes.set_xticks(range(len(labels)), [f"{name}\n{n} texts" for name, n in zip(labels, support, strict=True)])
        axes.set(ylabel="F1, %")
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        add_legend(figure, colors, records)
        seaborn.despine(figure)
        save_figure(figure, path)


def plot_confusions(records: list[dict], path: Path) -> None:
    """The matrices of several records, and below them what each changes against the first one."""
    first = np.array(records[0]["quality"]["confusion_matrix"])
    differences = [np.array(record["quality"]["confusion_matrix"]) - first for record in records]
    largest = max(1, max(np.abs(one).max() for one in differences))
    labels = records[0]["quality"]["labels"]
    small = {"annot_kws": {"fontsize": "x-small"}}
    with styled():
        figure, (above, below) = grid(len(records), COLUMNS, SQUARE, rows_of=2)
        for axes, record in zip(above, records, strict=False):
            draw_confusion(axes, record["quality"]["confusion_matrix"], labels, **small)
            axes.set_title(record_name(record), fontsize="medium")
        below[0].axis("off")
        below[0].text(0.5, 0.5, f"change against\n{record_name(records[0])}:\ntexts in a cell", ha="center")
        for axes, record, difference in zip(below[1:], records[1:], differences[1:], strict=False):
            written = np.where(difference == 0, "", np.char.mod("%+d", difference))
            draw_cells(axes, difference, written, labels, fmt="", cmap="PuOr", vmin=-largest, vmax=largest, cbar=False,
                       linecolor="0.85", **small)  # fmt: skip
            axes.set_title(record_name(record), fontsize="medium")
        for axes in (*above, *below):
            axes.label_outer()
            axes.tick_params(labelsize="small")
        below[min(1, len(records) - 1)].tick_params(labelleft=True)  # the first one is text
        figure.tight_layout()
        save_figure(figure, path)


def plot_reliability(records: list[dict], colors: dict, results: Path, path: Path) -> None:
    """Accuracy, with its 95 % interval, against confidence in the bins of the calibration error.

    The area of a dot shows how many texts its bin holds.
    """
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    with styled():
        figure, (panels,) = grid(len(records), COLUMNS, SQUARE)
        for axes, record in zip(panels, records, strict=False):
            labels, logits = read_predictions(results / "predictions" / f"{record_name(record)}.parquet")
            probabilities = softmax(logits)
            confidence, right = probabilities.max(axis=-1), probabilities.argmax(axis=-1) == labels
            bins = np.digitize(confidence, edges[1:-1])
            axes.plot([0, 1], [0, 1], color=OTHER, linewidth=1, linestyle=":")
            for one in np.unique(bins):
                place, hits = confidence[bins == one].mean(), right[bins == one]
                interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
                axes.vlines(place, *interval, color=colors[record["variant"]], linewidth=1.5, alpha=0.4)
                axes.scatter(place, hits.mean(), s=25 + 200 * len(hits) / len(labels), zorder=3,
                             color=colors[record["variant"]], edgecolor="white")  # fmt: skip
            error = record["quality"]["expected_calibration_error"]
            axes.set_title(f"{record_name(record)}\ncalibration error {100 * error:.1f} %", fontsize="medium")
            axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1.04), ylim=(0, 1.04), aspect="equal")
            axes.label_outer()
        seaborn.despine(figure)
        figure.tight_layout()
        save_figure(figure, path)
