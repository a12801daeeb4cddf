"""What strangers write and send: names that are no text, links, edited side files, markup, paths and tokens.

Tables of texts are in test_batch.py, damaged folders in test_integrity.py, answers of a Hub in test_hub.py.
"""

import copy
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import onnx
import pytest

import run_publish
from emotion import EmotionClassifier
from emotion.evaluation.record import read_records
from emotion.evaluation.schema import Record
from emotion.hub.model_card import render_card
from emotion.hub.render import Markdown, escape, plot_confusion_matrix
from emotion.inference.runtimes import check_is_one_file
from emotion.utils.errors import UserError, visible
from emotion.utils.files import ROOT, check_file, check_sums, without_path, write_sums

MODEL = ROOT / "weights" / "qat-int4"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder of a stranger, without checksums."""
    return Path(shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("SHA256SUMS")))


def edit(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def refused(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(UserError) as error:
        EmotionClassifier.from_pretrained(folder, threads=1)
    assert visible(str(error.value)) == str(error.value) and str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sad\x1b[31m\x07", r"sad\x1b[31m\x07"),
        ("\u202egnihton\u200f", r"\u202egnihton\u200f"),
        ("a\0b\nc\u2028d\x85", r"a\x00b\nc\u2028d\x85"),
        ("\ud800", r"\ud800"),
        ("R&B, joie, \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645, \U0001f468\u200d\U0001f469", None),
    ],
)
def test_a_label_that_cannot_be_seen_is_refused(text, shown, folder):
    assert visible(text) == (shown or text)
    edit(folder, id2label={str(number): text if number == 5 else str(number) for number in range(6)})
    if shown:
        assert "config.json" in refused(folder)
    else:
        assert EmotionClassifier.from_pretrained(folder, threads=1).labels[5] == text


@pytest.mark.parametrize(
    "values",
    [{"architectures": [1]}, {"architectures": 5}, *({"vocab_size": size} for size in (-1, 0, 10**21))],
    ids=str,
)
def test_a_config_with_senseless_values_is_refused(values, folder):
    edit(folder, **values)
    assert next(iter(values)) in refused(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "onnx/model_quantized.onnx"]
)
@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", "outside"])
def test_a_link_out_of_the_folder_is_not_opened(name, target, folder, tmp_path):
    shutil.move(folder / name, tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / target)
    assert name in refused(folder) or target == "/dev/zero"


def test_links_of_the_hubs_cache_and_inside_a_folder_are_opened(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    (snapshot / "onnx").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("sound", encoding="utf-8")
    (snapshot / "onnx" / "a").symlink_to(Path("../../../blobs/1"))
    (snapshot / "b").symlink_to(Path("onnx/a"))
    check_sums(snapshot, ["onnx/a", "b", "absent"])
    blobs.rename(tmp_path / "theirs")
    blobs.symlink_to(tmp_path / "theirs")  # a folder that only looks like the cache
    for name in ("onnx/a", "b"):
        with pytest.raises(UserError, match=f"{name} is a link out of"):
            check_sums(snapshot, [name])
    os.mkfifo(snapshot / "pipe")
    for name, fault in {"pipe": "is a pipe", "onnx": "is a folder", "absent": "no file"}.items():
        with pytest.raises(UserError, match=fault):
            check_file(snapshot / name)


def test_checksums_without_end_are_not_read(folder):
    with (folder / "SHA256SUMS").open("wb") as file:
        file.truncate(200_000_000)
    assert "SHA256SUMS has 200,000,000 bytes" in refused(folder)


def test_weights_in_another_file_are_refused(tmp_path):
    weights = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32), "weights")
    value = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [64, 64])
    node = onnx.helper.make_node("Identity", ["weights"], ["logits"], name="relocation")
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "graph", [], [value], [weights]))
    onnx.save(model, tmp_path / "one.onnx")
    check_is_one_file(tmp_path / "one.onnx")
    onnx.save(model, tmp_path / "two.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(UserError, match="two.onnx has its weights in another file"):
        check_is_one_file(tmp_path / "two.onnx")


def publish(folder: Path) -> None:
    run_publish.main([str(folder), "--repo_id", "user/mine-qat-int4", "--dry_run", "true"])


def test_a_link_to_a_secret_is_not_published(folder, tmp_path, capsys):
    (tmp_path / "id_rsa").write_text("secret", encoding="utf-8")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UserError, match="LICENSE is a link out of"):
        publish(folder)
    (folder / "LICENSE").unlink()
    write_sums(folder)
    (folder / "LICENSE").symlink_to(tmp_path / "id_rsa")
    publish(folder)
    assert "left out: LICENSE" in capsys.readouterr().out  # SHA256SUMS does not name it


MARKUP = [
    "<img src=x onerror=alert(1)>",
    "p|q ![i](http://evil.example/i.png)",
    "`$x$`",
    "</details>\n\n# Heading\n<b>",
]


@pytest.fixture(scope="module")
def hostile_records() -> list[Record]:
    """The tracked records with other names of the classes and another recipe."""
    records, named = read_records(ROOT / "results"), [*MARKUP[:3], "$\\frac{$", "{{ 1 }}", "'; --"]
    for record in records:
        quality = record.quality
        quality.per_class_f1 = dict(zip(named, quality.per_class_f1.values(), strict=True))
        quality.labels = named
        for example in record.examples:
            example.scores = dict(zip(named, example.scores.values(), strict=True))
        (record.provenance.recipe or {}).update({"learning_rate": MARKUP[3], MARKUP[0]: MARKUP})
    return records


def test_markup_in_names_and_recipes_is_shown_and_does_nothing(hostile_records):
    before = copy.deepcopy(hostile_records)
    _, head, text = render_card(hostile_records, "qat-int4", "user/mine").split("---\n", 2)
    assert hostile_records == before and huggingface_hub.ModelCard(f"---\n{head}---\n").data.model_name == "mine"
    for part in ("<img", "</details>\\n", "![i]", "\n# Heading", "<b>"):
        assert part not in text, part
    assert text.count("</details>") == 1 and "&#60;img src=x onerror=alert(1)>" in text
    (line,) = [line for line in text.splitlines() if line.startswith("F1 of each class: ")]
    assert "&#60;img" in line and line.count("(FP32: ") == 6
    assert escape(Markdown("<b>")) == "<b>" and escape(escape(MARKUP)) == escape(MARKUP)


def test_a_dollar_in_a_name_is_no_mathematics(hostile_records, tmp_path):
    plot_confusion_matrix(next(one for one in hostile_records if one.variant == "ptq"), tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("../../home/name/texts.csv", "texts.csv"),
        ("~/models/bert", "bert"),
        ("~name/models/my bert", "my bert"),
        ("file:///home/name/bert", "bert"),
        ("/home/first last/bert/", "bert"),
        ("C:\\Users\\name\\bert", "bert"),
        ("trained on /home/name/a.csv, then on ../b/c.csv", "trained on a.csv, then on c.csv"),
        ({"files": ["/home/name/a.csv", {"/home/name/b": 1}]}, {"files": ["a.csv", {"b": 1}]}),
        ("owner/name", None),
        ("https://huggingface.co/owner/name", None),
        ("is it joy/love and/or \\d+\\w+ 1/2 ~5", None),
        ([1e-4, None, True, "/", ".", ""], None),
    ],
)
def test_paths_of_this_machine_are_cut_in_what_is_published(value, kept):
    assert without_path(value) == (value if kept is None else kept)


def test_no_error_shows_a_token_or_moves_the_cursor(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "my-own-token")
    error = UserError(f"the Hub says:\n my-own-token, hf_{'aB3' * 12} \x1b[2J\u202e")
    assert str(error) == r"the Hub says: (the token), (a token) \x1b[2J\u202e"
