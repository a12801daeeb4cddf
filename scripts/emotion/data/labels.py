"""Labels by name: texts and integers become classes, and classes take the order of a fine-tuned model's."""

import re

import numpy as np

from emotion.utils.errors import UserError


def encode_labels(splits: dict, where: str, multi_label: bool = False) -> dict:
    """Makes classes of the texts or integers in the `label` column, with the same names in all splits.

    Args:
        splits: name -> `datasets.Dataset`; those without labels, or with a ClassLabel, are returned as they are.
        multi_label: whether the model gives a text several labels; then lists of them are taken, too.

    Returns:
        The splits with a `ClassLabel`, or lists of one, its names sorted, integers by value; raises `UserError` for
        other labels.
    """
    from datasets import ClassLabel, List, Value

    if any("label" not in rows.features for rows in splits.values()):
        return splits
    lists, other = [holds_lists(rows) for rows in splits.values()], "--label_column_name names another column"
    several = any(lists)
    if several and not (multi_label and all(lists)):
        why = "(several labels a text), and the model gives a text one" if all(lists) else "in some splits alone"
        raise UserError(f"{where}: column 'label' holds lists {why}; {other}")
    splits, whole = (_lists_of_classes(splits), List) if several else (splits, lambda feature: feature)
    features = [rows.features["label"] for rows in splits.values()]
    features = [feature.feature for feature in features] if several else features
    if any(isinstance(feature, ClassLabel) for feature in features):
        return splits
    for feature in features:
        if not isinstance(feature, Value):
            holds = f"{where}: column 'label' holds {type(feature).__name__} and no names or integers"
            raise UserError(f"{holds}; {other}")
        if not feature.dtype.startswith(("int", "uint", "bool", "string", "large_string")):
            raise UserError(f"{where}: column 'label' is {feature.dtype}, no class; write names or integers")
    splits = {split: rows.cast_column("label", whole(Value("string"))) for split, rows in splits.items()}
    feature = whole(ClassLabel(names=_sorted(_names_in(splits, several), where)))
    return {split: rows.cast_column("label", feature) for split, rows in splits.items()}


def _names_in(splits: dict, several: bool) -> set[str]:
    """All names that rows have as their label, or as one of ``several``; raises `UserError` for an empty one."""
    names = set()
    for split, rows in splits.items():
        for row, label in enumerate(rows["label"]):
            for name in label if several else [label]:
                if not (name or "").strip():
                    raise UserError(f"{split} row {row}: label is {name!r}; each row needs one")
                names.add(name.strip())  # as `ClassLabel` does
    return names


def _lists_of_classes(splits: dict) -> dict:
    """Lists of 0 and 1, one for each class in all rows, as lists of the classes that have a 1; others as they are."""
    columns = {split: list(rows["label"]) for split, rows in splits.items()}
    for split, labels in columns.items():
        if None in labels:
            raise UserError(f"{split} row {labels.index(None)}: label is None; a text without labels has []")
    every = [label for labels in columns.values() for label in labels]
    width = len(every[0]) if every else 0
    if width < 2 or not all(len(label) == width and set(label) <= {0, 1} for label in every):
        return splits
    for split, labels in columns.items():
        classes = [[place for place, value in enumerate(label) if value] for label in labels]
        splits = splits | {split: splits[split].remove_columns("label").add_column("label", classes)}
    return splits


def holds_lists(rows) -> bool:
    """Whether each row has a list of labels: `datasets` calls such a feature List, LargeList or Sequence."""
    return hasattr(rows.features["label"], "feature")


def class_names(feature) -> list[str] | None:
    """The names of the classes of a ClassLabel or of lists of one; None for another feature."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def label_array(rows, classes: int, multi_label: bool = False) -> np.ndarray:
    """The labels of rows: int (rows,), or with ``multi_label`` 0 or 1 for each of the classes, (rows, classes)."""
    if not multi_label:
        return np.asarray(rows["label"])
    labels = np.zeros((len(rows), classes), dtype=int)
    for row, found in enumerate(rows["label"]):
        labels[row, found] = 1
    return labels


def _sorted(names: set[str], where: str) -> list[str]:
    """The names of classes in their order; raises `UserError` for numbers with a fraction, which are no classes."""
    if all(re.fullmatch(r"[+-]?\d{1,18}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    if all(re.fullmatch(r"[+-]?\d*\.?\d+(e[+-]?\d+)?", name, re.IGNORECASE) for name in names):
        example = next(name for name in sorted(names) if not name.isdecimal())
        raise UserError(
            f"{where}: column 'label' holds numbers such as {example}, no classes; write names or integers"
        )
    return sorted(names)


def match_labels(splits: dict, names: list[str], model_labels: list[str], where: str) -> dict:
    """Puts labels into the order of a fine-tuned model's: names are compared, without letter case, never positions.

    Args:
        splits: name -> `datasets.Dataset` whose labels are indices into ``names``.
        model_labels: names in the order of the model's logits. Default names, LABEL_0 and so on, fit the integers.

    Raises:
        UserError: with both lists, if one has a name that the other lacks.
    """
    from datasets import ClassLabel, Features, List

    found, wanted = [name.strip() for name in names], [name.strip() for name in model_labels]
    if wanted == [f"LABEL_{index}" for index in range(len(wanted))] and all(name.isdecimal() for name in found):
        found = [f"LABEL_{int(name)}" for name in found]
    if len(set(map(str.casefold, wanted))) == len(wanted):
        found, wanted = list(map(str.casefold, found)), list(map(str.casefold, wanted))
    if sorted(found) != sorted(wanted):
        lists = f"{len(wanted)} labels ({', '.join(model_labels)}), {where} has {len(names)} ({', '.join(names)})"
        raise UserError(f"the model answers {lists}; give both the same, in the dataset or in id2label of config.json")
    if found == wanted:
        return splits
    print(f"{where}: labels are put into the order of the model's: {', '.join(model_labels)}")
    order = [wanted.index(name) for name in found]

    def reorder(row: dict) -> dict:
        label = row["label"]
        return {"label": [order[one] for one in label] if isinstance(label, list) else order[label]}

    names = ClassLabel(names=model_labels)
    if holds_lists(next(iter(splits.values()))):
        names = List(names)
    return {
        split: rows.map(reorder, features=Features({**rows.features, "label": names}))
        for split, rows in splits.items()
    }
