"""The evaluation protocol: scores and times every model in the same way, whatever its format.

Quality is computed from the logits of all rows. Latency is the time from the token ids of one text, at its own length,
to its logits. Throughput counts texts per second: from token ids in batches of 32 that are sorted by length, or end to
end, from many texts to their labels. Nothing here depends on the variant.
"""

import time

import numpy as np

from emotion.data.dataset import Task, conflicting_texts
from emotion.data.metrics import expected_calibration_error, macro_f1_interval, score
from emotion.inference.runtimes import batches_by_length, predict
from emotion.utils.command import Bar

# Runs at batch 1 that are not counted: caches fill, threads wake, and runtimes settle on a kernel.
WARMUP_RUNS = 30
KEPT_PERCENTILES = (5, 25, 50, 75, 95, 99)


def time_each(classifier, token_ids: list[list[int]]) -> np.ndarray:
    """Times each text from token ids to logits, one at a time (batch 1): milliseconds, float64 (texts,)."""
    times_ns = np.empty(len(token_ids))
    for row, ids in enumerate(token_ids):
        start = time.perf_counter_ns()
        classifier.logits([ids])  # alone in its batch, so without padding
        times_ns[row] = time.perf_counter_ns() - start
    return times_ns / 1e6


def time_batches(classifier, token_ids: list[list[int]], batch_size: int = 32) -> float:
    """Times batches sorted by length, from token ids to logits: texts per second."""
    batches = batches_by_length(token_ids, batch_size)  # sorted before the clock starts: that is not the model's work
    start = time.perf_counter()
    for batch in batches:
        classifier.logits([token_ids[row] for row in batch])
    return len(token_ids) / (time.perf_counter() - start)


def time_end_to_end(classifier, texts: list[str]) -> float:
    """Times one call of `EmotionClassifier.classify`, with tokenization, sorting and padding: texts per second."""
    start = time.perf_counter()
    classifier.classify(texts)
    return len(texts) / (time.perf_counter() - start)


def summarize_latency(times_ms: np.ndarray) -> dict:
    """Returns the field `latency_ms` of a record: percentiles and mean of the runs, in milliseconds."""
    # Three digits: runs of the same text differ by more.
    latency = {f"p{percent}": round(float(np.percentile(times_ms, percent)), 3) for percent in KEPT_PERCENTILES}
    return {"batch_size": 1, **latency, "mean": round(float(times_ms.mean()), 3), "runs": len(times_ms)}


def measure_quality(logits, labels, task: Task, rows, split: str, threshold: float | None = None) -> dict:
    """Returns the field `quality` of a record: scores on all rows, and on the consistently labelled ones.

    Args:
        logits: float32 array (rows, classes).
        labels: int array (rows,); with a ``threshold`` as of `score`.
        task: its splits are searched for conflicting labels.
    """
    # No model can be right about a text that the dataset has with two labels. The scores on all rows include such
    # texts; without them one sees what the model can do.
    conflicting = conflicting_texts(*task.splits.values())
    free = np.array([text not in conflicting for text in rows["text"]])
    scores, free_scores = score(logits, labels, threshold), score(logits[free], labels[free], threshold)
    several = {} if threshold is None else {"threshold": threshold, "micro_f1": scores["micro_f1"]}
    return {
        "split": split,
        "examples": len(labels),
        **several,
        "macro_f1": scores["macro_f1"],
        "accuracy": scores["accuracy"],
        "per_class_f1": dict(zip(task.labels, scores["per_class_f1"], strict=True)),
        "confusion_matrix": scores["confusion_matrix"],  # rows: true, columns: predicted; or one for each label
        "labels": task.labels,
        "macro_f1_ci95": macro_f1_interval(logits, labels, threshold),
        "expected_calibration_error": expected_calibration_error(logits, labels),
        "conflict_free": {
            "examples": int(free.sum()),
            "macro_f1": free_scores["macro_f1"],
            "accuracy": free_scores["accuracy"],
        },
    }


def choose_timed(count: int, runs: int) -> np.ndarray:
    """Draws the rows, of ``count``, that latency is measured on: `WARMUP_RUNS` that do not count, then ``runs``."""
    # The same seed for every model: all are timed on the same texts, whose lengths decide how long they take.
    return np.random.default_rng(0).integers(count, size=WARMUP_RUNS + runs)


def measure_speed(classifier, token_ids: list[list[int]], runs: int) -> dict:
    """Returns the fields `latency_ms` and `throughput_per_s` of a record; their values are null if ``runs`` is 0.

    Args:
        token_ids: of all texts; latency is measured on a seeded sample, throughput on all.
        runs: the number of counted runs at batch 1.
    """
    if not runs:  # null and not 0, which would look like a time
        latency = {"batch_size": 1, **dict.fromkeys(("p50", "p95", "p99", "mean")), "runs": 0}
        return {"latency_ms": latency, "throughput_per_s": {"batch_size": 32, "value": None}}
    # A warm-up: a runtime prepares itself for each new length and batch size, and another copy of the model may have
    # scored the rows.
    with Bar(total=3, desc="timed") as bar:
        predict(classifier, token_ids, batch_size=32)
        bar.update()
        times_ms = time_each(classifier, [token_ids[row] for row in choose_timed(len(token_ids), runs)])[WARMUP_RUNS:]
        bar.update()
        texts_per_s = time_batches(classifier, token_ids, batch_size=32)
    throughput = {"batch_size": 32, "value": round(texts_per_s, 1)}
    return {"latency_ms": summarize_latency(times_ms), "throughput_per_s": throughput}
