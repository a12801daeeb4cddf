"""Checks results against their evidence: records against their predictions, means over seeds against the seeds.

A number that anyone can compute again from a file beside it is computed again before a page shows it.
"""

import math
from pathlib import Path

import numpy as np

from emotion.data.metrics import expected_calibration_error, macro_f1_interval
from emotion.evaluation.schema import ROUNDING, Record, Seeds
from emotion.utils.errors import UserError

# Of an interval's width: another version of NumPy may draw other rows, which moves its ends by a tenth at most.
REDRAWN = 0.2


def read_predictions(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a predictions file, as `write_record` writes it.

    Returns:
        The labels, int64 (rows,), and the logits, float32 (rows, classes).

    Raises:
        UserError: if the file is missing or damaged.
    """
    import pyarrow  # imported here: commands that only read or name records start faster without it
    from pyarrow import parquet

    if not Path(path).is_file():
        raise UserError(f"no file {path}; measure with python scripts/run_evaluation.py")
    try:
        table = parquet.read_table(path)
        return _to_numpy(*(table[name].combine_chunks() for name in ("row", "label", "logits")))
    except (pyarrow.ArrowException, OSError, LookupError, ValueError, AttributeError) as error:
        raise UserError(f"{path} holds no predictions: {' '.join(str(error).split())}; measure it again") from error


def _to_numpy(rows, labels, logits) -> tuple[np.ndarray, np.ndarray]:
    """Converts the Arrow columns of a predictions file; raises `ValueError` if they are not what they should be."""
    types = list(map(str, (rows.type, labels.type, logits.type.value_type)))
    if types != ["int64", "int64", "float"]:
        raise ValueError(f"row, label and logits are {', '.join(types)}, not int64, int64 and float")
    lengths = set(logits.value_lengths().to_pylist())
    if len(lengths) != 1 or None in lengths:
        raise ValueError("'logits' is empty, or has rows of different lengths")
    rows, labels = rows.to_numpy(), labels.to_numpy()
    logits = logits.flatten().to_numpy().reshape(len(rows), -1)
    if (rows != np.arange(len(rows))).any():
        raise ValueError("'row' does not count from 0")
    if not np.isfinite(logits).all():
        raise ValueError("'logits' are not finite")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"'label' has values outside of the {logits.shape[1]} classes of 'logits'")
    return labels, logits


def score_again(labels: np.ndarray, logits: np.ndarray, names: list[str]) -> dict:
    """Computes the fields of `quality` that the predictions determine, without scikit-learn, which loads slowly.

    Args:
        labels: int64 (rows,).
        logits: float32 (rows, classes).
        names: of the classes.
    """
    classes = len(names)
    predicted = logits.argmax(axis=-1)
    matrix = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    of_class = 2 * np.diagonal(matrix) / np.maximum(matrix.sum(axis=0) + matrix.sum(axis=1), 1)
    return {
        "examples": len(labels),
        "confusion_matrix": matrix.tolist(),
        "accuracy": float((predicted == labels).mean()),
        "per_class_f1": dict(zip(names, of_class.tolist(), strict=True)),
        "macro_f1": float(of_class.mean()),
        "expected_calibration_error": expected_calibration_error(logits, labels),
    }


def check_evidence(record: Record, path: Path, predictions: Path) -> np.ndarray:
    """Checks that a record says what its predictions give.

    Args:
        path: the record's file, for the message.

    Returns:
        The labels of the rows, int64 (rows,): records of the same rows must have the same.

    Raises:
        UserError: if a field of `quality` is not what the predictions give.
    """
    labels, logits = read_predictions(predictions)
    quality = record.quality
    wrong = [] if logits.shape[1] == len(quality.labels) else ["labels"]
    if not wrong:
        expected = score_again(labels, logits, quality.labels)
        wrong = [name for name, value in expected.items() if not _is_equal(getattr(quality, name), value)]
        low, high = macro_f1_interval(logits, labels)
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
                if (folder / "metrics" / f"{name}.json").is_file():
                    records.append(Record.read(folder / "metrics" / f"{name}.json"))
                    for field, value in _scores_of(folder, records[-1]).items():
                        recorded = getattr(scores, field)
                        if recorded is not None and not _is_equal(recorded, value):
                            raise UserError(
                                f"{path}: '{field}' of seed {seed} is not that of {name}; measure it again"
                            )
        found.append((summary, records))
    return sorted(found, key=lambda pair: pair[0].variant)


def _scores_of(folder: Path, record: Record) -> dict:
    """Computes the scores of a seed's record from its predictions, and its changes against that seed's baseline."""
    labels, logits = read_predictions(folder / "predictions" / f"{record.name}.parquet")
    scores = score_again(labels, logits, record.quality.labels)
    found = {"macro_f1": scores["macro_f1"], "accuracy": scores["accuracy"]}
    found["conflict_free_macro_f1"] = record.quality.conflict_free.macro_f1
    baseline = folder / "predictions" / "baseline-pytorch.parquet"
    if baseline.is_file():
        labels_of_baseline, before = read_predictions(baseline)
        if not np.array_equal(labels, labels_of_baseline) or before.shape != logits.shape:
            raise UserError(f"the predictions of {record.name} and {baseline} are not of the same rows")
        found["change"] = found["macro_f1"] - score_again(labels, before, record.quality.labels)["macro_f1"]
        found["flips"] = int((logits.argmax(axis=-1) != before.argmax(axis=-1)).sum())
    return found
