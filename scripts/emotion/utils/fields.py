"""Files of settings that others may have written or damaged: JSON or YAML, checked where it is read."""

import math
from pathlib import Path

from emotion.utils.errors import UserError, reason_of

MOST_BYTES = 4_000_000  # the config.json of a model has some thousand
MOST_VALUES = 200_000  # in YAML a few lines can stand for millions of values, by names for parts that repeat


def read_fields(path: Path, parse, kinds: dict, most_bytes: int = MOST_BYTES) -> dict:
    """Reads a mapping whose values have the types that this program relies on.

    Args:
        parse: from the file's text to its value.
        kinds: key -> the type, or types, of its value, or the kinds of a mapping inside. A key that the file may leave
            out ends with "?". The file may have more keys.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise UserError(f"{path} has {size:,} bytes, and {most_bytes:,} at most can be right")
        values = parse(path.read_text(encoding="utf-8"))
        _check_plain(values)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except Exception as error:  # not text, not JSON, nested too deeply: each parser has errors of its own
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from error
    _check_kinds(values, kinds, str(path))
    return values


def _check_plain(value) -> None:
    """Raises `ValueError` unless the value is made of what JSON has: a record that quotes it must be written."""
    values = [value]
    for count, one in enumerate(values):  # the list grows while it is read
        if count > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")
        if isinstance(one, dict):
            values += one.keys()
            values += one.values()
            if not all(isinstance(key, str) for key in one):
                raise ValueError("it has a key that is no text")
        elif isinstance(one, list):
            values += one
        elif isinstance(one, float) and not math.isfinite(one) or not isinstance(one, str | int | float | None):
            raise ValueError(f"it holds {one!r:.40}, which JSON does not have")


def _check_kinds(values, kinds: dict, place: str) -> None:
    """Raises `UserError` for the first value of another type than `read_fields` was told."""
    if not isinstance(values, dict):
        raise UserError(f"{place} must hold a mapping and holds {_name(values)}")
    for name, kind in kinds.items():
        key = name.removesuffix("?")
        if key not in values:
            if key == name:
                raise UserError(f"{place} has no '{key}'")
        elif isinstance(kind, dict):
            _check_kinds(values[key], kind, f"{place}: '{key}'")
        # Python counts True as a number, and no field that is read as one can mean it.
        elif not isinstance(values[key], kind) or isinstance(values[key], bool):
            raise UserError(f"{place}: '{key}' cannot be {_name(values[key])}")


def _name(value) -> str:
    """A value for a message, cut short."""
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else f"{value!r:.40}"
