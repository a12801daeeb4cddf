"""The real thing, short: the embedded model learns from real rows, and all its forms answer alike on test rows."""

import numpy as np
import pytest
import torch

from conftest import realigned
from emotion.data.metrics import score
from emotion.data.tokenization import TextEncoder
from emotion.inference.model_folder import files_to_serve, load_trained_classifier, weights_of
from emotion.inference.runtimes import open_artifact, predict
from emotion.quantization.int8 import quantize_torchao
from emotion.quantization.layers import Plan, find_layers


def test_it_learns_from_real_rows(real, test_rows):
    classifier = open_artifact(real, "onnx", threads=2)
    rows = test_rows.select(range(min(1000, len(test_rows))))
    scores = score(predict(classifier, classifier.encode(list(rows["text"]))), np.array(rows["label"]))
    assert scores["accuracy"] > 0.5  # always joy: 0.35
    assert scores["macro_f1"] > 0.25  # always joy: 0.09


def test_fusing_for_onnx_runtime_changes_no_answer(real, test_rows):
    texts = list(test_rows["text"])[:300]
    logits = {}
    for format in ("pytorch", "bf16", "onnx"):
        classifier = open_artifact(real, format, threads=2)
        logits[format] = predict(classifier, classifier.encode(texts))
    np.testing.assert_allclose(logits["onnx"], logits["pytorch"], atol=1e-3)
    assert (logits["onnx"].argmax(axis=-1) == logits["pytorch"].argmax(axis=-1)).all()
    assert (logits["bf16"].argmax(axis=-1) == logits["pytorch"].argmax(axis=-1)).mean() > 0.97


@pytest.mark.parametrize("format", ["torchao", "onnx", "openvino"])
def test_int8_is_a_quarter_and_answers_nearly_alike(format, real, real_int8, test_rows):
    texts = list(test_rows["text"])[:300]
    before, after, again = (
        predict(classifier, classifier.encode(texts))
        for classifier in (
            open_artifact(real, "pytorch", threads=2),
            open_artifact(real_int8, format, threads=2),
            open_artifact(real_int8, format, threads=2),
        )
    )
    np.testing.assert_array_equal(after, again)  # reopened, the very logits
    assert (before.argmax(axis=-1) == after.argmax(axis=-1)).mean() > 0.95
    twin = {"torchao": "pytorch", "onnx": "onnx", "openvino": "onnx"}[format]
    sizes = [sum(files_to_serve(*one).values()) for one in ((real_int8, format), (real, twin))]
    assert sizes[0] <= 0.27 * sizes[1]
    assert weights_of(real_int8, format).stat().st_size < weights_of(real, twin).stat().st_size


def test_torchao_gives_before_and_after_saving_the_very_logits(real, test_rows, tmp_path):
    float_model = load_trained_classifier(real)
    model = quantize_torchao(Plan(real, float_model, find_layers(float_model)), tmp_path)
    reopened = load_trained_classifier(tmp_path)
    encoder = TextEncoder(real)
    inputs = {name: torch.from_numpy(array) for name, array in encoder.pad(encoder(test_rows["text"][:32])).items()}
    with torch.no_grad():
        assert torch.equal(realigned(model)(**inputs).logits, realigned(reopened)(**inputs).logits)
