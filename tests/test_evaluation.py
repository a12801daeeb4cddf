"""The evaluation protocol, its record and its data: numbers can be recomputed, and odd datasets are refused."""

import re

import datasets
import numpy as np
import pytest
from pyarrow import parquet
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

import run_evaluation
from conftest import COLORS, build_rows, color_features, read_json, run_script, save_dataset
from emotion.data import dataset
from emotion.data.dataset import fingerprint, get_split, load_task
from emotion.data.metrics import expected_calibration_error, score
from emotion.data.tokenization import load_tokenizer, tokenize
from emotion.evaluation.protocol import summarize_latency
from emotion.evaluation.schema import Record
from emotion.hub.render import plot_confusion_matrix
from emotion.utils import base_model as source
from emotion.utils.base_model import EMBEDDED_MODEL, find_base_model
from emotion.utils.errors import UserError

PERCENTILES = {"p5": 5.095, "p25": 25.075, "p50": 50.05, "p75": 75.025, "p95": 95.005, "p99": 99.001}


@pytest.fixture(scope="module")
def results(artifact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for format in ("pytorch", "bf16", "onnx"):
        run_evaluation.main([str(artifact), "--format", format, "--results_dir", str(folder), "--latency_runs", "200"])
    return folder


def test_three_records_with_all_fields_and_a_picture_each(results, tmp_path):
    for name in ("baseline-pytorch", "baseline-bf16", "baseline-onnx"):
        record = Record.read(results / "metrics" / f"{name}.json")
        assert record.name == name and record.quality.split == "test" and record.quality.examples == 90
        assert record.latency_ms.runs == 200 and record.throughput_per_s.value > 0
        assert record.encoder.layers == 2 and record.encoder.width == 64
        assert record.environment.cpu and record.environment.packages["torch"]
        plot_confusion_matrix(record, tmp_path / name)
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_anyone_can_recompute_the_record_from_the_logits(results, colors):
    record = read_json(results / "metrics" / "baseline-onnx.json")
    table = parquet.read_table(results / "predictions" / "baseline-onnx.parquet")
    assert table.column_names == ["row", "label", "logits"]
    assert str(table.schema.field("logits").type) == "list<element: float>"
    labels = table["label"].to_numpy()
    predicted = np.array(table["logits"].to_pylist()).argmax(axis=-1)
    assert labels.tolist() == build_rows(90)["label"]
    quality = record["quality"]
    assert quality["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert quality["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert quality["confusion_matrix"] == confusion_matrix(labels, predicted).tolist()
    assert list(quality["per_class_f1"]) == quality["labels"] == ["warm", "cold", "none"]
    low, high = quality["macro_f1_ci95"]
    assert low <= quality["macro_f1"] <= high


@pytest.mark.parametrize(
    ("format", "weights", "dtype"),
    [
        ("pytorch", "model.safetensors", "float32"),
        ("bf16", "model.bf16.safetensors", "bfloat16"),
        ("onnx", "onnx/model.onnx", "float32"),
    ],
)
def test_bytes_are_those_on_the_disk_and_no_layer_is_quantized(format, weights, dtype, results, artifact):
    record = read_json(results / "metrics" / f"baseline-{format}.json")
    assert set(record["size"]["files"]) == {weights, "config.json", "tokenizer.json", "tokenizer_config.json"}
    sizes = {name: (artifact / name).stat().st_size for name in record["size"]["files"]}
    assert record["size"]["files"] == sizes and record["size"]["bytes_to_serve"] == sum(sizes.values())
    types = dict.fromkeys(("weights", "activations", "embeddings"), dtype)
    layers = {"quantized_layers": 0, "linear_layers": 14}  # two times six, a pooler and a head
    assert record["scheme"] == types | layers | {"largest_weight": None, "kept_in_float": {}}


def test_rows_with_a_contradiction_and_texts_that_are_cut_are_in_the_record(artifact, tmp_path):
    train, test = build_rows(30), build_rows(90)
    same_text = test["text"].count(test["text"][0])
    test["text"][1] += " red" * 99
    train["text"].append(test["text"][0])
    train["label"].append((test["label"][0] + 1) % 3)
    data = save_dataset(tmp_path / "data", {"train": train, "test": test}, color_features())
    run_evaluation.main([str(artifact), "--dataset_name", str(data), "--results_dir", ".", "--latency_runs", "0"])
    record = read_json(tmp_path / "metrics" / "baseline-pytorch.json")
    assert record["quality"]["conflict_free"]["examples"] == 90 - same_text and record["quality"]["texts_cut"] == 1
    assert record["latency_ms"]["p50"] is None and record["throughput_per_s"]["value"] is None


@pytest.mark.parametrize("labels", [["yes", "no"], ["warm", "cold", "colorless"]])
def test_a_dataset_of_other_classes_is_refused(labels, artifact, tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=labels)})
    save_dataset(tmp_path / "data", {"test": {"text": ["red"], "label": [0]}}, features)
    with pytest.raises(UserError, match=f"3 labels .*{labels[-1]}"):
        run_evaluation.main([str(artifact), "--dataset_name", str(tmp_path / "data"), "--results_dir", "results"])
    assert not list((tmp_path / "results").rglob("*.*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "gguf"], "'gguf'; it has pytorch, bf16, onnx"),
        (["--dtype", "bfloat16"], "--dtype"),
        (["--split", "dev"], "'dev'"),
        (["--latency_runs", "10"], "at least 200"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message, artifact):
    with pytest.raises(UserError, match=message):
        run_evaluation.main([str(artifact), *flags])


def test_scores_of_known_cases():
    assert summarize_latency(np.arange(1, 1001) / 10) == PERCENTILES | {"batch_size": 1, "mean": 50.05, "runs": 1000}
    logits = np.eye(3)[[0, 0, 1, 1]]
    scores = score(logits, np.array([0, 0, 1, 0]))
    assert scores["per_class_f1"] == pytest.approx([0.8, 2 / 3, 0])
    assert scores["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 3)
    assert scores["confusion_matrix"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    labels = np.array([0] * 8 + [1] * 2)
    always_first = np.tile(np.log([0.8, 0.2]), (10, 1))
    assert expected_calibration_error(always_first, labels) == pytest.approx(0, abs=1e-12)
    too_sure = np.tile([30.0, 0.0], (10, 1))
    assert expected_calibration_error(too_sure, labels) == pytest.approx(0.2, abs=1e-9)


def test_an_evaluation_prints_no_library_warnings(artifact, tmp_path):
    flags = ("--format", "pytorch", "--latency_runs", 0, "--results_dir", "out")
    done = run_script("run_evaluation.py", artifact, *flags)
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 2
    # Results that cannot be written are said before the measuring.
    (tmp_path / "results").write_text("a file")
    done = run_script("run_evaluation.py", artifact, "--results_dir", tmp_path / "results")
    assert done.returncode == 1
    assert re.fullmatch("error: .*results.*\n", done.stderr)


INTEGERS = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("int64")})
NAMED = color_features()
NUMBERS = datasets.Features({"text": datasets.Value("int64"), "label": NAMED["label"]})


def test_labels_and_rows_come_from_the_dataset(colors, tmp_path):
    task = load_task(str(colors))
    assert (task.name, task.source, task.labels) == ("colors", "folder", list(COLORS))
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 480, "validation": 60, "test": 90}
    # A folder of save_to_disk opens too.
    rows = datasets.Dataset.from_dict(build_rows(9), features=NAMED)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    assert load_task(str(tmp_path / "saved")).labels == list(COLORS)


@pytest.mark.parametrize(
    ("columns", "features", "message"),
    [
        ({"sentence": ["a"], "label": [0]}, None, "no column 'text'"),
        ({"text": ["a"], "labels": [0]}, None, "no column 'label'"),
        ({"text": ["a", "b"], "label": ["joy", None]}, None, "train row 1: label is None"),
        ({"text": ["a", "b"], "label": ["joy", " "]}, None, "train row 1: label is ' '"),
        ({"text": ["a", "b"], "label": [1, 1]}, INTEGERS, "column 'label' has 1 classes"),
        ({"text": ["a", "b"], "label": [0.5, 1.5]}, None, "column 'label' is float64"),
        ({"text": ["a", "b"], "label": ["0.5", "1"]}, None, "column 'label' holds numbers such as 0.5"),
        ({"text": ["a", "b"], "label": [[0], [0, 1]]}, None, "column 'label' holds lists"),
        ({"text": ["a", "b"], "label": [0, -1]}, NAMED, "train row 1: label -1"),
        ({"text": ["a", "b"], "label": [0, None]}, NAMED, "train row 1: label None"),
        ({"text": ["a", "  "], "label": [0, 1]}, NAMED, "train row 1: text is '  '"),
        ({"text": ["a", None], "label": [0, 1]}, NAMED, "train row 1: text is None"),
        ({"text": [1, 2], "label": [0, 1]}, NUMBERS, "train row 0: text is 1"),
    ],
)
def test_a_wrong_dataset_is_refused(columns, features, message, tmp_path):
    save_dataset(tmp_path / "data", {"train": columns}, features)
    with pytest.raises(UserError, match=message):
        load_task(str(tmp_path / "data"))


def test_what_is_not_there_is_said(colors):
    with pytest.raises(UserError, match="'dev'"):
        get_split(load_task(str(colors)), "dev")
    for find in (load_task, find_base_model):
        for name, noun in (("./nowhere", "./nowhere"), ("someone/something", "the Hub cannot be reached")):
            with pytest.raises(UserError, match=noun):
                find(name)


def test_without_the_hub_the_embedded_model_and_then_the_sample_stand_in(monkeypatch):
    base = find_base_model(source.DEFAULT_MODEL)
    assert (base.name, base.source) == (EMBEDDED_MODEL, "package")
    sample = [copy for copy in dataset.LOCAL_COPIES if copy[0] == "sample"]
    monkeypatch.setattr(dataset, "LOCAL_COPIES", tuple(sample))
    task = load_task(dataset.DEFAULT_DATASET)
    assert task.source == "sample" and "sample" in task.name
    assert task.labels == ["sadness", "joy", "love", "anger", "fear", "surprise"]
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 360, "validation": 90, "test": 90}


def test_long_texts_are_cut_counted_and_reported(encoder, tmp_path, capsys):
    save_dataset(tmp_path / "data", {"train": {"text": ["sky " * 100, "sky"], "label": [0, 1]}}, NAMED)
    rows = load_task(str(tmp_path / "data")).splits["train"]
    tokenizer = load_tokenizer(str(encoder), max_length=16)
    assert [len(ids) for ids in tokenize(rows, tokenizer, "train")["input_ids"]] == [16, 3]
    assert "train: 1 of 2 texts are longer than 16 tokens" in capsys.readouterr().out
    assert load_tokenizer(str(encoder), max_length=1000).model_max_length == 40  # the model's positions


def test_the_fingerprint_sees_order_text_and_label():
    prints = {
        fingerprint({"text": texts, "label": labels})
        for texts, labels in ((["a", "b"], [0, 1]), (["b", "a"], [0, 1]), (["a", "b"], [1, 0]), (["a", "c"], [0, 1]))
    }
    assert len(prints) == 4
