"""Shows where the time of a text goes: the share of each kind of operator, at batch 1 and in batches of 32.

ONNX Runtime and OpenVINO measure their operators themselves, on real texts of test. The plain alternatives of
run_benchmark.py that they open can be profiled too. The peaks of the machine stand beside the tables.

    python scripts/study_operators.py weights/baseline:onnx weights/ptq:onnx weights/ptq:openvino
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.arguments import parse_args
from emotion.common.command import run
from emotion.common.files import ROOT, write_json
from emotion.common.machine import THREADS, choose_threads, describe_run
from emotion.common.progress import Bar
from emotion.common.recipe import base_model_of, read_recipe_of
from emotion.measure.benchmark import draw_texts, name_of, split_name
from emotion.measure.contenders import make_contender
from emotion.measure.operators import profile
from emotion.measure.roofline import measure_peaks
from emotion.report.figures import write_studies
from emotion.report.pages import OPERATORS, page_of
from emotion.task.dataset import get_split, load_task_of

import numpy as np

TEXTS = 256  # one of each class of length; eight batches of 32


@dataclass
class OperatorsArguments:
    """Which artifacts are profiled, and where the results go."""

    artifacts: list[str] = field(metadata={"help": "folder:format words, of onnx or openvino."})
    threads: int | None = field(
        default=None, metadata={"help": "Threads to compute with; all if not given.", "choices": THREADS}
    )
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    """Profiles the artifacts and writes the page; ``argv``: the flags, those of the command line if not given."""
    (arguments,) = parse_args((OperatorsArguments,), positional="artifacts", argv=argv)
    results, named = Path(arguments.results_dir), [split_name(name) for name in arguments.artifacts]
    first_folder = named[0][0]  # all artifacts get the texts of its dataset
    task, threads = load_task_of(read_recipe_of(first_folder)), choose_threads(arguments.threads)
    texts = draw_texts(list(get_split(task, "test")["text"]), TEXTS, np.random.default_rng(0))
    profiled = {}
    with tempfile.TemporaryDirectory() as work:
        for one in Bar(named, desc="profiled"):
            profiled[name_of(*one)] = profile(*make_contender(*one, Path(work)), texts, threads)
    study = describe_run(threads) | {
        "base_model": base_model_of(first_folder),
        "dataset": task.name,
        "dataset_source": task.source,
        "texts": len(texts),
        "artifacts": profiled,
        "peaks": measure_peaks(threads),  # last: finding them heats the processor
    }
    write_json(results / f"{OPERATORS}.json", study)
    print(write_studies(results)[page_of(results, "speed")])


if __name__ == "__main__":
    run(main)
