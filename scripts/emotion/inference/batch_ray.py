"""A batch job on Ray Data: a pool of actors, each with a model and a processor of its own, writes the same shards.

A row of the Ray dataset is the number of a shard. Actors read the input and write their shards themselves, so that all
machines must see input, model and output under the same paths.
"""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.data
import ray.exceptions

from emotion.inference.batch_job import Job, ShardWriter
from emotion.inference.emotion_classifier import EmotionClassifier
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT


class ShardActor:
    """Writes shards in a process of its own, with one thread."""

    def __init__(self, job: Job):
        self._job = job
        long_texts = job.answers.long_texts
        classifier = EmotionClassifier.from_pretrained(job.folder, job.format, threads=1, long_texts=long_texts)
        self._writer = ShardWriter(job, classifier)

    def __call__(self, batch: dict) -> dict:
        """Writes the shard that the batch's one row names, unless it is done; returns its number and the error."""
        number = int(batch["shard"][0])
        try:
            if self._job.find_done(number) is None:
                self._writer.write(number, progress=lambda rows: None)
        # Returned, not raised: Ray would wrap the message in tracebacks of two processes.
        except UserError as error:
            return {"shard": [number], "error": [str(error)]}
        except OSError as error:
            return {"shard": [number], "error": [f"cannot write {error.filename}: {error.strerror}"]}
        return {"shard": [number], "error": [""]}


def write_on_ray(job: Job, missing: list[int], progress: Callable[[int], object]) -> None:
    """Writes the shards ``missing`` on the cluster that is there, or on this machine; raises `UserError` if Ray fails.

    ``progress`` is called with the number of rows of each shard that is done.
    """
    waiting = set(missing)

    def count(number: int) -> None:
        waiting.remove(number)
        progress(job.rows_of(number))

    if waiting:
        _connect()
    while waiting:
        before = len(waiting)
        try:
            for number in _write_once(job, sorted(waiting)):
                count(number)
        # Ray may fail to fetch what an actor returned just before it died: its shard is there all the same.
        except ray.exceptions.RayError as error:
            for number in filter(job.find_done, sorted(waiting)):
                count(number)
            if len(waiting) == before:
                raise UserError(f"Ray writes no shard any more ({type(error).__name__}); run it again") from error


def _write_once(job: Job, numbers: list[int]) -> Iterator[int]:
    """Yields the number of each shard when it is done."""
    # A block per shard: blocks are what Ray hands out, and what it hands out again after a death.
    shards = ray.data.from_items([{"shard": number} for number in numbers], override_num_blocks=len(numbers))
    actors = min(len(numbers), max(1, int(ray.cluster_resources()["CPU"])))
    done = shards.map_batches(
        ShardActor,
        batch_size=1,
        fn_constructor_args=[job],
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        # Half a processor for each of as many actors: so those of a dead machine find room on those that are left.
        num_cpus=0.5,
        max_task_retries=5,  # a shard that kills every actor, for want of memory, ends the job
    )
    for row in done.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield row["shard"]


def _connect() -> None:
    """Joins the cluster that runs on this machine or that RAY_ADDRESS names; starts one if there is none."""
    options: dict[str, Any] = {
        # This package for all nodes, which need no clone: only what requirements.txt names.
        "runtime_env": {"py_modules": [str(ROOT / "scripts" / "emotion")]},
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.data.DataContext.get_current().enable_progress_bars = False  # the command shows one
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(address="auto", **options)
    except ConnectionError:
        ray.init(**options)
