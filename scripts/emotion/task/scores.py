"""Scores of logits: macro F1 and its interval, accuracy, per-class F1, confusion matrix, calibration error."""

from functools import cache

from emotion.common.files import ROOT

import numpy as np

CALIBRATION_BINS = 15  # as in the paper that is named below
# In macro F1. Validation has some 2,000 rows, and two scores count as equal if they are closer than four of them.
VALIDATION_NOISE = 0.002


@cache
def load_scores():
    """Opens the repository's `evaluate` module (metrics/metrics.py)."""
    import evaluate

    # By its path: a name would be looked up on the Hub. In memory: several processes may score at once.
    return evaluate.load(str(ROOT / "metrics"), keep_in_memory=True)


def score(logits: np.ndarray, labels: np.ndarray) -> dict:
    """Macro F1, accuracy, per-class F1 (list) and confusion matrix (rows: true, columns: predicted).

    Args:
        logits: float array (rows, classes).
        labels: int array (rows,).
    """
    # All classes are named, since one that the labels lack must not shorten the lists.
    classes = list(range(logits.shape[1]))
    return load_scores().compute(predictions=logits.argmax(axis=-1), references=labels, labels=classes)


def macro_f1_interval(logits: np.ndarray, labels: np.ndarray, resamples: int = 2000, seed: int = 0) -> list[float]:
    """The 95 % interval of macro F1, by a percentile bootstrap over the rows: [low, high].

    Efron, "Bootstrap Methods: Another Look at the Jackknife", The Annals of Statistics 1979.

    Args:
        logits: float array (rows, classes).
        labels: int array (rows,).
    """
    rows, classes = logits.shape
    # Only the cell of the confusion matrix matters of a row. Drawing rows with replacement is therefore the same as
    # drawing the counts of the cells from a multinomial distribution, which is much faster.
    cells = np.bincount(labels * classes + logits.argmax(axis=-1), minlength=classes**2)
    drawn = np.random.default_rng(seed).multinomial(rows, cells / rows, size=resamples)
    drawn = drawn.reshape(resamples, classes, classes)
    right = np.diagonal(drawn, axis1=1, axis2=2)
    either = drawn.sum(axis=1) + drawn.sum(axis=2)  # predicted plus present: F1 is 2 right / either
    # A class that was neither predicted nor drawn has an F1 of 0.
    macro_f1 = (2 * right / np.maximum(either, 1)).mean(axis=1)
    return np.percentile(macro_f1, [2.5, 97.5]).tolist()


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean gap between confidence and accuracy over 15 equally wide bins, weighted by rows.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        logits: float array (rows, classes).
        labels: int array (rows,).
    """
    probabilities = softmax(logits)
    confidence, right = probabilities.max(axis=-1), probabilities.argmax(axis=-1) == labels
    # A confidence of exactly 1 belongs into the last bin.
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, float64, in the shape of the logits."""
    # Without its maximum no exponent is positive, so none overflows.
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
