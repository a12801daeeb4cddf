"""The dataset: loading, checking, and choosing the training samples."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from emotion.data.labels import class_names, encode_labels, holds_lists, match_labels
from emotion.utils.arguments import COUNT, DROPOUT, Range, flag
from emotion.utils.base_model import RECIPE_FILE, hub_is_reachable
from emotion.utils.command import warn_first_and_last
from emotion.utils.errors import UserError, check_label, check_repo_id, reason_of
from emotion.utils.files import ROOT

DEFAULT_DATASET = "dair-ai/emotion"
# Without the Hub the default dataset is looked for here, in this order: the same rows beside the repository, then the
# small sample that every clone has.
LOCAL_COPIES = (("folder", ROOT.parent / "shared" / "data" / "emotion"), ("sample", ROOT / "sample"))
# Ending of a file -> the reader of `datasets`
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
VALIDATION_SEED = 42  # of the rows that are held out where there is no validation, the same ones for every command
MIN_LENGTH = 3  # of a text in tokens: one between the special tokens at both ends


@dataclass
class DrawArguments:
    """The flags that choose the training samples."""

    drop_conflicting_samples: bool = flag(
        True, "Leave out the training samples whose text has two different labels in train."
    )
    max_train_samples: int | None = flag(None, "Train on so many samples at most, drawn at random.", COUNT)


@dataclass
class RowsArguments(DrawArguments):
    """The flags that choose the training samples and their length."""

    max_seq_length: int = flag(128, "Length in tokens at which texts are truncated, and counted.", Range(MIN_LENGTH))


@dataclass
class DatasetArguments:
    """The flags that name the dataset and its columns."""

    dataset_name: str | None = flag(
        None, "Dataset: a Hub id, a folder, or a file (CSV, TSV, JSON lines, Parquet); by default the model's."
    )
    dataset_config_name: str | None = flag(None, "Configuration of the dataset.")
    text_column_name: str | None = flag(None, "Column of the texts; `text` by default.")
    label_column_name: str | None = flag(None, "Column of the labels; `label` by default.")


@dataclass
class TaskArguments(RowsArguments, DatasetArguments):
    """The flags that name the base model and the dataset."""

    model_name_or_path: str = flag(help="Base model: a Hub id or a local folder.", kw_only=True)
    model_revision: str | None = flag(None, "Branch, tag or commit of the base model on the Hub.")
    dataset_name: str = flag(DEFAULT_DATASET, "Dataset: a Hub id, folder, or file (CSV, TSV, JSON lines, Parquet).")
    # 0.1 as in BERT's pretraining
    attention_dropout: float | None = flag(0.1, "Dropout of attention weights; null: the base model's own.", DROPOUT)


@dataclass(frozen=True)
class Task:
    """A loaded and checked dataset."""

    name: str  # in cards and records
    source: str  # `hub`, `folder` or `sample`
    splits: dict  # name of a split -> `datasets.Dataset` with columns `text` (str) and `label` (int, or list of int)
    labels: list[str]  # names of the classes; a row's label is an index into them; none for texts alone


def load_task(
    name: str,
    config_name: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    *,
    texts_alone: bool = False,
    multi_label: bool = False,
) -> Task:
    """Loads and checks a dataset: a file, a folder, the Hub or, for the default only, its local copies.

    Args:
        texts_alone: whether the labels may be missing.
        multi_label: whether the model gives a text several labels, so that a row may have a list of them.

    Raises:
        UserError: if it cannot be found or read, or naming the column, split or row that is invalid.
    """
    dataset, source = _find_dataset(name, config_name, text_column or "text", label_column or "label")
    # All splits, even those that this command will not read: better now than after an hour of training.
    if not dataset:
        raise UserError(f"--dataset_name {name}: it has no splits; it needs train, validation and test")
    splits = _select_columns(dataset, name, text_column, label_column, texts_alone)
    splits = encode_labels(splits, name, multi_label)
    names = {split: _check_columns(rows, name) for split, rows in splits.items()}
    labels = next(iter(names.values()))
    for split, rows in splits.items():
        _check_names(names[split], labels, f"{name}, {split}")
        _check_rows(rows, split, labels)
    for label in labels:
        check_label(label, f"{name}: the name of a class")
    if source == "sample":
        name = "sample (written by this project)"  # not the default's name: it is other data
    elif source == "folder" and name != DEFAULT_DATASET:  # a local copy of the default holds the same rows
        name = Path(name).name  # not the path, which says nothing on another machine
    return Task(name=name, source=source, splits=splits, labels=labels)


def load_task_of(
    made_by: dict,
    arguments: DatasetArguments | None = None,
    model_labels: list[str] | None = None,
    texts_alone: bool = False,
    multi_label: bool = False,
) -> Task:
    """Loads the named dataset or, without a name, the one in this recipe.yaml of a model.

    Args:
        model_labels: of the fine-tuned model, to whose order the labels are put.
        texts_alone, multi_label: as of `load_task`.

    Raises:
        UserError: if neither names a dataset, or its labels are not the model's.
    """
    named: dict = {one.name: getattr(arguments, one.name, None) for one in fields(DatasetArguments)}
    # The recipe's configuration and columns belong to the recipe's dataset: one that is named here does not take them.
    if named["dataset_name"] is None:
        recipe = made_by.get("recipe", {})
        if "dataset_name" not in recipe:  # a quantized model keeps its baseline's recipe inside its own
            recipe = recipe.get("baseline", {})
        if "dataset_name" not in recipe:
            answers = f"; its labels are {', '.join(model_labels)}" if model_labels else ""
            raise UserError(
                f"the model has no {RECIPE_FILE} that names its dataset{answers}. Pass --dataset_name: a dataset with "
                "these labels (a Hub id, a folder or a file), or for run_ptq.py texts alone (texts.txt)"
            )
        named = {key: recipe.get(key) if value is None else value for key, value in named.items()}
    task = load_task(*named.values(), texts_alone=texts_alone, multi_label=multi_label)
    if not task.labels or not model_labels:
        return task
    return replace(task, splits=match_labels(task.splits, task.labels, model_labels, task.name), labels=model_labels)


def with_validation(task: Task) -> Task:
    """The dataset with a validation split: if it has none, a stratified tenth of train; `UserError` if too small.

    Where a text has a list of labels, the tenth is drawn at random.
    """
    if "validation" in task.splits or "train" not in task.splits:
        return task
    size = max(round(len(task.splits["train"]) / 10), len(task.labels))
    column = None if holds_lists(task.splits["train"]) else "label"
    try:
        parts = task.splits["train"].train_test_split(size, stratify_by_column=column, seed=VALIDATION_SEED)
    except ValueError as error:
        raise UserError(
            f"{task.name} has no validation split, and train cannot give one: {reason_of(error)}"
        ) from error
    how = "stratified" if column else "random"
    print(f"{task.name} has no validation split: a {how} tenth of train, {size} rows, is held out")
    return replace(task, splits=task.splits | {"train": parts["train"], "validation": parts["test"]})


def _find_dataset(name: str, config_name: str | None, text: str, label: str) -> tuple:
    """The dataset's splits, and its source: `hub`, `folder` or `sample`; ``text`` and ``label`` name its columns."""
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    if name and Path(name).is_dir():  # no name at all would be the folder that the command is started in
        if (Path(name) / "dataset_dict.json").is_file():  # written by `save_to_disk`, which `load_dataset` cannot read
            return _load(load_from_disk, name), "folder"
        return _load(_load_folder, name, config_name, text, label), "folder"
    if name and Path(name).is_file():
        return _load(_load_file, name, text, label), "folder"
    # Meant as a path: the Hub's answer would hide that
    if name.startswith((".", "/", "~")) or Path(name).suffix.lower() in READERS:
        raise UserError(f"--dataset_name {name}: no such folder or file")
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
    what = "a copy of it" if source == "folder" else "a small made-up sample, whose scores mean little"
    warn_first_and_last(f"without the Hub, {folder} is read instead of {name}: {what}")
    return _load(_load_folder, str(folder), config_name, text, label), source


