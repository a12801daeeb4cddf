"""The input of a batch job: finds its files, and reads any range of their rows as a stream, in flat memory.

Parquet is read by pyarrow; CSV and JSON lines by Python's own readers, which refuse what pyarrow guesses at: a quote
that is never closed, an integer of more than 64 bits, endless nesting.

`survey` reads all files once and counts their rows, in a hundredth of the time of classifying them. So a file that
cannot be read is found before the work begins, and every process of a cluster finds the file that a row is in.
"""

import csv
import glob
import io
import json
import lzma
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from emotion.utils.errors import UserError, one_line
from emotion.utils.files import sha256

# File extension -> how the file is read; an extension of `COMPRESSED` may follow
KINDS = {".csv": "csv", ".tsv": "tsv", ".txt": "txt", ".parquet": "parquet"}
KINDS |= dict.fromkeys((".json", ".jsonl", ".ndjson"), "jsonl")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
HUB_PREFIX = "hf://"
DELIMITERS = {"csv": ",", "tsv": "\t"}
BATCH_ROWS, BATCH_SIZE = 8192, 8 << 20  # rows that are read at once; fewer where they have more characters or bytes
MAX_VALUE = 8 << 20  # characters of a line, or of a value of CSV
MAX_DEPTH = 32  # levels of lists and structs in a column: Parquet takes 49


