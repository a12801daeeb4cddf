"""Times several artifacts interleaved in one run (A B A B): the only place where a ratio of speeds comes from.

Each artifact lives in a process of its own, so that no runtime's threads disturb another's, and answers the same texts
in turn. The first one named is what the others are compared with.

    python scripts/run_benchmark.py weights/baseline:pytorch weights/baseline:bf16 weights/baseline:onnx
"""

import datetime
import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path

from utils_cli import UserError, parse_flags, run

# isort: split
import numpy as np
from tqdm import tqdm
from utils_artifact import choose_threads, files_to_serve, find_formats, open_artifact, read_recipe_of, weights_of
from utils_files import relative, write_json
from utils_record import git_commit
from utils_ruler import WARMUP_RUNS, describe_environment, summarize_latency, time_batches, time_each
from utils_task import get_split, load_task_of

SETTLE_RUNS = 5  # after another artifact had the processor: its caches are gone


@dataclass
class BenchmarkArguments:
    """What is timed, and how often."""

    artifacts: list[str] = field(
        metadata={"help": "folder:format words; the first is what the others are compared to."}
    )
    rounds: int = field(default=12, metadata={"help": "Turns that each artifact gets; the spread is over these."})
    texts: int = field(default=50, metadata={"help": "Texts a turn at batch 1."})
    batches: int = field(default=8, metadata={"help": "Batches of 32 a turn."})
    threads: int | None = field(default=None, metadata={"help": "Threads to compute with; all if not given."})
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
    measured = interleave(named, texts, threads, arguments.rounds, arguments.texts, arguments.batches)
    names = [name_of(folder, format) for folder, format in named]
    result = {
        "date": datetime.date.today().isoformat(),
        "git_commit": git_commit(),
        "dataset": task.name,
        "dataset_source": task.source,
        "rounds": arguments.rounds,
        "texts_a_round": arguments.texts,
        "batches_a_round": arguments.batches,
        "compared_with": names[0],
        "artifacts": dict(zip(names, measured, strict=True)),
        "environment": describe_environment(threads),
    }
    if arguments.output:
        write_json(Path(arguments.output), result)
    for name, summary in result["artifacts"].items():
        faster, faster_in_batches = (summary[f"times_faster_at_batch_{size}"]["median"] for size in (1, 32))
        print(
            f"{name:28} p50 {summary['latency_ms']['p50']:7.2f} ms ({faster:.2f} x)"
            f"   {summary['throughput_per_s']['median']:7.0f} texts/s ({faster_in_batches:.2f} x)"
        )


def interleave(named, texts: list[str], threads: int, rounds: int, texts_a_round: int, batches: int) -> list:
    """Times each (folder, format) in turn, round after round.

    Returns:
        For each its bytes, latency, throughput, and how many times faster it was than the first.
    """
    workers = [Worker(folder, format, threads) for folder, format in named]
    rng = np.random.default_rng(0)
    for _ in tqdm(range(rounds), desc="interleaved rounds"):
        one_by_one = [texts[row] for row in rng.integers(len(texts), size=SETTLE_RUNS + texts_a_round)]
        batched = [texts[row] for row in rng.integers(len(texts), size=32 * batches)]
        for worker in workers:
            worker.take_turn(one_by_one, batched)
    for worker in workers:
        worker.close()
    return [worker.summary(workers[0]) for worker in workers]


def split_name(name: str) -> tuple[Path, str]:
    """'weights/baseline:onnx' -> the folder and the format; without a format the first that the folder has."""
    folder, _, format = name.partition(":")
    format = format or next(iter(find_formats(Path(folder))))
    weights_of(Path(folder), format)
    return Path(folder), format


def name_of(folder: Path, format: str) -> str:
    """What results call an artifact: `split_name` backwards, without a path of this machine."""
    return f"{relative(folder)}:{format}"


class Worker:
    """One artifact in its own process, idle while the others have their turn."""

    def __init__(self, folder: Path, format: str, threads: int):
        self.name = name_of(folder, format)
        self._bytes_to_serve = sum(files_to_serve(folder, format).values())
        self._times_ms, self._texts_per_s = [], []  # one entry a round
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, folder, format, threads), daemon=True)
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

    def take_turn(self, one_by_one: list[str], batched: list[str]) -> None:
        self._pipe.send((one_by_one, batched))
        times_ms, texts_per_s = self._receive()
        self._times_ms.append(times_ms)
        self._texts_per_s.append(texts_per_s)

    def summary(self, first: "Worker") -> dict:
        """Latency and throughput over all rounds, and how many times faster than ``first``, round by round."""
        p50 = np.median(self._times_ms, axis=1)
        return {
            "bytes_to_serve": self._bytes_to_serve,
            "latency_ms": summarize_latency(np.concatenate(self._times_ms)),
            "throughput_per_s": {"batch_size": 32, **spread(self._texts_per_s)},
            "times_faster_at_batch_1": spread(np.median(first._times_ms, axis=1) / p50),
            "times_faster_at_batch_32": spread(np.divide(self._texts_per_s, first._texts_per_s)),
        }

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def serve(pipe, folder: Path, format: str, threads: int) -> None:
    """The worker's process: opens and warms the artifact, then times what it is sent until it is sent None."""
    try:
        classifier = open_artifact(folder, format, threads=threads)
    except UserError as error:
        pipe.send(error)
        return
    warm = classifier.encode(["a few words to warm up with"]) * WARMUP_RUNS
    time_each(classifier, warm)
    time_batches(classifier, warm, batch_size=32)
    pipe.send("ready")
    while turn := pipe.recv():
        one_by_one, batched = turn
        times_ms = time_each(classifier, classifier.encode(one_by_one))[SETTLE_RUNS:]
        pipe.send((times_ms, time_batches(classifier, classifier.encode(batched), batch_size=32)))


def spread(values) -> dict:
    """Median, least and most over the rounds."""
    return {name: round(float(function(values)), 3) for name, function in
            (("median", np.median), ("min", np.min), ("max", np.max))}  # fmt: skip


if __name__ == "__main__":
    run(main)
