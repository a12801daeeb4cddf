"""Models that give a text several labels: sigmoid scores, a threshold, macro and micro F1; from PTQ to the card."""

import json
import random

import numpy as np
import pytest
import torch
from pyarrow import parquet
from sklearn.metrics import f1_score

import run_baseline
import run_batch
import run_evaluation
import run_ptq
import run_qat
from conftest import COLORS, FILLERS, SIZES, as_flags, ptq_flags, qat_flags, train_flags
from emotion import EmotionClassifier
from emotion.data.dataset import load_task
from emotion.data.metrics import probabilities, resampled_macro_f1, score
from emotion.evaluation.record import read_records
from emotion.hub.model_card import render_card
from emotion.hub.render import plot_confusion_matrix
from emotion.inference import predict
from emotion.utils.errors import UserError
from hub_server import validate_card
from test_architectures import build_classifier, train_briefly

NAMES = list(COLORS)
SETS = [[], ["warm"], ["cold"], ["none"], ["warm", "cold"], ["none", "warm"]]
MULTI_LABEL = "multi_label_classification"


def build_texts(count: int) -> list[dict]:
    """Texts that name a color of each of their labels."""
    draw, rows = random.Random(count), []
    for row in range(count):
        words = [draw.choice(COLORS[name]) for name in SETS[row % 6]] + draw.choices(FILLERS, k=3)
        rows.append({"text": " ".join(draw.sample(words, len(words))), "label": SETS[row % 6]})
    return rows


def multi_hot(rows: list[dict]) -> np.ndarray:
    return np.array([[name in row["label"] for name in NAMES] for row in rows]).astype(int)


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    splits = {"train": build_texts(300), "validation": build_texts(240), "test": build_texts(120)}
    return write(tmp_path_factory.mktemp("several"), **splits)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("model") / "baseline", build_texts(600)
    build_classifier(folder, "bert", SIZES | {"max_position_embeddings": 42}, problem_type=MULTI_LABEL)
    train_briefly(folder, [row["text"] for row in rows], torch.tensor(multi_hot(rows)).float())
    return folder


@pytest.fixture(scope="module")
def quantized(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "ptq"
    run_ptq.main(ptq_flags(model, out, dataset_name=data, formats="onnx"))
    return out


def test_lists_of_names_integers_or_zeros_and_ones_are_labels(tmp_path):
    for lists, names in (
        ([["warm"], ["cold", "none"], []], ["cold", "none", "warm"]),
        ([[2], [0, 10], []], ["0", "2", "10"]),
        ([[1, 0, 0], [0, 1, 1], [0, 0, 0]], ["0", "1", "2"]),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], ["0", "1", "2"]),
    ):
        path = write(tmp_path, train=[{"text": "red", "label": one} for one in lists])
        task = load_task(str(path), multi_label=True)
        found = [[task.labels[index] for index in label] for label in task.splits["train"]["label"]]
        expected = lists if 0 not in lists[0] and 0.0 not in lists[0] else [[0], [1, 2], []]
        assert task.labels == sorted(names, key=lambda name: (len(name), name))
        assert found == [list(map(str, one)) for one in expected]
        with pytest.raises(UserError, match="holds lists .several labels a text"):
            load_task(str(path))
    with pytest.raises(UserError, match="train row 1: label is None"):
        load_task(
            str(write(tmp_path, train=[{"text": "a", "label": ["x"]}, {"text": "a", "label": None}])), multi_label=True
        )


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(2, size=(90, 4)), rng.normal(size=(90, 4))
    found, guess = score(logits, labels, 0.3), probabilities(logits, True) >= 0.3
    assert found["micro_f1"] == pytest.approx(f1_score(labels, guess, average="micro"))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, guess, average="macro"))
    (drawn,) = resampled_macro_f1(labels, guess.astype(int), classes=4, resamples=0)
    assert drawn[0] == pytest.approx(found["macro_f1"])


