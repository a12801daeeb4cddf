"""The published INT8 model without Python: transformers.js in Node.js, and the demo page in a real browser."""

import json
import os
import re
import shutil
import subprocess

import run_ptq
import run_publish
from conftest import ROOT
from emotion.model.artifact import weights_of
from emotion.model.classifier import open_artifact, predict
from emotion.report.cards import TEMPLATE
from emotion.task.scores import softmax
from hub_server import Repository, running_hub

import numpy as np
import onnx
import pytest

pytestmark = pytest.mark.web
WEB, REPOSITORY = ROOT / "tests" / "web", "user/bert-emotion-ptq"
NO_MODEL = "No model is named. Type owner/name below and press Load"
TOLERANCE = 1e-3  # of a probability; the runtimes multiply the same integers, and sum what is float in other orders
# WebAssembly now and then rounds an activation the other way: over 200 test texts the largest gap was 0.03, the median
# 2e-8, and no label differed; a text between two emotions feels it most.
TOLERANCE_OF_BROWSERS = 0.1


@pytest.fixture(scope="module")
def published(real_int8):
    """A Hub that holds the INT8 model, and the environment of those who ask it."""
    files = {path.relative_to(real_int8).as_posix(): path.read_bytes() for path in real_int8.rglob("*.*")}
    with running_hub() as hub:
        hub.repositories[REPOSITORY] = Repository(commits=[files])
        yield hub, os.environ | {"HF_ENDPOINT": hub.url}


@pytest.fixture(scope="module")
def python_scores(real_int8):
    """What ONNX Runtime in Python gives, as a function of the texts: (texts, labels) in the order of `labels`."""
    classifier = open_artifact(real_int8, "onnx", threads=1)
    return classifier.labels, lambda texts: softmax(predict(classifier, classifier.encode(texts), batch_size=1))


def run_node(*words, env, **options) -> str:
    done = subprocess.run(["node", *map(str, words)], cwd=WEB, env=env, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_array(ranking: list[dict], labels: list[str]) -> list[float]:
    scores = {one["label"]: one["score"] for one in ranking}
    return [scores[label] for label in labels]


def test_node_gives_the_probabilities_of_python(published, python_scores, test_rows):
    hub, env = published
    texts = list(test_rows["text"])[:200]
    words = ("--import", "./setup.mjs", "classify.mjs", REPOSITORY, "q8")
    rankings = json.loads(run_node(*words, env=env, input=json.dumps(texts)))
    labels, scores = python_scores
    found, expected = np.array([as_array(ranking, labels) for ranking in rankings]), scores(texts)
    print(f"largest gap of a probability over {len(texts)} texts: {np.abs(found - expected).max():.2e}")
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert (found.argmax(axis=-1) == expected.argmax(axis=-1)).all()
    files = {"config.json", "tokenizer.json", "tokenizer_config.json", "onnx/model_quantized.onnx"}
    assert set(hub.downloads(REPOSITORY)) == files


def test_node_opens_a_file_whose_outlier_units_are_in_floats(real, test_rows, tmp_path):
    out, texts = tmp_path / "split", list(test_rows["text"])[:50]
    words = ["--baseline", str(real), "--output_dir", str(out), "--formats", "onnx", "--calibration_rows", "60"]
    run_ptq.main([*words, "--split_outliers", "true", "--max_loss", "100"])
    assert any("/outliers" in node.name for node in onnx.load(weights_of(out, "onnx")).graph.node)
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*")}
    classifier = open_artifact(out, "onnx", threads=1)
    expected = softmax(predict(classifier, classifier.encode(texts), batch_size=1))
    with running_hub() as hub:
        hub.repositories[REPOSITORY] = Repository(commits=[files])
        words = ("--import", "./setup.mjs", "classify.mjs", REPOSITORY, "q8")
        answer = run_node(*words, env=os.environ | {"HF_ENDPOINT": hub.url}, input=json.dumps(texts))
    found = np.array([as_array(ranking, classifier.labels) for ranking in json.loads(answer)])
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_the_snippet_of_the_card_runs_as_it_stands(published, python_scores):
    (code,) = re.findall(r"```js\n(.*?)```", TEMPLATE.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = "i feel so happy that you came"
    for gap, words in (("repo_id", REPOSITORY), ("dtype", "q8"), ("example.text", text)):
        code = code.replace(f"{{{{ {gap} }}}}", words)
    shown = run_node("--import", "./setup.mjs", "--input-type=module", "-", env=published[1], input=code)
    labels, scores = python_scores
    (expected,) = scores([text])
    assert f"label: '{labels[expected.argmax()]}'" in shown
    assert float(re.search(r"score: ([\d.]+)", shown)[1]) == pytest.approx(expected.max(), abs=TOLERANCE)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The demo page's folder as it is published."""
    folder = tmp_path_factory.mktemp("page")
    for name, content in run_publish.collect_page(ROOT / "docs" / "demo", REPOSITORY).items():
        (folder / name).write_bytes(content)
    return folder


def find_browser() -> str:
    return next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))


