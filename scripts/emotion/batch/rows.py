"""Reads the rows of files as a stream, by pyarrow: any range of them, in flat memory, with the same columns from all.

A survey counts the rows first. It takes a thousandth of the time that the answers take, finds a file that cannot be
read before the work begins, and lets every process of a cluster open the file that its rows are in.
"""

import contextlib
import io
import json
import lzma
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from emotion.batch.inputs import ON_THE_HUB, kind_of, local_path
from emotion.common.errors import UserError
from emotion.common.files import sha256

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

BLOCK = 8 << 20  # bytes that are read and parsed at once; a row of a CSV file cannot be longer
BATCH_ROWS = 8192  # of Parquet at once; fewer where rows are long
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """A file of the input, as the survey found it."""

    path: str
    rows: int
    bytes: int
    sha256: str  # of the file as it lies there, compressed or not


@dataclass(frozen=True)
class Source:
    """The rows of all files, one file after the other.

    Attributes:
        kind: how the files are read, of `emotion.batch.inputs.KINDS`.
        schema: the columns that are read from each file.
    """

    kind: str
    files: tuple[InputFile, ...]
    schema: pa.Schema

    @property
    def rows(self) -> int:
        """The number of rows of all files."""
        return sum(file.rows for file in self.files)


class RowReader:
    """Reads ranges of a source's rows; quickest if a range begins where the last one ended, or soon after."""

    def __init__(self, source: Source):
        self._source = source
        self._ends = list(accumulate(file.rows for file in source.files))
        # The stream stands before this row; the rest of a batch that it has given already comes first.
        self._position, self._stream, self._rest = 0, None, None

    def read(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Yields the rows from ``start`` to before ``stop``, in batches of any size.

        Raises:
            UserError: if a file cannot be read any more, or has another number of rows than it had.
        """
        self._move_to(start)
        while self._position < stop:
            batch = self._rest or next(self._stream)
            taken = batch.slice(0, stop - self._position)
            self._rest = batch.slice(len(taken)) if len(taken) < len(batch) else None
            self._position += len(taken)
            yield taken

    def _move_to(self, start: int) -> None:
        here, there = bisect_right(self._ends, self._position), bisect_right(self._ends, start)
        # Only Parquet knows where a row lies in its file. Elsewhere reading on is shorter than from the file's start.
        if self._stream and here == there and self._position < start and self._source.kind != "parquet":
            for _ in self.read(self._position, start):
                pass
        elif not self._stream or self._position != start:
            before = self._ends[there] - self._source.files[there].rows
            self._stream, self._rest = self._batches(there, start - before), None
            self._position = start

    def _batches(self, first: int, start: int) -> Iterator[pa.RecordBatch]:
        """Yields all rows from row ``start`` of file ``first`` on."""
        for file in self._source.files[first:]:
            rows = start
            for batch in read_file(file.path, self._source.kind, self._source.schema, start):
                rows += len(batch)
                if rows <= file.rows:
                    yield batch
            if rows != file.rows:
                raise UserError(f"{file.path} had {file.rows} rows when they were counted and has {rows} now")
            start = 0


def survey(kind: str, names: list[str], text_column: str, keep_columns: list[str] | None) -> Source:
    """Reads all files once: counts their rows, hashes them, and finds the columns that all of them have.

    Args:
        kind: how the files are read.
        names: the files, in order.
        text_column: the column to classify.
        keep_columns: the columns to read beside it; None takes all.

    Raises:
        UserError: naming the file that cannot be read, that lacks a column, or whose column has another type.
    """
    files, schema = [], None
    wanted = None if keep_columns is None else [text_column, *keep_columns]
    for name in names:
        with _reading(name):
            path = local_path(name)
            rows, found = _count(path, kind)
            _check_columns(name, found, [text_column] if wanted is None else wanted, kind)
            found = found if wanted is None else pa.schema([field for field in found if field.name in wanted])
            schema = _merge(schema or found, found, kind)
            # Whole, since the processes of a cluster have other working folders.
            place = name if name.startswith(ON_THE_HUB) else os.path.abspath(name)  # noqa: PTH100 (keeps links)
            files.append(InputFile(place, rows, path.stat().st_size, sha256(path)))
    # Lines of JSON may leave out what they do not have: only all of them together tell.
    _check_columns(names[0], schema, wanted or [text_column], kind="all")
    place = schema.get_field_index(text_column)
    if schema.types[place] not in (pa.string(), pa.null()):  # null: there is no text in any row
        raise UserError(f"column {text_column} of {names[0]} holds {schema.types[place]}, no texts; see --text_column")
    return Source(kind, tuple(files), schema.set(place, pa.field(text_column, pa.string())))


def _check_columns(name: str, schema: pa.Schema, wanted: list[str], kind: str) -> None:
    """Raises `UserError` for a column that is not there, or is there twice."""
    for column in schema.names:
        if schema.names.count(column) > 1:
            raise UserError(f"{name} has two columns '{column}'; rename one")
    for column in wanted:
        if column not in schema.names and kind != "jsonl":
            raise UserError(f"{name} has no column '{column}'; it has {', '.join(schema.names)}")


def _merge(schema: pa.Schema, found: pa.Schema, kind: str) -> pa.Schema:
    """One schema for both; an integer and a float become a float, and nothing and a string become a string."""
    if found.equals(schema):
        return schema
    if kind != "jsonl" and set(schema.names) != set(found.names):
        others = ", ".join(sorted(set(schema.names) ^ set(found.names)))
        raise pa.ArrowInvalid(f"not all files have the columns {others}; name those to keep: --keep_columns")
    return pa.unify_schemas([schema, found], promote_options="permissive")


def read_file(name: str, kind: str, schema: pa.Schema, start: int = 0) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a file from row ``start`` on, with these columns and types."""
    with _reading(name):
        path = local_path(name)
        if kind == "parquet":
            batches, start = _read_parquet(path, schema, start)
        else:
            batches = _read(path, kind, schema)
        for batch in batches:
            skipped = min(start, len(batch))
            start -= skipped
            if skipped < len(batch):
                yield _conform(batch.slice(skipped), schema)


def _count(path: Path, kind: str) -> tuple[int, pa.Schema]:
    """The number of rows, and the columns with the types that this project writes them with."""
    if kind == "parquet":
        with pa.parquet.ParquetFile(path) as file:
            return file.metadata.num_rows, _plain(file.schema_arrow, kind)
    rows, schema = 0, None
    for batch in _read(path, kind, None):
        rows += len(batch)
        found = _plain(batch.schema, kind)
        schema = _merge(schema or found, found, kind)
    nothing = [("text", pa.string())] if kind == "txt" else []  # an empty file
    return rows, schema or pa.schema(nothing)


def _read(path: Path, kind: str, schema: pa.Schema | None) -> Iterator[pa.RecordBatch]:
    """Yields all rows of a file of text; without a schema the columns are those of the file."""
    if kind in {"csv", "tsv"}:
        yield from _read_csv(path, "," if kind == "csv" else "\t", schema)
        return
    for block in _whole_lines(path):
        if kind == "txt":
            lines = block.removesuffix(b"\n").split(b"\n")
            yield pa.record_batch({"text": pa.array([line.removesuffix(b"\r") for line in lines], pa.binary())})
        elif block.strip():  # lines with nothing in them are no rows of JSON
            yield from _parse_json(block, schema).to_batches()


def _read_csv(path: Path, delimiter: str, schema: pa.Schema | None) -> Iterator[pa.RecordBatch]:
    """Yields all values as bytes: CSV has no types, and "007" must come out as it went in."""
    reading = pa.csv.ReadOptions(block_size=BLOCK)
    parsing = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with _open(path) as stream:
        names = pa.csv.open_csv(stream, reading, parsing).schema.names
    if len(names) == 1:  # then an empty line is a row
        parsing.ignore_empty_lines = False
    types = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.binary()), include_columns=schema.names if schema else None
    )
    with _open(path) as stream:
        reader = pa.csv.open_csv(stream, reading, parsing, types)
        yield pa.RecordBatch.from_pylist([], reader.schema)  # so that a file without rows has its columns
        yield from reader


