"""A batch job: an output folder with a manifest, and shards that hold rows with their answers.

A shard's bytes depend on its rows, the model and the flags alone, all of which the manifest names: a second call with
the same arguments resumes the job, and one with others is refused.
"""

import contextlib
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from emotion.inference.batch_reader import HUB_PREFIX, RowReader, Source
from emotion.inference.emotion_classifier import EmotionClassifier
from emotion.inference.model_folder import files_to_serve
from emotion.utils.errors import UserError, one_line
from emotion.utils.files import MAX_RESULT_BYTES, atomic_write, output_lock, read_fields, relative, sha256, write_json

PIECE_ROWS = 8192  # classified together: enough that the classifier is rarely idle between two pieces
PIECE_BYTES = 16 << 20  # of text: pieces of long texts have fewer rows, so that memory stays flat
# The status of a row's text, of which the first that applies is written
STATUSES = ("null", "empty", "cut", "averaged", "replaced", "ok")
RECORD_KINDS = {"rows": int, "bytes": int, "sha256": str, **{f"{status}?": int for status in STATUSES}}
DONE = ".done"  # folder of the records of finished shards; readers of tables skip names that begin so
MANIFEST = "_manifest.json"  # readers of a folder of Parquet skip names that begin so
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}  # all other formats are PyTorch's


@dataclass(frozen=True)
class Answers:
    """The columns of a row's answer."""

    top_k: int  # labels per row
    probabilities: bool  # whether there is a column for the probability of each label
    prefix: str  # begins the names of all columns
    threshold: float | None = None  # of a model that gives a text several labels: those in the column `labels`
    long_texts: str = "truncate"  # as of `EmotionClassifier`

    def schema(self, labels: list[str]) -> pa.Schema:
        """The columns, for a model with these labels."""
        fields = []
        for rank in range(1, min(self.top_k, len(labels)) + 1):
            number = "" if rank == 1 else f"_{rank}"
            fields += [(f"label{number}", pa.string()), (f"score{number}", pa.float32())]
        if self.threshold is not None:
            fields.append(("labels", pa.string()))
        if self.probabilities:
            fields += [(f"probability_{label}", pa.float32()) for label in labels]
        fields.append(("status", pa.string()))
        return pa.schema([(self.prefix + name, type) for name, type in fields])


