"""The confusion matrix of a record as a picture, and the style of all pictures."""

import contextlib
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn

from emotion.evaluation.schema import Record
from emotion.utils.files import atomic_write

matplotlib.use("Agg")  # draws into files; the default looks for a screen
PALETTE = "colorblind"
MOST_NAMED = 30  # classes; of more, nobody could read the names and numbers, and a picture would take gigabytes


@contextlib.contextmanager
def styled():
    """Gives figures the style of this project; matplotlib's own settings stay as they are."""
    with seaborn.axes_style("ticks"), seaborn.plotting_context("notebook"):
        yield


def save_figure(figure, path: Path) -> None:
    """Writes the figure as a PNG, and closes it; ``path`` may lack its suffix."""
    with atomic_write(path.with_suffix(".png")) as partial:
        # Without "Software" the bytes do not change with the version of matplotlib alone.
        figure.savefig(partial, dpi=110, bbox_inches="tight", format="png", metadata={"Software": None})
    plt.close(figure)


def plot_confusion_matrix(record: Record, path: Path) -> None:
    """Draws the counts, colored by their share of the true class; for many classes only the colors."""
    quality = record.quality
    counts = np.array(quality.confusion_matrix)  # (true classes, predicted classes)
    # Shares, not counts: the rare classes would all be white. At least 1, for a class without a text.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    look, note = {"annot": counts, "linewidths": 0.5, "xticklabels": quality.labels, "yticklabels": quality.labels}, ""
    if len(quality.labels) > MOST_NAMED:
        look, note = {"xticklabels": False, "yticklabels": False}, f", {len(quality.labels)} classes"
    bar = {"label": "share of the true class", "shrink": 0.8}
    with styled():
        # Inches: the margin with the names, and a cell per class.
        size = 2.2 + 0.75 * min(len(quality.labels), MOST_NAMED)
        figure, axes = plt.subplots(figsize=(size + 0.8, size))  # wider by the color bar
        seaborn.heatmap(shares, fmt="d", cmap="Blues", vmin=0, vmax=1, square=True, ax=axes, cbar_kws=bar, **look)
        axes.set(xlabel=f"predicted{note}", ylabel="true")
        axes.tick_params(axis="y", rotation=0)
        axes.tick_params(axis="x", rotation=30)
        title = f"{record.name}, {quality.split}: {quality.examples} texts, macro F1 {quality.macro_f1:.3f}"
        axes.set_title(title, fontsize="medium")
        save_figure(figure, path)
