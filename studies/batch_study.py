"""Measures the throughput and memory of run_batch.py, with one and two workers, and with Ray.

The texts are those of the training split, repeated, each with a number at its end, so that no cache helps. The rate of
`EmotionClassifier`, end to end, is measured before and after each job. Ray gets a cluster of one or two one-processor
nodes on this machine. Rates are measured between the first and the last shard; the time before that, in which files
are counted and models are opened, is reported separately.

    python studies/batch_study.py weights/ptq
    python studies/batch_study.py weights/ptq --rows 10000 20000 --ray_rows 10000 --results_dir build/dry
"""

import contextlib
import os
import resource
import shutil
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from emotion.data.dataset import DEFAULT_DATASET, load_task
from emotion.inference.emotion_classifier import EmotionClassifier
from emotion.utils.arguments import COUNT, parse_args
from emotion.utils.command import run
from emotion.utils.files import ROOT, read_json, relative, write_json
from emotion.utils.machine import choose_threads, describe_run, run_script

CLASS_ROWS = 20_000  # for the rate of the class: some seconds
PART = 0.1  # of the shards: the start and the end of a job
BLOCK = 50_000  # rows of the input that are written at once


@dataclass
class StudyArguments:
    """The model, and how many rows."""

    model: str = field(default=str(ROOT / "weights" / "ptq"), metadata={"help": "Model folder."})
    dataset_name: str = field(default=DEFAULT_DATASET, metadata={"help": "Dataset of the texts."})
    rows: list[int] = field(
        default_factory=lambda: [100_000, 1_000_000],
        metadata={
            "help": "Rows of the plain engine's jobs, ascending: the peak of memory includes all jobs so far.",
            "choices": COUNT,
        },
    )
    ray_rows: int = field(
        default=200_000, metadata={"help": "Rows of the jobs with one and two workers.", "choices": COUNT}
    )
    shard_rows: int = field(default=5_000, metadata={"help": "Rows per shard.", "choices": COUNT})
    work_dir: str = field(default=str(ROOT / "build" / "batch_study"), metadata={"help": "Where the jobs write."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    (arguments,) = parse_args((StudyArguments,), positional="model", argv=argv)
    task, work = load_task(arguments.dataset_name), Path(arguments.work_dir)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    texts = task.splits["train"]["text"][:]
    own = OwnRate(arguments.model, texts)
    plain = []
    for rows in arguments.rows:
        plain.append(measure(arguments, write_input(work, texts, rows), own, workers=None))
    some, engines = write_input(work, texts, arguments.ray_rows), {}
    for workers in (1, 2):
        engines[f"plain, {workers}"] = measure(arguments, some, own, workers, "plain")
        with ray_nodes(workers):
            engines[f"ray, {workers}"] = measure(arguments, some, own, workers, "ray")
    study = describe_run(choose_threads(None)) | {
        "model": relative(Path(arguments.model)),
        "dataset": task.name,
        "dataset_source": task.source,
        "shard_rows": arguments.shard_rows,
        "plain": plain,
        "engines": engines,
    }
    results = Path(arguments.results_dir)
    write_json(results / "batch.json", study)
    print(f"wrote the study to {results}; make report renders it")


class OwnRate:
    """The end-to-end rate of `EmotionClassifier`, on new texts."""

    def __init__(self, model: str, texts: list[str]):
        self._model, self._texts = model, numbered(texts)

    def measure(self, threads: int | None) -> float:
        """Returns texts per second. The model is opened again, so that it is not in memory during a job."""
        classifier = EmotionClassifier.from_pretrained(self._model, threads=threads)
        classifier.classify(list(islice(self._texts, 2000)))  # warm-up
        fresh = list(islice(self._texts, CLASS_ROWS))
        start = time.perf_counter()
        classifier.classify(fresh)
        return CLASS_ROWS / (time.perf_counter() - start)


def numbered(texts: list[str]):
    """Yields the texts endlessly, each with a number."""
    number = 0
    while True:
        yield f"{texts[number % len(texts)]} {number}"
        number += 1


def write_input(work: Path, texts: list[str], rows: int) -> Path:
    """Writes a Parquet file with the columns `id` and `text`."""
    path, stream = work / f"{rows}.parquet", numbered(texts)
    schema = pa.schema({"id": pa.int64(), "text": pa.string()})
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, BLOCK):
            some = list(islice(stream, min(BLOCK, rows - start)))
            writer.write_table(pa.table({"id": range(start, start + len(some)), "text": some}, schema=schema))
    return path


def measure(arguments, file: Path, own: OwnRate, workers: int | None, engine: str = "plain") -> dict:
    """Runs the command once; returns rates, seconds, bytes, and the peak memory of all commands so far."""
    output = file.parent / f"{file.stem}-{engine}-{workers}"
    flags = ["--model", arguments.model, "--shard_rows", arguments.shard_rows, "--engine", engine]
    if workers and engine == "plain":
        flags += ["--threads", workers]
    before, start = own.measure(workers), time.time()
    run_script("run_batch.py", file, output, *flags, check=True)
    seconds, rates = time.time() - start, [before, own.measure(workers)]
    manifest = read_json(output / "_manifest.json")
    ends = sorted(path.stat().st_mtime for path in (output / ".done").glob("*.json"))
    written = sum(shard["bytes"] for shard in manifest["shards"])
    # Of child processes that have ended, without Ray's workers; Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6 if engine == "plain" else None
    rate, part = arguments.shard_rows * (len(ends) - 1) / (ends[-1] - ends[0]), max(1, round(PART * len(ends)))
    return {
        "rows": manifest["output"]["rows"],
        "seconds": round(seconds, 1),
        "seconds_before_the_first_shard": round(ends[0] - start, 1),
        "rows_a_second": round(rate, 1),
        "rows_a_second_at_the_start": round(arguments.shard_rows * part / (ends[part] - ends[0]), 1),
        "rows_a_second_at_the_end": round(arguments.shard_rows * part / (ends[-1] - ends[-1 - part]), 1),
        "texts_a_second_of_the_class": [round(one, 1) for one in rates],
        "share_of_the_class": round(rate / float(np.mean(rates)), 3),
        "peak_memory_mb": peak and round(peak),
        "bytes_read": file.stat().st_size,
        "bytes_written": written,
    }


@contextlib.contextmanager
def ray_nodes(count: int):
    """Starts a Ray cluster of one-processor nodes for the commands in the block."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(count - 1):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        cluster.shutdown()


if __name__ == "__main__":
    run(main)
