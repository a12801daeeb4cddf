"""SHA256SUMS: the SHA-256 of every file of a model folder, as `sha256sum` writes and checks it."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from emotion.utils.errors import UserError, check_inside, reason_of
from emotion.utils.files import sha256, write_text

SUMS_FILE = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def format_sums(sums: dict[str, str]) -> str:
    """The content of SHA256SUMS, from the files' names, relative to its folder, and their SHA-256 in hexadecimal."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS over every other file of a folder."""
    sums = {name: sha256(Path(folder) / name) for name in _names_of(folder)}
    write_text(Path(folder) / SUMS_FILE, format_sums(sums))


def _names_of(folder: Path) -> list[str]:
    """The names of all files of a folder, relative to it and sorted; without SHA256SUMS."""
    names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
    return sorted(name for name in names if name != SUMS_FILE)


def read_sums(folder: Path) -> dict[str, str] | None:
    """Name -> SHA-256 of each file that a folder's SHA256SUMS names; None for a folder without one.

    Raises:
        UserError: if the file cannot be read, names a file twice, or names one outside the folder.
    """
    path = Path(folder) / SUMS_FILE
    if not path.exists():
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from error
    sums = {}
    for number, line in enumerate(lines, start=1):
        match = LINE.fullmatch(line)
        if not match:
            raise UserError(f"{path} line {number} is not '<64 hexadecimal digits>  <name>'")
        check_inside(match[2], f"{path} line {number}")
        name = PurePosixPath(match[2]).as_posix()
        if name in sums:
            raise UserError(f"{path} line {number} names {name} a second time")
        sums[name] = match[1]
    return sums


def check_sums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compares files of a folder with its SHA256SUMS; a folder without one passes.

    Args:
        folder: the model folder.
        names: relative to the folder; None takes all files that SHA256SUMS names.

    Raises:
        UserError: naming the first file that is missing, that SHA256SUMS does not name, or that differs from it.
    """
    folder, sums = Path(folder), read_sums(folder)
    if sums is None:
        return
    for name in sums if names is None else names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; make or download it again")
        if sums.get(name) != sha256(folder / name):
            how = "differs from" if name in sums else "is not named in"
            raise UserError(
                f"{folder / name} {how} {folder / SUMS_FILE}; make or download it again. If the change is yours, "
                f"remove {SUMS_FILE} or pass --skip_checksum"
            )


def check_covered(folder: Path) -> None:
    """Compares every file of a folder with its SHA256SUMS.

    Raises:
        UserError: as `check_sums` does, or if the folder has no SHA256SUMS, or holds a file that it does not name.
    """
    sums = read_sums(folder)
    if sums is None:
        raise UserError(f"{folder} has no {SUMS_FILE}; make or download it again")
    check_sums(folder, [*sums, *(name for name in _names_of(folder) if name not in sums)])


def has_files(folder: Path, checksums: dict[str, str]) -> bool:
    """Whether the folder has these files with these SHA-256."""
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in checksums.items())
