"""Damaged artifacts: each ends in one clear line, and none in a traceback, a NaN or another answer."""

import functools
import importlib
import os
import random
import shutil
import subprocess
import time

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from conftest import build_rows, contents, copy_to_edit, edit_json, run_script, seeds_for
from emotion import EmotionClassifier
from emotion.utils.base_model import read_recipe_of
from emotion.utils.errors import UserError
from emotion.utils.files import SUMS_FILE, read_sums
from mutations import KINDS, damage, edit_config, rename_onnx

TEXTS = build_rows(12)["text"]
# With its SHA256SUMS, or as a stranger's folder, of which the structure alone is checked
COPY = {True: shutil.copytree, False: copy_to_edit}
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
        folder = COPY[sums](request.getfixturevalue(name), tmp_path / str(number))
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
        folder = COPY[sums](request.getfixturevalue(name), tmp_path / str(sums))
        check_damaged(folder, format, damage(folder, rng), sound(name, format) if sums else None)


def put(file, **values):
    return lambda folder: edit_config(folder / f"{file}.json", **values)


def name_labels(*names):
    return put("config", id2label={str(number): name for number, name in enumerate(names)})


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def edit_weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})

    return damage


def edit_graph(change):
    def damage(folder):
        model = onnx.load(folder / "onnx" / "model.onnx")
        change(model.graph)
        onnx.save(model, folder / "onnx" / "model.onnx")

    return damage


def fill_head(value):
    def fill(graph):
        (bias,) = [one for one in graph.initializer if one.name == "classifier.bias"]
        bias.CopyFrom(onnx.numpy_helper.from_array(np.full(3, value, dtype=np.float32), bias.name))

    return edit_graph(fill)


# Each letter stands for two of the letter before
REPEATING = b"a: &a [x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c, c, c - 1, c - 1) for c in range(98, 123))
STRUCTURE = [
    # config.json
    (write("config.json", b"null"), "onnx", "config.json"),
    (write("config.json", b"{"), "onnx", "config.json cannot be read"),
    (write("config.json", b"[" * 99_999), "onnx", "config.json cannot be read"),
    (write("config.json", b'{"vocab_size": NaN}'), "onnx", "config.json .* nan"),
    (write("config.json", b" " * 5_000_000), "onnx", "config.json .* 5,000,000 bytes"),
    (put("config", id2label=["warm"]), "onnx", "config.json: 'id2label' cannot be"),
    (put("config", quantization_config=[]), "onnx", "'quantization_config' must hold a JSON object"),
    (put("config", quantization_config={"quant_method": {}}), "onnx", "'quant_method' cannot be"),
    (put("config", vocab_size="many"), "onnx", "config.json: 'vocab_size' cannot be 'many'"),
    (put("config", model_type={}), "pytorch", "cannot be opened"),
    # Labels
    (name_labels("warm", "cold", "warm"), "onnx", "config.json .*'warm'"),
    (name_labels("warm", "cold\nwarm", "none"), "onnx", "label 1 is 'cold.nwarm'"),
    (name_labels("warm", 3, "none"), "onnx", "label 1 is 3"),
    (name_labels("warm", "", "none"), "onnx", "label 1 is ''"),
    (name_labels("warm", "cold"), "onnx", "3 logits .* 2 labels"),
    (put("config", id2label={"0": "a", "1": "b", "x": "c"}), "onnx", "label 2 is None"),
    # Weights
    (put("config", num_hidden_layers=1), "pytorch", "weights hold bert.encoder.layer.1"),
    (put("config", num_hidden_layers=3), "pytorch", "has no weights for bert.encoder.layer.2"),
    (put("config", num_hidden_layers=10**6), "pytorch", "config.json asks for num_hidden_layers 1000000"),
    (put("config", vocab_size=10**9), "pytorch", "config.json asks for vocab_size 1000000000"),
    (edit_weights(lambda all: all | {"more": all["classifier.bias"].clone()}), "pytorch", "weights hold more"),
    (edit_weights(lambda all: {one: all[one] for one in all if "class" not in one}), "pytorch", "classifier.bias"),
    (put("config", id2label=dict(enumerate("abcd"))), "pytorch", r"classifier.bias is \[3\] .* \[4\]"),
    (write("model.safetensors", b"x" * 99), "pytorch", "model.safetensors cannot be read"),
    # Tokenizer
    (lambda folder: edit_json(folder / "tokenizer.json", "model/vocab/another", 23), "onnx", "json .* more tokens"),
    (put("tokenizer", post_processor=None), "onnx", r"tokenizer.json does not add the token \[CLS\] to a text"),
    (put("tokenizer", model=None), "onnx", "tokenizer.json cannot be used"),
    (put("tokenizer_config", pad_token="[NONE]"), "onnx", r"tokenizer.json has no token \[NONE\]"),
    (put("tokenizer_config", sep_token="[NONE]"), "onnx", r"tokenizer.json has no token \[NONE\]"),
    (put("tokenizer_config", pad_token=None), "onnx", "'pad_token' cannot be None"),
    (put("tokenizer_config", model_max_length="long"), "onnx", "'model_max_length' cannot be 'long'"),
    (put("tokenizer_config", model_max_length=-1), "onnx", "tokenizer.json cannot be used"),
    (write("tokenizer.json", b"{" + b" " * 60_000_001), "onnx", "tokenizer.json has 60,000,002 bytes"),
    # Graphs
    (edit_graph(lambda graph: rename_onnx(graph, "input_ids", "tokens")), "onnx", "model.onnx .* input_ids"),
    (edit_graph(lambda graph: rename_onnx(graph, "logits", "scores")), "onnx", "model.onnx .* logits"),
    (edit_graph(lambda graph: graph.node.pop()), "onnx", "model.onnx cannot be opened by ONNX Runtime"),
    (write("onnx/model.onnx", b""), "onnx", "model.onnx cannot be opened by ONNX Runtime"),
    (fill_head(np.nan), "onnx", r"\(onnx\) gives logits that are not finite"),
    (fill_head(np.inf), "onnx", r"\(onnx\) gives logits that are not finite"),
    # Files that are not there
    (lambda folder: (folder / "tokenizer.json").unlink(), "onnx", "tokenizer.json"),
    (lambda folder: (folder / "config.json").unlink(), "onnx", "config.json"),
    (lambda folder: [path.unlink() for path in folder.rglob("model.*")], None, "none of the formats"),
    (shutil.rmtree, "onnx", "no folder"),
    # recipe.yaml
    (write("recipe.yaml", b""), "onnx", "recipe.yaml"),
    (write("recipe.yaml", b"variant: ptq"), "onnx", "recipe.yaml has no 'recipe'"),
    (write("recipe.yaml", b"variant: 3\nrecipe: {}"), "onnx", "recipe.yaml: 'variant' cannot be 3"),
    (write("recipe.yaml", b"a: [\n"), "onnx", "recipe.yaml cannot be read"),
    (write("recipe.yaml", b"a: !!bool maybe"), "onnx", "recipe.yaml cannot be read"),
    (write("recipe.yaml", b"a: 2026-01-01"), "onnx", "recipe.yaml .* datetime.date"),
    (write("recipe.yaml", REPEATING), "onnx", "recipe.yaml .* repeats"),
]


