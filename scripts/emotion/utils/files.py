"""Files and folders that are whole or not there: written under a temporary name, then renamed.

A rename inside one folder happens at once or not at all, so that a killed program leaves the old file or the new one.

While a place is written, one process holds the lock `.<name>.lock` beside it, and makes what is new in
`.<name>.partial`. The system frees the lock of a process that has died; whoever holds it next clears what that one
left. A folder that stands there is replaced only if this project has made it and all that it holds.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from emotion.utils.errors import UserError, reason_of

WAIT_S = 600  # for the process that writes a file; longer only where it has died and its system frees no locks
ROOT = Path(__file__).resolve().parent.parent.parent.parent  # of the repository: <root>/scripts/emotion/common/


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that this project makes, and how it is told from a user's own.

    Attributes:
        name: what messages call it, with its article.
        is_ours: whether the content of a folder shows that this project has made it.
        entries: fits the name of each file and folder that it may hold, from its root on.
    """

    name: str
    is_ours: Callable[[Path], bool]
    entries: re.Pattern


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
    digest = hashlib.sha256()
    with Path(path).open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):  # a model need not fit into memory
            digest.update(piece)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step, so that a reader never sees half of it."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file of bytes in one step, as `write_text` does with text."""
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value) -> None:
    """Writes indented JSON.

    Raises:
        UserError: as `check_result` does.
        ValueError: if a number is not finite. JSON has no such number, and other programs could not read the file.
    """
    check_result(path, value)
    # Texts and labels stay readable (no \u escapes). One space: more would mostly indent the numbers of matrices.
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_write(path: Path, wait: bool = True):
    """Yields a temporary path beside ``path``; it becomes ``path`` when the block succeeds, and is removed if not.

    Two processes may write the same file: the second waits for the first. A link stays one: its target is written.

    Args:
        wait: as in `output_lock`.

    Raises:
        UserError: if ``path`` is no file, or its folder cannot be written.
    """
    check_is_file(path)
    with output_lock(path, wait) as place:  # which removes what an error leaves
        yield _partial(place)  # beside it, since a rename to another disk would be a copy
        _partial(place).replace(place)


@contextlib.contextmanager
def atomic_folder(folder: Path, kind: FolderKind | None = None):
    """Yields an empty temporary folder; it takes the place ``folder`` when the block succeeds.

    What stands there stays untouched until then. If the place is a link, the folder that it leads to is replaced.

    Args:
        kind: the kind of folder that is replaced; None to take an empty place only.

    Raises:
        UserError: as `check_replaceable` and `output_lock` do.
    """
    check_replaceable(folder, kind)
    with output_lock(folder) as place:
        new, old = _partial(place) / "new", _partial(place) / "old"
        new.mkdir(parents=True)  # with the permissions of any new folder; a temporary one would be the owner's alone
        yield new
        for path in new.rglob("*"):  # safetensors writes files that only their owner can read
            if path.is_file():
                path.chmod(0o644)
        check_replaceable(folder, kind)  # again: the user may have put a file there meanwhile
        # A folder that is not empty cannot be renamed over. The old one steps aside; `output_lock` brings it back if
        # the second rename fails, now or, if this process is killed between the two, in the next run.
        if place.exists():
            place.rename(old)
        new.rename(place)
        _clear(place)


def scratch_folder() -> tempfile.TemporaryDirectory:
    """A temporary folder that a model may be opened from: Windows leaves there what is still mapped into memory."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def discard(folder: Path) -> None:
    """Removes a folder that this project has made; a process killed meanwhile leaves no half of it in its place."""
    with output_lock(folder) as place:
        _partial(place).mkdir()
        place.rename(_partial(place) / "discarded")


@contextlib.contextmanager
def output_lock(path: Path, wait: bool = False):
    """Holds the place of a file or folder while the block runs; the process that holds it may do so again inside.

    Args:
        wait: whether to wait for a process that holds it, up to `WAIT_S`.

    Yields:
        The place itself: where ``path`` leads to if it is a link.

    Raises:
        UserError: if another process holds it, or nothing can be written there.
    """
    from filelock import FileLock, SoftFileLock, Timeout  # imported here: a program that only answers writes nothing

    place = _target(path)
    # One lock object per place: a second one of the same process would wait for the first.
    lock = FileLock(place.with_name(f".{place.name}.lock"), is_singleton=True)
    inside = lock.is_locked  # this process holds it already
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=WAIT_S if wait else 0)
    except Timeout as error:
        # On a disk without locks the file itself is one, which a process that was killed on another machine leaves.
        left = f", or remove {lock.lock_file} if none does" if isinstance(lock, SoftFileLock) else ""
        raise UserError(
            f"another process is writing {path}{left}; wait until it ends, or name another place"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write in {Path(path).parent}: {error.strerror}; choose another folder") from error
    try:
        if not inside:
            _clear(place)  # what a process that was killed has left
        yield place
    finally:
        if not inside:
            _clear(place)
            # Removed while it is held: one who waits for a file that is gone looks for the new one. Windows removes no
            # open file; there `filelock` does it, after the release.
            with contextlib.suppress(PermissionError):
                Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def check_replaceable(folder: Path, kind: FolderKind | None, inputs: Iterable[Path] = ()) -> None:
    """Raises `UserError` if a folder cannot be written without destroying what is the user's.

    Commands call this first, so that the error comes before the training and not after it.

    Args:
        kind: the kind of folder that may be replaced; None for an empty place only.
        inputs: files and folders that the run reads. The folder must not be one, nor hold one, nor lie in one.
    """
    place = _target(folder)
    if place.exists() and not place.is_dir():
        raise UserError(f"{folder} is a {_what_is(place)}; name a folder")
    if os.path.ismount(place) or Path.cwd().is_relative_to(place):  # neither can be renamed, or not without harm
        raise UserError(f"{folder} is a mount point, or holds the folder you are in; name a folder below it")
    for one in inputs:
        read = Path(one).resolve()
        if read.is_relative_to(place) or (read.is_dir() and place.is_relative_to(read)):
            raise UserError(f"{folder}: this run reads {one}, which must stay as it is; name another folder")
    # An empty folder is free to take: users make one first, and so do the programs that run this one.
    if place.is_dir() and any(place.iterdir()):
        if not (kind and kind.is_ours(place)):
            what = kind.name if kind else "an empty folder"
            raise UserError(f"{folder} holds something else (it is not {what} of this project); name another folder")
        if strangers := list(islice(_strangers(place, kind), 3)):  # three say enough
            raise UserError(
                f"{folder} holds {', '.join(strangers)}, which {kind.name} does not; move that away, or name another "
                "folder"
            )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=place.parent).cleanup()  # permissions alone do not tell: a disk can be full
    except OSError as error:
        raise UserError(f"cannot write in {Path(folder).parent}: {error.strerror}; choose another folder") from error


def check_is_file(path: Path) -> None:
    """Raises `UserError` if something that is no file stands where a file is to be written."""
    place = _target(path)
    if place.exists() and not place.is_file():
        raise UserError(f"{path} is a {_what_is(place)}; name a file")


def check_result(path: Path, fields: Iterable[str]) -> None:
    """Raises `UserError` if a file of results would replace something else than an earlier one.

    Args:
        fields: of the new file. An earlier one, of another version too, has one of them.
    """
    check_is_file(path)
    if not Path(path).is_file() or not Path(path).stat().st_size:
        return
    try:
        before = read_json(path)
    except UserError:
        before = {}
    if not before.keys() & set(fields):
        raise UserError(f"{path} holds something else than results of this command; move it away, or name another")


def _strangers(folder: Path, kind: FolderKind) -> Iterator[str]:
    """The entries of a folder that none of its kind has. A link is one, wherever it leads; a device is one."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        plain = not path.is_symlink() and (path.is_dir() or path.is_file())
        if not plain or not kind.entries.fullmatch(name):
            yield name


