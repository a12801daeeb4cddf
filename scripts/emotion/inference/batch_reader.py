"""Which files an input means: a file, a folder, a pattern, or a split of a dataset on the Hub."""

import csv
import glob
import io
import json
import lzma
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from emotion.utils.errors import UserError, one_line
from emotion.utils.files import sha256

# Ending -> how the file is read; another ending of `COMPRESSED` may stand behind it.
KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "txt",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ON_THE_HUB = "hf://"


def kind_of(name: str) -> str | None:
    """How a file is read, by its ending; None for an ending that says nothing."""
    path = Path(name.lower())
    if path.suffix in COMPRESSED and KINDS.get(path.with_suffix("").suffix) != "parquet":  # which compresses itself
        path = path.with_suffix("")
    return KINDS.get(path.suffix)


def is_table(name: str) -> bool:
    """Whether the name is plainly not that of plain lines: their bytes would be taken for texts."""
    return kind_of(name) not in {None, "txt"} or name.lower().endswith(COMPRESSED)


def find_files(words: list[str], config: str | None, split: str) -> tuple[str, list[str]]:
    """The kind of the input, and its files in order.

    Args:
        words: files, folders, patterns, or one id of a dataset on the Hub.
        config: the dataset's configuration, for the Hub alone.
        split: the dataset's split, for the Hub alone.

    Raises:
        UserError: if there is no such file, or the files are not all of one kind.
    """
    names = []
    for word in words:
        found = _expand(word)
        # As the Hub names a dataset. Anything else was meant as a file, even if there is none.
        if not found and word.count("/") == 1 and not word.startswith((".", "/", "~")) and kind_of(word) is None:
            found = _files_on_the_hub(word, config, split)
        if not found:
            raise UserError(f"no input {word}: no such file, and no file that the folder or the pattern fits")
        names += found
    kinds = {kind_of(name) for name in names}
    if len(kinds) > 1:
        raise UserError(f"the input holds files of several kinds ({', '.join(sorted(kinds))}); name those of one kind")
    return kinds.pop(), names


def _expand(word: str) -> list[str]:
    """The files that a word means, sorted; of a folder those with an ending of `KINDS`, in folders below it too."""
    path = Path(word)
    if path.is_file():
        if kind_of(word) is None:
            raise UserError(f"{word}: its ending says not what it is; known are {', '.join(KINDS)}, also compressed")
        return [word]
    if path.is_dir():
        inside = [one for one in path.rglob("*") if one.is_file() and kind_of(one.name)]
        return sorted(str(one) for one in inside if not _is_hidden(one.relative_to(path)))
    found = glob.glob(word, recursive=True)  # noqa: PTH207 (that of Path takes no pattern from the root)
    return sorted(name for name in found if Path(name).is_file() and kind_of(name))


def _is_hidden(path: Path) -> bool:
    """Names that begin so are marks and unfinished files of programs, this one's own among them."""
    return any(part.startswith((".", "_")) for part in path.parts)


def _files_on_the_hub(name: str, config: str | None, split: str) -> list[str]:
    """The files of a split, each with the commit that it is of; they are fetched when they are read."""
    # Imported here: it takes seconds and a hundred megabytes, and local files do not need it.
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(name, config).config.data_files
    except Exception as error:  # of the connection, the name, the configuration: the library has many
        raise UserError(f"no file {name}, and no dataset of this name on the Hub: {error}") from error
    if split not in files:
        raise UserError(f"{name} has no split '{split}'; it has {', '.join(map(str, files))}")
    return [str(one) for one in files[split]]


def local_path(name: str) -> Path:
    """Where a file lies on this machine; one of the Hub is fetched first, unless it is here already."""
    if not name.startswith(ON_THE_HUB):
        return Path(name)
    from huggingface_hub import hf_hub_download, parse_hf_uri

    from emotion.utils.hub_requests import ask_hub

    uri = parse_hf_uri(name)
    file = {"filename": uri.path_in_repo, "repo_type": uri.type, "revision": uri.revision}
    return Path(ask_hub(lambda: hf_hub_download(uri.id, **file), uri.id))


BATCH_ROWS, BATCH_SIZE = 8192, 8 << 20  # rows that are read at once; fewer where they have more characters or bytes
LONGEST_VALUE = 8 << 20  # characters of a line, or of a value of CSV
DEEPEST = 32  # levels of lists in a column: Parquet takes 49
DELIMITERS = {"csv": ",", "tsv": "\t"}


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
        kind: how the files are read, of `emotion.inference.batch_reader.KINDS`.
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
        here, there = (bisect_right(self._ends, row) for row in (self._position, start))
        # Only Parquet knows where a row lies in its file. Elsewhere reading on is shorter than from the file's start.
        on = here == there and self._position < start and self._source.kind != "parquet"
        if not self._stream or not (on or self._position == start):
            before = self._ends[there] - self._source.files[there].rows
            self._stream, self._rest, self._position = self._batches(there, start - before), None, start
        while self._position < stop:
            batch = self._rest or next(self._stream)
            skipped = max(0, min(start - self._position, len(batch)))
            taken = batch.slice(skipped, stop - self._position - skipped)
            self._rest = batch.slice(skipped + len(taken))  # false if it has no rows
            self._position += skipped + len(taken)
            if taken:
                yield taken

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
        with one_line(f"{name} cannot be read"):
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
    for field in schema:
        if is_nested(field.type, DEEPEST):
            raise UserError(f"column {field.name} of {names[0]} is nested more than {DEEPEST} levels deep")
    return Source(kind, tuple(files), schema.set(place, pa.field(text_column, pa.string())))


