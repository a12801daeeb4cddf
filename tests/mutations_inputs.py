"""Random inputs of a user, good and bad: flags, configs, folders of datasets and texts, each from a seeded generator.

Each function takes a `random.Random` and tells what it drew, so that a failure can be drawn again. A command must end
with an answer or with one line that says what to do; it must never end with a traceback, and never hang.
"""

import json
import random
from pathlib import Path

import datasets
from pyarrow import parquet

from conftest import build_rows, color_features, save_dataset

# Words that stand for no number, or for one that few flags take
NUMBERS = ("-1", "0", "nan", "inf", "-inf", "1e400", "9" * 400, "1.5", "-0.5", "1e-320", "0x10", "1_000", "2", "1e9")
WORDS = ("", " ", "abc", "[]", "{}", '{"a": 1}', "null", "true", "é", "../..", "x" * 5000, "/dev/null", "~", "--", "-")
UNPRINTABLE = ("a\0b", "caf\udce9", "line\nbreak", "\x1b[31m", "\u202eabc", "\ufeff")
LETTERS = (
    *"abcdefghijklmnopqrstuvwxyz     ",
    *"\t\n\r\u00a0\u3000\u200b\x00\x0b\x1c\x85",  # what tokenizers take as spaces, and what they leave out
    *".,!?'\"-_#@$%&()[]<>|\\/~^",
    *"éüßÅİſ\u0301\u0327\u1e9e\ufb01Σς",  # accents, apart and composed, and letters that change their number
    *"漢字かな한글",
    *"\U0001f600\U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea\ufe0f",  # emoji of one and of several characters
    *"0123456789",
)


def draw_flag(rng: random.Random, names: list[str]) -> tuple[str, list[str]]:
    """A flag with a value that it may not take: what it is, and the words of the command line."""
    name, value = rng.choice(names), rng.choice([*NUMBERS, *WORDS, *UNPRINTABLE])
    form = rng.choice(["joined", "apart", "alone", "misspelt", "twice"])
    args = {
        "joined": [f"--{name}={value}"],
        "apart": [f"--{name}", value],
        "alone": [f"--{name}"],
        "misspelt": [f"--{name[:-1]}", value],
        "twice": [f"--{name}", value, f"--{name}", value],
    }[form]
    return f"--{name} {value!r:.40} {form}", args


def draw_config(rng: random.Random, names: list[str]) -> tuple[str, bytes]:
    """The text of a config that is odd in one way: what it is, and its bytes."""
    name, value = rng.choice(names), rng.choice([*NUMBERS, *WORDS])
    configs = {
        "empty": b"",
        "value": f"{name}: {value}".encode(),
        "quoted value": json.dumps({name: value}).encode(),
        "list": f"{name}: [1, a, null]".encode(),
        "list in a list": f"{name}: [[1]]".encode(),
        "mapping": f"{name}: {{a: {{b: 1}}}}".encode(),
        "null": f"{name}: null".encode(),
        "yes": f"{name}: yes".encode(),
        "date": f"{name}: 2026-11-26".encode(),
        "month 13": f"{name}: 2026-13-26".encode(),
        "bytes": f"{name}: !!binary aGVsbG8=".encode(),
        "object": f"{name}: !!python/object/apply:os.system ['true']".encode(),
        "endless number": f"{name}: {'9' * 5000}".encode(),
        "half a character": f'{name}: "\\ud800"'.encode(),
        "zero character": f'{name}: "a\\0b"'.encode(),
        "control character": f"{name}: \x07".encode(),
        "latin-1": f"{name}: caf\xe9".encode("latin-1"),
        "utf-16": f"{name}: 1".encode("utf-16"),
        "byte order mark": f"\ufeff{name}: 1".encode(),
        "key that is no text": rng.choice(
            [b"1: 2", b"null: 1", b"1.5: 1", b"true: 1", b"2026-01-01: 1", b"? [a, b]\n: 1"]
        ),
        "key twice": f"{name}: 1\n{name}: 2".encode(),
        "unknown key": b"learning_rat: 1",
        "alias": f"a: &a 1\n{name}: *a".encode(),
        "itself": f"{name}: &a [*a]".encode(),
        "billion laughs": b"a: &a [x, x]\n" + b"".join(b"b%d: &b%d [*a, *a]\n" % (i, i) for i in range(30)),
        "deep": f"{name}: {'[' * 5_000}".encode(),
        "large": b"# padding\n" * 50_000,
        "no mapping": rng.choice([b"- a", b"abc", b"5", b"null", b"---\na: 1\n---\nb: 2"]),
        "not YAML": rng.choice([b"a: b: c", b"a: 'b", b"{", b"\t", b"%", b"a: @b", b"<<: 5", b"=: ="]),
        "mapping of another version": rng.choice([b"per_model: {a: {seed: 1}}", b"per_bits: {8: {seed: 1}}"]),
        "random bytes": rng.randbytes(rng.randint(1, 200)),
    }
    kind = rng.choice(list(configs))
    return f"{kind}: {configs[kind][:60]!r}", configs[kind]


