"""Whether two classifiers that answered the same rows differ: paired tests, corrected for how many there are.

Macro F1 by the paired bootstrap (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993), accuracy by McNemar's
exact test (McNemar, 1947), "no loss" by two one-sided tests within a margin (Schuirmann, 1987); corrected by Holm's
method (1979).
"""

from emotion.task.scores import expected_calibration_error

import numpy as np
from scipy import stats

RESAMPLES = 20_000
LEVEL = 0.05  # what a p-value must be below, after the correction
POWER = 0.8
MARGIN = 0.01  # macro F1: half of how far the score of a single model on 2,000 rows is uncertain (95 %)


def compare_with(reference: np.ndarray, others: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, dict]:
    """Compares each of several classifiers with the reference, row by row.

    Args:
        reference, others: logits (rows, classes) of the same rows.
        labels: int array (rows,).

    Returns:
        For each name what `compare` finds, and its p-values as Holm corrects them over all the names.
    """
    found = {name: compare(reference, logits, labels) for name, logits in others.items()}
    for name in ("p_macro_f1", "p_mcnemar", "p_loss", "p_margin"):
        for one, p in zip(found.values(), holm([one[name] for one in found.values()]), strict=True):
            one[f"{name}_holm"] = p
    return {name: one | {"verdict": verdict(one)} for name, one in found.items()}


def compare(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict:
    """What changes from one classifier's logits (rows, classes) to another's.

    `p_loss` belongs to "it is worse by the margin or more", `p_margin` to "it differs by the margin or more": small
    ones support "not worse" and "no loss". `minimal_difference` is the change of macro F1 that so many rows would show
    with a probability of 80 %, at a level of 5 %, before the correction.
    """
    predicted = [logits.argmax(axis=-1) for logits in (before, after)]
    right = [answers == labels for answers in predicted]
    scores = resampled_macro_f1(labels, *predicted, resamples=RESAMPLES)
    observed = resampled_macro_f1(labels, *predicted, resamples=0)
    change = scores[1] - scores[0]
    lost, won = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    error = float(change.std(ddof=1))
    return {
        "change": float(observed[1, 0] - observed[0, 0]),
        "change_ci95": np.percentile(change, [2.5, 97.5]).tolist(),
        "p_macro_f1": min(1.0, 2 * min(share(change <= 0), share(change >= 0))),
        "p_loss": share(change <= -MARGIN),
        "p_margin": max(share(change <= -MARGIN), share(change >= MARGIN)),
        "minimal_difference": float(stats.norm.isf(LEVEL / 2) + stats.norm.ppf(POWER)) * error,
        "flips": int((predicted[0] != predicted[1]).sum()),
        "lost": lost,
        "won": won,
        "p_mcnemar": float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0,
        "calibration_error_change": expected_calibration_error(after, labels)
        - expected_calibration_error(before, labels),
    }


def resampled_macro_f1(labels, *predictions, resamples: int, seed: int = 0) -> np.ndarray:
    """Macro F1 (classifiers, resamples) on rows drawn with replacement, the same rows for each classifier.

    Drawing rows is drawing their joint cells (label, first answer, second answer, ...) from a multinomial
    distribution.
    With no resamples the score of the rows themselves is returned, as one column.
    """
    cells, counts = np.unique(np.stack([labels, *predictions]), axis=1, return_counts=True)
    drawn = counts[None]
    if resamples:
        drawn = np.random.default_rng(seed).multinomial(len(labels), counts / len(labels), size=resamples)
    present, *predicted = (cells[:, :, None] == np.arange(cells.max() + 1)).astype(int)  # (cells, classes) each
    scores = []
    for answers in predicted:
        either = drawn @ (answers + present)  # predicted plus present: F1 is 2 right / either
        scores.append((2 * (drawn @ (answers * present)) / np.maximum(either, 1)).mean(axis=1))
    return np.array(scores)


def share(hits: np.ndarray) -> float:
    """The p-value of so many resamples on the wrong side; never 0, which no finite number of them can show."""
    return (int(hits.sum()) + 1) / (len(hits) + 1)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction: the smallest times their number, the next times one less, and never decreasing."""
    order = np.argsort(p_values, kind="stable")
    steps = np.maximum.accumulate(np.array(p_values)[order] * np.arange(len(p_values), 0, -1))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(steps, 1)
    return corrected.tolist()


def verdict(one: dict) -> str:
    """The words of the table. "No loss" is said only where both one-sided tests support it."""
    if not one["flips"]:
        return "same answers"
    within = one["p_margin_holm"] < LEVEL
    if one["p_macro_f1_holm"] < LEVEL:
        return f"{'better' if one['change'] > 0 else 'worse'}{', within the margin' if within else ''}"
    if within:
        return "no loss"
    return "not worse" if one["p_loss_holm"] < LEVEL else "undecided"


def mean_interval(values: list[float]) -> list[float] | None:
    """95 % interval of a mean over few independent runs (Student's t); None for a single run."""
    if len(values) < 2:
        return None
    spread = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return [float(np.mean(values) - spread), float(np.mean(values) + spread)]
