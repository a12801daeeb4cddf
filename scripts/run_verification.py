"""Checks that the weights in this folder are those that were measured, and answer here as they did there.

Compares each file of a released variant with its SHA256SUMS, scores it on the real test split, and holds its answers
against the published ones in `results/predictions`. Processors round differently, so that a few texts between two
classes may change sides; on the processor of the record nothing may.

    python scripts/run_verification.py
"""

from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.arguments import parse_args
from emotion.common.command import run
from emotion.common.errors import UserError
from emotion.common.files import ROOT
from emotion.common.machine import THREADS, choose_threads, describe_environment
from emotion.common.progress import Bar
from emotion.common.recipe import read_recipe_of
from emotion.common.sums import check_covered, read_sums
from emotion.measure.evidence import read_predictions, score_again
from emotion.measure.schema import Record
from emotion.model.emotion_classifier import EmotionClassifier
from emotion.model.released import OPENED_AS, RELEASED, SCORES_OF_OPENED
from emotion.report.render import markdown_table
from emotion.task.dataset import fingerprint, get_split, load_task_of

import numpy as np

EQUAL_LABELS = 0.998  # share of the rows; processors with and without VNNI differ in about one of a thousand
MACRO_F1_MARGIN = 0.002  # a tenth of the score's own interval


@dataclass
class VerificationArguments:
    """What is verified, and against what."""

    weights_dir: str = field(default=str(ROOT / "weights"), metadata={"help": "Folder of the released variants."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Folder of the published records."})
    threads: int | None = field(
        default=None, metadata={"help": "Threads to compute with; all if not given.", "choices": THREADS}
    )


def main(argv=None) -> None:
    """Verifies every released variant and prints a table; ends with an error if one differs."""
    (arguments,) = parse_args((VerificationArguments,), positional="weights_dir", argv=argv)
    threads = choose_threads(arguments.threads)
    lines, differing = [], []
    for variant in Bar(RELEASED, desc="verified"):
        format, results = OPENED_AS.get(variant, RELEASED[variant]), Path(arguments.results_dir)
        if variant in OPENED_AS:
            results /= SCORES_OF_OPENED
        found = verify(variant, format, Path(arguments.weights_dir) / variant, results, threads)
        scores = [f"{100 * found[key]:.2f}" for key in ("macro_f1", "published")]
        machine = "as recorded" if found["same_machine"] else "another"
        lines.append([variant, format, f"{100 * found['equal']:.2f}", *scores, machine, found["verdict"]])
        if found["verdict"] != "verified":
            differing.append(f"{variant} ({format})")
    head = ["variant", "format", "equal labels %", "macro F1 %", "published", "machine", "verdict"]
    print(markdown_table(head, lines), end="")
    if differing:
        raise UserError(f"{', '.join(differing)}: the answers are not those that were published")


def verify(variant: str, format: str, folder: Path, results: Path, threads: int) -> dict:
    """Scores a released folder in one format, and compares it with its record and its published predictions.

    Returns:
        `equal` (share of the rows with the published label), `macro_f1` here and `published`, `same_machine` and the
        `verdict`.

    Raises:
        UserError: if a file is damaged or is not the one that was measured, or the test rows are others.
    """
    name = f"{variant}-{format}"
    check_covered(folder)
    record = Record.read(results / "metrics" / f"{name}.json")
    if (
        not record.sha256 or not record.sha256.items() <= read_sums(folder).items()
    ):  # which the files were compared with just now
        raise UserError(f"{folder} is not what {results / 'metrics' / name}.json was measured on; fetch both again")
    task = load_task_of(read_recipe_of(folder))
    rows = get_split(task, record.quality.split)
    if fingerprint(rows) != record.made.dataset_fingerprint:
        raise UserError(
            f"{task.name} ({task.source}) has other test rows than those of {name}; the scores say nothing"
        )
    labels, published = read_predictions(results / "predictions" / f"{name}.parquet")
    logits = EmotionClassifier.from_pretrained(folder, format, threads).logits(rows["text"])
    found = {
        "equal": float(np.mean(logits.argmax(axis=-1) == published.argmax(axis=-1))),
        "macro_f1": score_again(labels, logits, task.labels)["macro_f1"],
        "published": score_again(labels, published, task.labels)["macro_f1"],
        "same_machine": is_same_machine(record.environment.model_dump(), describe_environment(threads)),
    }
    return found | {"verdict": judge(found)}


def judge(found: dict) -> str:
    """The verdict on the figures of one variant."""
    if found["same_machine"]:  # the same instructions on the same numbers
        same = found["equal"] == 1 and found["macro_f1"] == found["published"]
        return "verified" if same else "differs"
    close = abs(found["macro_f1"] - found["published"]) <= MACRO_F1_MARGIN
    return "verified" if close and found["equal"] >= EQUAL_LABELS else "differs"


def is_same_machine(there: dict, here: dict) -> bool:
    """Whether two environments compute alike to the last bit: processor, threads and libraries."""
    return all(there.get(key) == here.get(key) for key in ("cpu", "instruction_sets", "threads", "packages"))


if __name__ == "__main__":
    run(main)
