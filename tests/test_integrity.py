"""Damaged artifacts: each ends in one clear line, and none in a traceback, a NaN or another answer."""

import functools
import importlib
import json
import os
import random
import shutil
import subprocess
import time

import numpy as np
import onnx
import pytest
import yaml
from safetensors.torch import load_file, save_file

import run_publish
from conftest import build_rows, run_script, seeds_for
from emotion import EmotionClassifier
from emotion.utils.base_model import read_recipe_of
from emotion.utils.errors import UserError, reason_of
from emotion.utils.files import SUMS_FILE, read_sums
from mutations import KINDS, copy_artifact, damage, edit_config

TEXTS = build_rows(12)["text"]
OPENED = [("adapted", "nf4"), ("artifact", "pytorch"), ("artifact", "bf16"), ("artifact", "onnx")] + [
    ("quantized", format) for format in ("onnx", "openvino", "torchao")
]


def ask(folder, format, **options):
    """What a user reads of a folder: its recipe, its labels and its logits."""
    classifier = EmotionClassifier.from_pretrained(folder, format, threads=1, **options)
    return read_recipe_of(folder), classifier.labels, classifier.logits(TEXTS)


@pytest.fixture(scope="module")
def sound(request):
    """A function from a fixture's name and a format to what the undamaged folder answers."""

    @functools.cache
    def answer(name, format):
        return ask(request.getfixturevalue(name), format)

    return answer


def check_damaged(folder, format, about: str, expected=None) -> bool:
    """Whether a damaged folder is refused, in one line; if not, its logits are finite, and those expected."""
    try:
        recipe, labels, logits = ask(folder, format)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 900, about
        return True
    assert np.isfinite(logits).all() and logits.shape == (len(TEXTS), len(labels)), about
    if expected:
        assert (recipe, labels) == expected[:2], about
        np.testing.assert_allclose(logits, expected[2], atol=1e-4, err_msg=about)
    return False


@pytest.mark.parametrize(("kind", "sums"), [(kind, sums) for kind in KINDS for sums in (True, False)])
def test_a_damaged_folder_answers_as_before_or_not_at_all(kind, sums, sound, request, tmp_path):
    """Damages of files that are not opened change nothing. Without sums not every damage can be seen."""
    refused = 0
    for number, (name, format) in enumerate(OPENED):
        folder = copy_artifact(request.getfixturevalue(name), tmp_path / str(number), sums=sums)
        try:
            about = damage(folder, random.Random(f"{kind} {format}{'' if sums else ' without'}"), kind)
        except LookupError:  # no OpenVINO file in the baseline, or no sums
            continue
        refused += check_damaged(folder, format, about, sound(name, format) if sums else None)
        shutil.rmtree(folder)
    assert refused or not sums, kind


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", seeds_for(10))
def test_no_damage_of_an_artifact_changes_its_answer_in_silence(seed, sound, request, tmp_path, record_property):
    """With the sums and, where the answer may be another one, without."""
    rng = random.Random(seed)
    name, format = rng.choice(OPENED)
    record_property("draws", 2)
    for sums in (True, False):
        folder = copy_artifact(request.getfixturevalue(name), tmp_path / str(sums), sums=sums)
        check_damaged(folder, format, damage(folder, rng), sound(name, format) if sums else None)


# What the structure alone shows


def set_config(**values):
    return lambda folder: edit_config(folder / "config.json", **values)


def name_labels(*names):
    return set_config(id2label={str(number): name for number, name in enumerate(names)})


def set_tokenizer(**values):
    return lambda folder: edit_config(folder / "tokenizer.json", **values)


def set_token(**values):
    return lambda folder: edit_config(folder / "tokenizer_config.json", **values)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def add_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"more": tensors["classifier.bias"].clone()}, folder / "model.safetensors", {"format": "pt"})


