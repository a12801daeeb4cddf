"""Damages to an artifact, drawn from a seed: what disks, downloads, editors and attackers do to its files.

`damage(folder, draw)` changes a copy of an artifact in one way and returns a line that tells which. `KINDS` names the
ways. The same seed makes the same damage to the same files.
"""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import onnx
import yaml
from safetensors.torch import load_file, save_file

SUMS = "SHA256SUMS"
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
    kinds = [kind] if kind else draw.sample(list(KINDS), len(KINDS))
    for one in kinds:
        pattern, change = KINDS[one]
        files = [path for path in sorted(folder.rglob(pattern)) if path.is_file()]
        if change not in OF_SUMS:  # the sums are what finds the other damages
            files = [path for path in files if path.name != SUMS]
        if files:
            path = draw.choice(files)
            about = change(path, draw)
            return f"{one}: {path.relative_to(folder).as_posix()}: {about}"
    raise LookupError(f"{folder} has no file for {kind}")


# Of any file


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


def lengthen(path: Path, draw: random.Random) -> str:
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.choice([1, 1000])))
    return "random bytes at the end"


def blank(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)
    return f"a block of zeros at byte {start}"


def delete(path: Path, draw: random.Random) -> str:
    path.unlink()
    return "gone"


def exchange(path: Path, draw: random.Random) -> str:
    root = path.parent if path.parent.name not in {"onnx", "openvino", "adapter"} else path.parent.parent
    other = draw.choice([one for one in sorted(root.rglob("*")) if one.is_file() and one.name != SUMS])
    path.write_bytes(other.read_bytes())
    return f"with the bytes of {other.name}"


def make_folder(path: Path, draw: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder of that name"


def link_away(path: Path, draw: random.Random) -> str:
    target = draw.choice(["/dev/zero", "/etc/passwd", path.with_name("nowhere"), path.parent])
    path.unlink()
    path.symlink_to(target)
    return f"a link to {target}"


# Of settings


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


def nest_deeply(path: Path, draw: random.Random) -> str:
    path.write_text("[" * 100_000, encoding="utf-8")
    return "100,000 brackets"


def flood(path: Path, draw: random.Random) -> str:
    path.write_text("{" + " " * 70_000_000 + "}", encoding="utf-8")
    return "70 MB of blanks"


def no_text(path: Path, draw: random.Random) -> str:
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-16")
    return "in UTF-16"


# Of the labels, the layers and the words


def edit_config(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def change_labels(path: Path, draw: random.Random) -> str:
    names = list(json.loads(path.read_text(encoding="utf-8"))["id2label"].values())
    way = draw.choice(["reversed", "twice", "two lines", "no text", "one less", "one more"])
    changed = {
        "reversed": names[::-1],
        "twice": [names[0], *names[:-1]],
        "two lines": [names[0] + "\nx", *names[1:]],
        "no text": [7, *names[1:]],
        "one less": names[:-1],
        "one more": [*names, "another"],
    }[way]
    numbered = {str(number): name for number, name in enumerate(changed)}
    edit_config(path, id2label=numbered, label2id={str(name): number for number, name in enumerate(changed)})
    return way


def change_layers(path: Path, draw: random.Random) -> str:
    config = json.loads(path.read_text(encoding="utf-8"))
    key = "num_hidden_layers" if "num_hidden_layers" in config else "n_layers"
    layers = draw.choice([0, 1, config[key] - 1, config[key] + 1, 10**6])
    edit_config(path, **{key: layers})
    return f"{key} {layers}"


def change_sizes(path: Path, draw: random.Random) -> str:
    config = json.loads(path.read_text(encoding="utf-8"))
    names = ("vocab_size", "hidden_size", "dim", "intermediate_size", "max_position_embeddings", "num_attention_heads")
    key = draw.choice([name for name in names if name in config])
    size = draw.choice([0, 1, config[key] - 1, config[key] * 2, 10**9])
    edit_config(path, **{key: size})
    return f"{key} {size}"


def shuffle_words(path: Path, draw: random.Random) -> str:
    values = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    numbers = list(vocabulary.values())
    draw.shuffle(numbers)
    values["model"]["vocab"] = dict(zip(vocabulary, numbers, strict=True))
    path.write_text(json.dumps(values), encoding="utf-8")
    return "other numbers for the same words"


def add_words(path: Path, draw: random.Random) -> str:
    values = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    for number in range(len(vocabulary), len(vocabulary) + draw.choice([1, 1000])):
        vocabulary[f"word{number}"] = number
    path.write_text(json.dumps(values), encoding="utf-8")
    return f"{len(vocabulary)} words"


def leave_frame_out(path: Path, draw: random.Random) -> str:
    edit_config(path, post_processor=None)
    return "no first and last token"


# Of the weights


def spoil_weights(path: Path, draw: random.Random) -> str:
    """Another number in a tensor, a tensor less, one more, or one of another shape."""
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
    names = [name for name in tensors if name.startswith("classifier")]
    for name in names:
        tensors[name] = tensors[name] * 0
    save_file(tensors, path, metadata={"format": "pt"})
    return "a head of zeros"


def spoil_onnx(path: Path, draw: random.Random) -> str:
    """Another number in the weights of a graph."""
    model = onnx.load(path)
    floats = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT]
    chosen, value = draw.choice(floats), draw.choice([np.nan, np.inf, 0.0])
    array = np.full_like(onnx.numpy_helper.to_array(chosen), value)
    chosen.CopyFrom(onnx.numpy_helper.from_array(array, chosen.name))
    onnx.save(model, path)
    return f"{chosen.name} is {value}"


def edit_onnx(path: Path, draw: random.Random) -> str:
    """Another name, rank or type of an input or output, or a node less."""
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
    """Another word in the graph of an OpenVINO file."""
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


# Of the sums


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
    "longer": ("*", lengthen),
    "blank": ("*", blank),
    "deleted": ("*", delete),
    "exchanged": ("*", exchange),
    "a folder": ("*", make_folder),
    "a link": ("*", link_away),
    "a value": ("*config.json", change_settings),
    "a value of the tokenizer": ("tokenizer.json", change_settings),
    "other JSON": ("*.json", replace_settings),
    "nested": ("*.json", nest_deeply),
    "flood": ("*.json", flood),
    "no UTF-8": ("*.json", no_text),
    "recipe": ("recipe.yaml", change_settings),
    "other recipe": ("recipe.yaml", replace_settings),
    "labels": ("config.json", change_labels),
    "layers": ("config.json", change_layers),
    "sizes": ("config.json", change_sizes),
    "shuffled words": ("tokenizer.json", shuffle_words),
    "more words": ("tokenizer.json", add_words),
    "no frame": ("tokenizer.json", leave_frame_out),
    "weights": ("*.safetensors", spoil_weights),
    "head": ("model*.safetensors", zero_head),
    "ONNX weights": ("*.onnx", spoil_onnx),
    "ONNX graph": ("*.onnx", edit_onnx),
    "OpenVINO graph": ("*.xml", edit_openvino),
    "sums": (SUMS, spoil_sums),
}
OF_SUMS = {spoil_sums}


def copy_artifact(source: Path, folder: Path, sums: bool) -> Path:
    """A copy to damage; without its SHA256SUMS it is a stranger's folder, of which the structure alone is checked."""
    return shutil.copytree(source, folder, ignore=None if sums else shutil.ignore_patterns(SUMS))
