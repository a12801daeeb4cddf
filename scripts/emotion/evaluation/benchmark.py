"""Times several artifacts in one run, interleaved, each in a process of its own."""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emotion.data.metrics import macro_f1_interval
from emotion.evaluation.inspection import FLOATS
from emotion.evaluation.peers import bytes_of, open_peer, summarize_peer
from emotion.evaluation.predictions import score_again
from emotion.evaluation.protocol import WARMUP_RUNS, summarize_latency, time_batches, time_each, time_strings
from emotion.inference.emotion_classifier import EmotionClassifier
from emotion.inference.model_folder import find_formats
from emotion.inference.runtimes import predict
from emotion.utils.command import TRACEBACK_VARIABLE
from emotion.utils.errors import UserError, one_line
from emotion.utils.files import relative
from emotion.utils.progress import Bar

BATCH_SIZE = 32
# Turns that are not counted. In the first one a runtime prepares itself for new lengths and batch sizes, and its
# allocator grows; the second one shows nothing new to it.
WARMUP_TURNS = 2
# Every round draws texts of the same lengths, so that what is left between the rounds of one artifact is the machine.
# Where it moves the middle half of the rounds by more than a tenth, two artifacts that differ by a tenth, as many of
# ours do, cannot be told apart.
NOISE_LIMIT = 0.1
ANSWERED = 256  # texts that each artifact labels once, to see whether two of them answer alike


@dataclass(frozen=True)
class Protocol:
    """How long a run measures, and with how many threads."""

    threads: int
    rounds: int  # turns that each artifact gets and that count
    texts_per_round: int = 50  # timed one at a time
    batches_per_round: int = 8  # of 32 texts
    strings_per_round: int = 0  # answered in one call, from strings to labels; 0: not measured
    cold_starts: int = 0  # processes that are timed from their start to the first answer


def interleave(
    artifacts: dict[str, tuple[Path, str]],
    texts: list[str],
    protocol: Protocol,
    peers: Collection[str] = (),
    labels: list[str] | None = None,
) -> dict[str, dict]:
    """Times each artifact in turn, round after round, so that a slow minute of the machine slows all of them.

    Args:
        artifacts: name -> folder and format.
        texts: what they answer; each round draws from these.
        peers: names of those that other libraries have made. One that fails is left out, and a line says why.
        labels: the right label of each text, by which the peers are scored: they have no record.

    Returns:
        Name -> bytes, scheme, latency, throughput, noise, how many times faster it was than the fastest in FP32, and
        the share of texts that both give the same label. Fields about strings are null if not measured.

    Raises:
        UserError: if an artifact that is no peer cannot be opened, or its process ends; or if none is left.
    """
    workers = {}
    # All processes are started before the first round and wait for their turns: a round holds no start.
    for name, (folder, format) in Bar(artifacts.items(), desc="started"):
        with left_out_if_it_fails(name, peers, workers):
            workers[name] = Worker(name, folder, format, texts[:ANSWERED], protocol)
    for turn, counted in Bar(list(draw_turns(texts, protocol)), desc="interleaved rounds"):
        for name, worker in list(workers.items()):
            with left_out_if_it_fails(name, peers, workers):
                worker.take_turn(turn, counted)
    if not workers:
        raise UserError("nothing is left to time")
    summaries = {name: worker.summary() for name, worker in workers.items()}
    reference = workers[fastest_fp32(summaries)]
    if scored := [name for name in workers if name in peers and labels]:
        expected = reference.answer(texts)
        for name in Bar(scored, desc="scored"):
            with left_out_if_it_fails(name, peers, workers):
                summaries[name]["quality"] = workers[name].score(texts, labels, expected)
    for worker in workers.values():
        worker.close()
    return {name: summaries[name] | worker.compared_with(reference) for name, worker in workers.items()}


@contextlib.contextmanager
def left_out_if_it_fails(name: str, peers: Collection[str], workers: dict):
    """Takes a peer whose block raises a `UserError` out of the workers, and says why; any other's is raised."""
    try:
        yield
    except UserError as error:
        if name not in peers:
            raise
        Bar.write(f"left out: {error}" if name in str(error) else f"left out: {name}: {error}")
        if worker := workers.pop(name, None):
            worker.kill()


def draw_turns(texts: list[str], protocol: Protocol):
    """Yields for each turn the texts to answer one by one, in batches and as strings, and whether the turn counts."""
    rng, longest = np.random.default_rng(0), sorted(texts, key=len)[-BATCH_SIZE:]
    for turn in range(WARMUP_TURNS + protocol.rounds):
        counted = turn >= WARMUP_TURNS
        one_by_one = draw_texts(texts, protocol.texts_per_round, rng)
        batched = draw_texts(texts, BATCH_SIZE * protocol.batches_per_round, rng)
        strings = draw_texts(texts, protocol.strings_per_round, rng)
        if not counted:
            batched += longest  # no later batch needs more memory than the artifact has taken then
        yield (one_by_one, batched, strings), counted