def _what_is(path: Path) -> str:
    if path.is_dir() or path.is_file():
        return "folder" if path.is_dir() else "file"
    if path.is_fifo() or path.is_socket():
        return "pipe" if path.is_fifo() else "socket"
    return "device"


def _target(path: Path) -> Path:
    """Where a path leads to, through all links: what is new goes beside that, on the same disk."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError before Python 3.13
        raise UserError(f"{path} is a link that leads in a circle; name another place") from error


def _partial(place: Path) -> Path:
    """Where what is new is made. One fixed name: only who holds the lock of the place may use it."""
    return place.with_name(f".{place.name}.partial")


def _clear(place: Path) -> None:
    """Brings back what a killed process had put aside, and removes what it had begun."""
    partial = _partial(place)
    if (partial / "old").exists() and not place.exists():
        (partial / "old").rename(place)
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)  # a failure hurts nobody: the next run tries again
    else:
        partial.unlink(missing_ok=True)


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


MOST_BYTES = 4_000_000  # the config.json of a model has some thousand
MOST_VALUES = 200_000  # in YAML a few lines can stand for millions of values, by names for parts that repeat


def read_fields(path: Path, parse, kinds: dict, most_bytes: int = MOST_BYTES) -> dict:
    """Reads a mapping whose values have the types that this program relies on.

    Args:
        parse: from the file's text to its value.
        kinds: key -> the type, or types, of its value, or the kinds of a mapping inside. A key that the file may leave
            out ends with "?". The file may have more keys.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise UserError(f"{path} has {size:,} bytes, and {most_bytes:,} at most can be right")
        values = parse(path.read_text(encoding="utf-8"))
        _check_plain(values)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except Exception as error:  # not text, not JSON, nested too deeply: each parser has errors of its own
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from error
    _check_kinds(values, kinds, str(path))
    return values


def _check_plain(value) -> None:
    """Raises `ValueError` unless the value is made of what JSON has: a record that quotes it must be written."""
    values = [value]
    for count, one in enumerate(values):  # the list grows while it is read
        if count > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")
        if isinstance(one, dict):
            values += one.keys()
            values += one.values()
            if not all(isinstance(key, str) for key in one):
                raise ValueError("it has a key that is no text")
        elif isinstance(one, list):
            values += one
        elif isinstance(one, float) and not math.isfinite(one) or not isinstance(one, str | int | float | None):
            raise ValueError(f"it holds {one!r:.40}, which JSON does not have")


def _check_kinds(values, kinds: dict, place: str) -> None:
    """Raises `UserError` for the first value of another type than `read_fields` was told."""
    if not isinstance(values, dict):
        raise UserError(f"{place} must hold a mapping and holds {_name(values)}")
    for name, kind in kinds.items():
        key = name.removesuffix("?")
        if key not in values:
            if key == name:
                raise UserError(f"{place} has no '{key}'")
        elif isinstance(kind, dict):
            _check_kinds(values[key], kind, f"{place}: '{key}'")
        # Python counts True as a number, and no field that is read as one can mean it.
        elif not isinstance(values[key], kind) or isinstance(values[key], bool):
            raise UserError(f"{place}: '{key}' cannot be {_name(values[key])}")


def _name(value) -> str:
    """A value for a message, cut short."""
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else f"{value!r:.40}"
