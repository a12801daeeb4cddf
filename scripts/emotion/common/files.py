"""Files that are whole or not there: write under a temporary name, then rename."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from emotion.common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def relative(path: Path) -> str:
    """A path in the repository is named from its root, any other by its last part: no home folder is recorded."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def without_path(value):
    """The value, or the mapping of values, with each local folder named by its last part alone."""
    if isinstance(value, dict):
        return {key: without_path(one) for key, one in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step, so that a reader never sees half of it."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for what is not text."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value) -> None:
    """Writes indented JSON; a number that is not finite is an error, since JSON has none."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def whole_file(path: Path):
    """Yields a temporary path beside ``path``; it becomes ``path`` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path, marker: str):
    """Yields an empty temporary folder beside ``folder``; it takes that place when the block succeeds.

    What stood there before stays untouched until then, and is replaced only if it holds ``marker``, the file that
    this project leaves in its own folders.
    """
    folder = Path(folder)
    check_replaceable(folder, marker)
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # a run was killed between the two renames below
        old.rename(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(folder: Path, marker: str) -> None:
    """Raises `UserError` now rather than after the training, if ``folder`` cannot be written or is not ours."""
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise UserError(f"{folder} holds something else (no {marker} in it); name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder.parent).cleanup()
    except OSError as error:
        raise UserError(f"cannot write in {folder.parent}: {error.strerror}; choose another folder") from error


def read_json(path: Path) -> dict:
    """Reads a results file, or says which one is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