@pytest.mark.parametrize(("change", "format", "message"), STRUCTURE)
def test_the_structure_is_checked_without_sums(change, format, message, artifact, tmp_path):
    folder = copy_to_edit(artifact, tmp_path / "copy")
    change(folder)
    start = time.process_time()
    ask(artifact, format)
    whole, start = time.process_time() - start, time.process_time()
    with pytest.raises(UserError, match=message) as error:
        ask(folder, format)
    assert len(str(error.value).splitlines()) == 1
    assert time.process_time() - start < 1 + 10 * whole  # no model of a million layers was built


OPENVINO = [
    ('"input_ids"', '"tokens"', "openvino_model.xml .* input_ids"),
    ('names="logits"', 'names="scores"', "openvino_model.xml .* logits"),
    ('type="MatMul"', 'type="Product"', "OpenVINO: .* Product"),
    ("<net", "<not", "OpenVINO: .* XML"),
]


@pytest.mark.parametrize(("old", "new", "message"), OPENVINO)
def test_an_openvino_file_that_does_not_fit_is_said(old, new, message, quantized, tmp_path):
    folder = copy_to_edit(quantized, tmp_path / "copy")
    path = folder / "openvino" / "openvino_model.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message) as error:
        ask(folder, "openvino")
    assert ".cpp" not in str(error.value)  # OpenVINO's own source files help nobody


def test_the_sums_are_those_of_sha256sum(artifact, quantized, adapted):
    for folder in (artifact, quantized, adapted):
        assert read_sums(folder).keys() == contents(folder).keys() - {SUMS_FILE}
        done = subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS_FILE], cwd=folder, check=False)
        assert done.returncode == 0
        lines = (folder / SUMS_FILE).read_text().splitlines()
        assert lines == sorted(lines, key=lambda line: line[66:])
    assert "adapter/adapter_model.safetensors" in read_sums(adapted)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("config.json\n", "line 1 "),
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
    folder = shutil.copytree(artifact, tmp_path / "copy")
    (folder / SUMS_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        ask(folder, "onnx")


def test_a_format_that_is_gone_is_not_replaced_in_silence(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "copy")
    shutil.rmtree(folder / "onnx")
    with pytest.raises(UserError, match="onnx/model_quantized.onnx"):
        ask(folder, None)
    assert len(ask(folder, "openvino")[2]) == len(TEXTS)
    assert len(ask(folder, None, verify=False)[2]) == len(TEXTS)


def test_what_was_edited_on_purpose_is_opened_when_asked(artifact, colors, tmp_path):
    folder = shutil.copytree(artifact, tmp_path / "copy")
    edit_config(folder / "config.json", id2label={"0": "warm", "1": "cold", "2": "grey"})
    done = run_script("predict.py", "--model", folder, "a gray house")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "config.json differs from" in done.stderr and "--skip_checksum" in done.stderr
    done = run_script("predict.py", "--model", folder, "--skip_checksum", "a gray house")
    assert done.returncode == 0 and done.stdout.startswith("grey")


@pytest.mark.parametrize("command", ["run_ptq", "run_qat", "run_evaluation", "run_baseline", "run_publish"])
def test_every_command_that_opens_an_artifact_checks_it(command, artifact, colors, tmp_path):
    folder = shutil.copytree(artifact, tmp_path / "copy")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\x00")
    args = ["--model_name_or_path", folder, "--output_dir", tmp_path / "out"]
    if command in {"run_evaluation", "run_publish"}:
        args = [folder, "--results_dir", tmp_path / "results"]
    more = {"run_baseline": ["--dataset_name", colors], "run_publish": ["--repo_id", "user/x", "--dry_run"]}
    args += more.get(command, [])
    main = importlib.import_module(command).main
    with pytest.raises(UserError, match="model.safetensors differs from"):
        main([str(word) for word in args])
    assert not (tmp_path / "out").exists()
    if command == "run_publish":
        with pytest.raises(UserError, match="no records in"):  # it went on
            main([*map(str, args), "--skip_checksum"])
