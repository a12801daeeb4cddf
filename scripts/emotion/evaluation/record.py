"""The record of a measured artifact: which fields it has, how it is written and read, where its files lie."""

from pathlib import Path

import numpy as np

from emotion.data.dataset import Task, fingerprint
from emotion.evaluation.predictions import check_evidence, read_predictions
from emotion.evaluation.schema import Record
from emotion.utils.errors import UserError
from emotion.utils.files import atomic_write, without_path, write_json

BASE_FAMILY = "mpnet-base"  # the folder inside results/ that holds those of the base-size encoder


def read_records(results_dir: Path) -> list[Record]:
    """All records of a results folder, sorted by file name, each held against its predictions.

    Raises:
        UserError: if there are none, or one is damaged, or is not what its predictions give.
    """
    # Sorted: what is written from the records must not depend on the order of a file system.
    folder = Path(results_dir)
    paths = sorted((folder / "metrics").glob("*.json"))
    if not paths:
        raise UserError(f"no records in {folder / 'metrics'}; measure with python scripts/run_evaluation.py")
    records, seen = [], {}
    for path in paths:
        record = Record.read(path)
        if record.name != path.stem:
            raise UserError(f"{path}: is the record of '{record.name}' by its fields; measure it again")
        labels = check_evidence(record, path, folder / "predictions" / f"{path.stem}.parquet")
        # The same rows have the same labels in the same order: the paired tests go row by row.
        first = seen.setdefault(record.provenance.dataset_fingerprint, (path.stem, labels))
        if not np.array_equal(first[1], labels):
            raise UserError(f"{path}: its predictions are not of the rows of {first[0]}; measure both again")
        records.append(record)
    return records


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

    name = Record.check(record, f"{record['variant']}-{record['format']}").name
    table = pyarrow.table(
        {
            "row": pyarrow.array(range(len(labels)), pyarrow.int64()),
            "label": pyarrow.array(labels, pyarrow.int64()),
            # A list per row, and not a column per class: the schema is then the same for every dataset.
            "logits": pyarrow.array(list(logits), pyarrow.list_(pyarrow.float32())),
        }
    )
    # Logits first: if writing stops in between, there is no record without the rows that it was computed from.
    with atomic_write(Path(results_dir) / "predictions" / f"{name}.parquet") as partial:
        parquet.write_table(table, partial)
    path = Path(results_dir) / "metrics" / f"{name}.json"
    write_json(path, record)
    return path


def read_logits(path: Path):
    """The logits of a predictions file, float32 (rows, classes)."""
    return read_predictions(path)[1]


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
    made = made_by.get("provenance", {})
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
        "fallbacks": made_by.get("fallbacks"),  # PTQ: what was tried for each format, and what it cost
        "outlier_channels": made_by.get(
            "outlier_channels"
        ),  # PTQ for ONNX Runtime: the units that stay in float, and the rule
        "instruction": made_by.get("instruction"),  # of a language model: what it is asked
        "trained_with": made_by.get("trained_with"),  # versions of the other environment that has trained it
        "merged": made_by.get("merged"),  # QLoRA: what joining base and adapter did to validation macro F1
        "seed": made_by.get("seed"),
        "git_commit": made.get("git_commit"),
    }
