"""The record of a measured artifact: which fields it has, how it is written and read, where its files lie."""

from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import read_json, whole_file, without_path, write_json
from emotion.task.dataset import Task, fingerprint

# A record has all of these fields, and may have more. An unknown value is null, never a made-up number.
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
        value = record  # then one level down for each key
        for key in dotted.split("."):
            # A null is a value: only a field that does not exist is missing.
            if not isinstance(value, dict) or key not in value:
                raise UserError(f"{name}: the record has no field '{dotted}'; measure it again with run_evaluation.py")
            value = value[key]
    return record


def read_records(results_dir: Path) -> list[dict]:
    """All records of a results folder, sorted by file name; raises `UserError` if there are none, or one is broken."""
    # Sorted: what is written from the records must not depend on the order of a file system.
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

    Returns:
        The record's file.
    """
    import pyarrow  # imported here: commands that only read or name records start faster without it
    from pyarrow import parquet

    name = record_name(record)
    check_record(record, name)
    table = pyarrow.table(
        {
            "row": pyarrow.array(range(len(labels)), pyarrow.int64()),
            "label": pyarrow.array(labels, pyarrow.int64()),
            # A list per row, and not a column per class: the schema is then the same for every dataset.
            "logits": pyarrow.array(list(logits), pyarrow.list_(pyarrow.float32())),
        }
    )
    # Logits first: if writing stops in between, there is no record without the rows that it was computed from.
    with whole_file(Path(results_dir) / "predictions" / f"{name}.parquet") as partial:
        parquet.write_table(table, partial)
    path = Path(results_dir) / "metrics" / f"{name}.json"
    write_json(path, record)
    return path


def read_predictions(path: Path) -> tuple:
    """The labels, int64 (rows,), and the logits, float32 (rows, classes), of a predictions file.

    Raises:
        UserError: if there is no such file.
    """
    import numpy as np
    from pyarrow import parquet

    if not Path(path).is_file():
        raise UserError(f"no file {path}; measure with python scripts/run_evaluation.py")
    table = parquet.read_table(path)
    # A column of lists has no NumPy array of two dimensions; it becomes one by way of Python lists.
    return table["label"].to_numpy(), np.array(table["logits"].to_pylist(), dtype=np.float32)


def read_logits(path: Path):
    """The logits of a predictions file, float32 (rows, classes)."""
    return read_predictions(path)[1]


def record_name(record: dict) -> str:
    """The stem of the record's files: 'ptq-onnx'."""
    return f"{record['variant']}-{record['format']}"


def artifact_name(record: dict) -> str:
    """What run_benchmark.py calls the artifact of a record."""
    return f"{record['artifact']}:{record['format']}"


def explain(scheme: dict, made_by: dict) -> dict:
    """Adds to each layer that was counted as float the reason that the artifact's recipe.yaml gives."""
    reasons = made_by.get("kept_in_float", {})
    # Null for a layer without a reason: it was found in the file and not planned, which a reader should see.
    return scheme | {"kept_in_float": {name: reasons.get(name) for name in scheme["kept_in_float"]}}


def describe_scored(made_by: dict, task: Task, rows) -> dict:
    """The field `made` of a record: how the artifact was made, and the data that it was scored on.

    Args:
        made_by: the artifact's recipe.yaml; empty for a folder without one, whose values are then null.
        rows: the scored rows.
    """
    made = made_by.get("made", {})
    return {
        "base_model": made.get("base_model"),
        "base_model_source": made.get("base_model_source"),
        "dataset": task.name,
        "dataset_source": task.source,  # of the scored rows; the rows it was trained on may come from elsewhere
        "train_dataset_source": made.get("dataset_source"),
        "dataset_fingerprint": fingerprint(rows),
        "train_rows": made.get("train_rows"),
        "train_fingerprint": made.get("train_fingerprint"),
        "recipe": without_path(made_by["recipe"]) if made_by else None,  # records are published: no path of a machine
        "training": made_by.get("training"),
        "quantizing_seconds": made_by.get("seconds"),
        "forms": made_by.get("forms"),  # QAT: validation macro F1 before and after it was converted, and saved
        "remedies": made_by.get("remedies"),  # PTQ: what was tried for each format, and what it cost
        "outliers": made_by.get("outliers"),  # PTQ for ONNX Runtime: the units that stay in float, and the rule
        "merged": made_by.get("merged"),  # QLoRA: what joining base and adapter did to validation macro F1
        "seed": made_by.get("seed"),
        "git_commit": made.get("git_commit"),
    }
