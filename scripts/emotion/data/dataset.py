"""The dataset: loading, checking, and choosing the training samples."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emotion.utils.arguments import COUNT, DROPOUT, Range
from emotion.utils.base_model import hub_is_reachable
from emotion.utils.errors import UserError, check_label, check_repo_id
from emotion.utils.files import ROOT

DEFAULT_DATASET = "dair-ai/emotion"
# Without the Hub the default dataset is looked for here, in this order: the same rows beside the repository, then the
# small sample that every clone has.
LOCAL_COPIES = (("folder", ROOT.parent / "shared" / "data" / "emotion"), ("sample", ROOT / "sample"))
MIN_LENGTH = 3  # of a text in tokens: one between the special tokens at both ends


@dataclass
class DrawArguments:
    """The flags that choose the training samples."""

    drop_conflicting_samples: bool = field(
        default=True, metadata={"help": "Leave out the training samples whose text has two different labels in train."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many samples at most, drawn at random.", "choices": COUNT}
    )


@dataclass
class RowsArguments(DrawArguments):
    """The flags that choose the training samples and their length."""

    max_seq_length: int = field(
        default=128,
        metadata={"help": "Length in tokens at which texts are truncated, and counted.", "choices": Range(MIN_LENGTH)},
    )


@dataclass
class TaskArguments(RowsArguments):
    """The flags that name the base model and the dataset."""

    model_name_or_path: str = field(kw_only=True, metadata={"help": "Base model: a Hub id or a local folder."})
    dataset_name: str = field(
        default=DEFAULT_DATASET,
        metadata={"help": "Dataset with `text` and `label` (ClassLabel) columns: a Hub id or a local folder."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    attention_dropout: float | None = field(
        default=0.1,  # as in BERT's pretraining
        metadata={"help": "Dropout of the attention weights; null: the base model's own.", "choices": DROPOUT},
    )


@dataclass(frozen=True)
class Task:
    """A loaded and checked dataset."""

    name: str  # in cards and records
    source: str  # `hub`, `folder` or `sample`
    splits: dict  # name of a split -> `datasets.Dataset` with `text` (str) and `label` (int) columns
    labels: list[str]  # names of the classes; a row's label is an index into them


def load_task(name: str, config_name: str | None = None) -> Task:
    """Loads and checks a dataset: a local folder, the Hub or, for the default only, its local copies.

    Raises:
        UserError: if it cannot be found or read, or naming the column, split or row that is invalid.
    """
    dataset, source = _find_dataset(name, config_name)
    # All splits, even those that this command will not read: better now than after an hour of training.
    if not dataset:
        raise UserError(f"--dataset_name {name}: it has no splits; it needs train, validation and test")
    labels = None
    for split, rows in dataset.items():
        names = _check_columns(rows, name)
        labels = labels or names
        _check_names(names, labels, f"{name}, {split}")
        _check_rows(rows, split, len(labels))
    for label in labels:
        check_label(label, f"{name}: the name of a class")
    if source == "sample":
        name = "sample (written by this project)"  # not the default's name: it is other data
    elif source == "folder" and name != DEFAULT_DATASET:  # a local copy of the default holds the same rows
        name = Path(name).name  # not the path, which says nothing on another machine
    return Task(name=name, source=source, splits=dict(dataset), labels=labels)


def load_task_of(made_by: dict, name: str | None = None, config_name: str | None = None) -> Task:
    """Loads the named dataset or, without a name, the one that the model of this recipe.yaml was trained on."""
    recipe = made_by.get("recipe", {})
    recipe = recipe.get("baseline", recipe)  # a quantized model keeps its baseline's recipe inside its own
    # The recipe's configuration belongs to the recipe's dataset: one that is named here does not take it.
    if name is None:
        name = recipe.get("dataset_name", DEFAULT_DATASET)
        config_name = config_name or recipe.get("dataset_config_name")
    return load_task(name, config_name)


def _find_dataset(name: str, config_name: str | None) -> tuple:
    """The dataset's splits, and its source: `hub`, `folder` or `sample`."""
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    if name and Path(name).is_dir():  # no name at all would be the folder that the command is started in
        if (Path(name) / "dataset_dict.json").is_file():  # written by `save_to_disk`, which `load_dataset` cannot read
            return _load(load_from_disk, name), "folder"
        return _load(_load_folder, name, config_name), "folder"
    if name.startswith((".", "/", "~")):  # meant as a path: the Hub's answer would hide that
        raise UserError(f"--dataset_name {name}: no such folder")
    check_repo_id(name)
    reachable = hub_is_reachable()  # asked first: if the answer is no, the line below reads the cache alone
    try:
        return _load(load_dataset, name, config_name), "hub"
    except DatasetNotFoundError as error:  # its message tells a missing dataset from one that is gated
        raise UserError(f"--dataset_name {name}: {error}") from error
    except ConnectionError as error:
        if reachable:
            raise UserError(f"--dataset_name {name}: the Hub failed: {error}; try again later") from error
        if name != DEFAULT_DATASET:
            raise UserError(f"--dataset_name {name}: the Hub cannot be reached; name a local folder") from error
    # One of them is there: the sample is part of the repository.
    source, folder = next((source, folder) for source, folder in LOCAL_COPIES if folder.is_dir())
    return _load(_load_folder, str(folder), config_name), source


