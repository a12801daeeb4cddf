"""From strings to labels, as another program uses it: order, batches, threads, formats, errors."""

import copy
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from itertools import count, islice

import numpy as np
import pytest

from conftest import ROOT, WORDS, build_rows, copy_to_edit
from emotion import EmotionClassifier
from emotion.inference.emotion_classifier import CHUNK, FEW
from emotion.inference.runtimes import TOKENS, batches_by_tokens
from emotion.utils.errors import UserError
from hub_server import Repository, running_hub

# Of 0 to 80 words, some longer than the model takes; more than a chunk, so that chunks must be put together in order
MANY = [" ".join(WORDS[(row + word) % len(WORDS)] for word in range(row % 81)) for row in range(CHUNK + 500)]
FORMATS = ["onnx", "openvino", "torchao"]


@pytest.fixture(scope="module")
def classifier(artifact):
    return EmotionClassifier.from_pretrained(artifact, threads=2)


def test_answers_stand_in_the_order_of_the_texts(classifier):
    texts = build_rows(300)["text"]
    answers = classifier.classify(texts)
    assert classifier.labels == ["warm", "cold", "none"] and classifier.format == "onnx"
    labels = [answer["label"] for answer in answers]
    assert np.mean(np.array(labels) == np.array(classifier.labels * 100)) > 0.95
    assert all(set(answer) == {"label", "score"} and type(answer["score"]) is float for answer in answers)
    assert classifier.classify(texts[:1])[0]["label"] == labels[0]
    assert classifier.classify([]) == [] == list(classifier.classify_stream(iter([])))
    assert classifier.logits([]).shape == (0, 3) and len(classifier.classify(["", " ", "red"])) == 3


def test_several_labels_of_a_text(classifier):
    texts = ["the gray sky", "a red house"]
    everything = classifier.classify(texts, top_k=None)
    for answers, label in zip(everything, ("none", "warm"), strict=True):
        scores = [answer["score"] for answer in answers]
        assert answers[0]["label"] == label and {answer["label"] for answer in answers} == {"warm", "cold", "none"}
        assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1)
    assert classifier.classify(texts, top_k=2) == [answers[:2] for answers in everything]
    assert classifier.classify(texts, top_k=99) == everything
    assert classifier.classify(texts, top_k=1) == [answers[0] for answers in everything]


def test_many_texts_are_answered_as_one_by_one(classifier):
    """In FP32, where a text's logits do not depend on its batch."""
    logits = classifier.logits(MANY)
    assert logits.dtype == np.float32 and logits.shape == (len(MANY), 3)
    for row in range(0, len(MANY), 37):
        alone = classifier.logits([MANY[row]])[0]
        np.testing.assert_allclose(logits[row], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_the_number_of_threads_changes_nothing(format, quantized):
    logits = []
    for threads in (1, 2, 3, 3):
        logits.append(EmotionClassifier.from_pretrained(quantized, format, threads).logits(MANY))
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])


@pytest.mark.parametrize("format", FORMATS)
def test_every_runtime_answers(format, quantized):
    classifier = EmotionClassifier.from_pretrained(quantized, format, threads=2)
    labels = [answer["label"] for answer in classifier.classify(["red", "blue", "white sky"] * 20)]
    assert labels == ["warm", "cold", "none"] * 20


def test_the_lightest_format_is_taken(quantized, tmp_path):
    folder = tmp_path / "copy"
    copy_to_edit(quantized, folder)
    for format in FORMATS:
        assert EmotionClassifier.from_pretrained(folder).format == format
        shutil.rmtree(folder / format, ignore_errors=True)


def test_cut_texts_are_counted_once(artifact):
    classifier = EmotionClassifier.from_pretrained(artifact, threads=2)
    classifier.classify(["red " * 39, "blue"])
    classifier.logits(["red " * 38] * 100)  # with its first and last token as long as the model takes: 40
    assert classifier.texts_cut == 1


def test_a_stream_without_end_is_answered(classifier):
    endless = (f"{'red' if row % 2 else 'blue'} sky" for row in count())
    labels = [answer["label"] for answer in islice(classifier.classify_stream(endless), 2 * CHUNK + 10)]
    assert labels == ["cold", "warm"] * (CHUNK + 5)
    gc.collect()  # closes the stream; what it has read ahead is not computed any more
    assert classifier.classify(["red"])[0]["label"] == "warm"


def test_several_threads_may_ask_at_once(artifact):
    classifier = EmotionClassifier.from_pretrained(artifact, threads=2)
    expected, answers = classifier.logits(MANY[:200]), [None] * 4

    def ask(place: int) -> None:
        answers[place] = classifier.logits(MANY[:200])

    askers = [threading.Thread(target=ask, args=(place,)) for place in range(len(answers))]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    for answer in answers:
        np.testing.assert_array_equal(answer, expected)


def test_batches_hold_texts_of_nearly_the_same_length():
    lengths = np.random.default_rng(0).integers(2, 100, size=1000)
    token_ids = [[0] * length for length in [*lengths, TOKENS + 1, 3 * TOKENS]]
    batches = batches_by_tokens(token_ids)
    assert sorted(np.concatenate(batches)) == list(range(len(token_ids)))
    for batch in batches[:-2]:
        longest, shortest = max(lengths[batch]), min(lengths[batch])
        assert longest * len(batch) <= TOKENS and longest <= shortest * 9 / 8
    assert [len(batch) for batch in batches[-2:]] == [1, 1]  # longer than a batch may be, and answered
    assert batches_by_tokens([]) == []


