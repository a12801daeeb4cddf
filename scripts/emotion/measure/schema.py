"""Checks files of results against `schemas.yaml`, so that a damaged one is named before anything is written from it.

A library of JSON schemas cannot say that one field counts the entries of another, and says the rest at three times the
length. The notation of `schemas.yaml`, in which each shape is one of these:

- a word: one of `KINDS` or of the file's own `parts`; `one of a, b`, or of the names or entries of a field; `total of`
  numbers in a field; `place in` a list. `or null` behind it allows null, which says that a value was not measured.
- a list `[shape, size]`: the size is a number, `*` for any, `distinct`, or a field that has as many entries; without
  one the list must not be empty.
- a mapping: the names that must be there. `name if there` may be missing, `name if field` must be there where the
  field is (`is value`: where it has that value). `*` stands for any other names, `+` for one or more, `each of` for
  the names or entries of a field.

A field that another one is compared with stands above it, in the same mapping or in one around it.
"""

import datetime
import json
from functools import cache
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import read_json
from emotion.model.artifact import WEIGHT_FILES

LARGEST = 1e15  # no measurement is larger; float64 still tells its integers apart
# Numbers that never fall between two of their names; where both are there, they rise.
RISING = (("min", "median", "max"), ("p5", "p25", "p50", "p75", "p95", "p99"))


def _is_number(value) -> bool:
    # To Python true is a number; a NaN is smaller than nothing, so that it fails here too.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _is_integer(value) -> bool:
    return _is_number(value) and isinstance(value, int)


def _is_date(value) -> bool:
    try:
        return isinstance(value, str) and datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def _is_text(value) -> bool:
    # One line: another one would end a row of a table.
    return isinstance(value, str) and bool(value.strip()) and len(value.splitlines()) == 1


# Word of a shape -> how a message calls it, and the test
KINDS = {
    "any": ("anything", lambda value: True),
    "string": ("a text", lambda value: isinstance(value, str)),
    "text": ("a text of one line", _is_text),
    "date": ("a date like 2026-01-31", _is_date),
    "format": (f"one of {', '.join(WEIGHT_FILES)}", lambda value: isinstance(value, str) and value in WEIGHT_FILES),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "number": ("a number", _is_number),
    "integer": ("a whole number", _is_integer),
    "count": ("a whole number from 0 on", lambda value: _is_integer(value) and value >= 0),
    "whole": ("a whole number from 1 on", lambda value: _is_integer(value) and value >= 1),
    "amount": ("a number from 0 on", lambda value: _is_number(value) and value >= 0),
    "positive": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "share": ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "change": ("a number from -1 to 1", lambda value: _is_number(value) and -1 <= value <= 1),
}


@cache
def _schemas() -> dict:
    import yaml  # here: who only names a record does not need it

    return yaml.safe_load(Path(__file__).with_name("schemas.yaml").read_text(encoding="utf-8"))


def read_result(path: Path, kind: str) -> dict:
    """Reads a JSON file of results.

    Args:
        kind: its name in `schemas.yaml`.

    Raises:
        UserError: if the file is missing or damaged; it names the file and the field.
    """
    return check_result(read_json(path), kind, path)


def check_result(result: dict, kind: str, name) -> dict:
    """Returns the result; raises `UserError` with ``name`` in front if a field is missing or not what it must be."""
    if fault := _find_fault(result, _schemas()["files"][kind], "", ()):
        raise UserError(f"{name}: {fault}; measure it again")
    return result


def _find_fault(value, shape, field: str, around: tuple) -> str | None:
    """What is wrong with a value, in words; None if nothing is.

    Args:
        field: the value's name, with dots.
        around: the mappings that it lies in, the innermost first.
    """
    if isinstance(shape, str):
        return _find_fault_of_word(value, shape, field, around)
    kind = type(shape)
    if not isinstance(value, kind):
        return _other(field, value, "a list" if kind is list else "a mapping")
    if kind is list:
        return _find_fault_of_list(value, *shape, field=field, around=around)
    return _find_fault_of_mapping(value, shape, field, around)


def _find_fault_of_word(value, word: str, field: str, around: tuple) -> str | None:
    word, _, null = word.partition(" or ")
    if null and value is None:
        return None
    if word in _schemas()["parts"]:
        return _find_fault(value, _schemas()["parts"][word], field, around)
    if word in KINDS:
        expected, fits = KINDS[word]
        return None if fits(value) else _other(field, value, expected)
    relation, _, names = word.partition(" in " if " in " in word else " of ")
    if relation == "total":
        numbers = [_lookup(name, around) for name in names.split(" and ")]
        totals = {sum(one.values() if isinstance(one, dict) else one) for one in numbers}
        fits = _is_integer(value) and totals == {value}
    elif relation == "place":
        fits = _is_integer(value) and 0 <= value < len(_lookup(names, around))
    else:
        fits = isinstance(value, str) and value in (names.split(", ") if "," in names else _lookup(names, around))
    return None if fits else _other(field, value, word)


def _find_fault_of_list(value: list, shape, size="+", *, field: str, around: tuple) -> str | None:
    if size == "distinct" and len(set(map(str, value))) < len(value):
        return f"'{field}' has an entry twice"
    if size in ("+", "distinct") and not value:
        return f"'{field}' is empty"
    if size not in ("*", "+", "distinct"):
        wanted = size if isinstance(size, int) else len(_lookup(size, around))
        if len(value) != wanted:
            return f"'{field}' has {len(value)} entries, not {wanted}"
    for place, one in enumerate(value):
        if fault := _find_fault(one, shape, f"{field}[{place}]", around):
            return fault
    return None


def _find_fault_of_mapping(value: dict, shape: dict, field: str, around: tuple) -> str | None:
    around, named = (value, *around), set()
    for key, inner in shape.items():
        names, needed = _names_of(key, value, named, around)
        if key == "+" and not names:
            return f"'{field}' is empty"
        named.update(names)
        for name in names:
            dotted = f"{field}.{name}".lstrip(".")
            if name not in value:
                if needed:
                    return f"the record has no field '{dotted}'"
            elif not _is_text(name):
                return f"'{field}' has a field {_shown(name)}, which is no text of one line"
            elif fault := _find_fault(value[name], inner, dotted, around):
                return fault
    for rising in RISING:
        numbers = [value[name] for name in rising if value.get(name) is not None and name in named]
        if numbers != sorted(numbers):
            return f"'{field}' does not rise from {rising[0]} to {rising[-1]}"
    return None


def _names_of(key: str, value: dict, named: set, around: tuple) -> tuple[list[str], bool]:
    """The names in a mapping that a key of its shape stands for, and whether each must be there.

    Args:
        named: those that the keys before it stand for.
    """
    if key in ("*", "+"):
        return [name for name in value if name not in named], True
    if key.startswith("each of "):
        return list(_lookup(key.removeprefix("each of "), around)), True
    name, _, condition = key.partition(" if ")
    if condition in ("", "there"):
        return [name], not condition
    other, _, wanted = condition.partition(" is ")
    found = _lookup(other, around, None)
    is_asked_for = found == wanted if wanted else found not in (None, 0)
    return ([name], True) if is_asked_for else ([], False)


def _lookup(name: str, around: tuple, *default):
    """The value of a field in the nearest of the mappings that has it."""
    return next((one[name] for one in around if name in one), *default)


def _other(field: str, value, expected: str) -> str:
    return f"'{field}' is {_shown(value)}, not {expected}"


def _shown(value) -> str:
    """A value as JSON, on one short line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
