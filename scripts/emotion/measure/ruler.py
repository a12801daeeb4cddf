"""The ruler: how every artifact is scored and timed, whatever its format.

Quality comes from the logits of all rows; latency is the time from the token ids of one text, at its own length, to
its logits; throughput is texts a second in batches of 32 sorted by length. Nothing here knows a variant.
"""

import time

from emotion.model.classifier import _batches_by_length
from emotion.task.dataset import Task, conflicting_texts
from emotion.task.scores import expected_calibration_error, macro_f1_interval, score

import numpy as np

WARMUP_RUNS = 30


def time_each(classifier, token_ids: list[list[int]]) -> np.ndarray:
    """Milliseconds from token ids to logits of each text, one at a time (batch 1)."""
    times_ns = np.empty(len(token_ids))
    for row, ids in enumerate(token_ids):
        start = time.perf_counter_ns()
        classifier.logits([ids])
        times_ns[row] = time.perf_counter_ns() - start
    return times_ns / 1e6


def time_batches(classifier, token_ids: list[list[int]], batch_size: int = 32) -> float:
    """Texts a second, in batches sorted by length."""
    batches = _batches_by_length(token_ids, batch_size)
    start = time.perf_counter()
    for batch in batches:
        classifier.logits([token_ids[row] for row in batch])
    return len(token_ids) / (time.perf_counter() - start)


def summarize_latency(times_ms: np.ndarray) -> dict:
    """The percentiles that records keep, in milliseconds."""
    kept = (5, 25, 50, 75, 95, 99)
    return {
        "batch_size": 1,
        **{f"p{one}": round(float(value), 3) for one, value in zip(kept, np.percentile(times_ms, kept), strict=True)},
        "mean": round(float(times_ms.mean()), 3),
        "runs": len(times_ms),
    }


def measure_quality(logits, labels, task: Task, rows, split: str) -> dict:
    """Scores of all rows, and of those whose text stands nowhere in the dataset with another label."""
    conflicting = conflicting_texts(*task.splits.values())
    free = np.array([text not in conflicting for text in rows["text"]])
    scores, free_scores = score(logits, labels), score(logits[free], labels[free])
    return {
        "split": split,
        "examples": len(labels),
        "macro_f1": scores["macro_f1"],
        "accuracy": scores["accuracy"],
        "per_class_f1": dict(zip(task.labels, scores["per_class_f1"], strict=True)),
        "confusion_matrix": scores["confusion_matrix"],
        "labels": task.labels,
        "macro_f1_ci95": macro_f1_interval(logits, labels),
        "expected_calibration_error": expected_calibration_error(logits, labels),
        "conflict_free": {
            "examples": int(free.sum()),
            "macro_f1": free_scores["macro_f1"],
            "accuracy": free_scores["accuracy"],
        },
    }


def measure_speed(classifier, token_ids: list[list[int]], runs: int) -> dict:
    """Latency of seeded texts one by one, and throughput over all of them; null where it was not asked for."""
    if not runs:
        latency = dict.fromkeys(("p50", "p95", "p99", "mean"))
        return {
            "latency_ms": {"batch_size": 1, **latency, "runs": 0},
            "throughput_per_s": {"batch_size": 32, "value": None},
        }
    chosen = np.random.default_rng(0).integers(len(token_ids), size=WARMUP_RUNS + runs)
    times_ms = time_each(classifier, [token_ids[row] for row in chosen])[WARMUP_RUNS:]
    return {
        "latency_ms": summarize_latency(times_ms),
        "throughput_per_s": {"batch_size": 32, "value": round(time_batches(classifier, token_ids, batch_size=32), 1)},
    }
