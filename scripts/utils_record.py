"""The record of a measured artifact: what it must hold, how it is written and read, where its files lie."""

import json
import subprocess
from pathlib import Path

from utils_cli import ROOT, UserError
from utils_files import whole_file, write_json

# A record without one of these is not a record. A value that is not known is null, never a made-up number.
REQUIRED = """
variant format artifact date
scheme.weights scheme.activations scheme.quantized_layers scheme.linear_layers scheme.embeddings scheme.kept_in_float
scheme.largest_weight
made.base_model made.dataset made.dataset_source made.dataset_fingerprint made.train_dataset_source
made.recipe made.seed made.git_commit
quality.split quality.examples quality.macro_f1 quality.accuracy quality.per_class_f1 quality.confusion_matrix
quality.labels quality.macro_f1_ci95 quality.expected_calibration_error quality.conflict_free quality.texts_cut
size.bytes_to_serve size.megabytes size.files
latency_ms.batch_size latency_ms.p50 latency_ms.p95 latency_ms.p99 latency_ms.mean latency_ms.runs
throughput_per_s.batch_size throughput_per_s.value
environment.cpu environment.instruction_sets environment.threads environment.device environment.python
environment.packages
""".split()


def check_record(record: dict, name, fields=REQUIRED) -> dict:
    """Returns the record, or raises `UserError` naming the first of the fields that is missing."""
    for dotted in fields:
        value = record
        for key in dotted.split("."):
            if not isinstance(value, dict) or key not in value:
                raise UserError(f"{name}: the record has no field '{dotted}'; measure it again with run_evaluation.py")
            value = value[key]
    return record


def read_json(path: Path) -> dict:
    """Reads a results file, or says which one is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_records(results_dir: Path) -> list[dict]:
    """All records of a results folder, sorted by file name."""
    paths = sorted((Path(results_dir) / "metrics").glob("*.json"))
    if not paths:
        raise UserError(
            f"no records in {Path(results_dir) / 'metrics'}; measure with python scripts/run_evaluation.py"
        )
    return [check_record(read_json(path), path) for path in paths]


def write_record(record: dict, results_dir: Path, logits, labels) -> Path:
    """Writes the logits of every scored row, then the record, each whole or not at all.

    Args:
        logits: float32 array (rows, classes).
        labels: int array (rows,).
    """
    import pyarrow
    from pyarrow import parquet

    name = record_name(record)
    check_record(record, name)
    table = pyarrow.table(
        {
            "row": pyarrow.array(range(len(labels)), pyarrow.int64()),
            "label": pyarrow.array(labels, pyarrow.int64()),
            "logits": pyarrow.array(list(logits), pyarrow.list_(pyarrow.float32())),
        }
    )
    with whole_file(Path(results_dir) / "predictions" / f"{name}.parquet") as partial:
        parquet.write_table(table, partial)
    path = Path(results_dir) / "metrics" / f"{name}.json"
    write_json(path, record)
    return path


def read_predictions(path: Path) -> tuple:
    """The labels, int64 (rows,), and the logits, float32 (rows, classes), of a predictions file."""
    import numpy as np
    from pyarrow import parquet

    if not Path(path).is_file():
        raise UserError(f"no file {path}; measure with python scripts/run_evaluation.py")
    table = parquet.read_table(path)
    return table["label"].to_numpy(), np.array(table["logits"].to_pylist(), dtype=np.float32)


def read_logits(path: Path):
    """The logits of a predictions file, float32 (rows, classes)."""
    return read_predictions(path)[1]


def record_name(record: dict) -> str:
    return f"{record['variant']}-{record['format']}"


def git_commit() -> str | None:
    """The commit of the working tree, marked '-dirty' if its code or recipes differ; None outside a repository."""

    def git(*words) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "scripts", "configs", "metrics", "requirements.txt")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown whose columns line up in plain text too; all but the first are right-aligned."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells):
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *rest])} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([line(head), rule, *map(line, rows)]) + "\n"
