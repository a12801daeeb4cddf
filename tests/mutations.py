"""Random faults, each from a seeded generator: damaged model folders and results, odd inputs, failing Hubs.

Each function takes a `random.Random`, makes or draws one fault and returns a line that tells which, so that a failure
can be drawn again. A command must end with an answer or with one line that says what to do; never with a traceback.
"""

import json
import random
from pathlib import Path

import datasets
import numpy as np
import onnx
import yaml
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from conftest import build_rows, color_features, edit_json, read_json, save_dataset
from hub_server import WRITE, Fault, Hub

# Model folders: what disks, downloads, editors and attackers do to their files

SUMS = "SHA256SUMS"
SIZES = ("vocab_size", "hidden_size", "dim", "intermediate_size", "max_position_embeddings", "num_attention_heads")
# Values of every type, and such that mean nothing where a size, a number or a name is wanted
OTHERS = [None, True, 0, -1, 3, 10**6, 10**12, 0.5, float("nan"), "", "x", "../x", "a\nb", [], [1], {}, {"a": None}]
OTHERS += [10**21, -(10**21), "a\x1b[2J\u202eb", "<b>|`$"]


def damage(folder: Path, draw: random.Random, kind: str | None = None) -> str:
    """Damages a folder; returns a description.

    Args:
        kind: one of `KINDS`; drawn if None, among those for which the folder has a file.

    Raises:
        LookupError: if the folder has no file for this kind.
    """
    for one in [kind] if kind else draw.sample(list(KINDS), len(KINDS)):
        pattern, change = KINDS[one]
        files = [path for path in sorted(folder.rglob(pattern)) if path.is_file()]
        if change not in OF_SUMS:  # the sums are what finds the other damages
            files = [path for path in files if path.name != SUMS]
        if files:
            path = draw.choice(files)
            about = change(path, draw)
            return f"{one}: {path.relative_to(folder).as_posix()}: {about}"
    raise LookupError(f"{folder} has no file for {kind}")


