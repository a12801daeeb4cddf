"""Paired tests: do two classifiers that answered the same rows differ? And means over seeds.

Macro F1 is tested by the paired bootstrap (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993), accuracy by
McNemar's exact test (McNemar, 1947), and "no loss" by two one-sided tests within a margin (Schuirmann, 1987). The
p-values are corrected for the number of comparisons by Holm's method (1979).
"""

from functools import partial

import numpy as np
from scipy import stats

from emotion.data.metrics import expected_calibration_error, resampled_macro_f1
from emotion.evaluation.schema import Mean
from emotion.utils.errors import UserError

RESAMPLES = 20_000  # enough for p-values of 1 in 20,000: they stay significant when a dozen tests are corrected
LEVEL = 0.05  # a p-value below it is significant, after the correction
POWER = 0.8  # the probability with which `minimum_detectable_effect` would be found
# Of macro F1; a smaller change counts as no loss. It is half the uncertainty of one model's score on 2,000 rows, which
# is about 0.02 on either side (95 %).
NO_LOSS_MARGIN = 0.01


def compare_with(reference: np.ndarray, others: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, dict]:
    """Compares classifiers with the reference, row by row; all logits are (rows, classes), ``labels`` int (rows,).

    Returns:
        Name -> the result of `compare`, its p-values corrected over all the names (`..._holm`), and its `verdict`.
    """
    results = {name: compare(reference, logits, labels) for name, logits in others.items()}
    # Each test is a question of its own, asked once for every name; it is corrected over the names.
    for test in ("p_macro_f1", "p_mcnemar", "p_loss", "p_margin"):
        corrected = holm([result[test] for result in results.values()])
        for result, p in zip(results.values(), corrected, strict=True):
            result[f"{test}_holm"] = p
    for result in results.values():
        result["verdict"] = verdict(result)
    return results


def compare(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict:
    """Returns the changes from one classifier's logits (rows, classes) to another's, and their p-values.

    `p_loss` tests the hypothesis "it is worse by the margin or more", `p_margin` the hypothesis "it differs by the
    margin or more". A small p-value supports "not worse" and "no loss". `minimum_detectable_effect` is the change of
    macro F1 that this number of rows would show with a probability of 80 %, at a level of 5 %, before the correction.
    """
    predicted_before, predicted_after = before.argmax(axis=-1), after.argmax(axis=-1)
    right_before, right_after = predicted_before == labels, predicted_after == labels
    macro_f1 = partial(resampled_macro_f1, labels, predicted_before, predicted_after, classes=before.shape[1])
    observed, scores = macro_f1(resamples=0), macro_f1(resamples=RESAMPLES)
    change = scores[1] - scores[0]  # on each resample, the same rows for both: what both find hard cancels out
    lost, won = int((right_before & ~right_after).sum()), int((~right_before & right_after).sum())
    # Two one-sided tests: the change is within the margin only if it is neither too low nor too high.
    p_loss, p_gain = share(change <= -NO_LOSS_MARGIN), share(change >= NO_LOSS_MARGIN)
    standard_errors = float(stats.norm.isf(LEVEL / 2) + stats.norm.ppf(POWER))
    return {
        "change": float(observed[1, 0] - observed[0, 0]),
        "change_ci95": np.percentile(change, [2.5, 97.5]).tolist(),
        "p_macro_f1": min(1.0, 2 * min(share(change <= 0), share(change >= 0))),
        "p_loss": p_loss,
        "p_margin": max(p_loss, p_gain),
        "minimum_detectable_effect": standard_errors * float(change.std(ddof=1)),
        "flips": int((predicted_before != predicted_after).sum()),
        "lost": lost,
        "won": won,
        # McNemar: without a difference, a row that only one of them answers right is as likely lost as won.
        "p_mcnemar": float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0,
        "calibration_error_change": expected_calibration_error(after, labels)
        - expected_calibration_error(before, labels),
    }


def share(hits: np.ndarray) -> float:
    """The p-value: the share of the resamples that hit. It is never 0, which no finite number of them can show."""
    return (int(hits.sum()) + 1) / (len(hits) + 1)


def holm(p_values: list[float]) -> list[float]:
    """Applies Holm's step-down correction to p-values, and returns them in their order."""
    order = np.argsort(p_values, kind="stable")
    # The smallest is multiplied by their number, the next by one less, and so on. The running maximum keeps the order:
    # a p-value that was larger must not count for more after the correction.
    steps = np.maximum.accumulate(np.array(p_values)[order] * np.arange(len(p_values), 0, -1))
    return np.minimum(steps, 1)[np.argsort(order)].tolist()


def verdict(result: dict) -> str:
    """The verdict on a result with corrected p-values: "no loss" only if both one-sided tests support it."""
    if not result["flips"]:
        return "same answers"
    within = result["p_margin_holm"] < LEVEL
    if result["p_macro_f1_holm"] < LEVEL:  # a difference can be certain and still be too small to matter
        return f"{'better' if result['change'] > 0 else 'worse'}{', within the margin' if within else ''}"
    if within:
        return "no loss"
    return "not worse" if result["p_loss_holm"] < LEVEL else "undecided"


def mean_interval(values: list[float]) -> list[float] | None:
    """95 % interval of a mean over few independent runs (Student's t); None for a single run."""
    if len(values) < 2:
        return None
    # Student's t and not the normal distribution: over three seeds the deviation is an estimate itself.
    spread = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return (np.mean(values) + np.array([-spread, spread])).tolist()


def check_seeds(seeds: list[int], flag: str) -> None:
    """Raises `UserError` if there is no seed, or one is repeated: it would count twice in the mean."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{flag} {' '.join(map(str, seeds))}: it takes one seed at least, and each once")


def summarize_scores(runs: list[dict], names) -> dict[str, dict]:
    """Name of a score -> its `mean` and sample `standard_deviation` over the runs; the latter is null for one run."""
    return {name: Mean.of([run[name] for run in runs]).model_dump() for name in names}