def draw_dataset(rng: random.Random, folder: Path) -> str:
    """Fills a folder with a dataset that is odd in one way; returns what it is."""
    kind = rng.choice(list(DATASETS))
    folder.mkdir(parents=True)
    DATASETS[kind](rng, folder)
    return kind


def _columns(**columns):
    """A dataset whose splits have these columns, of the types that the library finds."""
    return lambda rng, folder: save_dataset(folder, {"train": columns, "validation": columns, "test": columns})


def _rows(text=None, label=None):
    """A good dataset in which one row of one split has this text or label."""

    def save(rng, folder):
        splits = {name: build_rows(rng.choice([9, 12, 30])) for name in ("train", "validation", "test")}
        columns = splits[rng.choice(list(splits))]
        row = rng.randrange(len(columns["text"]))
        if text is not None:
            columns["text"][row] = text[0]
        if label is not None:
            columns["label"][row] = label[0]
        save_dataset(folder, splits, color_features())

    return save


def _splits(*sizes):
    """A dataset with splits of these sizes; None leaves a split out."""

    def save(rng, folder):
        splits = {}
        for name, size in zip(("train", "validation", "test"), sizes, strict=True):
            if size is not None:
                splits[name] = build_rows(size)
        save_dataset(folder, splits, color_features())

    return save


def _file(name: str, content: bytes):
    return lambda rng, folder: (folder / name).write_bytes(content)