@dataclass(frozen=True)
class InputFile:
    """A file of the input, as `survey` found it; the checksum is of its bytes on disk, compressed or not."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """The rows of all files, one file after the other."""

    kind: str  # how the files are read, one of the values of `KINDS`
    files: tuple[InputFile, ...]
    schema: pa.Schema  # the columns that are read from each file

    @property
    def rows(self) -> int:
        """The number of rows of all files."""
        return sum(file.rows for file in self.files)


def kind_of(name: str) -> str | None:
    """How a file is read, by its extension; None for an unknown one."""
    path = Path(name.lower())
    if path.suffix in COMPRESSED and KINDS.get(path.with_suffix("").suffix) != "parquet":  # which compresses itself
        path = path.with_suffix("")
    return KINDS.get(path.suffix)


def find_files(inputs: list[str], config: str | None, split: str) -> tuple[str, list[str]]:
    """The kind of the input, and its files in order; raises `UserError` if there are none, or of several kinds.

    ``inputs`` are files, folders, patterns, or a dataset id on the Hub with its ``config`` and ``split``.
    """
    names = []
    for name in inputs:
        found = _expand(name)
        # As the Hub names a dataset. Anything else was meant as a file, even if there is none.
        if not found and name.count("/") == 1 and not name.startswith((".", "/", "~")) and kind_of(name) is None:
            found = _files_on_hub(name, config, split)
        if not found:
            raise UserError(f"no input {name}: no such file, and no file in the folder or of the pattern")
        names += found
    kinds = set()
    for name in names:
        if (kind := kind_of(name)) is None:
            raise UserError(f"{name}: unknown extension; known are {', '.join(KINDS)}, also compressed")
        kinds.add(kind)
    if len(kinds) > 1:
        raise UserError(f"the input holds files of several kinds ({', '.join(sorted(kinds))}); name those of one kind")
    return kinds.pop(), names


def _expand(name: str) -> list[str]:
    """The files of a name, a folder or a pattern, sorted; of a folder those with an extension of `KINDS`."""
    path = Path(name)
    if path.is_file():
        return [name]
    found = glob.glob(name, recursive=True)  # noqa: PTH207 (that of Path takes no pattern from the root)
    if path.is_dir():
        # Names that begin so are marks and unfinished files of programs, this one's own among them.
        hidden = re.compile(r"(^|/)[._]")
        found = [str(file) for file in path.rglob("*") if not hidden.search(file.relative_to(path).as_posix())]
    return sorted(file for file in found if kind_of(file) and Path(file).is_file())


def _files_on_hub(name: str, config: str | None, split: str) -> list[str]:
    """The URIs of the files of a split, each with its commit; they are downloaded when they are read."""
    # Imported here: it takes seconds and a hundred megabytes, and local files do not need it.
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(name, config).config.data_files
    except Exception as error:  # of the connection, the name, the configuration: the library has many
        raise UserError(f"no file {name}, and no dataset of this name on the Hub: {error}") from error
    if split not in files:
        raise UserError(f"{name} has no split '{split}'; it has {', '.join(map(str, files))}")
    return [str(file) for file in files[split]]


def local_path(name: str) -> Path:
    """The local path of a file; one of the Hub is downloaded unless it is in the cache."""
    if not name.startswith(HUB_PREFIX):
        return Path(name)
    from huggingface_hub import hf_hub_download, parse_hf_uri

    from emotion.utils.hub_requests import ask_hub

    uri = parse_hf_uri(name)
    download = partial(hf_hub_download, uri.id, uri.path_in_repo, repo_type=uri.type, revision=uri.revision)
    return Path(ask_hub(download, uri.id))


def survey(kind: str, names: list[str], text_column: str, keep_columns: list[str] | None) -> Source:
    """Reads all files once: counts their rows, hashes them, and finds the columns that all of them have.

    ``keep_columns`` are read beside the text's, all of them if None. Raises `UserError` with the file that cannot be
    read, that lacks a column, or whose column has another type.
    """
    files, schema = [], pa.schema([])
    wanted = [text_column] if keep_columns is None else [text_column, *keep_columns]
    for name in names:
        with one_line(f"{name} cannot be read"):
            path = local_path(name)
            rows, found = _count(path, kind)
            # Lines of JSON may leave out what they do not have: only all of them together tell.
            _check_columns(name, found, [] if kind == "jsonl" else wanted)
            if keep_columns is not None:
                found = pa.schema([field for field in found if field.name in wanted])
            schema = _merge(schema or found, found, kind)
            # Absolute, since the processes of a cluster have other working folders.
            full = name if name.startswith(HUB_PREFIX) else os.path.abspath(name)  # noqa: PTH100 (keeps links)
            files.append(InputFile(full, rows, path.stat().st_size, sha256(path)))
    _check_columns(names[0], schema, wanted)
    index = schema.get_field_index(text_column)
    if schema.types[index] not in (pa.string(), pa.null()):  # null: there is no text in any row
        raise UserError(f"column {text_column} of {names[0]} holds {schema.types[index]}, no texts; see --text_column")
    for field in schema:
        if _is_deep(field.type):
            raise UserError(f"column {field.name} of {names[0]} is nested more than {MAX_DEPTH} levels deep")
    return Source(kind, tuple(files), schema.set(index, pa.field(text_column, pa.string())))


def _is_deep(type: pa.DataType) -> bool:
    """Whether a type has lists or structs inside each other, more than `MAX_DEPTH` levels deep."""
    level = [type]
    for _ in range(MAX_DEPTH + 1):  # no recursion: Python's ends before that of JSON does
        level = [outer.field(index).type for outer in level for index in range(outer.num_fields)]
    return bool(level)


def _check_columns(name: str, schema: pa.Schema, wanted: list[str]) -> None:
    for column in schema.names:
        if schema.names.count(column) > 1:
            raise UserError(f"{name} has two columns '{column}'; rename one")
    for column in wanted:
        if column not in schema.names:
            raise UserError(f"{name} has no column '{column}'; it has {', '.join(schema.names)}")


def _merge(schema: pa.Schema, found: pa.Schema, kind: str) -> pa.Schema:
    """One schema for both; an integer and a float become a float, null and a string become a string."""
    if found.equals(schema):
        return schema
    if kind != "jsonl" and set(schema.names) != set(found.names):
        others = ", ".join(sorted(set(schema.names) ^ set(found.names)))
        raise pa.ArrowInvalid(f"not all files have the columns {others}; name those to keep: --keep_columns")
    return pa.unify_schemas([schema, found], promote_options="permissive")


def _count(path: Path, kind: str) -> tuple[int, pa.Schema]:
    """The number of rows of a file, and its columns with the types that are written."""
    if kind == "parquet":
        with pa.parquet.ParquetFile(path) as file:
            return file.metadata.num_rows, _plain_schema(file.schema_arrow)
    rows, schema = 0, pa.schema([])
    for batch in _read_text(path, kind, None):
        rows += len(batch)
        schema = _merge(schema or batch.schema, batch.schema, kind)
    return rows, schema


class RowReader:
    """Reads ranges of a source's rows; fastest if a range begins where the last one ended, or soon after."""

    def __init__(self, source: Source):
        self._source = source
        self._ends = list(accumulate(file.rows for file in source.files))
        # The next row of the stream; the rest of a batch comes before the stream's next batch.
        self._position = 0
        self._stream: Iterator[pa.RecordBatch] | None = None
        self._rest: pa.RecordBatch | None = None

    def read(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Yields the rows from ``start`` to before ``stop``, in batches; raises `UserError` for a changed file."""
        current, file = (bisect_right(self._ends, row) for row in (self._position, start))
        # Only Parquet knows where a row is in its file. In others reading on is shorter than from the file's start.
        can_skip = current == file and self._position < start and self._source.kind != "parquet"
        if not self._stream or not (can_skip or self._position == start):
            before = self._ends[file] - self._source.files[file].rows
            self._stream, self._rest, self._position = self._batches(file, start - before), None, start
        while self._position < stop:
            batch = self._rest or next(self._stream)
            skipped = max(0, min(start - self._position, len(batch)))
            part = batch.slice(skipped, stop - self._position - skipped)
            self._rest = batch.slice(skipped + len(part))  # false if it has no rows
            self._position += skipped + len(part)
            if part:
                yield part

    def _batches(self, first: int, start: int) -> Iterator[pa.RecordBatch]:
        """Yields all rows from row ``start`` of file ``first`` on."""
        kind, schema = self._source.kind, self._source.schema
        for file in self._source.files[first:]:
            rows = skip = start
            with one_line(f"{file.path} cannot be read"):
                path = local_path(file.path)
                if kind == "parquet":
                    batches, skip = _read_parquet(path, schema, start)
                else:
                    batches = _read_text(path, kind, schema)
                for batch in batches:
                    part = batch.slice(min(skip, len(batch)))
                    skip -= len(batch) - len(part)
                    rows += len(part)
                    if part and rows <= file.rows:
                        yield part
            if rows != file.rows:
                raise UserError(f"{file.path} had {file.rows} rows when they were counted and has {rows} now")
            start = 0


def _read_text(path: Path, kind: str, schema: pa.Schema | None) -> Iterator[pa.RecordBatch]:
    """Yields all rows of a text file; without a schema the columns are those of each batch."""
    # A value of a table may hold any line end.
    lines = _read_lines(path, newline="" if kind in DELIMITERS else "\n")
    if kind == "jsonl":
        for objects in _batched(_read_objects(lines)):
            yield _batch_of_objects(objects, schema)
        return
    if kind in DELIMITERS:
        rows = _read_table(lines, DELIMITERS[kind])
        _, names = next(rows)
    else:
        rows = ((len(line), [line.removesuffix("\n").removesuffix("\r")]) for line in lines)
        names = ["text"]
    schema = schema or pa.schema([(name, pa.string()) for name in names])  # CSV has no types: "007" stays as it is
    indices = [names.index(name) for name in schema.names]
    for batch in chain([[]], _batched(rows)):  # a file without rows has its columns
        columns = [pa.array([row[index] for row in batch], pa.string()) for index in indices]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _read_lines(path: Path, newline: str) -> Iterator[str]:
    """Yields the lines of a file, with U+FFFD for bytes that are not UTF-8."""
    # pyarrow does not know xz.
    is_xz = path.suffix.lower() == ".xz"
    file = lzma.open(path) if is_xz else pa.input_stream(str(path), compression="detect")  # noqa: SIM115 (below)
    with io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline=newline) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_VALUE), ""), 1):
            if len(line) == MAX_VALUE and not line.endswith(("\r", "\n")):
                raise ValueError(f"line {number} is longer than {MAX_VALUE:,} characters")
            yield line


def _read_table(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of characters and the values of the header, then of each row."""
    csv.field_size_limit(MAX_VALUE)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    begin = 1
    try:
        for row in reader:
            names = names or row
            if not row and len(names) == 1:  # then an empty line is a row
                row = [""]
            if row and len(row) != len(names):
                raise csv.Error(f"expected {len(names)} columns, got {len(row)}")
            if row:
                yield sum(map(len, row)), row
            begin = reader.line_num + 1
    except csv.Error as error:
        reason = "a quote is never closed" if "end of data" in str(error) else error
        raise ValueError(f"the row that begins in line {begin}: {reason}") from error
    if not names:
        raise ValueError("it is empty")


def _read_objects(lines: Iterator[str]) -> Iterator[tuple[int, dict]]:
    """Yields the number of characters and the object of each line of JSON; empty lines are no rows."""
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                row = json.loads(line, object_pairs_hook=_unique_keys)
                if "\\ud" in line or "\\uD" in line:  # half a surrogate pair, perhaps, cut by another program
                    text = json.dumps(row, ensure_ascii=False).encode("utf-16", "surrogatepass")
                    row = json.loads(text.decode("utf-16", "replace"))
                if not isinstance(row, dict):
                    raise ValueError(f"it is no object but {type(row).__name__}")
                yield len(line), row
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error} (one object per line is wanted)") from error


