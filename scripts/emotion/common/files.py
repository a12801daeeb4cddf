"""Files and folders that are whole or not there: written under a temporary name, then renamed.

A rename inside one folder happens at once or not at all, so that a killed program leaves the old file or the new one.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

from emotion.common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent.parent  # of the repository: <root>/scripts/emotion/common/


def relative(path: Path) -> str:
    """The name of a path for records: from the repository's root if it lies there, else its last part alone."""
    path = Path(path).resolve()
    # Records are published: the folders above may hold the user's name, and no reader needs them.
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def without_path(value):
    """A recipe's value with each absolute path replaced by its last part; a mapping is searched through."""
    if isinstance(value, dict):
        return {key: without_path(one) for key, one in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step, so that a reader never sees half of it."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file of bytes in one step, as `write_text` does with text."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value) -> None:
    """Writes indented JSON.

    Raises:
        ValueError: if a number is not finite. JSON has no such number, and other programs could not read the file.
    """
    # Texts and labels stay readable (no \u escapes). One space: more would mostly indent the numbers of matrices.
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def whole_file(path: Path):
    """Yields a temporary path beside ``path``; it becomes ``path`` when the block succeeds, and is removed if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, since a rename to another disk would be a copy; with the process's number, since two programs may
    # write the same file at once.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # after the rename it is gone already


@contextlib.contextmanager
def whole_folder(folder: Path, marker: str):
    """Yields an empty temporary folder beside ``folder``; it takes that place when the block succeeds.

    An older folder of that name stays untouched until then. It is replaced only if it holds ``marker``, the file that
    this project leaves in its own folders.

    Raises:
        UserError: if ``folder`` cannot be written, or holds something else.
    """
    folder = Path(folder)
    check_replaceable(folder, marker)
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # a run was killed between the two renames below
        old.rename(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)  # with the permissions of any new folder; a temporary one would be the owner's alone
    try:
        yield partial
        for path in partial.rglob("*"):  # safetensors writes files that only their owner can read
            if path.is_file():
                path.chmod(0o644)
        # A folder that is not empty cannot be renamed over. The old one steps aside, so that it can be brought back.
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)  # a failure hurts nobody: the new folder is in its place
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(folder: Path, marker: str) -> None:
    """Raises `UserError` if ``folder`` cannot be written, or holds something that this project did not make.

    Commands call this first, so that the error comes before the training and not after it.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a folder")
    # An empty folder is free to take: users make one first, and so do the programs that run this one.
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise UserError(f"{folder} holds something else (no {marker} in it); name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder.parent).cleanup()  # permissions alone do not tell: a disk can be full
    except OSError as error:
        raise UserError(f"cannot write in {folder.parent}: {error.strerror}; choose another folder") from error


def read_json(path: Path) -> dict:
    """Reads a file of results.

    Raises:
        UserError: if the file is missing, is not JSON, or holds no object; it names the file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON, and no UTF-8 holds it
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    # The first is the parent of JSON's and UTF-8's errors; lists in lists a thousand times deep raise the second.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object but {type(value).__name__}")
    return value


def _finite(word: str) -> float:
    """A number of a JSON file; raises `ValueError` for NaN, Infinity and 1e999, which JSON does not have."""
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"{word} is no number")
    return number
