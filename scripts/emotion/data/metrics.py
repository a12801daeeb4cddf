"""Scores of logits: macro F1 and its interval, accuracy, per-class F1, confusion matrix, calibration error."""

from functools import cache

import numpy as np

from emotion.utils.files import ROOT

CALIBRATION_BINS = 15  # as in Guo et al.
VALIDATION_NOISE = 0.002  # in macro F1: below it two scores on validation, of 2,000 rows, count as equal
BOOTSTRAP_CHUNK = 2**21  # counts in memory at once, 16 MiB


@cache
def load_scores():
    """Loads the repository's `evaluate` module (metrics/metrics.py)."""
    import evaluate

    # By its path: a name would be looked up on the Hub. In memory: several processes may score at once.
    return evaluate.load(str(ROOT / "metrics"), keep_in_memory=True)


def decide(logits: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """The predicted class of each row, int (rows,); with a threshold 1 for each label whose sigmoid reaches it or 0.

    Args:
        logits: float array (rows, classes).
        threshold: of a model that gives a text several labels; None for one that gives it one.
    """
    return logits.argmax(axis=-1) if threshold is None else (probabilities(logits, True) >= threshold).astype(int)


def score(logits: np.ndarray, labels: np.ndarray, threshold: float | None = None) -> dict:
    """Macro F1, accuracy, per-class F1 (list) and confusion matrix (rows: true, columns: predicted).

    Args:
        logits: float array (rows, classes).
        labels: int array (rows,); with a ``threshold`` 0 or 1 for each label, (rows, classes), and micro F1 is added.
    """
    # All classes are named, since one that the labels lack must not shorten the lists.
    classes = list(range(logits.shape[1]))
    return load_scores().compute(predictions=decide(logits, threshold), references=labels, labels=classes)


def four_digits(score: float | None) -> str:
    """A score or a loss with four digits; "not measured" for None."""
    return "not measured" if score is None else f"{score:.4f}"


def macro_f1_interval(logits: np.ndarray, labels: np.ndarray, threshold: float | None = None) -> list[float]:
    """The 95 % interval of macro F1, by a percentile bootstrap over the rows: [low, high]; arguments as of `score`.

    Efron, "Bootstrap Methods: Another Look at the Jackknife", The Annals of Statistics 1979.
    """
    scores = resampled_macro_f1(labels, decide(logits, threshold), classes=logits.shape[1], resamples=2000)
    return np.percentile(scores, [2.5, 97.5]).tolist()


def resampled_macro_f1(labels, *predictions, classes: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Macro F1 on rows drawn with replacement, the same rows for each classifier.

    Args:
        labels: int array (rows,), or 0 and 1 for each label, (rows, classes).
        predictions: of each classifier, in the same form.
        resamples: number of draws; with 0 the rows themselves are scored, as one column.

    Returns:
        Float array (classifiers, resamples).
    """
    from scipy import sparse  # here: who scores rows only needs no SciPy

    # Rows with the same label and predictions form a cell, and there are few cells. Drawing rows is drawing the number
    # of rows of each cell, from a multinomial distribution.
    stacked = np.stack([labels, *predictions])
    cells, counts = np.unique(stacked, axis=1, return_counts=True)
    # For the labels, then for each classifier: (classes, cells), 1 where a cell has the class. Sparse, since with many
    # classes nearly all of it is 0.
    ones, columns = np.ones(len(counts), dtype=int), np.arange(len(counts))
    if stacked.ndim == 3:
        present, *predicted = (sparse.csr_array(of.T) for of in cells)
    else:
        present, *predicted = (sparse.csr_array((ones, (of, columns)), shape=(classes, len(counts))) for of in cells)
    rng = np.random.default_rng(seed)
    chunk = max(1, BOOTSTRAP_CHUNK // max(classes, len(counts)))
    scores = []
    for start in range(0, max(resamples, 1), chunk):
        drawn = counts[None]  # (resamples, cells)
        if resamples:
            size = min(chunk, resamples - start)
            drawn = rng.multinomial(len(labels), counts / len(labels), size=size)
        of_chunk = []
        for matrix in predicted:
            total = (matrix + present) @ drawn.T  # predicted plus present
            correct = matrix.multiply(present) @ drawn.T
            # A class that was neither predicted nor drawn has an F1 of 0.
            of_chunk.append((2 * correct / np.maximum(total, 1)).mean(axis=0))
        scores.append(of_chunk)
    return np.concatenate(scores, axis=1)


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean gap between confidence and accuracy over 15 equally wide bins, weighted by rows.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Where a text may have several labels, the share of rows with a label takes the place of accuracy, for all labels.

    Args:
        logits: float array (rows, classes).
        labels: int array (rows,), or 0 and 1 for each label, (rows, classes).
    """
    if labels.ndim == 2:
        confidence, right = probabilities(logits, multi_label=True).ravel(), labels.ravel()
    else:
        scores = softmax(logits)
        confidence, right = scores.max(axis=-1), scores.argmax(axis=-1) == labels
    # A confidence of exactly 1 belongs into the last bin.
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def probabilities(logits: np.ndarray, multi_label: bool = False) -> np.ndarray:
    """The score of each label, float64, as a pipeline of Transformers gives it: one sigmoid each with ``multi_label``.

    Args:
        logits: float array (rows, labels).
        multi_label: whether a text may have several labels; otherwise scores are those of `softmax`.
    """
    return 1 / (1 + np.exp(-logits.astype(np.float64).clip(-700, 700))) if multi_label else softmax(logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, float64, in the shape of the logits."""
    # Without its maximum no exponent is positive, so none overflows.
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
