"""Records and predictions: how they are written, read, and checked against each other.

A number that anyone can compute again from a file beside it is computed again before a page shows it: a record's from
its predictions, the means over seeds from the seeds' predictions.
"""

import math
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from emotion.data.dataset import Task, fingerprint
from emotion.data.metrics import decide, expected_calibration_error, macro_f1_interval
from emotion.evaluation.schema import ROUNDING, Record, Seeds
from emotion.utils.errors import UserError
from emotion.utils.files import atomic_write, without_path, write_json

MPNET_BASE = "mpnet-base"  # the folder in results/ for the 12-layer encoder
# Fields of recipe.yaml that a record repeats; each is null for the methods that do not write it
COPIED = ("training", "forms", "fallbacks", "outlier_channels", "instruction", "trained_with", "merged", "seed")
# Of an interval's width: another version of NumPy may draw other rows, which moves its ends by a tenth at most.
REDRAWN = 0.2


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


def check_evidence(record: Record, path: Path, predictions: Path) -> np.ndarray:
    """Checks that the record in the file ``path`` says what its predictions give; returns their labels, int64 (rows,).

    Raises:
        UserError: if a field of `quality` is not what the predictions give.
    """
    labels, logits = read_predictions(predictions)
    quality = record.quality
    wrong = [] if logits.shape[1] == len(quality.labels) else ["labels"]
    if not wrong:
        expected = score_again(labels, logits, quality.labels, quality.threshold)
        wrong = [name for name, value in expected.items() if not _is_equal(getattr(quality, name), value)]
        low, high = macro_f1_interval(logits, labels, quality.threshold)
        if np.abs(np.subtract(quality.macro_f1_ci95, (low, high))).max() > REDRAWN * (high - low) + ROUNDING:
            wrong.append("macro_f1_ci95")
    if wrong:
        raise UserError(f"{path}: 'quality.{wrong[0]}' is not what {predictions} gives; measure it again")
    return labels


def _is_equal(recorded, expected) -> bool:
    """Whether a recorded value is the expected one; floats are rounded."""
    if isinstance(expected, dict):
        same_names = isinstance(recorded, dict) and list(recorded) == list(expected)
        return same_names and all(_is_equal(recorded[name], expected[name]) for name in expected)
    if isinstance(expected, float):
        return isinstance(recorded, int | float) and math.isclose(recorded, expected, rel_tol=0, abs_tol=ROUNDING)
    return recorded == expected


def score_again(labels: np.ndarray, logits: np.ndarray, names: list[str], threshold: float | None = None) -> dict:
    """Computes the fields of `quality` that the predictions determine, without scikit-learn, which loads slowly.

    Args:
        labels: int64 (rows,); with a ``threshold`` 0 or 1 for each label, (rows, classes).
        logits: float32 (rows, classes).
        names: of the classes.
    """
    classes, several = len(names), {}
    predicted = decide(logits, threshold)
    right = predicted == labels
    if threshold is None:
        matrix = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
        of_class = 2 * np.diagonal(matrix) / np.maximum(matrix.sum(axis=0) + matrix.sum(axis=1), 1)
    else:
        cells = [(true & guess).sum(axis=0) for true in (1 - labels, labels) for guess in (1 - predicted, predicted)]
        matrix, right = np.stack(cells, axis=-1).reshape(classes, 2, 2), right.all(axis=-1)
        of_class = 2 * cells[3] / np.maximum(cells[1] + cells[2] + 2 * cells[3], 1)
        several = {"micro_f1": float(2 * cells[3].sum() / max((predicted + labels).sum(), 1))}
    return {
        **several,
        "examples": len(labels),
        "confusion_matrix": matrix.tolist(),
        "accuracy": float(right.mean()),
        "per_class_f1": dict(zip(names, of_class.tolist(), strict=True)),
        "macro_f1": float(of_class.mean()),
        "expected_calibration_error": expected_calibration_error(logits, labels),
    }


