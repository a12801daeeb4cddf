"""Holds results against their evidence: records against their predictions, means over seeds against the seeds.

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


def read_predictions(path: Path) -> tuple:
    """The labels, int64 (rows,), and the logits, float32 (rows, classes), of a predictions file.

    Raises:
        UserError: if there is no such file, or it is not what `write_record` writes.
    """
    import pyarrow  # imported here: commands that only read or name records start faster without it
    from pyarrow import parquet

    if not Path(path).is_file():
        raise UserError(f"no file {path}; measure with python scripts/run_evaluation.py")
    try:
        table = parquet.read_table(path)
        rows, labels, logits = (table[name].combine_chunks() for name in ("row", "label", "logits"))
        numbers = logits.flatten().to_numpy()
        # A column of lists has no NumPy array of two dimensions: it is cut out of one, which needs equal lengths.
        numbers = numbers.reshape(len(logits), -1) if len(logits) else numbers
        lengths = set(logits.value_lengths().to_pylist())
        rows, labels = rows.to_numpy(), labels.to_numpy()
    except (pyarrow.ArrowException, OSError, LookupError, ValueError, AttributeError) as error:
        raise UserError(f"{path} holds no predictions: {' '.join(str(error).split())}; measure it again") from error
    if (rows.dtype, labels.dtype, numbers.dtype) != (np.int64, np.int64, np.float32):
        problem = f"row, label and logits are {rows.dtype}, {labels.dtype} and {numbers.dtype}, not int64 and float32"
    elif not len(rows) or len(lengths) != 1 or None in lengths:
        problem = "'logits' is empty, or has rows of different lengths"
    elif (rows != np.arange(len(rows))).any():
        problem = "'row' does not count from 0 on: the rows are not in their order"
    elif not np.isfinite(numbers).all():
        problem = f"'logits' of row {np.argwhere(~np.isfinite(numbers))[0][0]} are not finite"
    elif labels.min() < 0 or labels.max() >= numbers.shape[1]:
        problem = f"'label' has values outside of the {numbers.shape[1]} classes of its logits"
    else:
        return labels, numbers
    raise UserError(f"{path}: {problem}; measure it again")


def score_again(labels: np.ndarray, logits: np.ndarray, names: list[str]) -> dict:
    """The fields of `quality` that the predictions give, counted without scikit-learn, which takes seconds to load.

    Args:
        labels, logits: as `read_predictions` returns them.
        names: those of the classes.
    """
    classes = len(names)
    answers = logits.argmax(axis=-1)
    matrix = np.bincount(labels * classes + answers, minlength=classes**2).reshape(classes, classes)
    right, either = np.diagonal(matrix), matrix.sum(axis=0) + matrix.sum(axis=1)
    of_class = 2 * right / np.maximum(either, 1)
    return {
        "examples": len(labels),
        "confusion_matrix": matrix.tolist(),
        "accuracy": float((answers == labels).mean()),
        "per_class_f1": dict(zip(names, of_class.tolist(), strict=True)),
        "macro_f1": float(of_class.mean()),
        "expected_calibration_error": expected_calibration_error(logits, labels),
    }


def check_evidence(record: Record, path: Path, predictions: Path) -> np.ndarray:
    """Raises `UserError` unless a record says what its predictions give, and does not contradict itself.

    Args:
        path: the record's file, for the message.

    Returns:
        The labels of the rows, int64 (rows,): records of the same rows must have the same.
    """
    labels, logits = read_predictions(predictions)
    quality, names = record.quality, record.quality.labels
    if logits.shape[1] != len(names):
        raise UserError(f"{path}: {len(names)} 'quality.labels', but {predictions} has {logits.shape[1]} classes")
    for field, given in score_again(labels, logits, names).items():
        if not _agree(getattr(quality, field), given):
            raise UserError(f"{path}: 'quality.{field}' is not what {predictions} gives; measure it again")
    low, high = macro_f1_interval(logits, labels)
    apart = np.abs(np.subtract(quality.macro_f1_ci95, (low, high))).max()
    if apart > REDRAWN * (high - low) + ROUNDING:
        raise UserError(f"{path}: 'quality.macro_f1_ci95' is not what {predictions} gives; measure it again")
    return labels


def _agree(said, given) -> bool:
    """Whether a field of a record holds what was computed again, of which floats are rounded."""
    if isinstance(given, dict):
        same_names = isinstance(said, dict) and list(said) == list(given)
        return same_names and all(_agree(said[name], given[name]) for name in given)
    if isinstance(given, float):
        return isinstance(said, int | float) and math.isclose(said, given, rel_tol=0, abs_tol=ROUNDING)
    return said == given


def read_seeds(results: Path) -> list[Seeds]:
    """The summaries over seeds among the results, sorted by file name.

    Raises:
        UserError: if one lacks a field, or contradicts its runs or the records of its seeds.
    """
    summaries = []
    for path in sorted((results / "seeds").glob("*.json")):
        summary = Seeds.read(path)
        for format in summary.formats:
            name = f"{summary.variant}-{format}"
            for seed, scores in summary.runs_of(format):
                for field, value in _scores_of(path.parent / str(seed), name).items():
                    if (said := getattr(scores, field)) is not None and not _agree(said, value):
                        raise UserError(f"{path}: '{field}' of seed {seed} is not that of {name}; measure it again")
        summaries.append(summary)
    return summaries


def commits_of(summaries: list[Seeds], results: Path) -> set[str]:
    """The commits whose code made what summaries over seeds are means of, as far as the records of the seeds are kept.

    Args:
        summaries: what `read_seeds` returns.
        results: the folder that they came from.
    """
    commits = set()
    for summary in summaries:
        for format in summary.formats:
            for seed, _ in summary.runs_of(format):
                path = results / "seeds" / str(seed) / "metrics" / f"{summary.variant}-{format}.json"
                if path.is_file():
                    commits.add(Record.read(path).provenance.git_commit)
    return commits - {None}


def _scores_of(folder: Path, name: str) -> dict:
    """The scores that the predictions of a seed give, and its record tells; empty if it has none."""
    predictions, baseline = folder / "predictions", folder / "predictions" / "baseline-pytorch.parquet"
    if not (predictions / f"{name}.parquet").is_file():
        return {}
    record = Record.read(folder / "metrics" / f"{name}.json")
    labels, logits = read_predictions(predictions / f"{name}.parquet")
    scores = score_again(labels, logits, list(map(str, range(logits.shape[1]))))
    given = {key: scores[key] for key in ("macro_f1", "accuracy")}
    given["conflict_free_macro_f1"] = record.quality.conflict_free.macro_f1
    if baseline.is_file():
        labels_of_baseline, before = read_predictions(baseline)
        if not np.array_equal(labels, labels_of_baseline) or before.shape != logits.shape:
            raise UserError(f"{predictions / name}.parquet and {baseline} are not of the same rows")
        was = score_again(labels, before, list(map(str, range(before.shape[1]))))["macro_f1"]
        given |= {
            "change": given["macro_f1"] - was,
            "flips": int((logits.argmax(axis=-1) != before.argmax(axis=-1)).sum()),
        }
    return given
