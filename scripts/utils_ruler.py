"""The ruler: how every artifact is scored and timed, whatever its format.

Quality comes from the logits of all rows; latency is the time from the token ids of one text, at its own length, to
its logits; throughput is texts a second in batches of 32 sorted by length. Nothing here knows a variant.
"""

import datetime
import importlib.metadata
import platform
import time
from functools import cache

import numpy as np
from utils_classifier import softmax
from utils_cli import ROOT
from utils_record import git_commit

WARMUP_RUNS = 30
CALIBRATION_BINS = 15
PACKAGES = ("torch", "transformers", "datasets", "evaluate", "accelerate", "tokenizers", "numpy", "scikit-learn",
            "onnx", "onnxruntime", "torchao", "optimum-intel", "openvino", "nncf", "peft", "bitsandbytes")  # fmt: skip


@cache
def load_scores():
    """Opens the repository's `evaluate` module (metrics/metrics.py) by its path."""
    import evaluate

    return evaluate.load(str(ROOT / "metrics"), keep_in_memory=True)


def score(logits: np.ndarray, labels: np.ndarray) -> dict:
    """Macro F1, accuracy, per-class F1 (list) and confusion matrix (rows: true, columns: predicted).

    Args:
        logits: float array (rows, classes).
        labels: int array (rows,).
    """
    classes = list(range(logits.shape[1]))
    return load_scores().compute(predictions=logits.argmax(axis=-1), references=labels, labels=classes)


def macro_f1_interval(logits: np.ndarray, labels: np.ndarray, resamples: int = 2000, seed: int = 0) -> list[float]:
    """95 % percentile bootstrap interval of macro F1 over the rows.

    Drawing rows with replacement is drawing the cells of their confusion matrix from a multinomial distribution.
    """
    rows, classes = logits.shape
    cells = np.bincount(labels * classes + logits.argmax(axis=-1), minlength=classes**2)
    drawn = np.random.default_rng(seed).multinomial(rows, cells / rows, size=resamples)
    drawn = drawn.reshape(resamples, classes, classes)
    right = np.diagonal(drawn, axis1=1, axis2=2)
    either = drawn.sum(axis=1) + drawn.sum(axis=2)  # predicted plus present: F1 is 2 right / either
    macro_f1 = (2 * right / np.maximum(either, 1)).mean(axis=1)
    return np.percentile(macro_f1, [2.5, 97.5]).tolist()


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean gap between confidence and accuracy over 15 equally wide bins, weighted by rows.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    probabilities = softmax(logits)
    confidence, right = probabilities.max(axis=-1), probabilities.argmax(axis=-1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def predict(classifier, token_ids: list[list[int]], batch_size: int = 32) -> np.ndarray:
    """Logits of all texts, float32 (texts, labels) in their order; batches are sorted by length to save padding."""
    logits = np.empty((len(token_ids), len(classifier.labels)), dtype=np.float32)
    for batch in _batches_by_length(token_ids, batch_size):
        logits[batch] = classifier.logits([token_ids[row] for row in batch])
    return logits


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


def _batches_by_length(token_ids: list[list[int]], batch_size: int) -> list[np.ndarray]:
    order = np.argsort([len(ids) for ids in token_ids], kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def summarize_latency(times_ms: np.ndarray) -> dict:
    """The percentiles that records keep, in milliseconds."""
    kept = (5, 25, 50, 75, 95, 99)
    return {
        "batch_size": 1,
        **{f"p{one}": round(float(value), 3) for one, value in zip(kept, np.percentile(times_ms, kept), strict=True)},
        "mean": round(float(times_ms.mean()), 3),
        "runs": len(times_ms),
    }


def describe_environment(threads: int, device: str = "cpu") -> dict:
    """What the figures were measured on: the processor and its instruction sets, Python and the packages."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    vector = ("avx", "amx", "sve", "neon", "asimd", "i8mm", "dotprod", "bf16")
    return {
        "cpu": capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        "instruction_sets": sorted(
            name for name, has in capabilities.items() if has is True and name.startswith(vector)
        ),
        "threads": threads,
        "device": device,
        "python": platform.python_version(),
        "packages": package_versions(),
    }


def describe_run(threads: int) -> dict:
    """When, from which commit and on what a study was measured: what each of them begins with."""
    return {
        "date": datetime.date.today().isoformat(),
        "git_commit": git_commit(),
        "environment": describe_environment(threads),
    }


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that a result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
