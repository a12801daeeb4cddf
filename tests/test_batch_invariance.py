"""One answer per text with fixed activation ranges: alone, in any batch, in any order, beside any neighbor."""

import numpy as np
import pytest

import run_ptq
import run_qat
from conftest import WORDS, build_rows, ptq_flags, qat_flags
from emotion.inference.emotion_classifier import EmotionClassifier
from emotion.utils.base_model import read_recipe_of

# Neighbors that stretch the range of a batch: the longest text, one token repeated, other alphabets, nothing
NEIGHBORS = [" ".join(WORDS) * 2, "sky " * 40, "красный blå 红色 ☃", "", "!?" * 30, *build_rows(20)["text"]]
TEXTS = build_rows(40)["text"]


def gap_between(folder, format: str = "onnx") -> float:
    """The largest difference of a logit between a text alone and the same text in batches of all kinds."""
    classifier = EmotionClassifier.from_pretrained(folder, format, threads=1)
    alone = np.concatenate([classifier.logits([text]) for text in TEXTS])
    together = classifier.logits(TEXTS)
    mixed = classifier.logits([*NEIGHBORS, *TEXTS, *NEIGHBORS])[len(NEIGHBORS) : len(NEIGHBORS) + len(TEXTS)]
    backwards = classifier.logits(TEXTS[::-1])[::-1]
    return max(float(np.abs(alone - other).max()) for other in (together, mixed, backwards))


@pytest.mark.parametrize("format", ["torchao", "onnx", "openvino"])
def test_each_format_has_one_answer_per_text(format, quantized):
    assert gap_between(quantized, format) <= 1e-5


@pytest.mark.parametrize("bits", [8, 2])
def test_a_text_has_one_answer_after_ptq(bits, artifact, tmp_path):
    run_ptq.main(ptq_flags(artifact, tmp_path / "ptq", bits=bits, max_f1_drop=100, formats="onnx"))
    assert gap_between(tmp_path / "ptq") <= 1e-5


@pytest.mark.parametrize("bits", [8, 2])
def test_a_text_has_one_answer_after_qat(bits, artifact, tmp_path):
    run_qat.main(qat_flags(artifact, tmp_path / "qat", bits=bits, num_train_epochs=1, formats="onnx"))
    assert gap_between(tmp_path / "qat") <= 1e-5


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "mpnet"])
def test_other_encoders_have_one_answer_per_text(kind, baseline_of, tmp_path):
    run_ptq.main(ptq_flags(baseline_of(kind), tmp_path / kind, max_f1_drop=100, formats="onnx"))
    assert gap_between(tmp_path / kind) <= 1e-5


def test_dynamic_ranges_depend_on_the_neighbors(artifact, tmp_path):
    flags = {"activation_quantization": "dynamic", "formats": "onnx"}
    run_ptq.main(ptq_flags(artifact, tmp_path / "ptq", max_f1_drop=100, **flags))
    assert read_recipe_of(tmp_path / "ptq")["variant"] == "ptq-dynamic"
    assert gap_between(tmp_path / "ptq") > 1e-3