def flip_bits(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    places = [draw.randrange(len(content)) for _ in range(draw.choice([1, 1, 8, 100]))]
    for place in places:
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"{len(places)} bits from byte {places[0]}"


def cut(path: Path, draw: random.Random) -> str:
    length = draw.choice([0, 1, 8, draw.randrange(path.stat().st_size)])
    path.write_bytes(path.read_bytes()[:length])
    return f"to {length} bytes"


def blank(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)
    return f"a block of zeros at byte {start}"


def exchange(path: Path, draw: random.Random) -> str:
    root = path.parent if path.parent.name not in {"onnx", "openvino", "adapter"} else path.parent.parent
    other = draw.choice([one for one in sorted(root.rglob("*")) if one.is_file() and one.name != SUMS])
    path.write_bytes(other.read_bytes())
    return f"with the bytes of {other.name}"


def link_away(path: Path, draw: random.Random) -> str:
    target = draw.choice(["/dev/zero", "/etc/passwd", path.with_name("nowhere"), path.parent])
    path.unlink()
    path.symlink_to(target)
    return f"a link to {target}"


def change_settings(path: Path, draw: random.Random) -> str:
    is_yaml = path.suffix == ".yaml"
    values = (yaml.safe_load if is_yaml else json.loads)(path.read_text(encoding="utf-8"))
    about = change_value(values, draw)
    path.write_text(yaml.safe_dump(values, sort_keys=False) if is_yaml else json.dumps(values), encoding="utf-8")
    return about


def replace_settings(path: Path, draw: random.Random) -> str:
    texts = ["", "- a\n", "x", "42", "a: !!bool maybe", "a: 2026-99-99", "a: [", "{1: 2}", "a: !!set {b}"]
    text = draw.choice(texts) if path.suffix == ".yaml" else json.dumps(draw.choice(OTHERS))
    path.write_text(text, encoding="utf-8")
    return f"{text!r} for all"


def change_value(values: dict, draw: random.Random) -> str:
    """Replaces or removes a value of a mapping, at any depth."""
    place, name = values, ""
    while True:
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        name += f"/{key}"
        below = place[key]
        if isinstance(below, dict | list) and below and draw.random() < 0.6:
            place = below
        elif isinstance(place, dict) and draw.random() < 0.2:
            del place[key]
            return f"{name} removed"
        else:
            place[key] = draw.choice([one for one in OTHERS if type(one) is not type(below)] + OTHERS)
            return f"{name} is {place[key]!r}"


def edit_config(path: Path, **values) -> None:
    path.write_text(json.dumps(read_json(path) | values), encoding="utf-8")


def change_labels(path: Path, draw: random.Random) -> str:
    names = list(read_json(path)["id2label"].values())
    way = draw.choice(["reversed", "twice", "two lines", "no text", "one less", "one more"])
    changed = {"reversed": names[::-1], "twice": [names[0], *names[:-1]], "two lines": [names[0] + "\nx", *names[1:]]}
    changed |= {"no text": [7, *names[1:]], "one less": names[:-1], "one more": [*names, "another"]}
    changed = changed[way]
    numbered = {str(number): name for number, name in enumerate(changed)}
    edit_config(path, id2label=numbered, label2id={str(name): number for number, name in enumerate(changed)})
    return way


def change_size(*names: str, most: int):
    def change(path: Path, draw: random.Random) -> str:
        config = read_json(path)
        key = draw.choice([name for name in names if name in config])
        size = draw.choice([0, 1, config[key] - 1, config[key] + 1, config[key] * 2, most])
        edit_config(path, **{key: size})
        return f"{key} {size}"

    return change


def shuffle_words(path: Path, draw: random.Random) -> str:
    vocabulary = read_json(path)["model"]["vocab"]
    numbers = list(vocabulary.values())
    draw.shuffle(numbers)
    edit_json(path, "model/vocab", dict(zip(vocabulary, numbers, strict=True)))
    return "other numbers for the same words"


def add_words(path: Path, draw: random.Random) -> str:
    vocabulary = read_json(path)["model"]["vocab"]
    more = {f"word{number}": number for number in range(len(vocabulary), len(vocabulary) + draw.choice([1, 1000]))}
    edit_json(path, "model/vocab", vocabulary | more)
    return f"{len(more)} more words"


def spoil_weights(path: Path, draw: random.Random) -> str:
    tensors = load_file(path)
    name = draw.choice([one for one in sorted(tensors) if tensors[one].is_floating_point()])
    way = draw.choice(["nan", "inf", "zero", "removed", "added", "shape"])
    if way == "removed":
        del tensors[name]
    elif way == "added":
        tensors[f"{name}.more"] = tensors[name].clone()
    elif way == "shape":
        tensors[name] = tensors[name].flatten()[:-1].clone()
    else:
        tensors[name] = tensors[name].clone().fill_(float(way.replace("zero", "0")))
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name}: {way}"


def zero_head(path: Path, draw: random.Random) -> str:
    tensors = load_file(path)
    for name in [name for name in tensors if name.startswith("classifier")]:
        tensors[name] = tensors[name] * 0
    save_file(tensors, path, metadata={"format": "pt"})
    return "a head of zeros"


def spoil_onnx(path: Path, draw: random.Random) -> str:
    model = onnx.load(path)
    floats = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT]
    chosen, value = draw.choice(floats), draw.choice([np.nan, np.inf, 0.0])
    array = np.full_like(onnx.numpy_helper.to_array(chosen), value)
    chosen.CopyFrom(onnx.numpy_helper.from_array(array, chosen.name))
    onnx.save(model, path)
    return f"{chosen.name} is {value}"


def edit_onnx(path: Path, draw: random.Random) -> str:
    model = onnx.load(path)
    graph = model.graph
    way = draw.choice(["input name", "output name", "rank", "type", "width", "node", "opset"])
    value = draw.choice(graph.output if way in {"output name", "width"} else graph.input)
    if way in {"input name", "output name"}:
        rename_onnx(graph, value.name, "other")
    elif way == "rank":
        value.type.tensor_type.shape.dim.add().dim_value = 1
    elif way == "type":
        value.type.tensor_type.elem_type = onnx.TensorProto.INT32
    elif way == "width":
        value.type.tensor_type.shape.dim[-1].dim_value = 7
    elif way == "node":
        del graph.node[draw.randrange(len(graph.node))]
    else:
        model.opset_import[0].version = 999
    onnx.save(model, path)
    return way


