"""Atomic writes, locks on what is written, checksums, and checked reading of JSON and YAML.

What is new is made in `.<name>.partial` beside its target, under the lock `.<name>.lock`, and then renamed: a killed
program leaves the old file or the new one. The next process to lock the target removes what a killed one has left. A
folder is replaced only if this project has made it and all that it holds.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from emotion.utils.errors import UserError, check_inside, reason_of

ROOT = Path(__file__).resolve().parent.parent.parent.parent  # of the repository
RECOMMENDED = "qat-int4"  # the best file of QAT on validation; a seventh of FP32
PACKAGED = Path(__file__).resolve().parent.parent / "model"  # the same files, in an installed package
LOCK_TIMEOUT_S = 600  # to wait for another process; reached only where it has died and the disk frees no locks
MAX_BYTES = 4_000_000  # of a settings file; the config.json of a model has some thousand
MAX_RESULT_BYTES = 100_000_000  # of a file of results
# How a path of a machine begins; and such paths, of two parts and more, inside a text, but not the end of an address
PATH_START = re.compile(r"file:/|(~[\w.-]*|\.{0,2})/|([A-Za-z]:|\.{1,2}|\\)[/\\]")
PART = r"[^\s/\\,;:'\"()\[\]<>|]+"
PATH_INSIDE = re.compile(
    rf"(?<![\w:/.~-])((file:/*|~[\w.-]*|\.{{1,2}})?(/+{PART}){{2,}}/?|([A-Za-z]:|\\)(\\{PART}){{2,}})"
)
SUMS_FILE = "SHA256SUMS"  # of every file of a model folder, as `sha256sum` writes and checks it


def recommended_model() -> Path:
    """The folder of the recommended model: the installed package's, or that of the clone."""
    return PACKAGED if PACKAGED.is_dir() else ROOT / "weights" / RECOMMENDED


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that this project makes, and how it is told from a user's own."""

    name: str  # with its article
    is_ours: Callable[[Path], bool]  # whether its content shows that this project has made it
    entries: re.Pattern  # matches each name that it may hold, relative to its root


def relative(path: Path) -> str:
    """The path relative to the repository if it lies there, else its last part alone, for published records."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def without_path(value):
    """A value of a recipe or record with each path of this machine cut to its last part, in mappings and lists too."""
    if isinstance(value, dict):
        return {without_path(key): without_path(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_path(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if PATH_START.match(value) and "\n" not in value:  # nothing but a path, which may hold blanks
        return PureWindowsPath(value).name or value
    return PATH_INSIDE.sub(lambda found: PureWindowsPath(found[0]).name, value)


def check_file(path: Path, folder: Path | None = None, max_bytes: int | None = None) -> None:
    """Checks a file that a stranger may have made, before it is opened.

    Raises `UserError` unless it is a regular file of at most ``max_bytes`` that no link leads out of the ``folder``,
    or, in the Hub's cache, out of the blobs of its repository.
    """
    target = _target(path)
    if not target.is_file():
        raise UserError(f"{path} is a {_type_of(target)}; name a file" if target.exists() else f"no file {path}")
    if max_bytes is not None and (size := target.stat().st_size) > max_bytes:
        raise UserError(f"{path} has {size:,} bytes, and {max_bytes:,} at most can be right")
    if folder is not None:
        root = Path(folder).resolve()
        places = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
        if not any(target.is_relative_to(place) for place in places):
            raise UserError(f"{path} is a link out of {folder}; put the file itself there")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb", buffering=0) as file:
        while chunk := file.read(1 << 20):  # a model need not fit into memory
            digest.update(chunk)
    return digest.hexdigest()


def format_sums(sums: dict[str, str]) -> str:
    """The content of SHA256SUMS, from the files' names, relative to its folder, and their SHA-256 in hexadecimal."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS over every other file of a folder."""
    write_text(Path(folder) / SUMS_FILE, format_sums({name: sha256(folder / name) for name in _names_of(folder)}))