def _labels(names):
    """A dataset whose classes have these names."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    columns = {"text": ["red", "blue"], "label": [0, len(names) - 1]}
    return lambda rng, folder: save_dataset(folder, dict.fromkeys(("train", "validation", "test"), columns), features)


def _label_out_of_range(rng, folder):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("int64")})
    columns = {"text": ["a", "b"], "label": [0, rng.choice([-2, 3, 7, 2**40])]}
    rows = datasets.Dataset.from_dict(columns, features=features).data.table
    parquet.write_table(rows.replace_schema_metadata(color_features().arrow_schema.metadata), folder / "train.parquet")


def _cut_off(rng, folder):
    _splits(30, 9, 9)(rng, folder)
    path = folder / f"{rng.choice(['train', 'validation', 'test'])}.parquet"
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def _flipped(rng, folder):
    _splits(30, 9, 9)(rng, folder)
    path = folder / "train.parquet"
    content = bytearray(path.read_bytes())
    for _ in range(5):
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    path.write_bytes(content)


def _saved_to_disk(rng, folder):
    rows = datasets.Dataset.from_dict(build_rows(9), features=color_features())
    if rng.random() < 0.5:
        rows.save_to_disk(folder)  # one split without a name
        return
    datasets.DatasetDict({"train": rows}).save_to_disk(folder)
    damaged = rng.choice(["dataset_dict.json", "train/state.json", "train/dataset_info.json"])
    (folder / damaged).write_bytes(rng.choice([b"", b"null", b"[]", b"{}", b'{"splits": []}', b"\xff"]))


DATASETS = {
    "good": _splits(30, 9, 9),
    "no files": lambda rng, folder: None,
    "other columns": _columns(sentence=["a", "b"], emotion=[0, 1]),
    "no label": _columns(text=["a", "b"]),
    "labels without names": _columns(text=["a", "b"], label=[0, 1]),
    "labels as words": _columns(text=["a", "b"], label=["joy", "fear"]),
    "labels as shares": _columns(text=["a", "b"], label=[0.5, 1.5]),
    "labels as lists": _columns(text=["a", "b"], label=[[0], [1, 2]]),
    "texts as lists": _columns(text=[["a"], ["b"]], label=[0, 1]),
    "texts as mappings": _columns(text=[{"a": 1}, {"a": 2}], label=[0, 1]),
    "texts as numbers": _columns(text=[1, 2], label=[0, 1]),
    "texts as bytes": _columns(text=[b"\xff", b"a"], label=[0, 1]),
    "nothing but nulls": _columns(text=[None, None], label=[None, None]),
    "text null": _rows(text=[None]),
    "text empty": _rows(text=[""]),
    "text of spaces": _rows(text=[" \n\t"]),
    "text of zero characters": _rows(text=["\0"]),
    "text of a megabyte": _rows(text=["sky " * 250_000]),
    "text of one long word": _rows(text=["s" * 1_000_000]),
    "label null": _rows(label=[None]),
    "label of a hidden split": _rows(label=[-1]),
    "label out of range": _label_out_of_range,
    "no train": _splits(None, 9, 9),
    "no validation": _splits(30, None, 9),
    "no test": _splits(30, 9, None),
    "train empty": _splits(0, 9, 9),
    "validation empty": _splits(30, 0, 9),
    "one row each": _splits(1, 1, 1),
    "no class": lambda rng, folder: _columns(text=["a"], label=[None])(rng, folder),
    "one class": _labels(["only"]),
    "classes without letters": _labels(["", " "]),
    "classes of two lines": _labels(["a\nb", "c"]),
    "100 classes": _labels([f"class {number}" for number in range(100)]),
    "CSV": _file("train.csv", b"text,label\nred,0\nblue,1\n"),
    "CSV that is not UTF-8": _file("train.csv", "text,label\ncafé,0\n".encode("latin-1")),
    "CSV with rows of other lengths": _file("train.csv", b"text,label\nred,0,1,2\nblue\n"),
    "CSV of zero bytes": _file("train.csv", b""),
    "JSON that ends early": _file("train.json", b'{"text": "red", "lab'),
    "JSON of another kind": _file("train.json", b"[1, 2, 3]"),
    "JSON lines of other types": _file("train.jsonl", b'{"text": "a", "label": 0}\n{"text": 5, "label": "x"}\n'),
    "plain text": _file("train.txt", b"red\nblue\n"),
    "archive that is none": _file("train.zip", b"PK\x03\x04 and no more"),
    "Parquet of zero bytes": _file("train.parquet", b""),
    "Parquet that is none": _file("train.parquet", b"PAR1 and no more"),
    "Arrow that is none": _file("train.arrow", b"ARROW1 and no more"),
    "program": _file("data.py", b"raise SystemExit('a program of the dataset ran')"),
    "card that is no YAML": lambda rng, folder: (
        _splits(30, 9, 9)(rng, folder),
        _file("README.md", b"---\na: b: c\n---\n")(rng, folder),
    ),
    "card of other columns": lambda rng, folder: (
        _splits(30, 9, 9)(rng, folder),
        _file("README.md", b"---\ndataset_info:\n  features:\n  - name: x\n    dtype: int64\n---\n")(rng, folder),
    ),
    "Parquet cut off": _cut_off,
    "Parquet with flipped bits": _flipped,
    "saved to disk": _saved_to_disk,
}


def draw_text(rng: random.Random) -> tuple[str, str]:
    """A text of any characters: what it is, and the text."""
    kind = rng.choice(["letters", "words", "endless word", "one letter", "spaces between", "accents"])
    letters = rng.choices(LETTERS, k=rng.choice([1, 5, 50, 500, 5000, 50_000]))
    texts = {
        "letters": "".join(letters),
        "words": " ".join(
            rng.choices(["i", "feel", "so", "happy,", "antidisestablishmentarianism", "x" * 120], k=4000)
        ),
        "endless word": "i feel " + "".join(letters).replace(" ", "") + " today",
        "one letter": letters[0] * rng.choice([1, 99, 100, 101, 5000, 50_000]),
        "spaces between": (" " * rng.choice([2, 300, 3000])).join(["sky", "red", *letters[:30]]),
        "accents": "e" + "\u0301" * rng.choice([1, 100, 5000]) + "".join(letters[:100]),
    }
    return f"{kind}: {texts[kind][:40]!r} of {len(texts[kind])}", texts[kind]