def _unique_keys(pairs: list[tuple]) -> dict:
    """A JSON object; raises `ValueError` for a key that it has twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{max(names, key=names.count)}' is there twice")
    return found


def _batch_of_objects(rows: list[dict], schema: pa.Schema | None) -> pa.RecordBatch:
    try:
        batch = pa.RecordBatch.from_struct_array(pa.array(rows, pa.struct(list(schema)) if schema else None))
    except OverflowError as error:
        raise ValueError("an integer has more than 64 bits; write it as a text") from error
    names = dict.fromkeys(name for row in rows for name in row)
    return batch if schema or not names else batch.select(list(names))  # in the order of the file


def _batched(rows: Iterator[tuple]) -> Iterator[list]:
    """Yields lists of rows, which come with their sizes, of at most `BATCH_ROWS` rows."""
    batch, total = [], 0
    for size, row in rows:
        batch.append(row)
        total += size
        if len(batch) == BATCH_ROWS or total > BATCH_SIZE:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _read_parquet(path: Path, schema: pa.Schema, start: int) -> tuple[Iterator[pa.RecordBatch], int]:
    """The rows from the row group on that holds row ``start``, and that row's number in it."""
    file = pa.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)  # otherwise it reads a whole group
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    first = 0
    while first < len(groups) and start >= groups[first].num_rows:
        start -= groups[first].num_rows
        first += 1
    largest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    size = max(1, min(BATCH_ROWS, BATCH_SIZE // (largest + 1)))
    batches = file.iter_batches(size, row_groups=range(first, len(groups)), columns=schema.names)
    return (_cast(batch, schema) for batch in batches), start


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with one type for all kinds of strings, and without the metadata of other programs."""
    fields = []
    for field in schema:
        type = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        is_text = pa.types.is_large_string(type) or pa.types.is_string_view(type)
        fields.append(pa.field(field.name, pa.string() if is_text else type))
    return pa.schema(fields)


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of the schema, in its types and its order."""
    columns = []
    for field in schema:
        column = batch.column(field.name)
        columns.append(_valid_utf8(column) if field.type == pa.string() else column.cast(field.type))
    return pa.record_batch(columns, schema=schema)


def _valid_utf8(column: pa.Array) -> pa.Array:
    """The strings, with U+FFFD for bytes that are not UTF-8."""
    try:
        column = column.cast(pa.string())
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        values = column.cast(pa.binary()).to_pylist()
        return pa.array([None if value is None else value.decode("utf-8", "replace") for value in values], pa.string())
