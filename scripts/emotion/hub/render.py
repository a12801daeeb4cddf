"""Fills the templates: the words and tables of every page stand in files, and Python prepares what they cannot count.

A table is a block `{% filter table %}` with a line per row and `¦` between its cells, the head first.
"""

import contextlib
from pathlib import Path

import jinja2

from emotion.utils.errors import UserError
from emotion.utils.processor import TITLES


@contextlib.contextmanager
def complete(what: str):
    """Raises `UserError` where a field is missing, or is null where a number belongs.

    It works as a `with` block around the preparation of ``what``, and as the decorator of a function that renders it.
    """
    try:
        yield
    # What it reads was checked field by field. This is for what only two files, or two fields, tell together:
    # templates raise the first of these where something is missing, Python the others.
    except (jinja2.UndefinedError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{what} cannot be written: {error}; measure it again") from error


def render(template: Path, **fields) -> str:
    """The text of a template, filled with the fields.

    Args:
        template: its path; the templates that it includes lie beside it.

    Raises:
        jinja2.UndefinedError: if the template names a field that is not there; `complete` makes a `UserError` of it.
    """
    # StrictUndefined: by default a missing field would silently be an empty word. The two `_blocks`: a line that holds
    # nothing but a tag leaves no line in the page.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_without_last_newline,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters |= {
        "short": shorten,
        "processor": TITLES.get,  # of a class of processors
        "number": number,
        "percent": lambda value, form=".2f": number(value, form, 100),
        "mean": plus_minus,
        "p_value": lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",  # no verdict depends on how far below
        "times": _times,
        "spread": lambda one, unit="": f"{one.median:.2f}{unit} [{one.min:.2f}, {one.max:.2f}]",  # over the rounds
        "table": _table,
    }
    return environment.get_template(template.name).render(**fields)


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown whose columns line up in plain text too; all but the first are right-aligned.

    Args:
        head: the names of the columns.
        rows: as many cells each; there may be no row.
    """
    lines = [[cell.strip().replace("|", "\\|") for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [f"| {' | '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])} |" for line in lines]
    # The colon on the right of a rule is Markdown's mark for a column that is aligned there.
    lines.insert(1, f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:]))
    return "\n".join(lines) + "\n"


def _times(ratio) -> str:
    """' (2.1x)', of a spread its median; a second digit where it is needed to see how much slower or larger."""
    if not ratio:  # not part of an interleaved run
        return ""
    ratio = ratio["median"] if isinstance(ratio, dict) else ratio
    return f" ({ratio:.1f}x)" if ratio >= 0.95 else f" ({ratio:.2f}x)"


def _table(text: str) -> str:
    """The table that a block of a template spells out."""
    head, *rows = [line.split("¦") for line in text.splitlines() if line.strip()]
    return markdown_table(head, rows)


def number(value: float | None, form: str = ".2f", factor: float = 1) -> str:
    """The value times the factor, formatted; a dash for None, which stands for a value that was not measured."""
    return "-" if value is None else format(factor * value, form)


def plus_minus(one, form: str = ".2f", factor: float = 100) -> str:
    """A mean over seeds and its standard deviation: '89.04 ± 0.66', in points if not said; a single seed has none.

    Args:
        one: a `Deviation`, or a mapping with its fields.
    """
    mean, deviation = dict(one)["mean"], dict(one)["standard_deviation"]
    text = number(mean, form, factor)
    return text if deviation is None else f"{text} ± {number(deviation, form.removeprefix('+'), factor)}"


def shorten(commit: str | None) -> str:
    """The first seven digits of a commit, and whether its code was changed; "unknown" outside a repository."""
    if commit is None:
        return "unknown"
    digits, *mark = commit.split("-", 1)
    return "-".join([digits[:7], *mark])


def _without_last_newline(value):
    """Tables end with a newline of their own; without it a blank line of a template is a blank line of the page."""
    return value.rstrip("\n") if isinstance(value, str) else value
