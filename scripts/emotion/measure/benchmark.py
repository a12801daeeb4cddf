"""Several artifacts timed in one run, interleaved, each in a process of its own."""

import multiprocessing
import os
import tempfile
import time
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import relative
from emotion.measure.contenders import COMPILED
from emotion.measure.inspection import describe_scheme
from emotion.measure.ruler import WARMUP_RUNS, summarize_latency, time_batches, time_each
from emotion.model.artifact import files_to_serve, find_formats, weights_of
from emotion.model.classifier import open_artifact, predict

import numpy as np
from tqdm import tqdm

SETTLE_RUNS = 5  # after another artifact had the processor: its caches are gone
ANSWERED = 256  # texts whose labels tell whether two contenders answer alike


def interleave(
    contenders: dict[str, tuple[Path, str]],
    texts: list[str],
    threads: int,
    rounds: int,
    texts_a_round: int,
    batches: int,
    cold_starts: int = 0,
) -> dict[str, dict]:
    """Times each contender (its folder and format) in turn, round after round.

    Returns:
        For each its bytes, scheme, latency, throughput, how many times faster it was than the fastest FP32, and the
        share of texts that got that one's label.
    """
    workers = {
        name: Worker(name, folder, format, threads, texts[:ANSWERED], cold_starts)
        for name, (folder, format) in tqdm(contenders.items(), desc="started")
    }
    rng = np.random.default_rng(0)
    for turn in tqdm(range(1 + rounds), desc="interleaved rounds"):
        one_by_one = [texts[row] for row in rng.integers(len(texts), size=SETTLE_RUNS + texts_a_round)]
        batched = [texts[row] for row in rng.integers(len(texts), size=32 * batches)]
        for worker in workers.values():
            worker.take_turn(one_by_one, batched, counted=turn > 0)  # the first one warms what length and batch need
    for worker in workers.values():
        worker.close()
    reference = workers[fastest_fp32({name: worker.summary() for name, worker in workers.items()})]
    return {name: worker.summary() | worker.compared_with(reference) for name, worker in workers.items()}


def fastest_fp32(measured: dict[str, dict]) -> str:
    """The one that the others are compared with: the fastest at batch 1 that computes in FP32, else the first."""
    fp32 = [name for name, one in measured.items() if one["scheme"]["weights"] == one["precision"] == "float32"]
    return min(fp32, key=lambda name: measured[name]["latency_ms"]["p50"]) if fp32 else next(iter(measured))


def split_name(name: str) -> tuple[Path, str]:
    """'weights/baseline:onnx' -> the folder and the format; without a format the first that the folder has."""
    folder, _, format = name.partition(":")
    return Path(folder), format or next(iter(find_formats(Path(folder))))


def name_of(folder: Path, format: str) -> str:
    """What results call an artifact: `split_name` backwards, without a path of this machine."""
    return f"{relative(folder)}:{format}"


class Worker:
    """One contender in its own process, idle while the others have their turn."""

    def __init__(self, name: str, folder: Path, format: str, threads: int, texts: list[str], cold_starts: int):
        self.name = name
        self._bytes_to_serve = sum(files_to_serve(folder, format.removesuffix(COMPILED)).values())
        self._times_ms, self._texts_per_s, self._cold_start_ms = [], [], []
        for left in reversed(range(max(cold_starts, 1))):
            start = time.perf_counter()
            self._start(folder, format, threads, texts)
            self._cold_start_ms += [1000 * (time.perf_counter() - start)] if cold_starts else []
            if left:
                self._process.kill()
                self._process.join()
        self._about = self._receive()

    def _start(self, *what) -> None:
        """Starts the process and waits for its first answer; what torch.compile cached before does not count."""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, *what), daemon=True)
        self._cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self._cache.name
        self._process.start()
        self._receive()

    def _receive(self):
        while not self._pipe.poll(1):
            if not self._process.is_alive():
                raise UserError(f"{self.name} ended while it was measured")
        answer = self._pipe.recv()
        if isinstance(answer, UserError):
            raise answer
        return answer

    def take_turn(self, one_by_one: list[str], batched: list[str], counted: bool) -> None:
        self._pipe.send((one_by_one, batched))
        times_ms, texts_per_s = self._receive()
        if counted:
            self._times_ms.append(times_ms)
            self._texts_per_s.append(texts_per_s)

    def summary(self) -> dict:
        """What it is, latency and throughput over all rounds, and the time from a process's start to an answer."""
        return {
            "bytes_to_serve": self._bytes_to_serve,
            "scheme": self._about["scheme"],
            "precision": self._about["precision"],
            "latency_ms": summarize_latency(np.concatenate(self._times_ms)),
            "throughput_per_s": {"batch_size": 32, **spread(self._texts_per_s)},
            "cold_start_ms": spread(self._cold_start_ms) if self._cold_start_ms else None,
        }

    def compared_with(self, reference: "Worker") -> dict:
        """How many times faster than another contender, round by round, and how often the labels are equal."""
        p50, other_p50 = (np.median(one._times_ms, axis=1) for one in (self, reference))
        return {
            "times_faster_at_batch_1": spread(other_p50 / p50),
            "times_faster_at_batch_32": spread(np.divide(self._texts_per_s, reference._texts_per_s)),
            "equal_labels": float(np.mean(self._about["answers"] == reference._about["answers"])),
        }

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def serve(pipe, folder: Path, format: str, threads: int, texts: list[str]) -> None:
    """The worker's process: opens and warms the contender, then times what it is sent until it is sent None."""
    try:
        plain_format = format.removesuffix(COMPILED)
        classifier = open_artifact(folder, plain_format, threads=threads)
        if format.endswith(COMPILED):
            classifier.compile()
        classifier.logits(classifier.encode(texts[:1]))
        pipe.send("answered")
        scheme = describe_scheme(classifier, weights_of(folder, plain_format), plain_format)
        answers = predict(classifier, classifier.encode(texts)).argmax(axis=-1)
    except UserError as error:
        pipe.send(error)
        return
    time_each(classifier, classifier.encode(texts[:WARMUP_RUNS]))
    pipe.send({"scheme": scheme, "precision": precision_of(scheme, classifier), "answers": answers})
    while turn := pipe.recv():
        one_by_one, batched = turn
        times_ms = time_each(classifier, classifier.encode(one_by_one))[SETTLE_RUNS:]
        pipe.send((times_ms, time_batches(classifier, classifier.encode(batched), batch_size=32)))


def precision_of(scheme: dict, classifier) -> str:
    """In what the matrix products are computed: int8, bfloat16 or float32."""
    if scheme["activations"].startswith("int8"):
        return "int8"
    computes_in = getattr(classifier, "float_precision", scheme["activations"])  # OpenVINO decides by the processor
    return "bfloat16" if computes_in in {"bf16", "bfloat16"} else "float32"


def spread(values) -> dict:
    """Median, least and most over the rounds."""
    return {name: round(float(function(values)), 3) for name, function in
            (("median", np.median), ("min", np.min), ("max", np.max))}  # fmt: skip
