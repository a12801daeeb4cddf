"""Counts the classes, lengths, repeated texts and conflicting labels of a dataset.

Writes `results/dataset.json`, which has counts and row numbers but no texts, which belong to their authors.

    python studies/dataset_study.py
    python studies/dataset_study.py --dataset_name ../my_dataset --results_dir build/my_dataset
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emotion.data.dataset import TaskArguments, conflicting_texts, load_task
from emotion.data.tokenization import load_tokenizer
from emotion.utils.arguments import parse_args
from emotion.utils.base_model import DEFAULT_MODEL, find_base_model
from emotion.utils.command import run
from emotion.utils.files import ROOT, write_json
from emotion.utils.machine import choose_threads, describe_run

QUANTILES = (5, 50, 95, 99)  # percent, of the lengths


@dataclass
class ExplorationArguments(TaskArguments):
    """Which dataset, and whose tokenizer."""

    model_name_or_path: str = DEFAULT_MODEL
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    """Counts, and writes the study."""
    (arguments,) = parse_args((ExplorationArguments,), positional="dataset_name", argv=argv)
    base = find_base_model(arguments.model_name_or_path)
    task = load_task(arguments.dataset_name, arguments.dataset_config_name)
    # The limit of a training, which would truncate longer texts
    tokenizer = load_tokenizer(base.path, arguments.max_seq_length)
    splits = {split: describe_split(rows, task.labels, tokenizer) for split, rows in task.splits.items()}
    study = describe_run(choose_threads(None)) | {
        "dataset": task.name,
        "dataset_source": task.source,
        "base_model": base.name,
        "cut_at": tokenizer.model_max_length,
        "labels": task.labels,
        "splits": splits,
        "conflicts_across_splits": find_conflicts(task.splits, task.labels),
    }
    results = Path(arguments.results_dir)
    write_json(results / "dataset.json", study)
    print(f"wrote the study to {results}; make report renders it")


def describe_split(rows, labels: list[str], tokenizer) -> dict:
    """Returns the counts of one split.

    Lengths are in tokens, with special tokens, before truncation. `length_counts[n]` is the number of texts of n
    tokens; `class_counts` is in the order of the labels.
    """
    ids = tokenizer(list(rows["text"]), verbose=False)["input_ids"]  # not verbose: it warns of each long text
    lengths = np.array(list(map(len, ids)))
    quantiles = np.percentile(lengths, QUANTILES).astype(int).tolist()
    more_than_once = [count for count in Counter(rows["text"]).values() if count > 1]
    return {
        "rows": len(lengths),
        "class_counts": np.bincount(rows["label"], minlength=len(labels)).tolist(),
        "length_counts": np.bincount(lengths).tolist(),
        "length_quantiles": dict(zip(map(str, QUANTILES), quantiles, strict=True)),
        "longest": int(lengths.max()),
        "mean_length": float(lengths.mean()),
        "texts_cut": int((lengths > tokenizer.model_max_length).sum()),
        "repeated_texts": len(more_than_once),
        "rows_too_many": sum(more_than_once) - len(more_than_once),
        "texts_with_two_labels": len(conflicting_texts(rows)),
    }


def find_conflicts(splits: dict, labels: list[str]) -> list[dict]:
    """Finds the texts that two splits have with different labels: no model can be right about both.

    Returns:
        For each text: split -> its labels and rows there; sorted by the texts, which are left out.
    """
    conflicting = conflicting_texts(*splits.values())
    occurrences = {text: {split: [] for split in splits} for text in sorted(conflicting)}
    for split, columns in splits.items():
        for row, (text, label) in enumerate(zip(columns["text"], columns["label"], strict=True)):
            if text in conflicting:
                occurrences[text][split].append({"label": labels[label], "row": row})
    across = []
    for found in occurrences.values():
        if sum(map(bool, found.values())) > 1:  # the others conflict within one split
            across.append(found)
    return across


if __name__ == "__main__":
    run(main)