def read_predictions(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a predictions file: the labels, int64 (rows,) or (rows, classes), and the logits, float32 (rows, classes).

    Raises:
        UserError: if the file is missing or damaged.
    """
    if not Path(path).is_file():
        raise UserError(f"no file {path}; measure with python scripts/run_evaluation.py")
    try:
        table = parquet.read_table(path)
        return _to_numpy(*(table[name].combine_chunks() for name in ("row", "label", "logits")))
    except (pyarrow.ArrowException, OSError, LookupError, ValueError, AttributeError) as error:
        raise UserError(f"{path} holds no predictions: {' '.join(str(error).split())}; measure it again") from error


def _to_numpy(rows, labels, logits) -> tuple[np.ndarray, np.ndarray]:
    """Converts the Arrow columns of a predictions file; raises `ValueError` if they are not what they should be."""
    several = hasattr(labels.type, "value_type")  # a list for each row
    labels = labels.flatten() if several else labels
    types = list(map(str, (rows.type, labels.type, logits.type.value_type)))
    if types != ["int64", "int64", "float"]:
        raise ValueError(f"row, label and logits are {', '.join(types)}, not int64, int64 and float")
    lengths = set(logits.value_lengths().to_pylist())
    if len(lengths) != 1 or None in lengths:
        raise ValueError("'logits' is empty, or has rows of different lengths")
    rows, labels = rows.to_numpy(), labels.to_numpy()
    logits = logits.flatten().to_numpy().reshape(len(rows), -1)
    labels = labels.reshape(logits.shape) if several else labels
    if (rows != np.arange(len(rows))).any():
        raise ValueError("'row' does not count from 0")
    if not np.isfinite(logits).all():
        raise ValueError("'logits' are not finite")
    if labels.min() < 0 or labels.max() >= (2 if several else logits.shape[1]):
        raise ValueError(f"'label' has values outside of the {logits.shape[1]} classes of 'logits'")
    return labels, logits


def read_seeds(results: Path) -> list[tuple[Seeds, list[Record]]]:
    """Reads the summaries over seeds in ``results``, sorted by variant, and the records of their seeds that are kept.

    Raises:
        UserError: if a summary lacks a field, or contradicts its runs or the predictions of its seeds.
    """
    found = []
    for path in sorted((results / "seeds").glob("*.json")):
        summary, records = Seeds.read(path), []
        for format in summary.formats:
            name = f"{summary.variant}-{format}"
            for seed, scores in summary.runs_of(format):
                folder = path.parent / str(seed)
                if not (folder / "metrics" / f"{name}.json").is_file():
                    continue
                records.append(Record.read(folder / "metrics" / f"{name}.json"))
                for field, value in scores_of_seed(records[-1], folder).items():
                    if not (getattr(scores, field) is None or _is_equal(getattr(scores, field), value)):
                        raise UserError(f"{path}: '{field}' of seed {seed} is not that of {name}; measure it again")
        found.append((summary, records))
    return sorted(found, key=lambda pair: pair[0].variant)


def scores_of_seed(record: Record, results: Path) -> dict:
    """Scores the predictions of a seed's record in ``results``; all but the baseline against that seed's baseline.

    Returns:
        `macro_f1`, `accuracy` and `conflict_free_macro_f1`; and for all but the baseline `change` (of macro F1) and
        `flips` (texts with another label).
    """
    labels, logits = read_predictions(results / "predictions" / f"{record.name}.parquet")
    scores = score_again(labels, logits, record.quality.labels)
    found = {"macro_f1": scores["macro_f1"], "accuracy": scores["accuracy"]}
    found["conflict_free_macro_f1"] = record.quality.conflict_free.macro_f1
    baseline = results / "predictions" / "baseline-pytorch.parquet"
    if record.variant != "baseline" and baseline.is_file():
        labels_of_baseline, before = read_predictions(baseline)
        if not np.array_equal(labels, labels_of_baseline) or before.shape != logits.shape:
            raise UserError(f"the predictions of {record.name} and {baseline} are not of the same rows")
        found["change"] = found["macro_f1"] - score_again(labels, before, record.quality.labels)["macro_f1"]
        found["flips"] = int((logits.argmax(axis=-1) != before.argmax(axis=-1)).sum())
    return found


def write_record(record: dict, results_dir: Path, logits, labels) -> Path:
    """Writes the logits (float32, rows x classes) of every scored row, then the record, each atomically.

    Returns:
        The record's file.
    """
    name = Record.check(record, f"{record['variant']}-{record['format']}").name
    columns = {
        "row": pyarrow.array(range(len(labels)), pyarrow.int64()),
        "label": pyarrow.array(list(labels), pyarrow.int64() if labels.ndim == 1 else pyarrow.list_(pyarrow.int64())),
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
    """Returns the field `provenance` of a record: how the model was made, and the scored rows.

    Args:
        recipe: the model's recipe.yaml; empty for a folder without one, whose values are then null.
    """
    made = recipe.get("provenance", {})
    described = {
        "base_model": made.get("base_model"),
        "base_model_source": made.get("base_model_source"),
        "dataset": task.name,
        "dataset_source": task.source,  # of the scored rows; the training rows may come from elsewhere
        "train_dataset_source": made.get("dataset_source"),
        "dataset_fingerprint": fingerprint(rows),
        "train_rows": made.get("train_rows"),
        "train_fingerprint": made.get("train_fingerprint"),
        "recipe": recipe["recipe"] if recipe else None,
        "quantizing_seconds": recipe.get("seconds"),
        **{name: recipe.get(name) for name in COPIED},
        "git_commit": made.get("git_commit"),
    }
    return without_path(described)  # records are published