def _load(load, name: str, *config_name):
    """Calls ``load``; turns the error of a broken file into a `UserError`."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load(name, *config_name)
    except (UserError, DatasetNotFoundError, ConnectionError):  # the caller may have another copy
        raise
    except Exception as error:  # of any kind: the library lets the errors of its readers through
        reason = error.__cause__ or error  # which names the file and the line
        message = f"{type(reason).__name__} {' '.join(str(reason).split())}"
        raise UserError(f"--dataset_name {name}: cannot be read: {message}") from error


def _check_columns(rows, name: str) -> list[str]:
    """Checks that there are texts and at least two named labels; returns the names of the labels."""
    from datasets import ClassLabel, Value

    for column in ("text", "label"):
        if column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise UserError(f"{name}: no column '{column}' (it has {columns}); rename yours to it")
    if not isinstance(rows.features["text"], Value):  # a list, an image, ...: reading its rows may need a library
        raise UserError(f"{name}: column 'text' is no text but {type(rows.features['text']).__name__}")
    # Bare numbers do not say which class is which, and the model's config.json would not either.
    feature = rows.features["label"]
    if not isinstance(feature, ClassLabel):
        how = "convert it once with dataset.class_encode_column('label') and save it"
        raise UserError(f"{name}: column 'label' is {getattr(feature, 'dtype', feature)}, not a ClassLabel; {how}")
    if len(feature.names) < 2:
        raise UserError(f"{name}: column 'label' has {len(feature.names)} classes; telling texts apart needs two")
    return feature.names


def _check_names(names: list[str], labels: list[str], where: str) -> None:
    """Checks that a split names the classes in the order of the first one: a label is an index into them."""
    if names != labels:
        found = f"the labels are {', '.join(names)}, in other splits {', '.join(labels)}"
        raise UserError(f"{where}: {found}; give all splits the same names in the same order")


def _load_folder(folder: str, config_name: str | None):
    """Loads a folder of files, which must name the classes alike.

    `datasets` takes the names of the first Parquet file for all: another order would give other labels.
    """
    from datasets import Features, load_dataset, load_dataset_builder
    from pyarrow import parquet

    first = None
    for files in (load_dataset_builder(folder, config_name).config.data_files or {}).values():
        for path in files:
            if path.endswith(".parquet"):
                feature = Features.from_arrow_schema(parquet.read_schema(path)).get("label")
                if names := getattr(feature, "names", None):  # of a ClassLabel alone
                    first = first or names
                    _check_names(names, first, path)
    return load_dataset(folder, config_name)


def _check_rows(rows, split: str, classes: int) -> None:
    """Checks that each row has a text, and a label that is a class."""
    if not len(rows):
        raise UserError(f"{split} has no rows; fill it or leave it out")
    try:
        pairs = list(zip(rows["text"], rows["label"], strict=True))
    except UnicodeDecodeError as error:
        raise UserError(f"{split}: a text is not UTF-8 ({error}); convert the file") from error
    for row, (text, label) in enumerate(pairs):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{split} row {row}: text is {text!r:.80}; each row needs a text that is not empty")
        # -1 is the mark that `datasets` gives a row without a label, in a hidden test split for instance.
        if label is None or not 0 <= label < classes:
            raise UserError(f"{split} row {row}: label {label} is outside 0..{classes - 1}")


def get_split(task: Task, split: str):
    """The rows of a split; raises `UserError`, which names the splits that exist, if there is none of that name."""
    if split not in task.splits:
        raise UserError(f"{task.name} has no split '{split}'; it has {', '.join(task.splits)}")
    return task.splits[split]


def select_train_rows(rows, arguments: RowsArguments, seed: int):
    """Returns the training samples of the train split, and prints how many are left out for which reason.

    Args:
        seed: of the draw, if `max_train_samples` asks for fewer rows than there are.

    Raises:
        UserError: if no rows are left.
    """
    # A text with two labels teaches neither: whatever the model predicts, one of its rows calls it wrong.
    if arguments.drop_conflicting_samples:
        conflicting = conflicting_texts(rows)
        kept = [row for row, text in enumerate(rows["text"]) if text not in conflicting]
        print(f"train: {len(rows) - len(kept)} of {len(rows)} rows left out, their texts have two labels")
        if not kept:
            raise UserError("train: no rows are left; fix their labels, or set --drop_conflicting_samples false")
        rows = rows.select(kept)
    # Drawn after the others have left, so that as many remain as were asked for.
    if arguments.max_train_samples is not None and arguments.max_train_samples < len(rows):
        rows = rows.shuffle(seed=seed).select(range(arguments.max_train_samples))
        print(f"train: {len(rows)} rows, drawn at random")
    return rows


def stratified_sample(rows, count: int, seed: int):
    """``count`` rows drawn at random from each class, in proportion to its share; `UserError` if there are fewer."""
    if not 1 <= count <= len(rows):
        raise UserError(f"--num_calibration_samples {count}: train has {len(rows)} rows; it takes 1 to {len(rows)}")
    order = np.random.default_rng(seed).permutation(len(rows))
    # Sorted class by class; a stable sort keeps the random order inside each class.
    order = order[np.argsort(np.asarray(rows["label"])[order], kind="stable")]
    # Evenly spaced positions in this order: a class that fills a tenth of it gets a tenth of them.
    return rows.select(order[np.linspace(0, len(rows) - 1, count).round().astype(int)])


def fingerprint(rows) -> str:
    """SHA-256 over the texts and labels of the rows, in their order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for text, label in zip(rows["text"], rows["label"], strict=True):
        digest.update(f"{label}\t{text}\n".encode())  # the label first: a text may hold a tab
    return digest.hexdigest()


def conflicting_texts(*splits) -> set[str]:
    """The texts that have two or more different labels in the given splits together."""
    labels_of = defaultdict(set)
    for rows in splits:
        for text, label in zip(rows["text"], rows["label"], strict=True):
            labels_of[text].add(label)
    return {text for text, labels in labels_of.items() if len(labels) > 1}
