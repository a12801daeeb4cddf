"""Times several artifacts interleaved in one run (A B A B): the only place where a ratio of speeds comes from.

Each artifact lives in a process of its own, so that no runtime's threads disturb another's, and answers the same texts
in turn. Beside the formats of a folder it times what a user would make of it without us: `pytorch-compiled`,
`bf16-compiled` and `torchao-compiled` (torch.compile), `onnx-plain` and `onnx-dynamic` (ONNX Runtime's export and its
dynamic INT8, with defaults), `openvino-plain`. All are compared with the fastest that computes in FP32.

    python scripts/run_benchmark.py weights/baseline:pytorch weights/baseline:pytorch-compiled weights/ptq:onnx
"""

import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from utils_cli import UserError, parse_flags, run

# isort: split
import numpy as np
from tqdm import tqdm
from utils_artifact import choose_threads, files_to_serve, find_formats, open_artifact, read_recipe_of, weights_of
from utils_contenders import COMPILED, make_contender
from utils_files import relative, write_json
from utils_roofline import add_roofline
from utils_ruler import WARMUP_RUNS, describe_run, predict, summarize_latency, time_batches, time_each
from utils_scheme import describe_scheme
from utils_task import get_split, load_task_of

SETTLE_RUNS = 5  # after another artifact had the processor: its caches are gone
ANSWERED = 256  # texts whose labels tell whether two contenders answer alike


@dataclass
class BenchmarkArguments:
    """What is timed, and how often."""

    artifacts: list[str] = field(metadata={"help": "folder:format words."})
    rounds: int = field(default=12, metadata={"help": "Turns that each artifact gets; the spread is over these."})
    texts: int = field(default=50, metadata={"help": "Texts a turn at batch 1."})
    batches: int = field(default=8, metadata={"help": "Batches of 32 a turn."})
    cold_starts: int = field(
        default=3, metadata={"help": "Processes, one after another, timed from their start to the first answer."}
    )
    threads: int | None = field(default=None, metadata={"help": "Threads to compute with; all if not given."})
    roofline: bool = field(default=True, metadata={"help": "Measure the machine's peaks, and the distance to them."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Texts to use; the first artifact's if not given."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file of the result; printed only if not given."})


def main(argv=None) -> None:
    (arguments,) = parse_flags((BenchmarkArguments,), positional="artifacts", argv=argv)
    named = [split_name(name) for name in arguments.artifacts]
    task = load_task_of(read_recipe_of(named[0][0]), arguments.dataset_name)
    print(f"texts: {task.name} ({task.source}), test")
    texts = list(get_split(task, "test")["text"])
    threads = choose_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as work:
        contenders = {name_of(*one): make_contender(*one, Path(work)) for one in named}
        measured = interleave(contenders, texts, threads, arguments.rounds, arguments.texts, arguments.batches,
                              arguments.cold_starts)  # fmt: skip
    result = describe_run(threads) | {
        "dataset": task.name,
        "dataset_source": task.source,
        "rounds": arguments.rounds,
        "texts_a_round": arguments.texts,
        "batches_a_round": arguments.batches,
        "compared_with": fastest_fp32(measured),
        "artifacts": measured,
    }
    if arguments.roofline:
        add_roofline(result, named[0][0], texts, threads)
    if arguments.output:
        write_json(Path(arguments.output), result)
    for name, one in measured.items():
        faster, faster_in_batches = (one[f"times_faster_at_batch_{size}"]["median"] for size in (1, 32))
        print(
            f"{name:34} p50 {one['latency_ms']['p50']:7.2f} ms ({faster:.2f} x)"
            f"   {one['throughput_per_s']['median']:7.0f} texts/s ({faster_in_batches:.2f} x)"
        )


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


if __name__ == "__main__":
    run(main)
