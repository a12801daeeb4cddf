"""Names that come from a file or a command line: checked where they enter, so that none becomes a path or a page."""

import re
from pathlib import PureWindowsPath

from emotion.utils.errors import UserError

PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"  # of a repository's name
# A folder's own name may become a variant's, so that letters of any language and blanks are allowed.
FILE_NAME = r"\w[\w .+=-]*"


def check_name(name, where) -> None:
    """Raises `UserError` unless a variant or a format can be part of a file's name: no path, and one line.

    Args:
        where: the file that it stands in.
    """
    if not isinstance(name, str) or not re.fullmatch(FILE_NAME, name):
        raise UserError(f"{where}: {name!r} is no name for a file; it takes letters, digits, blanks and '_.+=-'")


def check_line(name, where) -> None:
    """Raises `UserError` unless the name of a model or of a dataset is one line that a page can show as it is."""
    if name is not None and (not isinstance(name, str) or not name.isprintable() or set(name) & set('<>`|"')):
        raise UserError(f"{where}: {name!r} is no name of a model or a dataset; it takes one line without markup")


def check_repo_id(repo_id: str) -> None:
    """Raises `UserError` unless a word is 'name' or 'owner/name' in the letters that the Hub takes."""
    # The Hub's own check lets a line break at the end pass.
    if not re.fullmatch(f"({PART}/)?{PART}", repo_id):
        raise UserError(f"{repo_id!r} is no name for a repository; it takes owner/name")


def check_inside(name, where) -> None:
    """Raises `UserError` unless a name that a file gives leads to a file inside the artifact's folder.

    On every system: a name with a drive or backslashes leads elsewhere on Windows alone.
    """
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts or not path.parts:
        raise UserError(f"{where}: {name!r} leads out of the artifact's folder")