def rename_onnx(graph, name: str, other: str) -> None:
    for value in [*graph.input, *graph.output]:
        if value.name == name:
            value.name = other
    for node in graph.node:
        for names in (node.input, node.output):
            for place, one in enumerate(names):
                if one == name:
                    names[place] = other


def edit_openvino(path: Path, draw: random.Random) -> str:
    old, new = draw.choice(
        [
            ('"input_ids"', '"other"'),
            ('"logits"', '"other"'),
            ('"i64"', '"i32"'),
            ('"f32"', '"f16"'),
            ('shape="?,?"', 'shape="?,?,?"'),
            ('type="MatMul"', 'type="Other"'),
            ("<edge ", "<other "),
            ("<dim>64</dim>", "<dim>65</dim>"),
            ('"opset1"', '"opset999"'),
        ]
    )
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(old, new, draw.choice([1, -1])), encoding="utf-8")
    return f"{new} for {old}"


def spoil_sums(path: Path, draw: random.Random) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    way = draw.choice(["twice", "outside", "no sum", "one less", "empty", "other sum"])
    place = next(number for number, line in enumerate(lines) if line.endswith("  config.json"))
    if way == "twice":
        lines.append(lines[place])
    elif way == "outside":
        lines.append(f"{'0' * 64}  ../config.json")
    elif way == "no sum":
        lines[place] = "config.json"
    elif way == "other sum":
        lines[place] = f"{'0' * 64}  config.json"
    else:
        lines = lines[:place] + lines[place + 1 :] if way == "one less" else []
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return way


# Kind -> the files that it damages, and how
KINDS = {
    "bits": ("*", flip_bits),
    "cut": ("*", cut),
    "longer": ("*", lambda path, draw: path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice([1, 1000])))),
    "blank": ("*", blank),
    "deleted": ("*", lambda path, draw: path.unlink()),
    "exchanged": ("*", exchange),
    "a folder": ("*", lambda path, draw: (path.unlink(), path.mkdir())),
    "a link": ("*", link_away),
    "a value": ("*config.json", change_settings),
    "a value of the tokenizer": ("tokenizer.json", change_settings),
    "other JSON": ("*.json", replace_settings),
    "nested": ("*.json", lambda path, draw: path.write_text("[" * 100_000)),
    "flood": ("*.json", lambda path, draw: path.write_text("{" + " " * 70_000_000 + "}")),
    "no UTF-8": ("*.json", lambda path, draw: path.write_text(path.read_text(encoding="utf-8"), encoding="utf-16")),
    "recipe": ("recipe.yaml", change_settings),
    "other recipe": ("recipe.yaml", replace_settings),
    "labels": ("config.json", change_labels),
    "layers": ("config.json", change_size("num_hidden_layers", "n_layers", most=10**6)),
    "sizes": ("config.json", change_size(*SIZES, most=10**9)),
    "shuffled words": ("tokenizer.json", shuffle_words),
    "more words": ("tokenizer.json", add_words),
    "no frame": ("tokenizer.json", lambda path, draw: edit_config(path, post_processor=None)),
    "weights": ("*.safetensors", spoil_weights),
    "head": ("model*.safetensors", zero_head),
    "ONNX weights": ("*.onnx", spoil_onnx),
    "ONNX graph": ("*.onnx", edit_onnx),
    "OpenVINO graph": ("*.xml", edit_openvino),
    "sums": (SUMS, spoil_sums),
}
OF_SUMS = {spoil_sums}


# Inputs of a user, good and bad: flags, configs, folders of datasets and texts

