"""Damages of a folder of results, drawn by a seed: what a disk, an editor or a careless program leaves behind.

Each function takes a copy of a folder of results and a `random.Random`, damages one file and returns what it did.
"""

import json
from pathlib import Path

# What a field may be replaced with: other types, and numbers that are no measurement
VALUES = (
    None,
    True,
    -1,
    0,
    1.5,
    1e999,
    10**30,
    float("nan"),
    "",
    "seven",
    "two\nlines",
    [],
    [None],
    {},
    {"a": []},
    "\ud800",
)


def pick_json(folder: Path, draw) -> Path:
    """A JSON file that is rendered; `comparison.json` is written anew each time."""
    paths = [path for path in folder.rglob("*.json") if path.name != "comparison.json"]
    return draw.choice(sorted(path for path in paths if "seeds" not in path.parent.parent.parts[-2:]))


def places_of(value, *path) -> list[tuple]:
    """The ways to all values inside a JSON value: keys and indices, from the outermost."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, one in pairs:
        found += [(*path, key), *places_of(one, *path, key)]
    return found


def change_field(folder: Path, draw) -> str:
    """Replaces a value somewhere in a JSON file."""
    return edit(folder, draw, lambda inner, key: inner.__setitem__(key, draw.choice(VALUES)), "replaced")


def remove_field(folder: Path, draw) -> str:
    """Removes a field, or an entry of a list."""
    return edit(folder, draw, lambda inner, key: inner.__delitem__(key), "removed")


def shift_number(folder: Path, draw) -> str:
    """Changes a number, so that it is still a number."""

    def shift(inner, key) -> None:
        if isinstance(inner[key], int | float) and not isinstance(inner[key], bool):
            inner[key] = draw.choice((inner[key] + 1, inner[key] * 1.01, -inner[key] - 1))

    return edit(folder, draw, shift, "shifted")


def edit(folder: Path, draw, change, word: str) -> str:
    """Changes one place of one JSON file."""
    path = pick_json(folder, draw)
    value = json.loads(path.read_text(encoding="utf-8"))
    place = draw.choice(places_of(value))
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    change(inner, place[-1])
    path.write_text(json.dumps(value), encoding="utf-8")
    return f"{path.relative_to(folder)}: {word} {'.'.join(map(str, place))}"


def damage_bytes(folder: Path, draw) -> str:
    """Truncates, empties or scrambles a file, JSON or predictions."""
    predictions = sorted((folder / "predictions").glob("*.parquet"))
    path = draw.choice([pick_json(folder, draw), draw.choice(predictions)])
    content = bytearray(path.read_bytes())
    how = draw.choice(("truncated", "emptied", "scrambled", "replaced by null", "replaced by a list", "not UTF-8"))
    place = draw.randrange(len(content))
    contents = {
        "truncated": content[:place],
        "emptied": b"",
        "scrambled": content[:place] + draw.randbytes(8) + content[place + 8 :],
        "replaced by null": b"null",
        "replaced by a list": b"[" * 5000,
        "not UTF-8": b'{"a": "\xff"}',
    }
    path.write_bytes(contents[how])
    return f"{path.relative_to(folder)}: {how} at {place}"


MUTATIONS = (change_field, remove_field, shift_number, damage_bytes)


def mutate(folder: Path, draw) -> str:
    """Damages a folder of results in one of all the ways; returns a description."""
    one = draw.choice(MUTATIONS)
    return f"{one.__name__}: {one(folder, draw)}"