def test_ptq_is_gated_by_macro_f1_at_the_threshold(model, data, quantized, tmp_path, capsys):
    run_ptq.main(ptq_flags(model, tmp_path / "out", dataset_name=data, formats="onnx", threshold=0.999))
    assert "validation macro F1" in capsys.readouterr().out
    with pytest.raises(UserError, match="points of validation macro F1"):
        run_ptq.main(ptq_flags(model, tmp_path / "low", dataset_name=data, formats="onnx", bits=2, max_f1_drop=-1))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(row["text"] for row in build_texts(300)))
    run_ptq.main(ptq_flags(model, tmp_path / "texts", dataset_name=texts, formats="onnx"))
    assert "% agree with FP32" in capsys.readouterr().out


def test_the_record_and_the_card_of_several_labels(model, data, quantized, tmp_path):
    for folder, format in ((model, "pytorch"), (quantized, "onnx")):
        flags = as_flags(dataset_name=data, results_dir=tmp_path, latency_runs=0, format=format, threshold=0.4)
        run_evaluation.main([str(folder), *flags])
    records = read_records(tmp_path)  # checked against their predictions
    rows = build_texts(120)
    guess = EmotionClassifier(quantized).logits([row["text"] for row in rows])
    micro = f1_score(multi_hot(rows), probabilities(guess, True) >= 0.4, average="micro")
    (quality,) = (record.quality for record in records if record.variant == "ptq")
    assert quality.threshold == 0.4 and quality.micro_f1 == pytest.approx(micro) and quality.macro_f1 > 0.95
    card = render_card(records, "ptq", "user/mine")
    assert validate_card(card) == [] and "0.4 or more: warm, cold, none" in card and "Micro F1" in card
    assert "It always predicts one" not in card and "numpy.exp" in card
    plot_confusion_matrix(records[0], tmp_path / "matrix.png")


def test_answers_are_the_labels_that_reach_the_threshold(model, quantized, tmp_path, capsys):
    classifier = EmotionClassifier(quantized)
    texts = {"red house blue sky the": {"warm", "cold"}, "see the house": set(), "i black the now": {"none"}}
    for answers, expected in zip(classifier.classify(list(texts), threshold=0.5), texts.values(), strict=True):
        assert {one["label"] for one in answers} == expected
    predict.main(["--model", str(quantized), "--json", *texts])
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{one["label"] for one in line["labels"]} for line in shown] == list(texts.values())
    predict.main(["--model", str(quantized), "--threshold", "1", "black"])
    assert capsys.readouterr().out == "(no label)\tblack\n"
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    run_batch.main([str(tmp_path / "texts.txt"), str(tmp_path / "out"), "--model", str(quantized)])
    table = parquet.read_table(tmp_path / "out" / "part-00000.parquet")
    assert [set(json.loads(labels)) for labels in table["labels"].to_pylist()] == list(texts.values())


def test_a_threshold_is_for_several_labels_alone(artifact, quantized):
    with pytest.raises(UserError, match="gives a text one label, and has no threshold"):
        predict.main(["--model", str(artifact), "--threshold", "0.5", "red"])
    with pytest.raises(UserError, match="0 to 1"):
        EmotionClassifier(quantized).classify(["red"], threshold=2)


def test_trainings_and_models_of_one_label_refuse_lists(artifact, encoder, data, tmp_path):
    for main, flags in (
        (run_baseline.main, train_flags(encoder, data, tmp_path / "out")),
        (run_qat.main, qat_flags(artifact, tmp_path / "out", dataset_name=data)),
        (run_ptq.main, ptq_flags(artifact, tmp_path / "out", dataset_name=data)),
        (run_evaluation.main, [str(artifact), *as_flags(dataset_name=data, results_dir=tmp_path / "out")]),
    ):
        with pytest.raises(UserError, match="several labels a text"):
            main(flags)
    assert not (tmp_path / "out" / "config.json").exists()
