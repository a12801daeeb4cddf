"""The task: where the base model and the dataset come from, what their rows must look like, how texts become ids.

All variants load the task through this file, so that they see the same rows, labels and word pieces.
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import ROOT
from emotion.task.source import DEFAULT_MODEL, hub_is_reachable

import numpy as np

DEFAULT_DATASET = "dair-ai/emotion"
LOCAL_COPIES = (("folder", ROOT.parent / "shared" / "data" / "emotion"), ("sample", ROOT / "sample"))


@dataclass
class RowsArguments:
    """Which rows of train are learnt from, and how much of each."""

    drop_conflicting_rows: bool = field(
        default=True, metadata={"help": "Leave out the training rows whose text stands in train with two labels."}
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Train on so many rows, drawn at random; for trying things out."}
    )
    max_length: int = field(
        default=128, metadata={"help": "Longest text in word pieces; what is longer is cut, counted and reported."}
    )


@dataclass
class TaskArguments(RowsArguments):
    """Which model learns what."""

    model_name_or_path: str = field(
        default=DEFAULT_MODEL, metadata={"help": "Base model: a Hub id or a local folder with a tokenizer."}
    )
    dataset_name: str = field(
        default=DEFAULT_DATASET,
        metadata={"help": "Dataset with `text` and `label` (ClassLabel) columns: a Hub id or a local folder."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset; its own default if none is given."}
    )
    attention_dropout: float | None = field(
        default=None, metadata={"help": "Dropout of the attention weights; the base model's own if not given."}
    )


@dataclass(frozen=True)
class Task:
    """A loaded dataset. ``splits`` maps a split's name to rows with `text` (str) and `label` (int) columns."""

    name: str
    source: str  # hub, folder or sample
    splits: dict
    labels: list[str]


def load_task(name: str, config_name: str | None = None) -> Task:
    """Loads and checks a dataset: a local folder, the Hub, or, for the default only, the copies that stand in for it.

    Raises:
        UserError: naming the column, split or row that is not as it must be.
    """
    dataset, source = _find_dataset(name, config_name)
    for split, rows in dataset.items():
        labels = _check_columns(rows, name)
        _check_rows(rows, split, len(labels))
    display_name = DEFAULT_DATASET if name == DEFAULT_DATASET and source != "sample" else Path(name).name
    if source == "hub":
        display_name = name
    elif source == "sample":
        display_name = "sample (written by this project)"
    return Task(name=display_name, source=source, splits=dict(dataset), labels=labels)


def load_task_of(made_by: dict, name: str | None = None, config_name: str | None = None) -> Task:
    """Loads the dataset named, or else the one that an artifact learnt; ``made_by`` is its recipe.yaml."""
    recipe = made_by.get("recipe", {})
    recipe = recipe.get("baseline", recipe)  # a quantized artifact tells what its baseline learnt
    if name is None:
        name = recipe.get("dataset_name", DEFAULT_DATASET)
        config_name = config_name or recipe.get("dataset_config_name")
    return load_task(name, config_name)


def _find_dataset(name: str, config_name: str | None):
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    if Path(name).is_dir():
        if (Path(name) / "dataset_dict.json").is_file():
            return _load(lambda: load_from_disk(name), name), "folder"
        return _load(lambda: load_dataset(name, config_name), name), "folder"
    if name.startswith((".", "/", "~")):
        raise UserError(f"--dataset_name {name}: no such folder")
    reachable = hub_is_reachable()
    try:
        return _load(lambda: load_dataset(name, config_name), name), "hub"
    except DatasetNotFoundError as error:  # its message tells a missing dataset from one that is gated
        raise UserError(f"--dataset_name {name}: {error}") from error
    except ConnectionError as error:
        if reachable:
            raise UserError(f"--dataset_name {name}: the Hub failed: {error}; try again later") from error
        if name != DEFAULT_DATASET:
            raise UserError(f"--dataset_name {name}: the Hub cannot be reached; name a local folder") from error
    source, folder = next((source, folder) for source, folder in LOCAL_COPIES if folder.is_dir())
    return _load(lambda: load_dataset(str(folder), config_name), str(folder)), source


def _load(load, name: str):
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        return load()
    except (DatasetNotFoundError, ConnectionError):
        raise
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = error.__cause__ or error
        raise UserError(f"--dataset_name {name}: cannot be read: {reason}") from error


def _check_columns(rows, name: str) -> list[str]:
    from datasets import ClassLabel

    for column in ("text", "label"):
        if column not in rows.column_names:
            raise UserError(
                f"{name}: no column '{column}' (it has {', '.join(rows.column_names)}); rename yours to it"
            )
    feature = rows.features["label"]
    if not isinstance(feature, ClassLabel):
        raise UserError(
            f"{name}: column 'label' is {getattr(feature, 'dtype', feature)}, not a ClassLabel with names; "
            "convert it once with dataset.class_encode_column('label') and save it"
        )
    return feature.names


def _check_rows(rows, split: str, classes: int) -> None:
    for row, (text, label) in enumerate(zip(rows["text"], rows["label"], strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{split} row {row}: text is {text!r}; each row needs a text that is not empty")
        if label is None or not 0 <= label < classes:
            raise UserError(f"{split} row {row}: label {label} is outside 0..{classes - 1}")


def get_split(task: Task, split: str):
    """Returns a split's rows, or says which splits there are."""
    if split not in task.splits:
        raise UserError(f"{task.name} has no split '{split}'; it has {', '.join(task.splits)}")
    return task.splits[split]


def select_train_rows(rows, arguments: RowsArguments, seed: int):
    """The rows to learn from: a text that carries two labels teaches neither."""
    if arguments.drop_conflicting_rows:
        conflicting = conflicting_texts(rows)
        kept = [row for row, text in enumerate(rows["text"]) if text not in conflicting]
        print(f"train: {len(rows) - len(kept)} of {len(rows)} rows left out, their texts carry two labels")
        rows = rows.select(kept)
    if arguments.max_train_rows is not None and arguments.max_train_rows < len(rows):
        rows = rows.shuffle(seed=seed).select(range(arguments.max_train_rows))
        print(f"train: {len(rows)} rows, drawn at random")
    return rows


def stratified_sample(rows, count: int, seed: int):
    """So many rows, drawn at random from each class in proportion to its share."""
    if not 1 <= count <= len(rows):
        raise UserError(f"--calibration_rows {count}: train has {len(rows)} rows; it takes 1 to {len(rows)}")
    order = np.random.default_rng(seed).permutation(len(rows))
    order = order[np.argsort(np.asarray(rows["label"])[order], kind="stable")]  # class by class, each shuffled
    return rows.select(order[np.linspace(0, len(rows) - 1, count).round().astype(int)])


def fingerprint(rows) -> str:
    """SHA-256 over the texts and labels of the rows, in order."""
    digest = hashlib.sha256()
    for text, label in zip(rows["text"], rows["label"], strict=True):
        digest.update(f"{label}\t{text}\n".encode())
    return digest.hexdigest()


def conflicting_texts(*splits) -> set[str]:
    """Texts that stand in the given splits with two or more different labels."""
    labels_of = defaultdict(set)
    for rows in splits:
        for text, label in zip(rows["text"], rows["label"], strict=True):
            labels_of[text].add(label)
    return {text for text, labels in labels_of.items() if len(labels) > 1}


@cache
def source_of(dataset_name: str, config_name: str | None) -> str:
    """Where the dataset comes from; loaded once, however many seeds ask."""
    return load_task(dataset_name, config_name).source
