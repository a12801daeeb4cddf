"""The output folder of a job: what was asked, and what is done; a second call goes on or is refused."""

import contextlib
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from emotion.inference.batch_inputs import ON_THE_HUB
from emotion.inference.batch_shards import STATUSES, Job
from emotion.inference.model_folder import files_to_serve
from emotion.utils.errors import UserError
from emotion.utils.files import read_json, relative, sha256, taken, write_json

MANIFEST = "_manifest.json"  # readers of a folder of Parquet skip names that begin so
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}  # all other formats are PyTorch's


@contextlib.contextmanager
def claim(output: Path):
    """Makes the folder if there is none, and holds it for this process alone.

    Raises:
        UserError: if it holds something else, or another process is writing into it.
    """
    with taken(output) as folder:
        folder.mkdir(exist_ok=True)
        # A killed process may have left the beginning of a manifest.
        foreign = [path.name for path in folder.iterdir() if not path.name.startswith(f".{MANIFEST}")]
        if foreign and not (folder / MANIFEST).is_file():
            raise UserError(f"{output} holds something else (no {MANIFEST} in it); name another folder")
        yield


def describe(job: Job) -> dict:
    """What decides the bytes of the output: input, model, flags, versions; no date, and no folder of this machine."""
    names = [file.path for file in job.source.files]
    common = os.path.commonpath([os.path.dirname(name) for name in names])  # noqa: PTH120 (names of the Hub are no paths)
    files = []
    for file in job.source.files:
        on_the_hub = file.path.startswith(ON_THE_HUB)  # such a name holds the commit, and no folder of this machine
        path = file.path if on_the_hub else Path(file.path).relative_to(common).as_posix()
        files.append(asdict(file) | {"path": path})
    served = files_to_serve(job.folder, job.format)
    packages = ("pyarrow", "numpy", "tokenizers", RUNTIMES.get(job.format, "torch"))
    return {
        "input": {"kind": job.source.kind, "rows": job.source.rows, "files": files},
        "model": {"format": job.format, "sha256": {name: sha256(job.folder / name) for name in served}},
        "flags": {
            "text_column": job.text_column,
            **asdict(job.answers),
            "output_format": job.output_format,
            "shard_rows": job.shard_rows,
        },
        "columns": {field.name: str(field.type) for field in job.schema},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def begin(job: Job, asked: dict) -> None:
    """Writes down what is asked, or compares it with what was asked of this folder before.

    Raises:
        UserError: naming the first difference.
    """
    manifest = job.output / MANIFEST
    if not manifest.is_file():
        write_json(manifest, {"model_name": relative(job.folder), **asked, "complete": False})
        return
    before = read_json(manifest)
    for part, now in asked.items():
        if different := _difference(part, before.get(part), now):
            raise UserError(f"{job.output} holds answers to another question: {different}; name another folder")


def _difference(name: str, before, now) -> str | None:
    """The first place at which two values of JSON differ, in words; None if they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if different := _difference(f"{name}.{key}", before.get(key), now.get(key)):
                return different
        return None
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return _difference(name, dict(enumerate(before)), dict(enumerate(now)))
    return None if before == now else f"{name} was {before!r:.80}, and is {now!r:.80}"


def finish(job: Job, asked: dict) -> dict:
    """Writes the manifest of a job whose shards are all there; returns rows and counts.

    Raises:
        UserError: if one of the shards is missing.
    """
    counts, shards = {"rows": job.source.rows, **dict.fromkeys(STATUSES, 0)}, []
    for number in job.shards:
        made = job.find_made(number)
        if made is None:
            raise UserError(f"{job.path(number)} is missing; run the command again")
        for status in STATUSES:
            counts[status] += made.get(status, 0)
        shards.append({"path": job.path(number).name, **made})
    # The name of the first call stays: a copy of the model is the same model.
    name = read_json(job.output / MANIFEST)["model_name"]
    write_json(
        job.output / MANIFEST, {"model_name": name, **asked, "output": counts, "shards": shards, "complete": True}
    )
    return counts
