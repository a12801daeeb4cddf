"""One answer per text: alone, in any batch, in any order, beside any neighbor."""

import numpy as np
import pytest

import run_ptq
from conftest import WORDS, build_rows
from emotion.inference.emotion_classifier import EmotionClassifier

# Neighbors that would stretch the range of a batch: the longest text, one token repeated, other alphabets, nothing
NEIGHBORS = [" ".join(WORDS) * 2, "sky " * 40, "красный blå 红色 ☃", "", "!?" * 30, *build_rows(20)["text"]]
TEXTS = build_rows(40)["text"]


def gap_between(folder, format: str) -> float:
    """The largest difference of a logit between a text alone and the same text in batches of all kinds."""
    classifier = EmotionClassifier.from_pretrained(folder, format, threads=1)
    alone = np.concatenate([classifier.logits([text]) for text in TEXTS])
    together = classifier.logits(TEXTS)
    mixed = classifier.logits([*NEIGHBORS, *TEXTS, *NEIGHBORS])[len(NEIGHBORS) : len(NEIGHBORS) + len(TEXTS)]
    backwards = classifier.logits(TEXTS[::-1])[::-1]
    return max(float(np.abs(alone - other).max()) for other in (together, mixed, backwards))


@pytest.mark.parametrize("format", ["torchao", "onnx", "openvino"])
def test_a_text_has_one_answer_after_ptq(format, quantized):
    assert gap_between(quantized, format) <= 1e-5


@pytest.mark.parametrize("bits", [8, 2])
def test_a_text_has_one_answer_after_qat(bits, trained):
    assert gap_between(trained / str(bits), "onnx") <= 1e-5


@pytest.mark.parametrize("format", ["nf4", "onnx"])
def test_a_text_has_one_answer_after_qlora(format, adapted):
    assert gap_between(adapted, format) <= 1e-5


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "mpnet"])
def test_other_encoders_have_one_answer_too(kind, baseline_of, tmp_path):
    words = ["--model_name_or_path", str(baseline_of(kind)), "--formats", "onnx", "--num_calibration_samples", "60"]
    run_ptq.main([*words, "--max_f1_drop", "100", "--output_dir", str(tmp_path / kind)])
    assert gap_between(tmp_path / kind, "onnx") <= 1e-5


def test_dynamic_ranges_depend_on_the_neighbors(artifact, tmp_path):
    words = ["--model_name_or_path", str(artifact), "--formats", "onnx", "--activation_quantization", "dynamic"]
    run_ptq.main([*words, "--num_calibration_samples", "60", "--output_dir", str(tmp_path / "ptq")])
    assert gap_between(tmp_path / "ptq", "onnx") > 1e-3