def _names_of(folder: Path) -> list[str]:
    """The names of all files of a folder, relative to it; without SHA256SUMS."""
    names = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
    return sorted(names - {SUMS_FILE})


def read_sums(folder: Path) -> dict[str, str] | None:
    """Name -> SHA-256 of each file that SHA256SUMS names; None without it. Raises `UserError` if it is damaged."""
    path = Path(folder) / SUMS_FILE
    if not path.exists():
        return None
    check_file(path, folder, MAX_BYTES)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from error
    sums = {}
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not match:
            raise UserError(f"{path} line {number} is not '<64 hexadecimal digits>  <name>'")
        check_inside(match[2], f"{path} line {number}")
        name = PurePosixPath(match[2]).as_posix()
        if name in sums:
            raise UserError(f"{path} line {number} names {name} a second time")
        sums[name] = match[1]
    return sums


def check_sums(folder: Path, names: Iterable[str] | None = None, verify: bool = True) -> None:
    """Checks files of a folder before they are opened, with `check_file` and against its SHA256SUMS, if it has one.

    Args:
        names: all that SHA256SUMS names by default.
        verify: whether SHA256SUMS is read.

    Raises:
        UserError: naming the first file that is missing, that SHA256SUMS does not name, or that differs from it.
    """
    folder = Path(folder)
    sums = read_sums(folder) if verify else None
    for name in (sums or ()) if names is None else names:
        if not (folder / name).exists():
            if sums is None:  # what needs the file says so
                continue
            raise UserError(f"{folder} has no {name}; make or download it again")
        check_file(folder / name, folder)
        if sums is not None and sums.get(name) != sha256(folder / name):
            how = "differs from" if name in sums else "is not named in"
            raise UserError(
                f"{folder / name} {how} {folder / SUMS_FILE}; make or download it again. If the change is yours, "
                f"remove {SUMS_FILE} or pass --skip_checksum"
            )


def check_covered(folder: Path) -> None:
    """Compares every file of a folder with its SHA256SUMS, which must be there and name all; as `check_sums`."""
    sums = read_sums(folder)
    if sums is None:
        raise UserError(f"{folder} has no {SUMS_FILE}; make or download it again")
    check_sums(folder, dict.fromkeys([*sums, *_names_of(folder)]))


def has_files(folder: Path, checksums: dict[str, str]) -> bool:
    """Whether the folder has these files with these SHA-256."""
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in checksums.items())


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, value) -> None:
    """Writes indented JSON atomically; raises `UserError` as `check_result` does, and `ValueError` for NaN."""
    check_result(path, value)
    # Texts and labels stay readable (no \u escapes). One space: more would mostly indent the numbers of matrices.
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_write(path: Path):
    """Yields a temporary path, which replaces ``path`` if the block succeeds and is removed if not.

    If ``path`` is a link, the file that it leads to is replaced. A process that writes the same file is waited for.
    Raises `UserError` if ``path`` is no file, or its folder cannot be written.
    """
    check_is_file(path)
    with output_lock(path, wait=True) as target:  # which removes what an error leaves
        yield _partial(target)
        _partial(target).replace(target)


@contextlib.contextmanager
def atomic_folder(folder: Path, kind: FolderKind | None = None):
    """Yields an empty temporary folder, which replaces ``folder``, or what it leads to, if the block succeeds.

    Takes the arguments of `check_replaceable`, and raises `UserError` as that and `output_lock` do.
    """
    check_replaceable(folder, kind)
    with output_lock(folder) as target:
        new, old = _partial(target) / "new", _partial(target) / "old"
        new.mkdir(parents=True)  # with the permissions of any new folder; a temporary one would be the owner's alone
        yield new
        for path in new.rglob("*"):  # safetensors writes files that only their owner can read
            if path.is_file():
                path.chmod(0o644)
        check_replaceable(folder, kind)  # again: the user may have put a file there meanwhile
        # A folder that is not empty cannot be renamed over. The old one steps aside; `output_lock` brings it back if
        # the second rename fails, now or, if this process is killed between the two, in the next run.
        if target.exists():
            target.rename(old)
        new.rename(target)
        _clear(target)