def is_nested(type: pa.DataType, levels: int) -> bool:
    """Whether a type is one of lists or structs inside of each other, more than ``levels`` deep."""
    inner = [type]
    for _ in range(levels + 1):  # no recursion: Python's ends before that of JSON does
        inner = [one.field(place).type for one in inner for place in range(one.num_fields)]
    return bool(inner)


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
    with one_line(f"{name} cannot be read"):
        path = local_path(name)
        if kind == "parquet":
            batches, start = _read_parquet(path, schema, start)
        else:
            batches = _read_text(path, kind, schema)
        for batch in batches:
            skipped = min(start, len(batch))
            start -= skipped
            if skipped < len(batch):
                yield batch.slice(skipped)


def _count(path: Path, kind: str) -> tuple[int, pa.Schema]:
    """The number of rows, and the columns with the types that this project writes them with."""
    if kind == "parquet":
        with pa.parquet.ParquetFile(path) as file:
            return file.metadata.num_rows, _plain(file.schema_arrow)
    rows, schema = 0, pa.schema([])
    for batch in _read_text(path, kind, None):
        rows += len(batch)
        schema = _merge(schema or batch.schema, batch.schema, kind)
    return rows, schema


def _read_text(path: Path, kind: str, schema: pa.Schema | None) -> Iterator[pa.RecordBatch]:
    """Yields all rows of a file of text; without a schema the columns are those of each batch."""
    # A value of a table may hold any line end.
    lines = _read_lines(path, newline="" if kind in DELIMITERS else "\n")
    if kind == "jsonl":
        for block in _blocks(_read_objects(lines)):
            yield _batch_of_objects(block, schema)
        return
    names, rows = ["text"], ((len(line), [line.removesuffix("\n").removesuffix("\r")]) for line in lines)
    if kind in DELIMITERS:
        rows = _read_table(lines, DELIMITERS[kind])
        _, names = next(rows)
    schema = schema or pa.schema([(name, pa.string()) for name in names])  # CSV has no types: "007" stays as it is
    places = [names.index(name) for name in schema.names]
    for block in chain([[]], _blocks(rows)):  # a file without rows has its columns
        columns = [pa.array([row[place] for row in block], pa.string()) for place in places]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _read_lines(path: Path, newline: str) -> Iterator[str]:
    """Yields the lines of a file; U+FFFD, the mark of a lost character, stands for bytes that are no UTF-8."""
    # pyarrow does not know xz.
    is_xz = path.suffix.lower() == ".xz"
    file = lzma.open(path) if is_xz else pa.input_stream(str(path), compression="detect")  # noqa: SIM115 (below)
    with io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline=newline) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST_VALUE), ""), 1):
            if len(line) == LONGEST_VALUE and not line.endswith(("\r", "\n")):
                raise ValueError(f"line {number} is longer than {LONGEST_VALUE:,} characters")
            yield line


def _read_table(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of characters and the values of the row of names, then of each row."""
    csv.field_size_limit(LONGEST_VALUE)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names, begin = [], 1
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
                row = json.loads(line, object_pairs_hook=_object)
                if "\\ud" in line or "\\uD" in line:  # half of an emoji, perhaps, cut by another program
                    words = json.dumps(row, ensure_ascii=False).encode("utf-16", "surrogatepass")
                    row = json.loads(words.decode("utf-16", "replace"))
                if not isinstance(row, dict):
                    raise ValueError(f"it is no object but {type(row).__name__}")
                yield len(line), row
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error} (one object per line is wanted)") from error


def _object(pairs: list[tuple]) -> dict:
    """An object of JSON; raises `ValueError` for a name that it has twice, of which one would be lost."""
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


def _blocks(rows: Iterator[tuple]) -> Iterator[list]:
    """Yields lists of rows, which come with their sizes, of at most `BATCH_ROWS` rows."""
    block, total = [], 0
    for size, row in rows:
        block.append(row)
        total += size
        if len(block) == BATCH_ROWS or total > BATCH_SIZE:
            yield block
            block, total = [], 0
    if block:
        yield block


def _read_parquet(path: Path, schema: pa.Schema, start: int) -> tuple[Iterator[pa.RecordBatch], int]:
    """The rows from the group of rows on that holds row ``start``, and that row's number in it."""
    file = pa.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)  # otherwise it reads a whole group
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    first = 0
    while first < len(groups) and start >= groups[first].num_rows:
        start -= groups[first].num_rows
        first += 1
    longest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    size = max(1, min(BATCH_ROWS, BATCH_SIZE // (longest + 1)))
    batches = file.iter_batches(size, row_groups=range(first, len(groups)), columns=schema.names)
    return (_conform(batch, schema) for batch in batches), start


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema with one type for all kinds of strings, and without what other programs noted in it."""
    fields = []
    for field in schema:
        type = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        text = pa.types.is_large_string(type) or pa.types.is_string_view(type)
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