@pytest.mark.parametrize("texts", [["red"], ["red"] * (FEW + 1)], ids=["one", "many"])
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_neither_torch_nor_transformers_is_imported(format, texts, quantized):
    code = (
        "import json, sys, emotion; assert 'numpy' not in sys.modules\n"
        "folder, format, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])\n"
        "classifier = emotion.EmotionClassifier.from_pretrained(folder, format, threads=2)\n"
        "print({answer['label'] for answer in classifier.classify(texts)})\n"
        "heavy = {'torch', 'transformers', 'pandas', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    args = [sys.executable, "-c", code, str(quantized), format, json.dumps(texts)]
    done = subprocess.run(args, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "scripts"), "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "{'warm'}\n"


FORKED = """
import faulthandler, os, signal, sys
from emotion import EmotionClassifier
folder, format, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
texts = ["red", "blue", "white sky", "i see the gray house"] * 10
classifier = EmotionClassifier.from_pretrained(folder, format, threads=threads)
def labels():
    return [answer["label"] for answer in classifier.classify(texts)]
expected = labels()
faulthandler.register(signal.SIGALRM, chain=True)  # shows where a process hangs, and ends it
child = os.fork()
signal.alarm(100)
if not child:
    grandchild = os.fork()
    signal.alarm(100)
    assert labels() == expected and labels()[:1] == expected[:1]
    assert classifier.classify(texts[:1])[0]["label"] == expected[0]
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) if grandchild else 0)
assert labels() == expected
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("format", [*FORMATS, "pytorch"])
def test_a_forked_process_answers(format, quantized, artifact):
    """40 texts before, 40 in the child and in its child, as under `gunicorn --preload`; then all three end."""
    folder = artifact if format == "pytorch" else quantized
    command = [sys.executable, "-c", FORKED, str(folder), format, "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("format", [*FORMATS, "pytorch"])
def test_a_copy_answers_in_every_format(format, quantized, artifact):
    folder = artifact if format == "pytorch" else quantized
    classifier = EmotionClassifier.from_pretrained(folder, format, threads=2)
    for other in (pickle.loads(pickle.dumps(classifier)), copy.deepcopy(classifier)):
        np.testing.assert_array_equal(other.logits(["red", "blue sky"]), classifier.logits(["red", "blue sky"]))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["red", None], "text 1 .* is None, no string"),
        (["red"] * (CHUNK + 3) + [float("nan")], f"text {CHUNK + 3} .* is nan, no string"),
        ([("red", "blue")], "text 0 .* no string"),
        (["red \ud83d"], "text 0 .* half a character at 4"),
    ],
)
def test_an_item_that_is_no_text_is_named(texts, message, classifier):
    for ask in (classifier.classify, classifier.logits):
        with pytest.raises(UserError, match=message):
            ask(texts)


def test_mistakes_of_the_caller_are_said_at_once(classifier, artifact):
    for ask in (classifier.classify, classifier.classify_stream, classifier.logits):
        with pytest.raises(TypeError, match=r"write \[text\]"):
            ask("red")
    with pytest.raises(UserError, match="top_k 0: it takes 1 or more"):
        classifier.classify_stream(["red"], top_k=0)
    with pytest.raises(UserError, match="has no format 'gguf'; it has pytorch, bf16, onnx"):
        EmotionClassifier.from_pretrained(artifact, "gguf")
    with pytest.raises(UserError, match="no format 'gguf'; take one of pytorch"):
        EmotionClassifier.from_pretrained("user/colors", "gguf")
    with pytest.raises(UserError, match="no folder nowhere"):
        EmotionClassifier.from_pretrained("nowhere")


def test_a_repository_of_the_hub_is_opened(quantized, tmp_path):
    files = {}
    for path in quantized.rglob("*"):
        if path.is_file() and "onnx" not in path.parts and path.name != "SHA256SUMS":
            files[path.relative_to(quantized).as_posix()] = path.read_bytes()
    code = (
        "from emotion import EmotionClassifier; classifier = EmotionClassifier.from_pretrained('user/colors')\n"
        "print(classifier.format, classifier.classify(['red'])[0]['label'])"
    )
    with running_hub() as hub:
        hub.repositories["user/colors"] = Repository(commits=[files])
        # In a process of its own: huggingface_hub reads these while it loads.
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        environment = os.environ | settings | {"PYTHONPATH": str(ROOT / "scripts"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "openvino warm\n", done.stderr
    assert "model.safetensors" not in hub.downloads("user/colors")


def test_pytorch_is_called_by_the_callers_own_thread(artifact, monkeypatch):
    # A second thread would bring a second team of PyTorch's threads, and both would be slower.
    classifier, callers = EmotionClassifier.from_pretrained(artifact, "pytorch", threads=2), set()
    forward = classifier.runtime.model.forward

    def watched(*args, **options):
        callers.add(threading.current_thread())
        return forward(*args, **options)

    monkeypatch.setattr(classifier.runtime.model, "forward", watched)
    classifier.classify(build_rows(90)["text"])
    assert callers == {threading.current_thread()}