def scratch_folder() -> tempfile.TemporaryDirectory:
    """A temporary folder that a model may be opened from: Windows leaves there what is still mapped into memory."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


@contextlib.contextmanager
def output_lock(path: Path, wait: bool = False):
    """Locks a file or folder, which need not exist, for writing; the process that has the lock may take it again.

    Yields where ``path`` leads to if it is a link. Raises `UserError` if nothing can be written there, or if another
    process has the lock, with ``wait`` after `LOCK_TIMEOUT_S`.
    """
    from filelock import FileLock, SoftFileLock, Timeout  # here: classifying texts must not wait for it

    target = _target(path)
    # One lock object per target: a second one of the same process would wait for the first.
    lock = FileLock(target.with_name(f".{target.name}.lock"), is_singleton=True)
    is_outermost = not lock.is_locked
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_TIMEOUT_S if wait else 0)
    except Timeout as error:
        # On a disk without locks the file itself is one, which a process that was killed on another machine leaves.
        left = f", or remove {lock.lock_file} if none does" if isinstance(lock, SoftFileLock) else ""
        raise UserError(f"another process is writing {path}{left}; wait until it ends, or name another") from error
    except OSError as error:
        raise UserError(f"cannot write in {Path(path).parent}: {error.strerror}; choose another folder") from error
    try:
        if is_outermost:
            _clear(target)  # what a process that was killed has left
        yield target
    finally:
        if is_outermost:
            _clear(target)
            # Removed before the release: a process that waits for a file that is gone looks for the new one. Windows
            # removes no open file; there `filelock` does it, after the release.
            with contextlib.suppress(PermissionError):
                Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def check_replaceable(folder: Path, kind: FolderKind | None, inputs: Iterable[Path] = ()) -> None:
    """Checks that a folder can be written without destroying what is the user's. Commands call this before any work.

    A folder of ``kind`` may be replaced, without one only an empty folder. It must not be, hold or lie in one of the
    ``inputs`` of the run. Raises `UserError`, which names what would be destroyed, or if nothing can be written there.
    """
    target = _target(folder)
    if target.exists() and not target.is_dir():
        raise UserError(f"{folder} is a {_type_of(target)}; name a folder")
    if os.path.ismount(target) or Path.cwd().is_relative_to(target):  # neither can be renamed, or not without harm
        raise UserError(f"{folder} is a mount point, or holds the folder you are in; name a folder below it")
    for name in inputs:
        read = Path(name).resolve()
        if read.is_relative_to(target) or (read.is_dir() and target.is_relative_to(read)):
            raise UserError(f"{folder}: this run reads {name}, which must stay as it is; name another folder")
    # An empty folder is free: users make one first, and so do the programs that run this one.
    if target.is_dir() and any(target.iterdir()):
        if not (kind and kind.is_ours(target)):
            what = kind.name if kind else "an empty folder"
            raise UserError(f"{folder} holds something else (it is not {what} of this project); name another folder")
        if foreign := ", ".join(islice(_foreign_entries(target, kind), 3)):  # three say enough
            raise UserError(f"{folder} holds {foreign}, which {kind.name} does not; move that away, or name another")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=target.parent).cleanup()  # permissions alone do not tell: a disk can be full
    except OSError as error:
        raise UserError(f"cannot write in {Path(folder).parent}: {error.strerror}; choose another folder") from error


def check_is_file(path: Path) -> None:
    """Raises `UserError` if something that is no file stands where a file is to be written."""
    target = _target(path)
    if target.exists() and not target.is_file():
        raise UserError(f"{path} is a {_type_of(target)}; name a file")


def check_result(path: Path, fields: Iterable[str]) -> None:
    """Raises `UserError` if a file of results would replace something else than an earlier one.

    An earlier one, of another version too, has one of the new file's ``fields``.
    """
    check_is_file(path)
    if not Path(path).is_file() or not Path(path).stat().st_size:
        return
    before = {}
    with contextlib.suppress(UserError):
        before = read_json(path)
    if not before.keys() & set(fields):
        raise UserError(f"{path} holds something else than results of this command; move it away, or name another")


def _foreign_entries(folder: Path, kind: FolderKind):
    """Yields the entries of a folder that none of its kind has; links and devices are such."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_plain = not path.is_symlink() and (path.is_dir() or path.is_file())
        if not is_plain or not kind.entries.fullmatch(name):
            yield name


