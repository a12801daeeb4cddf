"""Where the time of a text goes: the milliseconds of each kind of operator, as the runtimes themselves measure them.

A runtime fuses and replaces operators when it opens a file. The names are those of what it computes in the end.
"""

import json
import tempfile
import time
from collections import Counter
from pathlib import Path

from emotion.common.errors import UserError
from emotion.model.artifact import weights_of
from emotion.model.classifier import batches_by_length
from emotion.task.tokens import TextEncoder

import numpy as np

BATCH_SIZES = (1, 32)
PASSES = 3  # over all texts, after one that is not counted


def profile(folder: Path, format: str, texts: list[str], threads: int) -> dict[str, dict]:
    """Profiles a file on real texts, at batch 1 and in batches of 32 that are sorted by length.

    Args:
        format: `onnx` or `openvino`.

    Returns:
        `batch_1` and `batch_32`, each with the number of counted `calls`, the mean milliseconds of a call (`call_ms`),
        and for each kind of operator how often a call computes it (`count`) and how long that takes (`ms`, a mean).

    Raises:
        UserError: if the folder lacks the format, or the runtime cannot tell the time of an operator.
    """
    profilers = {"onnx": profile_onnx, "openvino": profile_openvino}
    if format not in profilers:
        raise UserError(f"{folder}:{format}: only {' and '.join(profilers)} tell the time of an operator")
    encoder, weights = TextEncoder(folder), weights_of(folder, format)
    token_ids, profiled = encoder(texts), {}
    for size in BATCH_SIZES:
        batches = []
        for rows in batches_by_length(token_ids, size):
            batches.append(encoder.pad([token_ids[row] for row in rows]))
        profiled[f"batch_{size}"] = profilers[format](weights, batches, threads)
    return profiled


def profile_onnx(weights: Path, batches: list[dict[str, np.ndarray]], threads: int) -> dict:
    """One batch size of `profile`, by ONNX Runtime's trace of every node."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "trace")
        session = onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]

        def call(batch: dict[str, np.ndarray]) -> None:
            session.run(None, {name: batch[name] for name in names})

        _time_calls(call, batches, passes=1)
        call_ms = _time_calls(call, batches, PASSES)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    # The trace holds the calls that are not counted too. It tells microseconds.
    first = sorted(event["ts"] for event in events if event["name"] == "model_run")[len(batches)]
    counts, sums = Counter(), Counter()
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= first:
            counts[event["args"]["op_name"]] += 1 / len(call_ms)
            sums[event["args"]["op_name"]] += event["dur"] / len(call_ms)
    return _summarize(counts, sums, call_ms)


def profile_openvino(weights: Path, batches: list[dict[str, np.ndarray]], threads: int) -> dict:
    """One batch size of `profile`, by OpenVINO's counters."""
    import openvino

    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True})
    request = core.compile_model(core.read_model(weights), "CPU").create_infer_request()
    names = [port.any_name for port in request.model_inputs]

    def call(batch: dict[str, np.ndarray]) -> None:
        request.infer({name: batch[name] for name in names})

    # A counter tells the mean of all calls so far, in whole microseconds, and not the time of the last call. So those
    # of the first pass, in which OpenVINO makes its kernels, are taken off.
    _time_calls(call, batches, passes=1)
    before = [one.real_time.total_seconds() for one in request.profiling_info]
    call_ms = _time_calls(call, batches, PASSES)
    counts, sums = Counter(), Counter()
    for one, warmup in zip(request.profiling_info, before, strict=True):
        mean = ((1 + PASSES) * one.real_time.total_seconds() - warmup) / PASSES
        if mean > 0:  # 0: it is part of an operator beside it, or takes no time
            counts[one.node_type] += 1
            sums[one.node_type] += 1e6 * mean
    return _summarize(counts, sums, call_ms)


def _time_calls(call, batches: list[dict[str, np.ndarray]], passes: int) -> list[float]:
    """Milliseconds of each call."""
    times_ms = []
    for batch in batches * passes:
        start = time.perf_counter()
        call(batch)
        times_ms.append(1000 * (time.perf_counter() - start))
    return times_ms


def _summarize(counts: Counter, sums: Counter, call_ms: list[float]) -> dict:
    """The result for one batch size, from operators and microseconds of a call by kind; the longest come first."""
    operators = {}
    for kind, microseconds in sums.most_common():
        operators[kind] = {"count": round(counts[kind]), "ms": round(microseconds / 1000, 4)}
    return {"calls": len(call_ms), "call_ms": round(float(np.mean(call_ms)), 4), "operators": operators}