def test_the_demo_page_in_a_browser(published, python_scores, page, tmp_path):
    """Opened at the width of a phone and used by keyboard alone; see browse.mjs."""
    words = ("browse.mjs", find_browser(), page, tmp_path / "screenshot.png")
    seen = json.loads(run_node(*words, env=published[1]))
    labels, scores = python_scores
    texts = {
        "first": "i feel so happy that you came",
        "typed": "i am scared of the dark",
        "example": "i miss my old home",
    }
    for state, text in texts.items():
        shown, (expected,) = seen[state], scores([text])
        assert shown["text"] == text
        assert [bar["label"] for bar in shown["bars"]] == labels
        np.testing.assert_allclose([bar["score"] for bar in shown["bars"]], expected, atol=TOLERANCE_OF_BROWSERS)
        for bar in shown["bars"]:
            assert bar["shown"] == f"{100 * bar['score']:.1f} %"
            assert float(bar["width"].rstrip("%")) == pytest.approx(100 * bar["score"], abs=0.06)
        (best,) = [bar for bar in shown["bars"] if bar["best"]]
        assert best["score"] == max(bar["score"] for bar in shown["bars"])
        assert re.match(rf"{best['label']}, [\d.]+ % in \d+ ms", shown["status"])
    assert seen["wide"] == 360  # nothing sticks out
    assert seen["empty"]["bars"] == [] and "user/nowhere cannot be loaded" in seen["nowhere"]["status"]
    assert seen["refused"] == []  # it asks the CDN and the Hub alone
    assert (tmp_path / "screenshot.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def failures(page):
    """What the demo page says under each fault of faults.mjs; no model is needed."""
    with running_hub() as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url}
        return json.loads(run_node("faults.mjs", find_browser(), page, env=env))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("libraryRefused", "The library of cdn.jsdelivr.net cannot be loaded: "),
        ("libraryIsHtml", "The library of cdn.jsdelivr.net cannot be loaded: "),
        ("libraryIsBroken", "The library of cdn.jsdelivr.net cannot be loaded: "),
        ("libraryNeverComes", "No progress for 30 s. Check the connection and reload"),
        ("modelRefused", f"{REPOSITORY} cannot be loaded: "),
        ("modelFails", f"{REPOSITORY} cannot be loaded: "),
        ("modelIsHtml", f"{REPOSITORY} cannot be loaded: "),
        ("modelNeverComes", "No progress for 30 s. Check the connection and reload"),
        ("answerFails", "The model failed on this text: out of memory. Change the text, or reload"),
        ("answerThrowsNumber", "The model failed on this text: 7340032. Change the text, or reload"),
        ("answerIsNaN", "The model failed on this text: it gives no probabilities. Change"),
        ("answerIsEmpty", "The model failed on this text: it gives no probabilities. Change"),
    ],
)
def test_the_demo_page_says_what_fails(fault, words, failures):
    seen = failures[fault]
    assert seen["status"].startswith(words) and "reload the page" in seen["status"] and len(seen["status"]) < 400
    assert seen["bars"] == [] and set(seen["opened"]) <= {REPOSITORY}


def test_the_demo_page_opens_no_model_that_nobody_named(failures):
    for link in ("linkNamesAnother", "linkNamesPath", "linkNamesMarkup"):
        assert failures[link]["opened"] == [] and failures[link]["images"] == 0
    assert "names another model, someone/else. Press Load" in failures["linkNamesAnother"]["status"]
    assert "No model is named" in failures["linkNamesPath"]["status"]
    assert failures["linkNamesSame"]["opened"] == [REPOSITORY]
    assert failures["personOpensAnother"]["opened"] == ["someone/else"]
    assert failures["personOpensAnother"]["status"].startswith("joy, 75.0 % in")
    assert failures["slowFirst"]["bars"] == ["user/second"]


def test_the_page_of_nobody_opens_no_model(tmp_path):
    """As it stands in this repository, before it is published."""
    with running_hub() as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url}
        seen = json.loads(run_node("faults.mjs", find_browser(), ROOT / "docs" / "demo", "answerFails", env=env))
    assert seen["answerFails"] == {"status": NO_MODEL, "bars": [], "opened": [], "images": 0}