def more_words(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["another"] = len(values["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(values))


def edit_graph(change):
    def damage(folder):
        model = onnx.load(folder / "onnx" / "model.onnx")
        change(model.graph)
        onnx.save(model, folder / "onnx" / "model.onnx")

    return damage


def rename(graph):
    for node in graph.node:
        node.input[:] = ["tokens" if name == "input_ids" else name for name in node.input]
    graph.input[0].name = "tokens"


def rename_output(graph):
    for node in graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    graph.output[0].name = "scores"


def fill_head(value):
    def fill(graph):
        (bias,) = [one for one in graph.initializer if one.name == "classifier.bias"]
        bias.CopyFrom(onnx.numpy_helper.from_array(np.full(3, value, dtype=np.float32), bias.name))

    return edit_graph(fill)


# Each letter stands for two of the letter before
REPEATING = b"a: &a [x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c, c, c - 1, c - 1) for c in range(98, 123))
STRUCTURE = [
    # config.json
    (write("config.json", b"null"), "onnx", "config.json must hold a JSON object"),
    (write("config.json", b"[]"), "onnx", "config.json must hold a JSON object"),
    (write("config.json", b"{"), "onnx", "config.json cannot be read: Expecting property name"),
    (write("config.json", b"[" * 99_999), "onnx", "config.json cannot be read: maximum recursion depth"),
    (write("config.json", b'{"vocab_size": NaN}'), "onnx", "config.json cannot be read: it holds nan"),
    (write("config.json", b" " * 5_000_000), "onnx", "config.json .* 5,000,000 bytes"),
    (set_config(id2label=["warm"]), "onnx", "config.json: 'id2label' cannot be"),
    (set_config(quantization_config=[]), "onnx", "'quantization_config' must hold a JSON object"),
    (set_config(quantization_config={"quant_method": {}}), "onnx", "'quant_method' cannot be"),
    (set_config(vocab_size="many"), "onnx", "config.json: 'vocab_size' cannot be 'many'"),
    (set_config(hidden_act=7), "pytorch", "cannot be opened"),
    (set_config(model_type={}), "pytorch", "cannot be opened"),
    # Labels
    (name_labels("warm", "cold", "warm"), "onnx", "config.json names two labels 'warm'"),
    (name_labels("warm", "cold\nwarm", "none"), "onnx", "the name of label 1 is 'cold.nwarm', and not one line"),
    (name_labels("warm", 3, "none"), "onnx", "the name of label 1 is 3, and not one line"),
    (name_labels("warm", "", "none"), "onnx", "the name of label 1 is '', and not one line"),
    (name_labels("warm", "cold"), "onnx", "gives 3 logits and config.json names 2 labels"),
    (set_config(id2label={"0": "a", "1": "b", "x": "c"}), "onnx", "the name of label 2 is None"),
    # Weights
    (set_config(num_hidden_layers=1), "pytorch", "its weights hold bert.encoder.layer.1.* does not have"),
    (set_config(num_hidden_layers=3), "pytorch", "has no weights for bert.encoder.layer.2"),
    (set_config(num_hidden_layers=10**6), "pytorch", "config.json asks for num_hidden_layers 1000000"),
    (set_config(vocab_size=10**9), "pytorch", "config.json asks for vocab_size 1000000000"),
    (add_tensor, "pytorch", "its weights hold more, which the model of config.json does not have"),
    (write("model.safetensors", b"x" * 99), "pytorch", "model.safetensors cannot be read"),
    # Tokenizer
    (more_words, "onnx", r"tokenizer.json has more tokens than config.json names \(23\)"),
    (set_tokenizer(post_processor=None), "onnx", r"tokenizer.json does not add the token \[CLS\] to a text"),
    (set_tokenizer(model=None), "onnx", "tokenizer.json cannot be used"),
    (set_token(pad_token="[NONE]"), "onnx", r"tokenizer.json has no token \[NONE\]"),
    (set_token(sep_token="[NONE]"), "onnx", r"tokenizer.json has no token \[NONE\]"),
    (set_token(pad_token=None), "onnx", "'pad_token' cannot be None"),
    (set_token(model_max_length="long"), "onnx", "'model_max_length' cannot be 'long'"),
    (set_token(model_max_length=-1), "onnx", "tokenizer.json cannot be used"),
    (write("tokenizer.json", b"{" + b" " * 60_000_001), "onnx", "tokenizer.json has 60,000,002 bytes"),
    # Graphs
    (edit_graph(rename), "onnx", "model.onnx does not take input_ids; it takes tokens"),
    (edit_graph(rename_output), "onnx", "model.onnx does not give logits"),
    (edit_graph(lambda graph: graph.node.pop()), "onnx", "model.onnx cannot be opened by ONNX Runtime"),
    (write("onnx/model.onnx", b""), "onnx", "model.onnx cannot be opened by ONNX Runtime"),
    (fill_head(np.nan), "onnx", r"\(onnx\) gives logits that are not finite"),
    (fill_head(np.inf), "onnx", r"\(onnx\) gives logits that are not finite"),
    # recipe.yaml
    (write("recipe.yaml", b""), "onnx", "recipe.yaml must hold a JSON object"),
    (write("recipe.yaml", b"- a"), "onnx", "recipe.yaml must hold a JSON object"),
    (write("recipe.yaml", b"variant: ptq"), "onnx", "recipe.yaml has no 'recipe'"),
    (write("recipe.yaml", b"variant: 3\nrecipe: {}"), "onnx", "recipe.yaml: 'variant' cannot be 3"),
    (write("recipe.yaml", b"a: [\n"), "onnx", "recipe.yaml cannot be read: while parsing"),
    (write("recipe.yaml", b"a: !!bool maybe"), "onnx", "recipe.yaml cannot be read"),
    (write("recipe.yaml", b"a: 2026-01-01"), "onnx", "recipe.yaml cannot be read: it holds datetime.date"),
    (write("recipe.yaml", REPEATING), "onnx", "recipe.yaml cannot be read: it repeats its parts"),
]


@pytest.mark.parametrize(("change", "format", "message"), STRUCTURE)
def test_the_structure_is_checked_without_sums(change, format, message, artifact, tmp_path):
    folder = copy_artifact(artifact, tmp_path / "copy", sums=False)
    change(folder)
    start = time.process_time()
    ask(artifact, format)
    whole, start = time.process_time() - start, time.process_time()
    with pytest.raises(UserError, match=message) as error:
        ask(folder, format)
    assert len(str(error.value).splitlines()) == 1
    assert time.process_time() - start < 1 + 10 * whole  # no model of a million layers was built


OPENVINO = [
    ('"input_ids"', '"tokens"', "openvino_model.xml does not take input_ids"),
    ('names="logits"', 'names="scores"', "openvino_model.xml does not give logits"),
    ('type="MatMul"', 'type="Product"', "cannot be opened by OpenVINO: .*operation with type: Product"),
    ("<net", "<not", "cannot be opened by OpenVINO: it is no graph in XML"),
]


@pytest.mark.parametrize(("old", "new", "message"), OPENVINO)
def test_an_openvino_file_that_does_not_fit_is_said(old, new, message, quantized, tmp_path):
    folder = copy_artifact(quantized, tmp_path / "copy", sums=False)
    path = folder / "openvino" / "openvino_model.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message) as error:
        ask(folder, "openvino")
    assert ".cpp" not in str(error.value)  # OpenVINO's own source files help nobody


def test_the_reason_of_an_openvino_error_is_its_own_line():
    text = "Exception from src/a.cpp:84:\nCheck 'x' failed at src/b.cpp:9:\nIncorrect weights in bin file!\n\n"
    assert reason_of(RuntimeError(text)) == "Incorrect weights in bin file!"
    assert reason_of(KeyError("dim")) == "KeyError: 'dim'" and reason_of(RuntimeError()) == "RuntimeError"
    assert reason_of(ValueError("in field 'a':\n\n  TypeError: no number")) == "in field 'a': TypeError: no number"
    assert reason_of(FileNotFoundError(2, "No such file", "name")) == "No such file"


# Sums


def test_the_sums_are_those_of_sha256sum(artifact, quantized, adapted):
    for folder in (artifact, quantized, adapted):
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert read_sums(folder).keys() == files - {SUMS_FILE}
        done = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS_FILE], cwd=folder, check=False)
        assert done.returncode == 0
        lines = (folder / SUMS_FILE).read_text().splitlines()
        assert lines == sorted(lines, key=lambda line: line[66:])
    assert "adapter/adapter_model.safetensors" in read_sums(adapted)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("config.json\n", "line 1 is not '<64 hexadecimal digits>  <name>'"),
        ("", "config.json is not named in"),
        (f"{'0' * 64}  config.json\n", "config.json differs from"),
        (f"{'0' * 64}  config.json\n{'0' * 64}  ./config.json\n", "line 2 names config.json a second time"),
        (f"{'0' * 64}  ../config.json\n", "line 1: .* leads out of the model folder"),
        (f"{'0' * 64}  ..\\\\config.json\n", "line 1: .* leads out"),
        (f"{'0' * 64}  C:/config.json\n", "line 1: .* leads out"),
        (f"{'0' * 64}  /etc/passwd\n", "line 1: .* leads out"),
        (b"\xff\xfe", "SHA256SUMS cannot be read"),
    ],
)
def test_sums_that_are_wrong_are_refused(content, message, artifact, tmp_path):
    folder = copy_artifact(artifact, tmp_path / "copy", sums=True)
    (folder / SUMS_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        ask(folder, "onnx")


def test_a_format_that_is_gone_is_not_replaced_in_silence(quantized, tmp_path):
    folder = copy_artifact(quantized, tmp_path / "copy", sums=True)
    shutil.rmtree(folder / "onnx")
    with pytest.raises(UserError, match="has no onnx/model_quantized.onnx, which SHA256SUMS names"):
        ask(folder, None)
    assert len(ask(folder, "openvino")[2]) == len(TEXTS)
    assert len(ask(folder, None, verify=False)[2]) == len(TEXTS)


def test_what_was_edited_on_purpose_is_opened_when_asked(artifact, colors, tmp_path):
    folder = copy_artifact(artifact, tmp_path / "copy", sums=True)
    names = json.loads((folder / "config.json").read_text())["id2label"]
    edit_config(folder / "config.json", id2label=names | {"2": "grey"})
    done = run_script("predict.py", "--model", folder, "a gray house")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "config.json differs from" in done.stderr and "--skip_checksum" in done.stderr
    done = run_script("predict.py", "--model", folder, "--skip_checksum", "a gray house")
    assert done.returncode == 0 and done.stdout.startswith("grey")


@pytest.mark.parametrize("command", ["run_ptq.py", "run_qat.py", "run_evaluation.py", "run_baseline.py"])
def test_every_command_that_opens_an_artifact_checks_it(command, artifact, colors, tmp_path):
    folder = copy_artifact(artifact, tmp_path / "copy", sums=True)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\x00")
    args = ["--model_name_or_path", folder, "--output_dir", tmp_path / "out"]
    if command == "run_evaluation.py":
        args = [folder, "--results_dir", tmp_path / "results"]
    elif command == "run_baseline.py":
        args += ["--dataset_name", colors]
    with pytest.raises(UserError, match="model.safetensors differs from"):
        importlib.import_module(command.removesuffix(".py")).main([str(word) for word in args])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_differs_from_its_sums_is_not_published(artifact, tmp_path):
    folder = copy_artifact(artifact, tmp_path / "copy", sums=True)
    with (folder / "model.bf16.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match="model.bf16.safetensors differs from"):
        run_publish.main([str(folder), "--repo_id", "user/colors", "--dry_run"])
    with pytest.raises(UserError, match="no records in"):  # it went on
        run_publish.main(
            [str(folder), "--repo_id", "user/colors", "--dry_run", "--skip_checksum", "--results_dir", str(tmp_path)]
        )


def test_recipes_that_the_program_writes_are_read(artifact, quantized, adapted, trained):
    for folder in (artifact, quantized, adapted, trained / "8", trained / "2"):
        assert read_recipe_of(folder) == yaml.safe_load((folder / "recipe.yaml").read_text())
