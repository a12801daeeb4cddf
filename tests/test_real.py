"""The real thing, short: the embedded model learns from real rows, and its three forms answer alike on test rows."""

import numpy as np
import pytest
import run_baseline
from utils_artifact import open_artifact
from utils_ruler import predict, score
from utils_task import DEFAULT_DATASET, EMBEDDED_MODEL, load_task


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "baseline"
    run_baseline.main(["--model_name_or_path", EMBEDDED_MODEL, "--max_train_rows", "3200", "--max_steps", "90",
                       "--learning_rate", "4e-4", "--eval_strategy", "no", "--save_strategy", "no",
                       "--load_best_model_at_end", "false", "--disable_tqdm", "true",
                       "--output_dir", str(folder)])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def test_rows():
    return load_task(DEFAULT_DATASET).splits["test"]


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