# Words that stand for no number, or for one that few flags take
NUMBERS = ("-1", "0", "nan", "inf", "-inf", "1e400", "9" * 400, "1.5", "-0.5", "1e-320", "0x10", "1_000", "2", "1e9")
WORDS = ("", " ", "abc", "[]", "{}", '{"a": 1}', "null", "true", "é", "../..", "x" * 5000, "/dev/null", "~", "--", "-")
SPLITS = ("train", "validation", "test")
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
    apart = [f"--{name}", value]
    args = {"joined": [f"--{name}={value}"], "apart": apart, "alone": apart[:1], "twice": apart * 2}
    return f"--{name} {value!r:.40} {form}", args.get(form, [f"--{name[:-1]}", value])


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
    kind = rng.choice(list(DATASETS))
    folder.mkdir(parents=True)
    DATASETS[kind](rng, folder)
    return kind


def _columns(**columns):
    """A dataset whose splits have these columns, of the types that the library finds."""
    return lambda rng, folder: save_dataset(folder, dict.fromkeys(SPLITS, columns))


def _row(text: str):
    """A good dataset in which one row of one split has this text."""

    def save(rng, folder):
        splits = {name: build_rows(rng.choice([9, 12, 30])) for name in SPLITS}
        texts = splits[rng.choice(list(splits))]["text"]
        texts[rng.randrange(len(texts))] = text
        save_dataset(folder, splits, color_features())

    return save


def _splits(*sizes):
    """A dataset with splits of these sizes; None leaves a split out."""

    def save(rng, folder):
        named = zip(SPLITS, sizes, strict=True)
        save_dataset(folder, {name: build_rows(size) for name, size in named if size is not None}, color_features())

    return save


def _file(name: str, content: bytes):
    return lambda rng, folder: (folder / name).write_bytes(content)


def _card(head: bytes):
    def save(rng, folder):
        _splits(30, 9, 9)(rng, folder)
        (folder / "README.md").write_bytes(b"---\n" + head + b"\n---\n")

    return save


