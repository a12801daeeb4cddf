"""Looks at the dataset before anything is trained: class balance, lengths, repeated and contradicting texts.

Writes `results/dataset.md` and `results/dataset.png`.

    python scripts/study_dataset.py
    python scripts/study_dataset.py --dataset_name ../my_dataset --results_dir build/my_dataset
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.command import run
from emotion.common.files import ROOT, write_text
from emotion.common.flags import parse_flags
from emotion.report.plots import plot_dataset
from emotion.report.tables import markdown_table
from emotion.task.dataset import TaskArguments, conflicting_texts, load_task
from emotion.task.source import find_base_model
from emotion.task.tokens import load_tokenizer

import numpy as np


@dataclass
class ExplorationArguments(TaskArguments):
    """Which dataset, counted in whose word pieces."""

    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the report is written."})


def main(argv=None) -> None:
    (arguments,) = parse_flags((ExplorationArguments,), positional="dataset_name", argv=argv)
    base = find_base_model(arguments.model_name_or_path)
    task = load_task(arguments.dataset_name, arguments.dataset_config_name)
    tokenizer = load_tokenizer(base.path, arguments.max_length)
    lengths = {
        split: np.array([len(ids) for ids in tokenizer(list(rows["text"]), verbose=False)["input_ids"]])
        for split, rows in task.splits.items()
    }
    counts = {split: np.bincount(rows["label"], minlength=len(task.labels)) for split, rows in task.splits.items()}
    results = Path(arguments.results_dir)
    plot_dataset(counts, lengths, task.labels, results / "dataset")
    title = f"# The dataset: {task.name}\n\nSource: {task.source}. Lengths are in word pieces of {base.name}.\n"
    parts = [
        title,
        "![Classes and lengths](dataset.png)\n",
        f"## Classes\n\n{describe_classes(counts, task.labels)}",
        f"## Lengths\n\n{describe_lengths(lengths, tokenizer.model_max_length)}",
        f"## Repeated texts\n\n{describe_repeats(task.splits)}",
        f"## Texts with two labels\n\n{describe_conflicts(task.splits, task.labels)}",
    ]
    write_text(results / "dataset.md", "\n".join(parts))
    print(f"wrote {results / 'dataset.md'}")


def describe_classes(counts: dict[str, np.ndarray], labels: list[str]) -> str:
    rows = []
    for index, label in enumerate(labels):
        rows.append([label, *(f"{c[index]} ({100 * c[index] / c.sum():.1f} %)" for c in counts.values())])
    rows.append(["all", *(str(c.sum()) for c in counts.values())])
    return markdown_table(["class", *counts], rows)


def describe_lengths(lengths: dict[str, np.ndarray], longest: int) -> str:
    rows = []
    for split, values in lengths.items():
        quantiles = np.percentile(values, [5, 50, 95, 99]).astype(int)
        cut = int((values > longest).sum())
        rows.append([split, *map(str, quantiles), str(values.max()), f"{values.mean():.1f}", str(cut)])
    return markdown_table(["split", "5 %", "median", "95 %", "99 %", "longest", "mean", f"cut at {longest}"], rows)


def describe_repeats(splits: dict) -> str:
    rows = []
    for split, columns in splits.items():
        repeats = Counter(columns["text"])
        more_than_once = [text for text, count in repeats.items() if count > 1]
        extra = sum(repeats[text] - 1 for text in more_than_once)
        rows.append([split, str(len(more_than_once)), str(extra), str(len(conflicting_texts(columns)))])
    head = ["split", "texts that stand more than once", "rows too many", "of the texts, with two labels"]
    return markdown_table(head, rows)


def describe_conflicts(splits: dict, labels: list[str]) -> str:
    """Where a text stands in two splits with different labels, by row: no model can get both right.

    The texts themselves are not written: the dataset's terms are its authors'.
    """
    conflicting = conflicting_texts(*splits.values())
    places = {text: {split: [] for split in splits} for text in sorted(conflicting)}
    for split, columns in splits.items():
        for row, (text, label) in enumerate(zip(columns["text"], columns["label"], strict=True)):
            if text in conflicting:
                places[text][split].append(f"{labels[label]} (row {row})")
    across = [found for found in places.values() if sum(bool(rows) for rows in found.values()) > 1]
    rows = [[", ".join(found[split]) for split in splits] for found in across]
    inside = [f"{len(conflicting_texts(columns))} in {split}" for split, columns in splits.items()]
    text = f"Inside one split: {', '.join(inside)}. Across splits: {len(rows)}.\n\n"
    return text + markdown_table(list(splits), rows)


if __name__ == "__main__":
    run(main)
