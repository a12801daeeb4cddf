"""Times several models in one interleaved run, each in a process of its own."""

import contextlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emotion.data.metrics import macro_f1_interval
from emotion.evaluation.inspection import FLOATS
from emotion.evaluation.peers import bytes_of, describe_peer, open_peer
from emotion.evaluation.protocol import WARMUP_RUNS, summarize_latency, time_batches, time_each, time_end_to_end
from emotion.evaluation.record import score_again
from emotion.inference.emotion_classifier import EmotionClassifier
from emotion.inference.model_folder import find_formats
from emotion.inference.runtimes import predict
from emotion.utils.arguments import COUNT, Range, flag
from emotion.utils.command import Bar
from emotion.utils.errors import UserError, one_line
from emotion.utils.files import relative
from emotion.utils.machine import THREADS

BATCH_SIZE = 32
# Rounds that do not count. In the first one a runtime prepares itself for new lengths and batch sizes, and its
# allocator grows; the second one shows nothing new to it.
WARMUP_ROUNDS = 2
# If the middle half of a model's rounds spans more than this share of their median, two models that differ by a tenth,
# as many do, cannot be told apart.
NOISE_LIMIT = 0.1
COMPARED_TEXTS = 256  # texts that each model classifies once, to see how often two of them agree


@dataclass
class Protocol:
    """The flags of run_benchmark.py that say how long it measures, and with how many threads."""

    # Enough for a spread that shows how steady the machine was, in a few minutes per model.
    rounds: int = flag(12, "Counted rounds.", COUNT)
    texts: int = flag(50, "Texts per round at batch 1.", COUNT)
    batches: int = flag(8, "Batches of 32 texts per round.", COUNT)
    # Enough that each of several threads computes many batches; few would show which thread got the last one.
    texts_end_to_end: int = flag(1024, "Texts per round, classified end to end in one call; 0: none.", Range(0))
    # Three, since the first start may read the libraries from disk; the median leaves it out.
    cold_starts: int = flag(3, "Starts per model, timed up to the first prediction.", Range(0))
    threads: int | None = flag(None, "Threads; all by default.", THREADS)


def interleave(
    artifacts: dict[str, tuple[Path, str]], texts: list[str], protocol: Protocol, peers=(), labels=None
) -> dict[str, dict]:
    """Times each model in turn, round after round, so that a slow minute of the machine slows all of them.

    Args:
        artifacts: name -> folder and format.
        texts: each round draws from these.
        protocol: with a number of threads.
        peers: names of models made by other libraries. One that fails is skipped with a message.
        labels: the label of each text; peers, which have no record, are scored by these.

    Returns:
        Name -> the results of `Worker.summarize` and of `Worker.compare_with` for the fastest FP32 model.

    Raises:
        UserError: if a model that is not a peer cannot be opened or its process ends, or none is left.
    """
    workers = {}
    for name, (folder, format) in Bar(artifacts.items(), desc="started"):
        with _skip_failed_peer(name, peers, workers):
            workers[name] = Worker(name, folder, format, texts[:COMPARED_TEXTS], protocol)
    for turn, counted in Bar(list(draw_turns(texts, protocol)), desc="interleaved rounds"):
        for name, worker in list(workers.items()):
            with _skip_failed_peer(name, peers, workers):
                worker.take_turn(turn, counted)
    if not workers:
        raise UserError("nothing is left to time")
    results = {name: worker.summarize() for name, worker in workers.items()}
    reference = workers[fastest_fp32(results)]
    if scored := [name for name in workers if name in peers and labels]:
        predicted = reference.predict_labels(texts)
        for name in Bar(scored, desc="scored"):
            with _skip_failed_peer(name, peers, workers):
                results[name]["quality"] = workers[name].score(texts, labels, predicted)
    for worker in workers.values():
        worker.close()
    return {name: results[name] | worker.compare_with(reference) for name, worker in workers.items()}


@contextlib.contextmanager
def _skip_failed_peer(name: str, peers: Collection[str], workers: dict):
    """Removes a peer from the workers, with a message, if the block raises a `UserError`."""
    try:
        yield
    except UserError as error:
        if name not in peers:
            raise
        Bar.write(f"left out: {error}" if name in str(error) else f"left out: {name}: {error}")
        if worker := workers.pop(name, None):
            worker.close()


def draw_turns(texts: list[str], protocol: Protocol) -> Iterator[tuple[tuple[list[str], ...], bool]]:
    """Yields the texts of each round (at batch 1, in batches, and end to end), and whether the round counts."""
    rng, longest = np.random.default_rng(0), sorted(texts, key=len)[-BATCH_SIZE:]
    for index in range(WARMUP_ROUNDS + protocol.rounds):
        counted = index >= WARMUP_ROUNDS
        one_by_one = draw_texts(texts, protocol.texts, rng)
        batched = draw_texts(texts, BATCH_SIZE * protocol.batches, rng)
        end_to_end = draw_texts(texts, protocol.texts_end_to_end, rng)
        if not counted:
            batched += longest  # no later batch needs more memory than is allocated here
        yield (one_by_one, batched, end_to_end), counted