def _labels(names):
    """A dataset whose classes have these names."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    columns = {"text": ["red", "blue"], "label": [0, len(names) - 1]}
    return lambda rng, folder: save_dataset(folder, dict.fromkeys(SPLITS, columns), features)


def _label_out_of_range(rng, folder):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("int64")})
    columns = {"text": ["a", "b"], "label": [0, rng.choice([-2, 3, 7, 2**40])]}
    rows = datasets.Dataset.from_dict(columns, features=features).data.table
    parquet.write_table(rows.replace_schema_metadata(color_features().arrow_schema.metadata), folder / "train.parquet")


def _cut_off(rng, folder):
    _splits(30, 9, 9)(rng, folder)
    path = folder / f"{rng.choice(SPLITS)}.parquet"
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
    "labels without names": _columns(text=["a", "b"], label=[0, 1]),
    "labels as words": _columns(text=["a", "b"], label=["joy", "fear"]),
    "texts as lists": _columns(text=[["a"], ["b"]], label=[0, 1]),
    "texts as mappings": _columns(text=[{"a": 1}, {"a": 2}], label=[0, 1]),
    "texts as bytes": _columns(text=[b"\xff", b"a"], label=[0, 1]),
    "nothing but nulls": _columns(text=[None, None], label=[None, None]),
    "text empty": _row(""),
    "text of zero characters": _row("\0"),
    "text of a megabyte": _row("sky " * 250_000),
    "text of one long word": _row("s" * 1_000_000),
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
    "card that is no YAML": _card(b"a: b: c"),
    "card of other columns": _card(b"dataset_info:\n  features:\n  - name: x\n    dtype: int64"),
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


# Folders of results: what a disk, an editor or a careless program leaves behind

# What a field of a record may be replaced with: other types, and numbers that are no measurement
VALUES = (None, True, -1, 0, 1.5, 1e999, 10**30, float("nan"), "", "seven", "two\nlines", "\ud800")
VALUES += ([], [None], {}, {"a": []})


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
    path = pick_json(folder, draw)
    value = read_json(path)
    place = draw.choice(places_of(value))
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    way, number = draw.choice(("replaced", "removed", "shifted")), inner[place[-1]]
    if way == "removed":
        del inner[place[-1]]
    elif way == "replaced":
        inner[place[-1]] = draw.choice(VALUES)
    elif isinstance(number, int | float) and not isinstance(number, bool):  # still a number
        inner[place[-1]] = draw.choice((number + 1, number * 1.01, -number - 1))
    path.write_text(json.dumps(value), encoding="utf-8")
    return f"{path.relative_to(folder)}: {way} {'.'.join(map(str, place))}"


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


def damage_results(folder: Path, draw) -> str:
    """Damages a folder of results in one of all the ways; returns a description."""
    return draw.choice((change_field, change_field, change_field, damage_bytes))(folder, draw)


# Answers of the Hub: what a proxy, a broken server or a liar may send

POSTED = ("/api/repos/create", "/validate-yaml", "/preupload/", "/objects/batch", "/lfs-verify", "/commit/")
REQUESTS = [*(("POST", path) for path in POSTED), ("PUT", "/lfs/"), ("HEAD", "/resolve/"), ("HEAD", "config.json")]
REQUESTS += [("GET", path) for path in ("/api/models/", "/resolve/", "tokenizer.json", "model_quantized.onnx")]
STATUSES = (204, 206, 300, 302, 304, 400, 401, 402, 403, 404, 408, 409, 413, 416, 418, 422, 429, 451)
STATUSES += (500, 502, 503, 507)
BODIES = (b"", b"<html>Sign in to a network</html>", b"\xff\xfe\x00", b'{"error": ', None, [], [None], {}, 3, "words")
BODIES += (
    {"error": [f"no\nto\x1b[2J {WRITE}"]},
    {"errors": 3, "files": {}, "objects": 7, "siblings": "x"},
    {"files": [None], "objects": [None], "siblings": [{}], "url": 3, "commitUrl": [], "commitOid": 1},
    {"objects": [{"oid": "1", "size": 1, "error": {"code": 413, "message": f"quota of {WRITE}"}}]},
    {"objects": [{"oid": 1, "size": "x", "actions": {"upload": {}}}]},
)
HEADERS = (
    *({"ETag": None}, {"ETag": '"../../../../outside"'}, {"X-Linked-ETag": "/outside"}),
    *({"X-Repo-Commit": commit} for commit in (None, "../../outside", "0" * 40)),
    *({"Content-Length": None, "Connection": "close"}, {"Content-Length": "many"}, {"Content-Length": "-1"}),
    *({"Content-Encoding": "gzip"}, {"Content-Range": "bytes x"}, {"X-Linked-Size": "7"}),
    {"X-Error-Code": "RepoNotFound"},
    {"Link": '<{hub}/api/models/user/model/tree/main>; rel="next"'},
    {"Location": "http://127.0.0.1:9/nowhere"},
)
DATES = ("Fri, 01 Jan 2100 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00")
PAUSES = ("0", "2", "86400", "-1", "soon", "nan", "9" * 5000, *DATES)
LOCATIONS = ("", "/", "http://[", "http://127.0.0.1:9/x", "ftp://host/file", "file:///etc/passwd", "//127.0.0.1:9/x")
BADLY = ("cut", "hang", "stall", "trickle", "endless", "shorter", "longer")


def inject_fault(hub: Hub, draw: random.Random) -> str:
    """Gives the server one fault, for some requests or for all; returns what it is."""
    method, path = draw.choice(REQUESTS)
    actions = (
        draw.choice(STATUSES),
        (draw.choice((200, 200, *STATUSES)), draw.choice(BODIES)),
        (draw.choice((301, 307, 308)), b"", {"Location": draw.choice(LOCATIONS)}),
        (draw.choice((429, 503)), b"", {"Retry-After": draw.choice(PAUSES)}),
        (429, b"", {"RateLimit": '"api";r=0;t=100000'}),
        draw.choice(HEADERS),
        draw.choice(BADLY),
    )
    fault = Fault(method, path, draw.choice(actions), times=draw.choice((1, 2, 1000)))
    hub.faults.append(fault)
    return repr(fault)[:300]