def _type_of(path: Path) -> str:
    if path.is_dir() or path.is_file():
        return "folder" if path.is_dir() else "file"
    return "pipe or socket" if path.is_fifo() or path.is_socket() else "device"


def _target(path: Path) -> Path:
    """Where a path leads to, through all links: what is new goes beside that, on the same disk."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError before Python 3.13
        raise UserError(f"{path} is a link that leads in a circle; name another") from error


def _partial(target: Path) -> Path:
    """Where what is new is made. One fixed name: only the process that has the lock may use it."""
    return target.with_name(f".{target.name}.partial")


def _clear(target: Path) -> None:
    """Brings back what a killed process had put aside, and removes what it had begun."""
    partial = _partial(target)
    if (partial / "old").exists() and not target.exists():
        (partial / "old").rename(target)
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)  # a failure hurts nobody: the next run tries again
    else:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """Reads a JSON object with finite numbers; raises `UserError`, which names the file, for anything else."""
    return read_fields(path, json.loads, {}, max_bytes=MAX_RESULT_BYTES)


def read_fields(path: Path, parse: Callable[[str], Any], types: dict, max_bytes: int = MAX_BYTES) -> dict:
    """Reads a JSON or YAML file that others may have damaged; raises `UserError` with the file and what is wrong.

    ``types`` is what the caller relies on: key -> the type, or types, of its value, or such a mapping for a mapping
    inside. A key that the file may leave out ends with "?". The file may have more keys.
    """
    path = Path(path)
    check_file(path, max_bytes=max_bytes)
    try:
        values = parse(path.read_text(encoding="utf-8"))
        _check_is_json(values, path.stat().st_size)
    except Exception as error:  # not text, not JSON, nested too deeply: each parser has errors of its own
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from error
    _check_types(values, types, str(path))
    return values


def _check_is_json(value, size: int) -> None:
    """Raises `ValueError` unless a value can be written as JSON, and a file of this size can hold it."""
    values = [value]
    for count, inner in enumerate(values):  # the list grows while it is read
        if count > size:  # YAML has aliases, by which a few lines can stand for millions of values
            raise ValueError("it repeats its parts by aliases, more than its size")
        if isinstance(inner, dict):
            values += [*inner.keys(), *inner.values()]
            if not all(isinstance(key, str) for key in inner):
                raise ValueError("it has a key that is no string")
        elif isinstance(inner, list):
            values += inner
        elif isinstance(inner, str):
            inner.encode()  # half a surrogate pair is valid JSON, and no UTF-8 holds it
        elif not isinstance(inner, int | float | None) or (isinstance(inner, float) and not math.isfinite(inner)):
            raise ValueError(f"it holds {inner!r:.40}, which JSON does not have")


def _check_types(values, types: dict, where: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{where} must hold a JSON object, or a mapping, and holds {values!r:.40}")
    for name, expected in types.items():
        key = name.removesuffix("?")
        if key not in values:
            if key == name:
                raise UserError(f"{where} has no '{key}'")
        elif isinstance(expected, dict):
            _check_types(values[key], expected, f"{where}: '{key}'")
        # Python counts True as a number, and no field that is read as one can mean it.
        elif not isinstance(values[key], expected) or isinstance(values[key], bool):
            raise UserError(f"{where}: '{key}' cannot be {values[key]!r:.40}")
