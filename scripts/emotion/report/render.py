"""Fills the templates: the words of every page stand in files, and Python prepares the numbers and tables."""

import contextlib
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.processor import TITLES

import jinja2

TEMPLATES = Path(__file__).resolve().parent / "templates"


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


def render(template: Path | str, **fields) -> str:
    """The text of a template, filled with the fields.

    Args:
        template: a path, or the name of a file in `templates/`.

    Raises:
        jinja2.UndefinedError: if the template names a field that is not there; `complete` makes a `UserError` of it.
    """
    # StrictUndefined: by default a missing field would silently be an empty word. The two `_blocks`: a line that holds
    # nothing but a tag leaves no line in the page.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_without_last_newline,
    )
    environment.filters["short"] = shorten
    environment.filters["processor"] = TITLES.get  # of a class of processors
    source = (TEMPLATES / template).read_text(encoding="utf-8")  # an absolute path stays as it is
    return environment.from_string(source).render(**fields)


def shorten(commit: str | None) -> str:
    """The first seven digits of a commit, and whether its code was changed; "unknown" outside a repository."""
    if commit is None:
        return "unknown"
    digits, *mark = commit.split("-", 1)
    return "-".join([digits[:7], *mark])


def _without_last_newline(value):
    """Tables end with a newline of their own; without it a blank line of a template is a blank line of the page."""
    return value.rstrip("\n") if isinstance(value, str) else value
