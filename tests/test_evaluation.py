"""The evaluation protocol and the record: numbers can be recomputed, and damaged folders are refused."""

import json
import shutil

import numpy as np
import pytest
from datasets import ClassLabel, Features, Value
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

import run_evaluation
from conftest import build_rows, color_features, copy_to_edit, read_json, run_script, save_dataset
from emotion.data.metrics import expected_calibration_error, macro_f1_interval, score
from emotion.evaluation.protocol import summarize_latency
from emotion.evaluation.schema import Record
from emotion.hub.render import plot_confusion_matrix
from emotion.utils.errors import UserError


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
    assert (
        table.column_names == ["row", "label", "logits"]
        and str(table.schema.field("logits").type) == "list<element: float>"
    )
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


def test_bytes_are_those_on_the_disk(results, artifact):
    sizes = {}
    for name, weights in (
        ("pytorch", "model.safetensors"),
        ("bf16", "model.bf16.safetensors"),
        ("onnx", "onnx/model.onnx"),
    ):
        size = read_json(results / "metrics" / f"baseline-{name}.json")["size"]
        assert set(size["files"]) == {weights, "config.json", "tokenizer.json", "tokenizer_config.json"}
        assert size["bytes_to_serve"] == sum((artifact / file).stat().st_size for file in size["files"])
        sizes[name] = size["files"][weights]
    assert sizes["bf16"] < 0.75 * sizes["pytorch"]  # a tiny model's header is a large part of its file


def test_the_baseline_has_no_quantized_layer(results):
    # two layers of six linears, a pooler and a head
    for name, dtype in (("pytorch", "float32"), ("bf16", "bfloat16"), ("onnx", "float32")):
        scheme = read_json(results / "metrics" / f"baseline-{name}.json")["scheme"]
        assert scheme == {
            "weights": dtype,
            "activations": dtype,
            "quantized_layers": 0,
            "linear_layers": 14,
            "largest_weight": None,
            "embeddings": dtype,
            "kept_in_float": {},
        }


def test_the_rows_without_a_contradiction_are_scored_apart(artifact, tmp_path):
    train, test = build_rows(30), build_rows(90)
    train["text"].append(test["text"][0])
    train["label"].append((test["label"][0] + 1) % 3)
    data = save_dataset(tmp_path / "data", {"train": train, "test": test}, color_features())
    run_evaluation.main([str(artifact), "--dataset_name", str(data), "--results_dir", ".", "--latency_runs", "0"])
    record = read_json(tmp_path / "metrics" / "baseline-pytorch.json")
    same_text = test["text"].count(test["text"][0])
    assert record["quality"]["conflict_free"]["examples"] == 90 - same_text
    assert record["latency_ms"]["p50"] is None and record["throughput_per_s"]["value"] is None


def test_texts_that_are_cut_are_in_the_record(artifact, tmp_path):
    data = save_dataset(
        tmp_path / "data", {"test": {"text": ["red " * 99, "blue"], "label": [0, 1]}}, color_features()
    )
    run_evaluation.main([str(artifact), "--dataset_name", str(data), "--results_dir", ".", "--latency_runs", "0"])
    assert read_json(tmp_path / "metrics" / "baseline-pytorch.json")["quality"]["texts_cut"] == 1


def remove_head(folder):
    weights = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "classifier" not in name
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rename_labels(folder):
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["2"] = "colourless"
    (folder / "config.json").write_text(json.dumps(config))