@dataclass(frozen=True)
class Job:
    """What every process that writes shards must know."""

    source: Source
    text_column: str  # the column to classify
    folder: Path  # of the model
    format: str  # of the model, which is opened
    answers: Answers
    schema: pa.Schema  # the columns of a shard: those of the input that are kept, then those of `answers`
    output: Path  # the folder of the shards
    output_format: str  # parquet, csv or jsonl
    shard_rows: int  # the last shard may have fewer

    @property
    def shards(self) -> range:
        """The numbers of all shards."""
        return range(-(-self.source.rows // self.shard_rows))

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.output / f"part-{number:05d}.{self.output_format}"

    def record(self, number: int) -> Path:
        """The file that records that a shard is done: its rows, counts and checksum."""
        return self.output / DONE / f"part-{number:05d}.json"

    def find_done(self, number: int) -> dict | None:
        """The record of a finished shard; None for one that is still to be written."""
        path, record = self.path(number), self.record(number)
        if not (path.is_file() and record.is_file()):
            return None
        # A shard that was changed after it was done, or whose record was, is written again.
        with contextlib.suppress(UserError):
            done = read_fields(record, json.loads, RECORD_KINDS)
            counted = sum(done.get(status, 0) for status in STATUSES)
            same_size = done["bytes"] == path.stat().st_size
            if same_size and done["rows"] == counted == self.rows_of(number) and done["sha256"] == sha256(path):
                return done
        return None

    def rows_of(self, number: int) -> int:
        """How many rows a shard has."""
        return min(self.shard_rows, self.source.rows - number * self.shard_rows)


class ShardWriter:
    """Writes the shards of a job, with its opened model, one after the other in one process."""

    def __init__(self, job: Job, classifier: EmotionClassifier):
        self._job, self._classifier, self._reader = job, classifier, RowReader(job.source)
        self._status_of_long = "cut" if job.answers.long_texts == "truncate" else "averaged"

    def write(self, number: int, progress: Callable[[int], object]) -> None:
        """Writes a shard and its record; ``progress`` is called with the number of rows of each piece."""
        job, start = self._job, number * self._job.shard_rows
        counts: Counter[str] = Counter()
        batches = self._reader.read(start, start + job.rows_of(number))
        try:
            with atomic_write(job.path(number)) as partial:
                with _open_table(partial, job.output_format, job.schema) as write:
                    for piece in _prefetch(pieces(batches, job.text_column)):
                        write(self._answer(piece, counts))
                        progress(len(piece))
                record = {"rows": job.rows_of(number), **counts, "bytes": partial.stat().st_size}
                record["sha256"] = sha256(partial)
        except OSError as error:
            if not error.errno or error.filename is not None:
                raise
            # pyarrow names no file where a disk is full.
            raise OSError(error.errno, os.strerror(error.errno), str(job.path(number))) from error
        # After the rename: a shard without a record is written again.
        write_json(job.record(number), record)

    def _answer(self, piece: pa.Table, counts: Counter) -> pa.Table:
        """The rows of the shard's file; adds to the counts of `STATUSES`."""
        texts = piece.column(self._job.text_column).to_pylist()
        status = np.array([_status(text) for text in texts], dtype=object)
        full = np.flatnonzero((status != "null") & (status != "empty"))
        answered = [texts[row] for row in full]
        encode = self._classifier.runtime.encode
        before = encode.texts_cut
        logits = self._classifier.logits(answered)
        status[full[find_cut(encode, answered, encode.texts_cut - before)]] = self._status_of_long
        counts.update(status)
        new = [*self._columns(logits, full, len(piece)), pa.array(status, pa.string())]
        kept = self._job.schema.names[: -len(new)]
        return pa.table([*(piece.column(name) for name in kept), *new], schema=self._job.schema)

    def _columns(self, logits: np.ndarray, full: np.ndarray, rows: int) -> list[pa.Array]:
        """Labels, scores and probabilities of the rows ``full``, int64 (texts,), by their logits; null in others."""
        answers, labels = self._job.answers, self._classifier.labels
        probabilities = np.zeros((rows, len(labels)), dtype=np.float32)
        probabilities[full] = self._classifier.probabilities(logits)
        without = ~np.isin(np.arange(rows), full)
        # Stable, as in `EmotionClassifier`: of equal scores the first label wins.
        order = np.argsort(-probabilities, axis=-1, kind="stable")
        columns = []
        for rank in range(min(answers.top_k, len(labels))):
            best = order[:, rank]
            columns.append(pa.array(labels).take(pa.array(best, mask=without)))
            columns.append(pa.array(probabilities[np.arange(rows), best], mask=without))
        if answers.threshold is not None:
            found = [[labels[index] for index in np.flatnonzero(row >= answers.threshold)] for row in probabilities]
            columns.append(pa.array([json.dumps(one, ensure_ascii=False) for one in found], mask=without))
        if answers.probabilities:
            columns += [pa.array(column, mask=without) for column in probabilities.T.copy()]
        return columns


def plan_columns(source: Source, keep_columns: list[str] | None, answers: pa.Schema) -> pa.Schema:
    """The columns of a shard: those of the input that are kept, then those of the answers, under other names."""
    kept = [field for field in source.schema if keep_columns is None or field.name in keep_columns]
    if both := {field.name for field in kept} & set(answers.names):
        hint = "leave it out with --keep_columns, or rename the new one with --prefix predicted_"
        raise UserError(f"the input has a column {min(both)} as well; {hint}")
    return pa.schema([*kept, *answers])


def pieces(batches: Iterator[pa.RecordBatch], text_column: str) -> Iterator[pa.Table]:
    """Yields tables of at most `PIECE_ROWS` rows and `PIECE_BYTES` of text, but of one row at least.

    Where a piece ends depends on the rows alone and not on how they were read, since the classifier's batches do.
    """
    parts, rows, size = [], 0, 0
    for batch in batches:
        lengths = pa.compute.binary_length(batch.column(text_column)).fill_null(0).to_numpy(zero_copy_only=False)
        start = 0
        while start < len(batch):
            sizes = size + np.cumsum(lengths[start : start + PIECE_ROWS - rows], dtype=np.int64)
            fitting = int(np.searchsorted(sizes, PIECE_BYTES, side="right"))
            count = fitting if rows else max(fitting, 1)
            if count:
                parts.append(batch.slice(start, count))
                rows, size, start = rows + count, sizes[count - 1], start + count
            if rows == PIECE_ROWS or start < len(batch):
                yield pa.Table.from_batches(parts)
                parts, rows, size = [], 0, 0
    if parts:
        yield pa.Table.from_batches(parts)


def _status(text: str | None) -> str:
    """One of `STATUSES`, as far as it is known before the text is tokenized."""
    if text is None:
        return "null"
    if not text.strip():
        return "empty"
    return "replaced" if "\ufffd" in text else "ok"


def find_cut(encode, texts: list[str], count: int) -> list[int]:
    """The indices of the ``count`` texts that were cut: the encoder only counts them."""
    found: list[int] = []
    rows = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    while rows and len(found) < count:
        row = rows.pop()  # most likely the longest ones
        before = encode.texts_cut
        encode([texts[row]])
        if encode.texts_cut > before:
            found.append(row)
    return found


@contextlib.contextmanager
def _open_table(path: Path, format: str, schema: pa.Schema):
    """Yields a function that appends a table to the file."""
    if format == "parquet":
        with pa.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            yield writer.write_table
    elif format == "csv":
        with one_line("--output_format csv"):  # which has no lists
            writer = pa.csv.CSVWriter(path, schema)
        with writer:
            yield writer.write_table
    else:
        with path.open("w", encoding="utf-8") as file:
            yield lambda table: file.writelines(_lines_of_json(table))


def _lines_of_json(table: pa.Table) -> Iterator[str]:
    for row in table.to_pylist():
        line = json.dumps(row, ensure_ascii=False, default=str)  # dates and decimals as strings
        if "NaN" in line or "Infinity" in line:  # which JSON does not have
            line = json.dumps(json.loads(line, parse_constant=lambda name: None), ensure_ascii=False)
        yield line + "\n"


def _prefetch(items: Iterator) -> Iterator:
    """Yields the items; another thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, items, None)
        while (item := future.result()) is not None:
            future = thread.submit(next, items, None)
            yield item


@contextlib.contextmanager
def lock_job(output: Path):
    """Creates and locks the output folder; raises `UserError` if it holds something else or is locked."""
    with output_lock(output) as folder:
        folder.mkdir(exist_ok=True)
        # A killed process may have left the beginning of a manifest.
        foreign = [path.name for path in folder.iterdir() if not path.name.startswith(f".{MANIFEST}")]
        if foreign and not (folder / MANIFEST).is_file():
            raise UserError(f"{output} holds something else (no {MANIFEST} in it); name another folder")
        yield


def manifest_of(job: Job) -> dict:
    """All that decides the bytes of the output: input, model, flags and versions; no date and no local path."""
    names = [file.path for file in job.source.files]
    common = os.path.commonpath([os.path.dirname(name) for name in names])  # noqa: PTH120 (URIs of the Hub are no paths)
    files = [asdict(file) for file in job.source.files]
    for file in files:
        if not file["path"].startswith(HUB_PREFIX):  # a URI of the Hub holds the commit, and no local folder
            file["path"] = Path(file["path"]).relative_to(common).as_posix()
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


def begin_job(job: Job) -> dict:
    """Writes the manifest, or raises `UserError` with the first difference to the one that is there; returns it."""
    path, manifest = job.output / MANIFEST, manifest_of(job)
    if not path.is_file():
        manifest = {"model_name": relative(job.folder), **manifest}
        write_json(path, manifest | {"complete": False})
        return manifest
    earlier = read_fields(path, json.loads, {"model_name": str}, MAX_RESULT_BYTES)
    before, now = _flatten(earlier), _flatten(manifest)
    names = [name for name in dict.fromkeys([*now, *before]) if name.split(".")[0] in manifest]
    for name in names:
        if before.get(name) != now.get(name):
            difference = f"{name} was {before.get(name)!r:.80}, and is {now.get(name)!r:.80}"
            raise UserError(f"{job.output} holds the output of another job: {difference}; name another folder")
    # The name of the first call stays: a copy of the model is the same model.
    return {"model_name": earlier["model_name"], **manifest}


def _flatten(value, name: str = "") -> dict:
    """The values inside a JSON value, by the names that lead there: {'flags.top_k': 1, 'input.files.0.rows': 9}."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{name}.{key}" if name else str(key))
    return flat


def finish_job(job: Job, manifest: dict) -> dict:
    """Completes the manifest; returns the counts of rows and statuses. Raises `UserError` if a shard is missing."""
    counts, shards = {"rows": job.source.rows, **dict.fromkeys(STATUSES, 0)}, []
    for number in job.shards:
        record = job.find_done(number)
        if record is None:
            raise UserError(f"{job.path(number)} is missing or damaged; run the command again")
        for status in STATUSES:
            counts[status] += record.get(status, 0)
        shards.append({"path": job.path(number).name, **record})
    write_json(job.output / MANIFEST, {**manifest, "output": counts, "shards": shards, "complete": True})
    return counts