def draw_texts(texts: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Draws a text of each of ``count`` quantiles of length, in random order: every draw takes as long to classify."""
    ordered = sorted(texts, key=len)  # by characters: the lengths in tokens are nearly in the same order
    rows = (np.arange(count) + rng.random(count)) * len(texts) / count
    return [ordered[int(row)] for row in rng.permutation(rows)]


def fastest_fp32(results: dict[str, dict]) -> str:
    """The name of the reference: the fastest model at batch 1 that computes in FP32, else the first."""
    fp32 = {}
    for name, result in results.items():
        # OpenVINO multiplies float32 weights in bfloat16 where the processor can; and a file of bfloat16, as the
        # baseline's in a clone, is computed in float32.
        if result["scheme"]["weights"] in FLOATS and result["precision"] == "float32":
            fp32[name] = result["latency_ms"]["p50"]
    return min(fp32, key=fp32.get) if fp32 else next(iter(results))


def split_name(name: str) -> tuple[Path, str]:
    """'weights/baseline:onnx' -> the folder and the format; without a format, the first that the folder has."""
    folder, _, format = name.partition(":")
    return Path(folder), format or next(iter(find_formats(Path(folder))))


def name_of(folder: Path, format: str) -> str:
    """The name of a model in the results: the inverse of `split_name`, without a local path."""
    return f"{relative(folder)}:{format}"


class Worker:
    """A model in a process of its own, idle in the turns of the others: no two share threads, memory or settings."""

    def __init__(self, name: str, folder: Path, format: str, texts: list[str], protocol: Protocol):
        """Opens the model, which classifies ``texts`` once; raises `UserError` if it cannot be opened."""
        self.name = name
        self._bytes_to_serve = bytes_of(folder, format)
        self._times_ms, self._texts_per_s, self._end_to_end_per_s = [], [], []  # an entry per counted round
        arguments = folder, format, protocol.threads, texts
        self._cold_starts_ms = [self._start(*arguments)][: protocol.cold_starts]
        for _ in range(protocol.cold_starts - 1):
            self.close()
            self._cold_starts_ms.append(self._start(*arguments))
        self._model = self._run(_describe, texts)

    def _start(self, *arguments) -> float:
        """Starts the process, and returns the milliseconds until its first answer."""
        start = time.perf_counter()
        # A fresh folder for each start: code that torch.compile has kept from another run would make it look fast.
        self._cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self._cache.name
        # "spawn" starts a bare Python; a forked process would inherit the libraries that are loaded here already.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)
        self._run(_open, *arguments)
        return 1000 * (time.perf_counter() - start)

    def _run(self, function, *arguments):
        """Calls a function in the process; whatever goes wrong there is a `UserError`."""
        try:
            return self._pool.submit(_call, f"{self.name} cannot be measured", function, *arguments).result()
        except BrokenProcessPool as error:  # killed, say for its memory
            raise UserError(f"{self.name} ended while it was measured") from error

    def take_turn(self, turn: tuple[list[str], ...], counted: bool) -> None:
        """Times the texts of a round, and keeps the times if the round counts."""
        times_ms, texts_per_s, end_to_end_per_s = self._run(_time, *turn)
        if counted:
            self._times_ms.append(times_ms)
            self._texts_per_s.append(texts_per_s)
            self._end_to_end_per_s += end_to_end_per_s

    def summarize(self) -> dict:
        """Returns size and scheme, latency and throughput over all rounds, and the time of a cold start."""
        noise = {"batch_1": noise_of(np.median(self._times_ms, axis=1)), "batch_32": noise_of(self._texts_per_s)}
        if self._end_to_end_per_s:
            noise["end_to_end"] = noise_of(self._end_to_end_per_s)
        return {
            "bytes_to_serve": self._bytes_to_serve,
            "scheme": self._model["scheme"],
            "precision": self._model["precision"],
            "latency_ms": summarize_latency(np.concatenate(self._times_ms)),
            "throughput_per_s": {"batch_size": BATCH_SIZE, **spread(self._texts_per_s)},
            "end_to_end_per_s": spread(self._end_to_end_per_s),
            "cold_start_ms": spread(self._cold_starts_ms),
            "noise": noise,
        }

    def compare_with(self, reference: "Worker") -> dict:
        """Returns the speed-ups over another model, round by round, and the share of equal labels."""
        p50 = np.median(self._times_ms, axis=1)  # of each round, so that only neighbors in time are divided
        reference_p50 = np.median(reference._times_ms, axis=1)
        end_to_end = np.divide(self._end_to_end_per_s, reference._end_to_end_per_s)
        return {
            "times_faster_at_batch_1": spread(reference_p50 / p50),
            "times_faster_at_batch_32": spread(np.divide(self._texts_per_s, reference._texts_per_s)),
            "times_faster_end_to_end": spread(end_to_end),
            "equal_labels": float(np.mean(self._model["predicted"] == reference._model["predicted"])),
        }

    def score(self, texts: list[str], labels: list[str], predicted: np.ndarray) -> dict | None:
        """Returns the scores on all texts, and the share of equal labels with ``predicted``; None for other labels."""
        names = self._model["labels"]
        if not set(labels) <= set(names):
            return None
        logits, expected = self._run(_predict, texts), np.array([names.index(label) for label in labels])
        scores = score_again(expected, logits, names)
        return {
            **{name: scores[name] for name in ("examples", "macro_f1", "accuracy", "expected_calibration_error")},
            "macro_f1_ci95": macro_f1_interval(logits, expected),
            "equal_labels": float(np.mean(np.array(names)[logits.argmax(axis=-1)] == predicted)),
        }

    def predict_labels(self, texts: list[str]) -> np.ndarray:
        """The label of each text, strings (texts,)."""
        return np.array(self._model["labels"])[self._run(_predict, texts).argmax(axis=-1)]

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown()


# What a worker's process runs


def _end_with_parent() -> None:
    """Ends this process when its parent is killed; a pool alone would leave it behind."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _call(fault: str, function, *arguments):
    with one_line(fault):
        return function(*arguments)


def _open(folder: Path, format: str, threads: int, texts: list[str]) -> None:
    """Opens the model, keeps it for the functions below, and answers the first text."""
    global opened, classifier
    opened = folder, format
    # The same class for all, also for the peers: end to end it batches the texts for each in the same way.
    classifier = EmotionClassifier(folder, format, threads, open_peer)
    _predict(texts[:1])


def _predict(texts: list[str]) -> np.ndarray:
    """The logits, float32 (texts, labels)."""
    return predict(classifier.runtime, classifier.runtime.encode(texts))


def _describe(texts: list[str]) -> dict:
    """Describes the model, and warms it up. `precision` is the type in which the matrix products are computed."""
    runtime, predicted = classifier.runtime, _predict(texts).argmax(axis=-1)
    scheme = describe_peer(runtime, *opened)
    time_each(runtime, runtime.encode(texts[:WARMUP_RUNS]))
    # OpenVINO decides when it opens a file, by the processor; the other runtimes compute in the activations' type.
    computes_in = getattr(runtime, "float_precision", scheme["activations"])
    precision = "bfloat16" if computes_in in {"bf16", "bfloat16"} else "float32"
    precision = "int8" if scheme["activations"].startswith("int8") else precision
    return {"labels": classifier.labels, "scheme": scheme, "precision": precision, "predicted": predicted}


def _time(one_by_one: list[str], batched: list[str], end_to_end: list[str]) -> tuple[np.ndarray, float, list[float]]:
    """Times a round: milliseconds of each text, texts per second in batches, and end to end (empty without texts)."""
    runtime = classifier.runtime
    single, batches = runtime.encode(one_by_one), runtime.encode(batched)
    # Each twice, of which the second counts: another model has filled the processor's caches, and oneDNN keeps only
    # so many kernels, one for each shape: those for many texts have evicted those for a single text.
    times_ms = [time_each(runtime, single) for _ in range(2)][-1]
    texts_per_s = [time_batches(runtime, batches, batch_size=BATCH_SIZE) for _ in range(2)][-1]
    return times_ms, texts_per_s, [time_end_to_end(classifier, end_to_end)] if end_to_end else []


def noise_of(values) -> float:
    """Interquartile range of a model's rounds, as a share of their median.

    Quartiles and not extremes: one round that another program disturbed does not move the median that is published.
    """
    low, median, high = np.percentile(values, (25, 50, 75))
    return round(float((high - low) / median), 4)


def list_noisy(results: dict[str, dict]) -> list[str]:
    """The names of those whose `noise` exceeds `NOISE_LIMIT` in any measurement."""
    return [name for name, result in results.items() if max(result["noise"].values()) > NOISE_LIMIT]


def spread(values) -> dict[str, float] | None:
    """Median, minimum and maximum over the rounds, to six digits: a small ratio stays above 0. None without rounds."""
    if not len(values):
        return None
    found = {"median": np.median(values), "min": np.min(values), "max": np.max(values)}
    return {name: float(f"{value:.6g}") for name, value in found.items()}
