"""Renders the templates of cards and pages, and the pictures.

A table is a block `{% filter table %}` with a line per row and `¦` between its cells, the head first.
"""

import contextlib
import re
from pathlib import Path

import jinja2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn
from pydantic import BaseModel

from emotion.evaluation.schema import Record
from emotion.utils.errors import UserError, visible
from emotion.utils.files import atomic_write
from emotion.utils.machine import PROCESSORS

PALETTE = "colorblind"
INK = "#737b86"  # of text and axes: pictures are transparent, and this can be read on white and on GitHub's dark page
# Variant -> its name for people; that of another is `qat-int4` -> "QAT INT4"
NAMES = {"baseline": "FP32", "ptq": "PTQ INT8", "ptq-dynamic": "PTQ INT8, dynamic ranges", "qat": "QAT INT8"}
NAMES["qlora"] = "QLoRA"
# What begins HTML, an entity, a link, code or a cell; a list, a heading or a fence would need a line of its own
MARKUP = re.compile(r"[<&\[`|](?!#\d+;)|¦")
MOST_NAMED = 30  # classes; of more, nobody could read the names and numbers, and a picture would take gigabytes


def name_of(variant: str) -> str:
    """The name of a variant for people: 'QAT INT4'."""
    return NAMES.get(variant) or variant.upper().replace("-", " ")


@contextlib.contextmanager
def complete(what: str):
    """Raises `UserError` if a field is missing, or null where a number is needed; a `with` block or a decorator."""
    try:
        yield
    # For fields that only a page reads: templates raise the first of these if one is missing, Python the others.
    except (jinja2.UndefinedError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{what} cannot be written: {error}; measure it again") from error


class Markdown(str):
    """A text that is Markdown already, which `escape` leaves as it is."""

    __slots__ = ()


def escape(value):
    """A value with each string in it, keys too, as Markdown that shows it and does nothing else."""
    if isinstance(value, str) and not isinstance(value, Markdown):
        return MARKUP.sub(lambda found: f"&#{ord(found[0])};", visible(value))
    if isinstance(value, dict):
        return {escape(key): escape(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [escape(inner) for inner in value]
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: escape(inner) for name, inner in value})
    return value


def render(template: Path, **fields) -> Markdown:
    """Renders a template, with those beside it, from `escape`d fields.

    A missing field raises `UndefinedError`, see `complete`.
    """
    # By default a missing field would be empty, and a line with nothing but a tag would leave a line in the page.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Tables end with a newline; without it a blank line of a template is a blank line of the page.
        finalize=lambda value: value.rstrip("\n") if isinstance(value, str) else value,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters |= {
        "short": shorten,
        "processor": PROCESSORS.get,  # of a class of processors
        "named": name_of,
        "number": number,
        "percent": lambda value, form=".2f": number(value, form, 100),
        "mean": plus_minus,
        "p_value": lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",  # no verdict depends on how far below
        "times": _times,
        "spread": _spread,
        "table": _table,
    }
    return Markdown(environment.get_template(template.name).render(**escape(fields)))


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table whose columns line up in plain text too; all but the first are right-aligned."""
    lines = [[cell.strip().replace("|", "\\|") for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [f"| {' | '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])} |" for line in lines]
    # The colon is Markdown's mark for a right-aligned column.
    lines.insert(1, f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:]))
    return "\n".join(lines) + "\n"


def _times(ratio) -> str:
    """' (2.1x)', of a spread its median; a second digit below 1."""
    if not ratio:  # not part of an interleaved run
        return ""
    ratio = ratio["median"] if isinstance(ratio, dict) else ratio
    return f" ({ratio:.1f}x)" if ratio >= 0.95 else f" ({ratio:.2f}x)"


def _spread(ratio, unit: str = "") -> str:
    """'2.10 [2.05, 2.20]': the median, the minimum and the maximum over the rounds."""
    values = dict(ratio)  # of a pydantic model too
    return f"{values['median']:.2f}{unit} [{values['min']:.2f}, {values['max']:.2f}]"


def _table(text: str) -> str:
    """The Markdown table of a template's block."""
    head, *rows = [line.split("¦") for line in text.splitlines() if line.strip()]
    return markdown_table(head, rows)


def number(value: float | None, form: str = ".2f", factor: float = 1) -> str:
    """Formats the value times the factor; a dash for None, a value that was not measured."""
    return "-" if value is None else format(factor * value, form)


def plus_minus(mean, form: str = ".2f", factor: float = 100) -> str:
    """Formats a `Mean`, or its fields: '89.04 ± 0.66', in points by default; one seed has no deviation."""
    values = dict(mean)
    text, deviation = number(values["mean"], form, factor), values["standard_deviation"]
    return text if deviation is None else f"{text} ± {number(deviation, form.removeprefix('+'), factor)}"


def shorten(commit: str | None) -> str:
    """The first seven digits of a commit, and whether its code was changed; "unknown" outside a repository."""
    if commit is None:
        return "unknown"
    digits, *mark = commit.split("-", 1)
    return "-".join([digits[:7], *mark])


@contextlib.contextmanager
def styled():
    """Gives figures the style of this project; matplotlib's own settings stay as they are."""
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    # A "$" in a name is no mathematics.
    look = {"text.parse_math": False, "savefig.transparent": True, **dict.fromkeys(inks, INK)}
    with seaborn.axes_style("ticks"), seaborn.plotting_context("notebook"), matplotlib.rc_context(look):
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
    columns, axis = quality.labels, "predicted"
    if quality.threshold is not None:  # a matrix of two rows for each label
        counts, columns, axis = counts.reshape(len(counts), 4), ["absent", "wrong", "missed", "found"], "label is"
    # Shares, not counts: the rare classes would all be white. At least 1, for a class without a text.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    look, note = {"annot": counts, "linewidths": 0.5, "xticklabels": columns, "yticklabels": quality.labels}, ""
    if len(quality.labels) > MOST_NAMED:
        look, note = {"xticklabels": False, "yticklabels": False}, f", {len(quality.labels)} classes"
    bar = {"label": "share of the true class", "shrink": 0.8}
    with styled():
        # Inches: the margin with the names, and a cell per class.
        size = 2.2 + 0.75 * min(len(quality.labels), MOST_NAMED)
        figure, axes = plt.subplots(figsize=(size + 0.8, size))  # wider by the color bar
        seaborn.heatmap(shares, fmt="d", cmap="Blues", vmin=0, vmax=1, square=True, ax=axes, cbar_kws=bar, **look)
        axes.set(xlabel=f"{axis}{note}", ylabel="true" if columns is quality.labels else "")
        axes.tick_params(axis="y", rotation=0)
        axes.tick_params(axis="x", rotation=30)
        title = f"{name_of(record.variant)}: {quality.examples} {quality.split} texts"
        axes.set_title(f"{title}, macro F1 {100 * quality.macro_f1:.1f} %", fontsize="medium")
        save_figure(figure, path)