def _load(load, name: str, *options):
    """Calls ``load``; turns the error of a broken file into a `UserError`."""
    from datasets import config
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load(name, *options)
    except (UserError, DatasetNotFoundError, ConnectionError):  # the caller may have another copy
        raise
    except Exception as error:  # of any kind: the library lets the errors of its readers through
        reason = error.__cause__ or error  # which names the file and the line
        if isinstance(reason, OSError) and str(reason.filename).startswith(str(config.HF_DATASETS_CACHE)):
            raise UserError(f"{reason.filename}: {reason.strerror}; HF_HOME names another place for caches") from error
        message = f"{type(reason).__name__} {' '.join(str(reason).split())}"
        raise UserError(f"--dataset_name {name}: cannot be read: {message}") from error


def _select_columns(dataset, name: str, text: str | None, label: str | None, texts_alone: bool) -> dict:
    """The splits with the columns of texts and labels alone, as `text` and `label`; arguments as of `load_task`."""
    columns, splits = {text or "text": "text"}, {}
    if (label or "label") in columns:
        raise UserError(f"--label_column_name {label or 'label'}: this column has the texts; name another one")
    if label or not texts_alone or any("label" in rows.column_names for rows in dataset.values()):
        columns[label or "label"] = "label"
    for split, rows in dataset.items():
        for column, kind in columns.items():
            if column not in rows.column_names:
                found = ", ".join(rows.column_names)
                raise UserError(
                    f"{name}, {split}: no column '{column}' (it has {found}); name yours with --{kind}_column_name"
                )
        rows = rows.select_columns(list(columns)).rename_columns(columns)
        if hasattr(rows.features.get("label"), "names") and set(rows.unique("label")) == {-1}:
            print(f"{name}: {split} is left out; its labels are hidden (-1)")
        else:
            splits[split] = rows
    return splits