def _parse_json(block: bytes, schema: pa.Schema | None) -> pa.Table:
    """The rows of whole lines; each block tells its own types, so that the first one does not bind the rest."""
    reading = pa.json.ReadOptions(block_size=len(block) + 1)
    parsing = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore" if schema else "infer")
    try:
        return pa.json.read_json(io.BytesIO(block), reading, parsing)
    except pa.ArrowInvalid as error:
        if "surrogate" not in str(error):
            raise
    # Half of an emoji, cut by another program: `_conform` will put the mark of a lost character in its place.
    lines = [json.dumps(json.loads(line), ensure_ascii=False) for line in block.splitlines() if line.strip()]
    return _parse_json("\n".join(lines).encode("utf-8", "surrogatepass"), schema)


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Yields blocks of bytes that end where a line ends."""
    with _open(path) as stream:
        parts, first = [], True
        while block := stream.read(BLOCK):
            block, first = block.removeprefix(BOM) if first else block, False
            end = block.rfind(b"\n") + 1
            if end:
                yield b"".join([*parts, block[:end]])
                parts = []
            parts.append(block[end:])
    if rest := b"".join(parts):
        yield rest


def _read_parquet(path: Path, schema: pa.Schema, start: int) -> tuple[Iterator[pa.RecordBatch], int]:
    """The rows from the group of rows on that holds row ``start``, and that row's number in it."""
    file = pa.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)  # otherwise it reads a whole group
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    first = 0
    while first < len(groups) and start >= groups[first].num_rows:
        start -= groups[first].num_rows
        first += 1
    longest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    size = max(1, min(BATCH_ROWS, BLOCK // (longest + 1)))
    return file.iter_batches(size, row_groups=range(first, len(groups)), columns=schema.names), start


def _open(path: Path):
    """A stream of the file's bytes, decompressed by its ending."""
    if path.suffix.lower() == ".xz":  # which pyarrow does not know
        return lzma.open(path)
    return pa.input_stream(str(path), compression="detect")


@contextlib.contextmanager
def _reading(name: str):
    """Makes one clear line of whatever the readers raise."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, lzma.LZMAError, json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if kind_of(name) == "jsonl":
            reason += " (one object per line is wanted)"
        if "straddling" in reason:
            reason = f"a row is longer than {BLOCK >> 20} MB, or a quote is never closed"
        raise UserError(f"{name} cannot be read: {reason}") from error


def _plain(schema: pa.Schema, kind: str) -> pa.Schema:
    """The schema with one type for all kinds of strings, and without what other programs noted in it."""
    fields = []
    for field in schema:
        type = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        text = pa.types.is_large_string(type) or pa.types.is_string_view(type)
        # What was read as bytes; and JSON has no dates: pyarrow sees them where all texts of a block look like one.
        text |= kind != "parquet" and (pa.types.is_binary(type) or pa.types.is_timestamp(type))
        fields.append(pa.field(field.name, pa.string() if text else type))
    return pa.schema(fields)


def _conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of the schema, in its types and its order."""
    columns = []
    for field in schema:
        column = batch.column(field.name)
        columns.append(_readable(column) if field.type == pa.string() else column.cast(field.type))
    return pa.record_batch(columns, schema=schema)


def _readable(column: pa.Array) -> pa.Array:
    """Strings of valid UTF-8; U+FFFD, the mark of a lost character, stands for bytes that are none."""
    try:
        column = column.cast(pa.string())
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        values = column.cast(pa.binary()).to_pylist()
        return pa.array([None if one is None else one.decode("utf-8", "replace") for one in values], pa.string())
