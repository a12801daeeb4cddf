"""The same job on Ray Data: a pool of actors, each with a model and a processor of its own, makes the same shards.

A row of the dataset is the number of a shard. Actors read their rows and write their shards themselves, so that all
machines must see input, model and output under the same paths. A shard that was made by an actor that died meanwhile
is found by its record.
"""

import logging
import os
from collections.abc import Callable, Iterator

import ray
import ray.data
import ray.exceptions

from emotion.inference.batch_job import Job, ShardMaker
from emotion.inference.emotion_classifier import EmotionClassifier
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT


class ShardActor:
    """Makes shards in a process of its own, with one thread."""

    def __init__(self, job: Job):
        self._job = job
        self._maker = ShardMaker(job, EmotionClassifier.from_pretrained(job.folder, job.format, threads=1))

    def __call__(self, batch: dict) -> dict:
        """Makes the shard that the batch's one row names, unless it is there, and tells what went wrong."""
        number = int(batch["shard"][0])
        try:
            if self._job.find_made(number) is None:
                self._maker.make(number, progress=lambda rows: None)
        # Handed back, not raised: Ray would wrap the message in tracebacks of two processes.
        except UserError as error:
            return {"shard": [number], "error": [str(error)]}
        except OSError as error:
            return {"shard": [number], "error": [f"cannot write {error.filename}: {error.strerror}"]}
        return {"shard": [number], "error": [""]}


def make_on_ray(job: Job, missing: list[int], progress: Callable[[int], object]) -> None:
    """Makes the shards on the cluster that is there, or on this machine.

    Raises:
        UserError: what an actor could not do, or what Ray itself could not.
    """
    waiting = set(missing)
    if waiting:
        _connect()
    while waiting:
        before = len(waiting)
        try:
            for number in _make_once(job, sorted(waiting)):
                waiting.remove(number)
                progress(job.rows_of(number))
        # Ray starts dead actors anew, but may still fail to fetch what one of them gave back just before. Its shard is
        # there all the same, and those that are not are begun again.
        except ray.exceptions.RayError as error:
            for number in [number for number in waiting if job.find_made(number)]:
                waiting.remove(number)
                progress(job.rows_of(number))
            if len(waiting) == before:
                raise UserError(
                    f"Ray makes no shard any more ({type(error).__name__}); run the command again"
                ) from error


def _make_once(job: Job, numbers: list[int]) -> Iterator[int]:
    """Yields the number of each shard when it is made."""
    # A block per shard: blocks are what Ray hands out, and what it hands out again after a death.
    shards = ray.data.from_items([{"shard": number} for number in numbers], override_num_blocks=len(numbers))
    actors = min(len(numbers), max(1, int(ray.cluster_resources()["CPU"])))
    made = shards.map_batches(
        ShardActor,
        batch_size=1,
        fn_constructor_args=[job],
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        # As many actors as processors, and each asks for half of one: so the actors of a dead machine find room on
        # those that are left.
        num_cpus=0.5,
        max_task_retries=5,  # a shard that kills every actor, for want of memory, ends the job
    )
    for row in made.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield row["shard"]


def _connect() -> None:
    """Joins the cluster that runs on this machine or that RAY_ADDRESS names; starts one if there is none."""
    options = {
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
