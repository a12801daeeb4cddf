"""Copies the weights that the repository tracks: one format of each released variant,
and what `from_pretrained` opens.

`train_seeds.py` has chosen the seed on validation, and the whole model stays in `weights/seeds`. Only files that were
scored are released: they must be those of the records in `results/metrics`.

With `--verify` it compares each tracked file with its SHA256SUMS, scores it on the test split, and compares the
predicted labels with those in `results/predictions`. Processors round differently, so that a few labels may differ; on
the processor of the record none may.

    python tools/release.py
    python tools/release.py --verify
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emotion.data.dataset import fingerprint, get_split, load_task_of
from emotion.evaluation.record import read_predictions, score_again
from emotion.evaluation.schema import Record
from emotion.hub.render import markdown_table
from emotion.inference import model_folder
from emotion.inference.emotion_classifier import EmotionClassifier
from emotion.utils import files
from emotion.utils.arguments import flag, parse_args
from emotion.utils.base_model import read_recipe_of
from emotion.utils.command import Bar, run
from emotion.utils.errors import UserError
from emotion.utils.machine import THREADS, choose_threads, describe_environment

BYTES_OF_FILE, BYTES_IN_ALL = 50 * 10**6, 200 * 10**6  # upper bounds for a clone
EQUAL_LABELS = 0.998  # share of the rows; processors with and without VNNI differ in about one of a thousand
MACRO_F1_MARGIN = 0.002  # a tenth of the score's own interval
DECISIVE = ("cpu", "instruction_sets", "threads", "packages")  # where they are the same, every bit is


@dataclass
class ReleaseArguments:
    """Where the models and their scores are."""

    weights_dir: str = flag(str(files.ROOT / "weights"), "Folder of the models and of seeds/.")
    results_dir: str = flag(str(files.ROOT / "results"), "Folder of the records.")
    verify: bool = flag(False, "Change nothing; compare the weights and predictions.")
    threads: int | None = flag(None, "Threads, with --verify.", THREADS)


def main(argv=None) -> None:
    """Releases or verifies."""
    (arguments,) = parse_args((ReleaseArguments,), positional="weights_dir", argv=argv)
    if arguments.verify:
        verify_all(arguments)
    else:
        release(Path(arguments.weights_dir), Path(arguments.results_dir))


def release(weights: Path, results: Path) -> None:
    """Checks all variants, then replaces their folders."""
    license_file = weights / model_folder.LICENSE_FILE
    if not license_file.is_file():
        raise UserError(f"no file {license_file}: each released folder carries a copy of it")
    # All checks before the first folder is replaced
    sources = {}
    for variant in model_folder.RELEASED:
        files.check_replaceable(weights / variant, model_folder.ARTIFACT)
        sources[variant] = find_source(variant, weights, results)
    check_sizes(sources)
    for variant, source in sources.items():
        with files.atomic_folder(weights / variant, model_folder.ARTIFACT) as folder:
            for name, released in model_folder.names_to_release(source, variant).items():
                (folder / released).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, folder / released)
            shutil.copyfile(license_file, folder / model_folder.LICENSE_FILE)
            files.write_sums(folder)
        megabytes = sum(path.stat().st_size for path in (weights / variant).rglob("*") if path.is_file()) / 1e6
        print(f"{variant:10} {model_folder.RELEASED[variant]:5} {megabytes:6.1f} MB  {source} -> {weights / variant}")


def find_source(variant: str, weights: Path, results: Path) -> Path:
    """Returns the model of the chosen seed.

    Raises:
        UserError: if there is none, it is damaged, or the record of its released format is of other files.
    """
    summary = results / "seeds" / f"{variant}.json"
    if not summary.is_file():
        raise UserError(f"no file {summary}; run python tools/train_seeds.py {variant}")
    source = weights / "seeds" / f"{variant}-{files.read_json(summary)['chosen_seed']}"
    files.check_sums(source)
    for format in [model_folder.RELEASED[variant], *({"torchao"} & model_folder.find_formats(source).keys())]:
        record = Record.read(results / "metrics" / f"{variant}-{format}.json")
        if not record.sha256 or not files.has_files(source, record.sha256):
            command = f"python scripts/run_evaluation.py {weights / variant} --format {format}"
            raise UserError(f"{source} was not scored as it is now; run {command}")
    return source


def check_sizes(sources: dict[str, Path]) -> None:
    """Raises `UserError` if a file, or all together, are too large for a clone."""
    total = 0
    for variant, source in sources.items():
        for name in model_folder.names_to_release(source, variant):
            size = (source / name).stat().st_size
            if size > BYTES_OF_FILE:
                raise UserError(f"{source / name} has {size:,} bytes; a released file has {BYTES_OF_FILE:,} at most")
            total += size
    if total > BYTES_IN_ALL:
        raise UserError(f"the released files have {total:,} bytes; together they have {BYTES_IN_ALL:,} at most")


def verify_all(arguments: ReleaseArguments) -> None:
    """Verifies every released variant and prints a table; raises `UserError` if one differs."""
    threads = choose_threads(arguments.threads)
    lines, differing = [], []
    for variant in Bar(model_folder.RELEASED, desc="verified"):
        format, results = model_folder.RELEASED[variant], Path(arguments.results_dir)
        if variant in model_folder.OPENED_AS:
            format, results = model_folder.OPENED_AS[variant], results / model_folder.SCORES_OF_OPENED
        found = verify(variant, format, Path(arguments.weights_dir) / variant, results, threads)
        scores = [f"{100 * found[key]:.2f}" for key in ("macro_f1", "published")]
        machine = "as recorded" if found["same_machine"] else "another"
        lines.append([variant, format, f"{100 * found['equal']:.2f}", *scores, machine, found["verdict"]])
        if found["verdict"] != "verified":
            differing.append(f"{variant} ({format})")
    head = ["variant", "format", "equal labels %", "macro F1 %", "published", "machine", "verdict"]
    print(markdown_table(head, lines), end="")
    if differing:
        raise UserError(f"{', '.join(differing)}: the labels are not those that were published")


def verify(variant: str, format: str, folder: Path, results: Path, threads: int) -> dict:
    """Scores a released folder in one format, and compares it with its record and its published predictions.

    Returns:
        `equal` (share of equal labels), `macro_f1` here and `published`, `same_machine` and the `verdict`.

    Raises:
        UserError: if a file is damaged or not the one that was measured, or the test rows are others.
    """
    name = f"{variant}-{format}"
    files.check_covered(folder)
    record = Record.read(results / "metrics" / f"{name}.json")
    if not record.sha256 or not record.sha256.items() <= files.read_sums(folder).items():
        raise UserError(f"{folder} is not what {results / 'metrics' / name}.json was measured on; fetch both again")
    task = load_task_of(read_recipe_of(folder))
    rows = get_split(task, record.quality.split)
    if fingerprint(rows) != record.provenance.dataset_fingerprint:
        raise UserError(f"{task.name} ({task.source}) has other test rows than those of {name}: nothing to compare")
    labels, published = read_predictions(results / "predictions" / f"{name}.parquet")
    here = describe_environment(threads)
    logits = EmotionClassifier.from_pretrained(folder, format, threads).logits(rows["text"])
    found = {
        "equal": float(np.mean(logits.argmax(axis=-1) == published.argmax(axis=-1))),
        "macro_f1": score_again(labels, logits, task.labels)["macro_f1"],
        "published": score_again(labels, published, task.labels)["macro_f1"],
        "same_machine": all(here[key] == getattr(record.environment, key) for key in DECISIVE),
    }
    return found | {"verdict": judge(found)}


def judge(found: dict) -> str:
    """The verdict on the result of `verify`."""
    least, margin = (1, 0) if found["same_machine"] else (EQUAL_LABELS, MACRO_F1_MARGIN)
    close = abs(found["macro_f1"] - found["published"]) <= margin
    return "verified" if close and found["equal"] >= least else "differs"


if __name__ == "__main__":
    run(main)
