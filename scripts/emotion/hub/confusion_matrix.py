"""Confusion matrices as pictures, in the style that all pictures of this project have."""

import contextlib
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn

from emotion.evaluation.schema import Record
from emotion.utils.files import atomic_write

matplotlib.use("Agg")  # draws into files alone; the default looks for a screen
STYLE = {"style": "ticks", "context": "notebook", "palette": "colorblind"}
MOST_NAMED = 30  # classes; of more, nobody could read the names and numbers, and a picture would take gigabytes


@contextlib.contextmanager
def styled():
    """Within it, figures have this project's style; matplotlib's own settings stay as they were."""
    with seaborn.axes_style(STYLE["style"]), seaborn.plotting_context(STYLE["context"]):
        yield


def save_figure(figure, path: Path) -> None:
    """Writes the figure as a PNG, and closes it; ``path`` may lack its ending."""
    with atomic_write(path.with_suffix(".png")) as partial:
        # Without "Software" the bytes do not change with the version of matplotlib alone.
        figure.savefig(partial, dpi=110, bbox_inches="tight", format="png", metadata={"Software": None})
    plt.close(figure)


def plot_confusion_matrix(record: Record, path: Path) -> None:
    """Counts in the cells, colour by the share of the true class."""
    quality = record.quality
    with styled():
        # Inches: the margin with the names, and a cell per class.
        size = 2.2 + 0.75 * min(len(quality.labels), MOST_NAMED)
        figure, axes = plt.subplots(figsize=(size + 0.8, size))  # wider by the bar of colours
        draw_confusion(axes, quality.confusion_matrix, quality.labels, cbar=True)
        axes.set_title(
            f"{record.name}, {quality.split}: {quality.examples} texts, macro F1 {quality.macro_f1:.3f}",
            fontsize="medium",
        )
        save_figure(figure, path)


def draw_confusion(axes, counts, labels: list[str], cbar: bool = False, **options) -> None:
    """Draws one matrix (true classes, predicted classes), coloured by the share of the true class."""
    counts = np.array(counts)
    # Shares, not counts: the rare classes would all be white. At least 1, for a class without a text.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    bar = {"cbar_kws": {"label": "share of the true class", "shrink": 0.8}} if cbar else {}
    draw_cells(axes, shares, counts, labels, fmt="d", cmap="Blues", vmin=0, vmax=1, cbar=cbar, **bar, **options)


def draw_cells(axes, values, numbers, labels: list[str], **options) -> None:
    """Draws a square heat map, true classes down and predicted ones across; of many classes the colours alone."""
    look = {"annot": numbers, "linewidths": 0.5, "xticklabels": labels, "yticklabels": labels}
    what = ""
    if len(labels) > MOST_NAMED:
        look, what = {"xticklabels": False, "yticklabels": False}, f", {len(labels)} classes"
    seaborn.heatmap(values, square=True, ax=axes, **options, **look)
    axes.set(xlabel=f"predicted{what}", ylabel="true")
    axes.tick_params(axis="y", rotation=0)
    axes.tick_params(axis="x", rotation=30)