def _check_columns(rows, name: str) -> list[str]:
    """Checks that there are texts and at least two named labels; returns the names of the labels, none without."""
    from datasets import Value

    if not isinstance(rows.features["text"], Value):  # a list, an image, ...: reading its rows may need a library
        raise UserError(f"{name}: column 'text' is no text but {type(rows.features['text']).__name__}")
    if "label" not in rows.column_names:
        return []
    names = class_names(rows.features["label"])
    if names is None:
        raise UserError(f"{name}: column 'label' is a ClassLabel in some splits alone; make it one in all, or in none")
    if len(names) < 2:
        raise UserError(f"{name}: column 'label' has {len(names)} classes; telling texts apart needs two")
    return names


def _check_names(names: list[str], labels: list[str], where: str) -> None:
    """Checks that a split names the classes in the order of the first one: a label is an index into them."""
    if names != labels:
        found = f"the labels are {', '.join(names)}, in other splits {', '.join(labels)}"
        raise UserError(f"{where}: {found}; give all splits the same names in the same order")


def _load_file(path: str, text: str, label: str):
    """Loads one file as the split train."""
    from datasets import load_dataset

    reader = READERS.get(Path(path).suffix.lower())
    if not reader:
        raise UserError(f"--dataset_name {path}: a file of an unknown kind; it takes {', '.join(READERS)}")
    options = _options(reader, text, label) | ({"sep": "\t"} if path.lower().endswith(".tsv") else {})
    dataset = load_dataset(reader, data_files={"train": path}, **options)
    return dataset.filter(lambda row: row["text"].strip()) if reader == "text" else dataset  # without empty lines


