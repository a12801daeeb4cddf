"""Labels by name: texts and integers become classes, and classes take the order of a fine-tuned model's."""

import re

from emotion.utils.errors import UserError


def encode_labels(splits: dict, where: str) -> dict:
    """Makes classes of the texts or integers in the `label` column, with the same names in all splits.

    Args:
        splits: name -> `datasets.Dataset`; those without labels, or with a ClassLabel, are returned as they are.

    Returns:
        The splits with a `ClassLabel`, its names sorted, integers by value; raises `UserError` for other labels.
    """
    from datasets import ClassLabel, Value

    features = [rows.features.get("label") for rows in splits.values()]
    if any(feature is None or isinstance(feature, ClassLabel) for feature in features):
        return splits
    for feature in features:
        if not isinstance(feature, Value):
            holds = f"{where}: column 'label' holds {type(feature).__name__} and not one name or integer a text"
            raise UserError(f"{holds}; --label_column_name names another column")
        if not feature.dtype.startswith(("int", "uint", "bool", "string", "large_string")):
            raise UserError(f"{where}: column 'label' is {feature.dtype}, no class; write names or integers")
    splits = {split: rows.cast_column("label", Value("string")) for split, rows in splits.items()}
    names = set()
    for split, rows in splits.items():
        for name in rows.unique("label"):
            if not (name or "").strip():
                row = list(rows["label"]).index(name)
                raise UserError(f"{split} row {row}: label is {name!r}; each row needs one")
            names.add(name.strip())  # as `ClassLabel` does
    feature = ClassLabel(names=_sorted(names, where))
    return {split: rows.cast_column("label", feature) for split, rows in splits.items()}


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
    from datasets import ClassLabel, Features

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
        return {"label": order[row["label"]]}

    names = ClassLabel(names=model_labels)
    return {
        split: rows.map(reorder, features=Features({**rows.features, "label": names}))
        for split, rows in splits.items()
    }
