"""The record of a measured model: what it says of the model's provenance, how it is written and read."""

from pathlib import Path

import numpy as np

from emotion.data.dataset import Task, fingerprint
from emotion.evaluation.predictions import check_evidence
from emotion.evaluation.schema import Record
from emotion.utils.errors import UserError
from emotion.utils.files import atomic_write, without_path, write_json

MPNET_BASE = "mpnet-base"  # the folder in results/ for the 12-layer encoder
# Fields of recipe.yaml that a record repeats; each is null for the methods that do not write it
COPIED = ("training", "forms", "fallbacks", "outlier_channels", "instruction", "trained_with", "merged", "seed")


def read_records(results_dir: Path) -> list[Record]:
    """Reads all records of a results folder, sorted by file name, and checks each against its predictions.

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
        # The paired tests compare row by row: the same rows have the same labels in the same order.
        name, first = seen.setdefault(record.provenance.dataset_fingerprint, (path.stem, labels))
        if not np.array_equal(first, labels):
            raise UserError(f"{path}: its predictions are not of the rows of {name}; measure both again")
        records.append(record)
    return records


def write_record(record: dict, results_dir: Path, logits, labels) -> Path:
    """Writes the logits of every scored row, then the record, each atomically.

    Args:
        logits: float32 array (rows, classes).
        labels: int array (rows,).

    Returns:
        The record's file.
    """
    import pyarrow  # imported here: commands that only read or name records start faster without it
    from pyarrow import parquet

    name = Record.check(record, f"{record['variant']}-{record['format']}").name
    columns = {
        "row": pyarrow.array(range(len(labels)), pyarrow.int64()),
        "label": pyarrow.array(labels, pyarrow.int64()),
        # A list per row, and not a column per class: the schema is then the same for every dataset.
        "logits": pyarrow.array(list(logits), pyarrow.list_(pyarrow.float32())),
    }
    # Logits first: if writing stops in between, there is no record without the rows that it was computed from.
    with atomic_write(Path(results_dir) / "predictions" / f"{name}.parquet") as partial:
        parquet.write_table(pyarrow.table(columns), partial)
    path = Path(results_dir) / "metrics" / f"{name}.json"
    write_json(path, record)
    return path


def add_reasons(scheme: dict, recipe: dict) -> dict:
    """Adds to each layer in the scheme's `kept_in_float` the reason that recipe.yaml gives, null if it gives none."""
    reasons = recipe.get("kept_in_float", {})
    return scheme | {"kept_in_float": {name: reasons.get(name) for name in scheme["kept_in_float"]}}


def describe_provenance(recipe: dict, task: Task, rows) -> dict:
    """Returns the field `provenance` of a record: how the model was made, and the data that it was scored on.

    Args:
        recipe: the model's recipe.yaml; empty for a folder without one, whose values are then null.
        rows: the scored rows.
    """
    made = recipe.get("provenance", {})
    return {
        "base_model": made.get("base_model"),
        "base_model_source": made.get("base_model_source"),
        "dataset": task.name,
        "dataset_source": task.source,  # of the scored rows; the training rows may come from elsewhere
        "train_dataset_source": made.get("dataset_source"),
        "dataset_fingerprint": fingerprint(rows),
        "train_rows": made.get("train_rows"),
        "train_fingerprint": made.get("train_fingerprint"),
        "recipe": without_path(recipe["recipe"]) if recipe else None,  # records are published: no local paths
        "quantizing_seconds": recipe.get("seconds"),
        **{name: recipe.get(name) for name in COPIED},
        "git_commit": made.get("git_commit"),
    }