def _options(reader: str, text: str, label: str) -> dict:
    """Options of a reader, by which a byte order mark is none of a text, and no word means a missing value."""
    if reader == "csv":  # pandas would read the text `null` as missing, and the texts of a column as numbers
        converters = {text: str, label: str}
        return {"encoding": "utf-8-sig", "converters": converters, "keep_default_na": False, "na_filter": False}
    return {"encoding": "utf-8-sig"} if reader in ("json", "text") else {}


def _load_folder(folder: str, config_name: str | None, text: str, label: str):
    """Loads a folder of files, which must name the classes alike.

    `datasets` takes the names of the first Parquet file for all: another order would give other labels.
    """
    from datasets import ClassLabel, Features, Value, load_dataset, load_dataset_builder
    from pyarrow import parquet

    builder, first = load_dataset_builder(folder, config_name), None
    for files in (builder.config.data_files or {}).values():
        for path in files:
            if path.endswith(".parquet"):
                feature = Features.from_arrow_schema(parquet.read_schema(path)).get(label)
                if names := getattr(feature, "names", None):  # of a ClassLabel alone
                    first = first or names
                    _check_names(names, first, path)
    options = _options(type(builder.config).__module__.rpartition(".")[2], text, label)
    declared = (builder.info.features or {}).get(label)  # in README.md
    if not options or not isinstance(declared, ClassLabel):
        return load_dataset(folder, config_name, **options)
    # `datasets` itself takes integers there, and no names.
    options["features"] = Features({**builder.info.features, label: Value("string")})
    return load_dataset(folder, config_name, **options).cast_column(label, declared)


def _check_rows(rows, split: str, names: list[str]) -> None:
    """Checks that each row has a text and, where there are classes, one of them; tells which classes have no row."""
    if not len(rows):
        raise UserError(f"{split} has no rows; fill it or leave it out")
    try:
        pairs = list(zip(rows["text"], rows["label"] if names else rows["text"], strict=True))
    except UnicodeDecodeError as error:
        raise UserError(f"{split}: a text is not UTF-8 ({error}); convert the file") from error
    absent = set(range(len(names)))
    for row, (text, label) in enumerate(pairs):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{split} row {row}: text is {text!r:.80}; each row needs a text that is not empty")
        # -1 is the mark that `datasets` gives a row without a label, in a hidden test split for instance.
        for one in (label if isinstance(label, list) else [label]) if names else ():
            if one is None or not 0 <= one < len(names):
                raise UserError(f"{split} row {row}: label {one} is outside 0..{len(names) - 1}")
            absent.discard(one)
    if absent:
        listed = ", ".join(names[index] for index in sorted(absent)[:3]) + (", ..." if len(absent) > 3 else "")
        print(f"{split} has no row of {len(absent)} classes ({listed}); their F1 counts as 0 in macro F1")


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


def split_texts(task: Task, count: int, seed: int) -> tuple:
    """Divides texts without labels at random: ``count`` to calibrate, but at most half of them, and all others."""
    from datasets import concatenate_datasets

    splits = [rows for split, rows in task.splits.items() if split != "test"] or list(task.splits.values())
    rows = concatenate_datasets(splits).shuffle(seed=seed)
    count = min(count, len(rows) // 2)
    if not count:
        raise UserError(f"{task.name} has a single text; quantizing needs some to calibrate and others to compare")
    return rows.select(range(count)), rows.select(range(count, len(rows)))


def stratified_sample(rows, count: int, seed: int):
    """``count`` rows drawn at random from each class, in proportion to its share; `UserError` if there are fewer."""
    if not 1 <= count <= len(rows):
        raise UserError(f"--num_calibration_samples {count}: train has {len(rows)} rows; it takes 1 to {len(rows)}")
    order = np.random.default_rng(seed).permutation(len(rows))
    # Sorted class by class; a stable sort keeps the random order inside each class. Lists of labels stay as drawn.
    if not holds_lists(rows):
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
            labels_of[text].add(str(label))  # which may be a list
    return {text for text, labels in labels_of.items() if len(labels) > 1}