def draw_texts(texts: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Texts in random order, one of each of ``count`` classes of length: every draw takes as long to answer."""
    ordered = sorted(texts, key=len)  # by characters: the lengths in tokens are nearly in the same order
    rows = (np.arange(count) + rng.random(count)) * len(texts) / count
    return [ordered[int(row)] for row in rng.permutation(rows)]


def fastest_fp32(measured: dict[str, dict]) -> str:
    """The name of the reference: the fastest artifact at batch 1 that computes in FP32, else the first."""
    fp32 = {}
    for name, one in measured.items():
        # OpenVINO multiplies float32 weights in bfloat16 where the processor can; and a file of bfloat16, as the
        # baseline's in a clone, is computed in float32.
        if one["scheme"]["weights"] in FLOATS and one["precision"] == "float32":
            fp32[name] = one["latency_ms"]["p50"]
    return min(fp32, key=fp32.get) if fp32 else next(iter(measured))


def split_name(name: str) -> tuple[Path, str]:
    """'weights/baseline:onnx' -> the folder and the format; without a format, the first that the folder has."""
    folder, _, format = name.partition(":")
    return Path(folder), format or next(iter(find_formats(Path(folder))))


def name_of(folder: Path, format: str) -> str:
    """The name of an artifact in the results: `split_name` backwards, without a path of this machine."""
    return f"{relative(folder)}:{format}"


class Worker:
    """One artifact in a process of its own, idle while the others have their turn.

    No runtime's threads disturb another's, and none shares memory or settings with another.
    """

    def __init__(self, name: str, folder: Path, format: str, texts: list[str], protocol: Protocol):
        """Starts the process; ``texts`` are labelled once. Raises `UserError` if the artifact cannot be opened."""
        self.name = name
        self._bytes_to_serve = bytes_of(folder, format)
        self._times_ms, self._texts_per_s, self._end_to_end_per_s = [], [], []  # an entry for each counted turn
        started_ms = [self._start(folder, format, protocol.threads, texts)]
        for _ in range(protocol.cold_starts - 1):
            self.kill()
            started_ms.append(self._start(folder, format, protocol.threads, texts))
        self._cold_start_ms = started_ms[: protocol.cold_starts]  # the one start that is always needed may not count
        self._about = self._receive()

    def _start(self, *arguments) -> float:
        """Starts the process, and returns the milliseconds until its first answer."""
        start = time.perf_counter()
        # "spawn" starts a bare Python; a forked process would inherit the libraries that are loaded here already.
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, *arguments), daemon=True)
        # A fresh folder for each start: code that torch.compile has kept from another run would make it look fast.
        self._cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self._cache.name
        self._process.start()
        self._receive()
        return 1000 * (time.perf_counter() - start)

    def _receive(self):
        # A process that was killed, say for its memory, answers nothing; `recv` alone would wait for it.
        try:
            while not self._pipe.poll(1):
                if not self._process.is_alive():
                    raise EOFError
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:  # how a pipe ends depends on when
            self._process.join()
            code = self._process.exitcode
            how = f" ({signal.Signals(-code).name})" if code < 0 else ""
            raise UserError(f"{self.name} ended while it was measured{how}") from error
        if isinstance(answer, UserError):
            raise answer
        return answer

    def _ask(self, request):
        with contextlib.suppress(OSError):  # it has ended, which the next line says
            self._pipe.send(request)
        return self._receive()

    def take_turn(self, texts: tuple[list[str], list[str], list[str]], counted: bool) -> None:
        """Times these texts, and keeps the times if the turn counts.

        Args:
            texts: those to answer one at a time, in batches, and in one call from strings to labels, if there are any.
        """
        times_ms, texts_per_s, end_to_end_per_s = self._ask(texts)
        if counted:
            self._times_ms.append(times_ms)
            self._texts_per_s.append(texts_per_s)
            self._end_to_end_per_s += [end_to_end_per_s] if end_to_end_per_s else []

    def summary(self) -> dict:
        """Bytes and scheme, latency and throughput over all rounds, and the time from a start to an answer."""
        noise = {"batch_1": noise_of(np.median(self._times_ms, axis=1)), "batch_32": noise_of(self._texts_per_s)}
        if self._end_to_end_per_s:
            noise["end_to_end"] = noise_of(self._end_to_end_per_s)
        return {
            "bytes_to_serve": self._bytes_to_serve,
            "scheme": self._about["scheme"],
            "precision": self._about["precision"],
            "latency_ms": summarize_latency(np.concatenate(self._times_ms)),
            "throughput_per_s": {"batch_size": BATCH_SIZE, **spread(self._texts_per_s)},
            "end_to_end_per_s": spread(self._end_to_end_per_s) if self._end_to_end_per_s else None,
            "cold_start_ms": spread(self._cold_start_ms) if self._cold_start_ms else None,
            "noise": noise,
        }

    def compared_with(self, reference: "Worker") -> dict:
        """How many times faster than another artifact, round by round, and how often the labels are equal."""
        p50 = np.median(self._times_ms, axis=1)  # of each round, so that only neighbours in time are divided
        reference_p50 = np.median(reference._times_ms, axis=1)
        from_strings = np.divide(self._end_to_end_per_s, reference._end_to_end_per_s)
        return {
            "times_faster_at_batch_1": spread(reference_p50 / p50),
            "times_faster_at_batch_32": spread(np.divide(self._texts_per_s, reference._texts_per_s)),
            "times_faster_end_to_end": spread(from_strings) if len(from_strings) else None,
            # Of the texts that each labelled when it was opened; the turns keep times only.
            "equal_labels": float(np.mean(self._about["answers"] == reference._about["answers"])),
        }

    def score(self, texts: list[str], labels: list[str], answers: np.ndarray) -> dict | None:
        """Scores of all texts, and the share that gets the same label as in ``answers``; None if it names others.

        Args:
            labels: the right label of each text.
            answers: what another worker's `answer` has returned.
        """
        names = self._about["labels"]
        if not set(labels) <= set(names):
            return None
        logits, expected = self._ask(texts), np.array([names.index(label) for label in labels])
        scores = score_again(expected, logits, names)
        return {
            **{name: scores[name] for name in ("examples", "macro_f1", "accuracy", "expected_calibration_error")},
            "macro_f1_ci95": macro_f1_interval(logits, expected),
            "equal_labels": float(np.mean(np.array(names)[logits.argmax(axis=-1)] == answers)),
        }

    def answer(self, texts: list[str]) -> np.ndarray:
        """The label of each text, strings (texts,)."""
        return np.array(self._about["labels"])[self._ask(texts).argmax(axis=-1)]

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):  # it has ended by itself
            self._pipe.send(None)
        self._process.join()

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.join()


def serve(pipe, folder: Path, format: str, threads: int, texts: list[str]) -> None:
    """Runs in the worker's process: opens and warms the artifact, then answers each request until None is sent.

    It sends the word "answered" after the first answer, then a dict with `labels`, `scheme`, `precision` and
    `answers`. A turn, three lists of texts, is answered with the milliseconds of its texts, the texts per second in
    batches, and those from strings to labels, None if it has no strings; a list of texts with their logits. Whatever
    goes wrong is sent as a `UserError`, and raised by the parent.
    """
    try:
        with one_line(f"{folder}:{format} cannot be measured"):
            _serve(pipe, folder, format, threads, texts)
    except UserError as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exc()
        with contextlib.suppress(OSError):  # the parent may have ended
            pipe.send(error)  # sent, since a raised one would end this process and never reach the parent


def _serve(pipe, folder: Path, format: str, threads: int, texts: list[str]) -> None:
    # The same class for all, also for the plain files: from strings to labels it batches the texts for each alike.
    classifier = EmotionClassifier(folder, format, threads, open_peer)
    runtime = classifier.runtime
    runtime.logits(runtime.encode(texts[:1]))
    pipe.send("answered")  # a cold start ends here
    scheme = summarize_peer(runtime, folder, format)
    answers = predict(runtime, runtime.encode(texts)).argmax(axis=-1)
    time_each(runtime, runtime.encode(texts[:WARMUP_RUNS]))
    about = {"labels": classifier.labels, "scheme": scheme, "precision": precision_of(scheme, runtime)}
    pipe.send(about | {"answers": answers})
    while request := pipe.recv():  # waiting takes no processor time from the others
        if isinstance(request, list):
            pipe.send(predict(runtime, runtime.encode(request)))
            continue
        one_by_one, batched, strings = request
        single, batches = runtime.encode(one_by_one), runtime.encode(batched)
        # Each twice, of which the second counts: another artifact has filled the processor's caches, and oneDNN keeps
        # only so many kernels, one for each shape: those for many strings have driven out those for a single text.
        times_ms = [time_each(runtime, single) for _ in range(2)][-1]
        texts_per_s = [time_batches(runtime, batches, batch_size=BATCH_SIZE) for _ in range(2)][-1]
        pipe.send((times_ms, texts_per_s, time_strings(classifier, strings) if strings else None))


def precision_of(scheme: dict, classifier) -> str:
    """The type in which the matrix products are computed: int8, bfloat16 or float32."""
    if scheme["activations"].startswith("int8"):
        return "int8"
    # OpenVINO decides when it opens a file, by the processor; the other runtimes compute in the activations' type.
    computes_in = getattr(classifier, "float_precision", scheme["activations"])
    return "bfloat16" if computes_in in {"bf16", "bfloat16"} else "float32"


def noise_of(values) -> float:
    """How far the middle half of an artifact's rounds lies apart (interquartile range), as a share of their median.

    Quartiles and not extremes: one round that another program disturbed does not move the median that is published.
    """
    low, median, high = np.percentile(values, (25, 50, 75))
    return round(float((high - low) / median), 4)


def list_noisy(measured: dict[str, dict]) -> list[str]:
    """The names of those whose `noise` exceeds `NOISE_LIMIT` in any measurement: the machine was not steady enough."""
    return [name for name, one in measured.items() if max(one["noise"].values()) > NOISE_LIMIT]


def spread(values) -> dict:
    """Median, minimum and maximum over the rounds, to six digits; a small ratio stays above 0."""
    found = {"median": np.median(values), "min": np.min(values), "max": np.max(values)}
    return {name: float(f"{value:.6g}") for name, value in found.items()}
