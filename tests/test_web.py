"""The models without Python: transformers.js in Node.js, and the demo page in a real browser."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import javascript_study
import run_ptq
import run_publish
from conftest import ROOT, read_json
from emotion.data.metrics import softmax
from emotion.inference.model_folder import SHARED_FILES, weights_of
from emotion.inference.runtimes import open_artifact, predict
from emotion.utils.errors import UserError
from emotion.utils.files import RECOMMENDED
from hub_server import Repository, running_hub

pytestmark = pytest.mark.web
WEB, REPOSITORY = ROOT / "tests" / "web", "user/bert-emotion-ptq"
FIRST = f"user/bert-emotion-{RECOMMENDED}"  # what the demo page opens by itself
FORMS = {"FP32": "baseline", "INT8": "qat", "INT4": "qat-int4", "INT2": "qat-int2"}  # what the page offers
FIRST_LOAD = 30e6  # bytes, of everything until the first answer
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


def run_node(*args, env, **options) -> str:
    done = subprocess.run(["node", *map(str, args)], cwd=WEB, env=env, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_array(ranking: list[dict], labels: list[str]) -> list[float]:
    scores = {one["label"]: one["score"] for one in ranking}
    return [scores[label] for label in labels]


def test_node_gives_the_probabilities_of_python(published, python_scores, test_rows):
    hub, env = published
    texts = list(test_rows["text"])[:200]
    args = ("--import", "./setup.mjs", "classify.mjs", REPOSITORY, "q8")
    rankings = json.loads(run_node(*args, env=env, input=json.dumps(texts)))
    labels, scores = python_scores
    found, expected = np.array([as_array(ranking, labels) for ranking in rankings]), scores(texts)
    print(f"largest gap of a probability over {len(texts)} texts: {np.abs(found - expected).max():.2e}")
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert (found.argmax(axis=-1) == expected.argmax(axis=-1)).all()
    files = {"config.json", "tokenizer.json", "tokenizer_config.json", "onnx/model_quantized.onnx"}
    assert set(hub.downloads(REPOSITORY)) == files
    together = json.loads(run_node(*args, "50", env=env, input=json.dumps(texts)))  # a text has one answer
    np.testing.assert_allclose(np.array([as_array(ranking, labels) for ranking in together]), found, atol=1e-5)


def test_node_opens_a_file_whose_outlier_units_are_in_floats(real, test_rows, tmp_path):
    out, texts = tmp_path / "split", list(test_rows["text"])[:50]
    args = ["--model_name_or_path", str(real), "--formats", "onnx", "--num_calibration_samples", "60"]
    run_ptq.main([*args, "--output_dir", str(out), "--split_outliers", "true", "--max_f1_drop", "100"])
    assert any("/outliers" in node.name for node in onnx.load(weights_of(out, "onnx")).graph.node)
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*")}
    classifier = open_artifact(out, "onnx", threads=1)
    expected = softmax(predict(classifier, classifier.encode(texts), batch_size=1))
    with running_hub() as hub:
        hub.repositories[REPOSITORY] = Repository(commits=[files])
        args = ("--import", "./setup.mjs", "classify.mjs", REPOSITORY, "q8")
        answer = run_node(*args, env=os.environ | {"HF_ENDPOINT": hub.url}, input=json.dumps(texts))
    found = np.array([as_array(ranking, classifier.labels) for ranking in json.loads(answer)])
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_the_study_times_texts_in_node(real_int8, tmp_path, capsys):
    javascript_study.main([str(real_int8), "--runs", "40", "--threads", "1", "--results_dir", str(tmp_path)])
    study = read_json(tmp_path / "javascript.json")
    assert study["latency_ms"]["runs"] == 40 and 0 < study["latency_ms"]["p50"] <= study["latency_ms"]["p95"]
    assert f"{study['latency_ms']['p50']:.2f} ms a text" in capsys.readouterr().out
    assert study["node"].startswith("v") and study["environment"]["threads"] == 1


def test_the_study_says_what_node_lacks(real_int8, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged"
    shutil.copytree(real_int8, damaged)
    (damaged / "onnx" / "model_quantized.onnx").write_bytes(b"cut")
    with pytest.raises(UserError, match="damaged does not open in transformers.js: .*Protobuf parsing failed"):
        javascript_study.ask_node(damaged, ["a"], threads=1)
    shutil.copy(WEB / "latency.mjs", tmp_path)
    monkeypatch.setattr(javascript_study, "WEB", tmp_path)
    with pytest.raises(UserError, match="no transformers.js in .*'make test GROUP=web' installs it"):
        javascript_study.ask_node(real_int8, ["a"], threads=1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no node on the path"):
        javascript_study.ask_node(real_int8, ["a"], threads=1)


def test_the_snippet_of_the_card_runs_as_it_stands(published, python_scores):
    card = (ROOT / "model_cards" / "ptq.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```js\n(.*?)```", card, flags=re.DOTALL)
    text = re.search(r'classify\("(.*?)"\)', code)[1]
    assert REPOSITORY in code
    shown = run_node("--import", "./setup.mjs", "--input-type=module", "-", env=published[1], input=code)
    labels, scores = python_scores
    (expected,) = scores([text])
    assert f"label: '{labels[expected.argmax()]}'" in shown
    assert float(re.search(r"score: ([\d.]+)", shown)[1]) == pytest.approx(expected.max(), abs=TOLERANCE)


def test_the_snippet_of_the_documentation_runs_on_a_folder(real_int8, python_scores, tmp_path):
    (code,) = re.findall(r"```js\n(.*?)```", (ROOT / "docs" / "usage.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / RECOMMENDED).symlink_to(real_int8)
    assert code.count('"weights/"') == 1 and f'"{RECOMMENDED}"' in code
    code = code.replace(
        '"weights/"', json.dumps(f"{tmp_path}/")
    )  # the libraries are found from the folder of the tests
    shown = run_node("--input-type=module", "-", env=os.environ, input=code)
    labels, scores = python_scores
    (expected,) = scores(["i feel so happy that you came"])
    assert f"label: '{labels[expected.argmax()]}'" in shown


@pytest.fixture(scope="module")
def variants(real, real_int8, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "baseline").symlink_to(real)
    (folder / "qat").symlink_to(real_int8)
    args = ["--model_name_or_path", str(real), "--formats", "onnx", "--num_calibration_samples", "60"]
    for bits in (4, 2):
        run_ptq.main(
            [*args, "--max_f1_drop", "100", "--bits", str(bits), "--output_dir", str(folder / f"qat-int{bits}")]
        )
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    for name, content in run_publish.collect_page(ROOT / "docs" / "demo", FIRST).items():
        (folder / name).write_bytes(content)
    return folder


@contextlib.contextmanager
def running_demo(weights: Path):
    """Serves the demo page as `make demo` does; gives the address."""
    args = [sys.executable, str(ROOT / "tools" / "demo.py"), "--port", "0", "--weights_dir", str(weights)]
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}{os.pathsep}{ROOT / 'tools'}"}
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
        finally:
            process.terminate()


@pytest.fixture(params=["published", "clone"])
def place(request, variants, published, page):
    """What browse.mjs opens: the page's folder, with all models but the float one on the Hub; or a clone's address."""
    if request.param == "clone":
        with running_demo(variants) as address:
            yield address
        return
    for folder in variants.glob("qat*"):
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        published[0].repositories[f"user/bert-emotion-{folder.name}"] = Repository(commits=[files])
    yield page


def find_browser() -> str:
    return next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))


def check_answer(shown: dict, folder: Path, text: str) -> None:
    """The probabilities are those of Python, and what stands and is drawn on the page is those probabilities."""
    classifier = open_artifact(folder, "onnx", threads=1)
    (expected,) = softmax(predict(classifier, classifier.encode([text]), batch_size=1))
    assert shown["text"] == text
    assert [bar["label"] for bar in shown["bars"]] == classifier.labels
    np.testing.assert_allclose([bar["score"] for bar in shown["bars"]], expected, atol=TOLERANCE_OF_BROWSERS)
    for bar in shown["bars"]:
        assert bar["shown"] == f"{100 * bar['score']:.1f} %"
        assert float(bar["width"].rstrip("%")) == pytest.approx(100 * bar["score"], abs=0.06)
    (best,) = [bar for bar in shown["bars"] if bar["best"]]
    assert best["score"] == max(bar["score"] for bar in shown["bars"])
    assert re.match(rf"{best['label']}, [\d.]+ % in \d+ ms", shown["status"])


def test_the_demo_page_in_a_browser(place, variants, published, page, tmp_path):
    """Opened at the width of a phone and used by keyboard alone; see browse.mjs."""
    args, is_clone = ("browse.mjs", find_browser(), place, tmp_path / "screenshot.png"), place != page
    seen = json.loads(run_node(*args, env=published[1]))
    there = [name for name in FORMS if name != "FP32" or is_clone]
    sizes = {name: f"{weights_of(variants / FORMS[name], 'onnx').stat().st_size / 1e6:.1f} MB" for name in there}
    assert [form.split() for form in seen["forms"]] == [
        [name, *sizes[name].split()] for name in FORMS if name in there
    ]
    assert seen["missing"] == ([] if is_clone else ["FP32: user/bert-emotion-baseline is not on the Hub"])

    check_answer(seen["first"], variants / RECOMMENDED, "i feel so happy that you came")
    assert f"{sizes['INT4']} of {sizes['INT4']}" in seen["amounts"]
    if not is_clone:
        print(f"bytes until the first answer: {seen['bytes']:,}")
        assert 12e6 < seen["bytes"] <= FIRST_LOAD
    labels = [bar["label"] for bar in seen["first"]["bars"]]
    assert f"one of these {len(labels)}, " in seen["classes"] and f": {', '.join(labels)}." in seen["classes"]

    for shown in (seen["typed"], seen["linked"]):
        check_answer(shown, variants / RECOMMENDED, "i am scared of the dark")
    # Read out: that it loads, and each answer once, not one for each key
    assert len([words for words in seen["said"] if "Loading" not in words]) == len(seen["saidLater"]) == 1
    assert seen["address"].endswith("#i%20am%20scared%20of%20the%20dark") and "first 128 tokens" in seen["cut"]
    assert seen["others"].keys() == set(there) - {"INT4"}  # the arrows pass over a form that is not there
    for name, shown in {**seen["others"], "INT4": seen["again"]}.items():
        check_answer(shown, variants / FORMS[name], "i am scared of the dark")
    check_answer(seen["example"], variants / RECOMMENDED, "i miss my old home")

    tried = [re.split(r"\t", line) for line in seen["tried"]]
    assert [line[:2] for line in tried] == [[name, sizes[name]] for name in ["INT4", *seen["others"]]]
    for _, _, answer, time in tried:
        assert re.fullmatch(r"\w+, [\d.]+ %", answer) and re.fullmatch(r"\d+ ms", time)
    assert [line.count("(another text)") for line in seen["triedLater"]] == [0] + [1] * len(seen["others"])
    assert seen["wide"] == 360  # nothing sticks out
    assert seen["empty"]["bars"] == []
    assert is_clone or "user/nowhere cannot be loaded" in seen["nowhere"]["status"]
    assert seen["refused"] == []  # it asks the CDN and the Hub alone, and in a clone its own server
    assert (tmp_path / "screenshot.png").stat().st_size > 10_000


@pytest.fixture(scope="module")
def failures(page):
    """What the demo page says under each fault of faults.mjs; no model is needed."""
    with running_hub() as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url}
        return json.loads(run_node("faults.mjs", find_browser(), page, env=env))


@pytest.mark.parametrize(
    ("fault", "args"),
    [
        ("libraryRefused", "The library of cdn.jsdelivr.net cannot be loaded: "),
        ("libraryIsHtml", "The library of cdn.jsdelivr.net cannot be loaded: "),
        ("libraryIsBroken", "The library of cdn.jsdelivr.net cannot be loaded: "),
        ("libraryNeverComes", "No progress for 30 s. Check the connection and reload"),
        ("noModels", f"{FIRST} cannot be loaded: "),
        ("modelRefused", f"{FIRST} cannot be loaded: "),
        ("modelFails", f"{FIRST} cannot be loaded: "),
        ("modelIsHtml", f"{FIRST} is damaged: "),
        ("modelNeverComes", "No progress for 30 s. Check the connection and reload"),
        ("answerFails", "The model failed on this text: out of memory. Change the text, or reload"),
        ("answerThrowsNumber", "The model failed on this text: 7340032. Change the text, or reload"),
        ("answerIsNaN", "The model failed on this text: it gives no probabilities. Change"),
        ("answerIsEmpty", "The model failed on this text: it gives no probabilities. Change"),
    ],
)
def test_the_demo_page_says_what_fails(fault, args, failures):
    seen = failures[fault]
    assert seen["status"].startswith(args) and "reload the page" in seen["status"] and len(seen["status"]) < 400
    assert seen["bars"] == [] and set(seen["opened"]) <= {FIRST} and seen["wide"] == 360


def test_the_demo_page_opens_no_model_that_nobody_named(failures):
    for link in ("linkNamesAnother", "linkNamesPath", "linkNamesMarkup"):
        assert failures[link]["opened"] == [] and failures[link]["images"] == 0
    assert "names another model, someone/else. Press Load" in failures["linkNamesAnother"]["status"]
    assert "No model is named" in failures["linkNamesPath"]["status"]
    assert failures["linkNamesSame"]["opened"] == [FIRST]
    assert failures["linkNamesSibling"]["opened"] == ["user/bert-emotion-qat-int2"]
    assert failures["personOpensAnother"]["opened"] == ["someone/else"]
    assert failures["personOpensAnother"]["status"].startswith("joy, 75.0 % in")
    assert failures["slowFirst"]["bars"] == ["user/second"]


def test_a_page_of_nobody_asks_nobody(tmp_path):
    """As it stands in this repository: it wants its own server, which says what makes the models that are missing."""
    args = ("faults.mjs", find_browser())
    seen = json.loads(run_node(*args, ROOT / "docs" / "demo", "libraryRefused", env=os.environ))["libraryRefused"]
    assert seen["status"].startswith("The library of tools/demo.py (make demo) cannot be loaded: ")
    with running_demo(tmp_path) as address:
        (tmp_path / RECOMMENDED / "onnx").mkdir(parents=True)
        (tmp_path / RECOMMENDED / "onnx" / "model_quantized.onnx").write_bytes(b"cut")
        for name in SHARED_FILES:
            shutil.copy(ROOT / "weights" / RECOMMENDED / name, tmp_path / RECOMMENDED)
        seen = json.loads(run_node(*args, address, "damaged", env=os.environ))["damaged"]
        assert seen["status"].startswith(f"{RECOMMENDED} is damaged: ")
        shutil.rmtree(tmp_path / RECOMMENDED)
        seen = json.loads(run_node(*args, address, "noModels", env=os.environ))["noModels"]
    assert seen["status"].startswith(f"{RECOMMENDED} cannot be loaded: ") and seen["wide"] == 360
    assert "FP32: not in weights/baseline; made by make demo, where PyTorch is installed" in seen["missing"]
    assert len(seen["missing"]) == len(FORMS)
