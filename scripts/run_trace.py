"""Follows one text of the dataset through a quantized artifact, beside the FP32 baseline that it was made from.

It writes the numbers of every step to `results/trace.json`, and shows them on the page `docs/follow_one_text.md`: the
row, word pieces, one row of rounded weights, logits, and, where the artifact has records, the confusion matrix.

    python scripts/run_trace.py "i didnt feel humiliated"
    python scripts/run_trace.py "i didnt feel humiliated" --artifact weights/qat --threads 1
"""

from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.arguments import parse_args
from emotion.common.command import run
from emotion.common.files import ROOT
from emotion.common.machine import THREADS, choose_threads
from emotion.common.recipe import read_recipe_of
from emotion.report.trace import ARTIFACT, BASELINE, measure_trace, write_trace
from emotion.task.dataset import load_task_of


@dataclass
class TraceArguments:
    """Which text, through which folders."""

    text: str = field(metadata={"help": "A text of the dataset, letter by letter; the one word that needs no flag."})
    # Relative to the folder that the command is started in, as for every command: the page repeats them.
    artifact: str = field(
        default=ARTIFACT, metadata={"help": "The quantized folder; it must have the format torchao."}
    )
    baseline: str = field(default=BASELINE, metadata={"help": "The FP32 folder that it was made from."})
    threads: int | None = field(
        default=None, metadata={"help": "Threads to compute with; all if not given.", "choices": THREADS}
    )
    results_dir: str = field(
        default=str(ROOT / "results"),
        metadata={"help": "Where trace.json is written; the page goes to docs/ beside it."},
    )


def main(argv=None) -> None:
    """Measures, writes and prints."""
    (arguments,) = parse_args((TraceArguments,), positional="text", argv=argv)
    # Any text could be classified; only a row of the dataset has a label, with which the page begins.
    folder, threads = Path(arguments.artifact), choose_threads(arguments.threads)
    task = load_task_of(read_recipe_of(folder))  # the dataset that the artifact learnt
    trace = measure_trace(arguments.text, folder, Path(arguments.baseline), task, threads)
    write_trace(trace, Path(arguments.results_dir))


if __name__ == "__main__":
    run(main)