def add_label(folder):
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["3"], config["label2id"]["gold"] = "gold", 3
    (folder / "config.json").write_text(json.dumps(config))


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_head, "is not a trained classifier: it has no weights for classifier.bias"),
        (rename_labels, "answers 3 labels (warm, cold, colourless)"),
        (cut_weights, "model.safetensors cannot be read"),
        (add_label, "classifier.bias is [3] in the weights and [4] by config.json"),
        (break_tokenizer, "tokenizer.json cannot be used: EOF while parsing an object"),
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "tokenizer.json cannot be used: No such file",
        ),
        (lambda folder: [path.unlink() for path in folder.rglob("model.*")], "has none of the formats"),
        (shutil.rmtree, "no folder"),
    ],
)
def test_a_folder_that_cannot_be_scored_is_refused(damage, message, artifact, tmp_path):
    folder = tmp_path / "copy"
    copy_to_edit(artifact, folder)
    damage(folder)
    with pytest.raises(UserError, match=".*") as error:
        run_evaluation.main([str(folder), "--results_dir", "results"])
    assert message in str(error.value)
    assert not list((tmp_path / "results").rglob("*.*"))


def test_a_dataset_of_other_classes_is_refused(artifact, tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["yes", "no"])})
    save_dataset(tmp_path / "data", {"test": {"text": ["red"], "label": [0]}}, features)
    with pytest.raises(UserError, match="answers 3 labels .* has 2"):
        run_evaluation.main([str(artifact), "--dataset_name", str(tmp_path / "data")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "gguf"], "has no format 'gguf'; it has pytorch, bf16, onnx"),
        (["--dtype", "bfloat16"], "unknown flag --dtype"),
        (["--split", "dev"], "has no split 'dev'"),
        (["--latency_runs", "10"], "at least 200"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message, artifact):
    with pytest.raises(UserError, match=".*") as error:
        run_evaluation.main([str(artifact), *flags])
    assert message in str(error.value)


def test_scores_of_a_class_that_nobody_predicts():
    logits = np.eye(3)[[0, 0, 1, 1]]
    scores = score(logits, np.array([0, 0, 1, 0]))
    assert scores["per_class_f1"] == pytest.approx([0.8, 2 / 3, 0])
    assert scores["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 3)
    assert scores["confusion_matrix"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_calibration_error_of_known_cases():
    labels = np.array([0] * 8 + [1] * 2)
    always_first = np.tile(np.log([0.8, 0.2]), (10, 1))
    assert expected_calibration_error(always_first, labels) == pytest.approx(0, abs=1e-12)
    too_sure = np.tile([30.0, 0.0], (10, 1))
    assert expected_calibration_error(too_sure, labels) == pytest.approx(0.2, abs=1e-9)


def test_the_interval_is_that_of_resampled_rows():
    """Against the plain way: draw rows with replacement, score them with scikit-learn."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=300)
    logits = np.eye(3)[np.where(rng.random(300) < 0.9, labels, rng.integers(3, size=300))]
    low, high = macro_f1_interval(logits, labels)
    drawn = rng.integers(300, size=(400, 300))
    scores = [f1_score(labels[rows], logits[rows].argmax(axis=-1), average="macro") for rows in drawn]
    assert [low, high] == pytest.approx(np.percentile(scores, [2.5, 97.5]), abs=0.01)
    assert macro_f1_interval(logits, labels) == [low, high]
    few = macro_f1_interval(logits[:60], labels[:60])
    assert high - low < 0.7 * (few[1] - few[0])


def test_latency_percentiles():
    summary = summarize_latency(np.arange(1, 1001) / 10)
    assert summary == {
        "batch_size": 1,
        "p5": 5.095,
        "p25": 25.075,
        "p50": 50.05,
        "p75": 75.025,
        "p95": 95.005,
        "p99": 99.001,
        "mean": 50.05,
        "runs": 1000,
    }


def test_an_evaluation_prints_no_library_warnings(artifact, tmp_path):
    done = run_script(
        "run_evaluation.py", artifact, "--format", "pytorch", "--latency_runs", 0, "--results_dir", "out"
    )
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 2


def test_results_that_cannot_be_written_are_said_before_the_measuring(artifact, tmp_path):
    (tmp_path / "results").write_text("a file")
    done = run_script("run_evaluation.py", artifact, "--results_dir", tmp_path / "results")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "choose another file or folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1
