"""From strings to labels, by the class and by predict.py: order, batches, threads, formats, streams, errors."""

import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice

import numpy as np
import pytest
from pyarrow import parquet

import run_baseline
import run_batch
import run_ptq
import run_qat
from conftest import (
    ROOT,
    WORDS,
    as_flags,
    build_rows,
    contents,
    copy_to_edit,
    ptq_flags,
    qat_flags,
    run_code,
    run_script,
    train_flags,
)
from emotion import EmotionClassifier
from emotion.data.tokenization import MOST_WINDOWS
from emotion.inference import predict
from emotion.inference.emotion_classifier import CHUNK, FEW
from emotion.utils.base_model import read_recipe_of
from emotion.utils.errors import UserError
from hub_server import Repository

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
    first = EmotionClassifier.from_pretrained(quantized, format, 1).logits(MANY)
    for threads in (2, 3, 3):
        other = EmotionClassifier.from_pretrained(quantized, format, threads).logits(MANY)
        np.testing.assert_array_equal(other, first)


def test_every_runtime_answers_and_the_lightest_one_is_taken(quantized, tmp_path):
    folder = copy_to_edit(quantized, tmp_path / "copy")
    for format in FORMATS:
        classifier = EmotionClassifier.from_pretrained(folder, threads=2)
        labels = [answer["label"] for answer in classifier.classify(["red", "blue", "white sky"] * 20)]
        assert classifier.format == format and labels == ["warm", "cold", "none"] * 20
        copied = pickle.loads(pickle.dumps(EmotionClassifier.from_pretrained(quantized, format)))
        assert copied.format == format and copied.classify(["red"])[0]["label"] == "warm"
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
    expected = classifier.logits(MANY[:200])
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(classifier.logits, [MANY[:200]] * 4):
            np.testing.assert_array_equal(answer, expected)


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
    done = run_code(code, quantized, format, json.dumps(texts), env={"PATH": ""})
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
    done = run_code(FORKED, folder, format, 2)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["red", None], "text 1 .* None"),
        (["red"] * (CHUNK + 3) + [float("nan")], f"text {CHUNK + 3} .* nan"),
        ([("red", "blue")], "text 0 "),
        (["red \ud83d"], "text 0 .* 4"),
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
    with pytest.raises(UserError, match="top_k 0"):
        classifier.classify_stream(["red"], top_k=0)
    for folder, noun in ((artifact, "'gguf'; .* bf16"), ("user/colors", "'gguf'; .* pytorch"), ("nowhere", "nowhere")):
        with pytest.raises(UserError, match=noun):
            EmotionClassifier.from_pretrained(folder, "gguf")


def test_a_repository_of_the_hub_is_opened(quantized, hub):
    files = {name: data for name, data in contents(quantized).items() if not name.startswith(("onnx", "SHA256"))}
    code = (
        "from emotion import EmotionClassifier; classifier = EmotionClassifier.from_pretrained('user/colors')\n"
        "print(classifier.format, classifier.classify(['red'])[0]['label'])"
    )
    hub.repositories["user/colors"] = Repository(commits=[files])
    done = run_code(code)  # in a process of its own: huggingface_hub reads its settings while it loads
    assert done.stdout == "openvino warm\n", done.stderr
    assert "model.safetensors" not in hub.downloads("user/colors")


def test_a_revision_is_opened_and_no_other(artifact, colors, hub, tmp_path, capsys):
    files = {name: data for name, data in contents(artifact).items() if name != "SHA256SUMS" and "onnx" not in name}
    renamed = files | {"config.json": files["config.json"].replace(b"warm", b"hot")}
    repository = hub.repositories["user/colors"] = Repository(commits=[files, renamed])
    first, last = ({"model_revision": repository.sha(index)} for index in (0, 1))
    assert EmotionClassifier.from_pretrained("user/colors", revision=first["model_revision"]).labels[0] == "warm"
    assert EmotionClassifier.from_pretrained("user/colors").labels[0] == "hot"
    predict.main(["--model", "user/colors", *as_flags(**first), "red"])
    assert capsys.readouterr().out.startswith("warm")
    (tmp_path / "texts.txt").write_text("red\n")
    run_batch.main([str(tmp_path / "texts.txt"), str(tmp_path / "out"), "--model", "user/colors", *as_flags(**first)])
    run_ptq.main(ptq_flags("user/colors", tmp_path / "ptq", formats="torchao", dataset_name=colors, **first))
    assert EmotionClassifier(tmp_path / "ptq").labels[0] == "warm"
    made = read_recipe_of(tmp_path / "ptq")["recipe"]
    assert (made["model_name_or_path"], made["model_revision"]) == ("user/colors", first["model_revision"])
    for main, flags in ((run_baseline.main, train_flags), (run_qat.main, qat_flags)):  # with the labels of the last
        with pytest.raises(UserError, match="hot"):
            places = ("user/colors", colors) if flags is train_flags else ("user/colors",)
            main(flags(*places, tmp_path / "no", **({"dataset_name": colors} | last)))
    for call, message in (
        (lambda: EmotionClassifier.from_pretrained("user/colors", revision="0" * 40), "no revision or file"),
        (lambda: EmotionClassifier.from_pretrained(artifact, revision="main"), "no repository of the Hub"),
        (lambda: run_baseline.main(train_flags(artifact, colors, "no", model_revision="main")), "no repository"),
        (
            lambda: run_baseline.main(train_flags("user/colors", colors, "no", model_revision="x")),
            "no revision or file",
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize("format", ["onnx", "pytorch"])
def test_scores_of_a_long_text_are_the_mean_of_its_parts(format, artifact, tmp_path, capsys):
    truncating = EmotionClassifier(artifact, format)
    length = truncating.runtime.encode.max_length - 2  # words of a window, without the special tokens
    words = ["red"] * length + ["blue", "sky"] * length + ["gray"] * 5
    parts = [" ".join(words[start : start + length]) for start in range(0, len(words), length)]
    expected = truncating.probabilities(truncating.logits(parts)).mean(axis=0)
    classifier = EmotionClassifier.from_pretrained(artifact, format, long_texts="mean")
    for averaging in (classifier, pickle.loads(pickle.dumps(classifier))):
        texts = ["a red house", " ".join(words), "gray"]
        found = averaging.probabilities(averaging.logits(texts))
        np.testing.assert_allclose(found[1], expected, atol=1e-5)
        np.testing.assert_allclose(averaging.logits(texts)[::2], truncating.logits(texts[::2]), atol=1e-5)
    assert len(parts) == 4 and classifier.texts_cut == 2
    with pytest.raises(UserError, match="truncate or mean"):
        EmotionClassifier(artifact, long_texts="middle")
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    flags = ["--model", str(artifact), "--format", format, "--long_texts", "mean"]
    predict.main([*flags, "--file", "texts.txt", "--top_k", "3", "--json"])
    shown = capsys.readouterr()
    scores = {one["label"]: one["score"] for one in json.loads(shown.out.splitlines()[1])["top_k"]}
    np.testing.assert_allclose([scores[label] for label in classifier.labels], expected, atol=1e-4)
    assert shown.err == "1 text was longer than the model takes and read in parts\n"
    run_batch.main(["texts.txt", "out", *flags, "--probabilities"])
    (row,) = parquet.read_table("out").slice(1, 1).to_pylist()
    assert row["status"] == "averaged" and row["probability_none"] == pytest.approx(expected[2], abs=1e-4)


def test_of_a_text_without_end_a_bounded_number_of_parts_is_read(artifact):
    classifier = EmotionClassifier(artifact, long_texts="mean")
    assert len(classifier.runtime.encode.windows(["sky " * 1_000_000])[0]) == MOST_WINDOWS
    assert classifier(["s" * 3_000_000, "red"])[1]["label"] == "warm"


# Neighbors that stretch the range of a batch: the longest text, one token repeated, other alphabets, nothing
NEIGHBORS = [" ".join(WORDS) * 2, "sky " * 40, "красный blå 红色 ☃", "", "!?" * 30, *build_rows(20)["text"]]
ROWS = build_rows(40)["text"]


def gap_between(folder, format: str = "onnx") -> float:
    """The largest difference of a logit between a text alone and the same text in batches of all kinds."""
    classifier = EmotionClassifier.from_pretrained(folder, format, threads=1)
    alone = np.concatenate([classifier.logits([text]) for text in ROWS])
    together = classifier.logits(ROWS)
    mixed = classifier.logits([*NEIGHBORS, *ROWS, *NEIGHBORS])[len(NEIGHBORS) : len(NEIGHBORS) + len(ROWS)]
    backwards = classifier.logits(ROWS[::-1])[::-1]
    return max(float(np.abs(alone - other).max()) for other in (together, mixed, backwards))


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("method", [run_ptq, run_qat])
def test_a_text_has_one_answer(method, bits, artifact, tmp_path):
    flags, changes = (ptq_flags, {"max_f1_drop": 100}) if method is run_ptq else (qat_flags, {"num_train_epochs": 1})
    method.main(flags(artifact, tmp_path / "out", bits=bits, **changes, formats="onnx"))
    assert gap_between(tmp_path / "out") <= 1e-5


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "mpnet"])
def test_other_encoders_have_one_answer_per_text(kind, baseline_of, tmp_path):
    run_ptq.main(ptq_flags(baseline_of(kind), tmp_path / kind, max_f1_drop=100, formats="onnx"))
    assert gap_between(tmp_path / kind) <= 1e-5


@pytest.mark.parametrize("name", ["ptq", "qat", "qat-int4", "qat-int2"])
def test_released_files_have_one_answer_per_text(name):
    assert gap_between(ROOT / "weights" / name) <= 1e-5


def test_dynamic_ranges_alone_depend_on_the_neighbors(quantized, artifact, tmp_path):
    assert max(gap_between(quantized, format) for format in ("torchao", "onnx", "openvino")) <= 1e-5
    flags = {"activation_quantization": "dynamic", "formats": "onnx"}
    run_ptq.main(ptq_flags(artifact, tmp_path / "ptq", max_f1_drop=100, **flags))
    assert read_recipe_of(tmp_path / "ptq")["variant"] == "ptq-dynamic"
    assert gap_between(tmp_path / "ptq") > 1e-3


def test_sentences_of_the_command_line(artifact):
    texts = ("i see the blue sky", "a red house")
    for more, cut in (((), 0), (("blue " * 5000, "\N{SNOWMAN} ünknown wörds"), 1)):
        done = run_script("predict.py", "--model", artifact, *texts, *more)
        assert done.returncode == 0 and done.stderr.count("cut") == len(done.stderr.splitlines()) == cut
        answers = [line.split("\t") for line in done.stdout.splitlines()]
        assert len(answers) == len(texts + more)
        assert [(scores.split()[0], text) for scores, text in answers[:2]] == [("cold", texts[0]), ("warm", texts[1])]


def test_all_classes_as_json_and_empty_lines_in_their_place(artifact):
    done = run_script("predict.py", "--model", artifact, "--json", "--top_k", 9, input="the gray sky\n\nblue\n")
    answer, empty, last = (json.loads(line) for line in done.stdout.splitlines())
    assert last["label"] == "cold" and empty["error"] == "empty text" and "label" not in empty
    assert done.returncode == 1 and "error: 1 " in done.stderr
    assert answer["text"] == "the gray sky" and answer["label"] == "none" == answer["top_k"][0]["label"]
    scores = [one["score"] for one in answer["top_k"]]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-4) and len(scores) == 3


def test_a_line_is_answered_before_the_next_one_comes(artifact):
    command = [sys.executable, str(ROOT / "scripts" / "predict.py"), "--model", str(artifact)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    for line, label in (("the red house", "warm"), ("violet", "cold"), ("gray", "none")):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith(label)
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    watchdog.cancel()


def test_many_lines_take_flat_memory(artifact, tmp_path):
    """Twenty times the lines, the same peak; a line that is split between two reads stays whole."""
    code = (
        "import predict, resource, sys; predict.main(['--model', sys.argv[1]])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks = []
    for lines in (2_000, 40_000):
        file = tmp_path / "many.txt"
        file.write_text("".join(f"the {('red', 'blue', 'black')[row % 3]} sky\n" for row in range(lines)))
        with file.open() as stream:
            done = run_code(code, artifact, stdin=stream)
        answers = done.stdout.splitlines()
        assert len(answers) == lines
        assert [line.split()[0] for line in answers] == (["warm", "cold", "none"] * lines)[:lines]
        peaks.append(int(done.stderr))
    assert peaks[1] < peaks[0] * 1.1


def test_a_reader_that_goes_away_is_no_error(artifact):
    command = f"set -o pipefail; yes red | {sys.executable} {ROOT}/scripts/predict.py --model {artifact} | head -n 3"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert len(done.stdout.splitlines()) == 3 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "message", "status"),
    [
        (["--model", "nowhere", "text"], "nowhere", 1),
        (["--file", "nowhere.txt"], "--file nowhere.txt", 1),
        (["--file", "a.csv"], "--file a.csv is a table", 1),
        (["--file", "a.Parquet"], "--file a.Parquet is a table", 1),
        (["--file", "lines.txt.gz"], "--file lines.txt.gz is a table", 1),
        (["--top_k", "0", "text"], "--top_k", 2),
        (["--top-k", "0", "text"], "--top_k", 2),
        (["--tpo_k", "1", "text"], "top_k", 2),
        (["--file", "a.txt", "text"], "--file", 2),
    ],
)
def test_what_cannot_be_answered_is_said(args, message, status):
    done = run_script("predict.py", *args)
    assert done.returncode == status and done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_terminal_gets_a_prompt_and_an_interruption_its_own_word():
    """The recommended model, since nothing is trained here."""
    master, terminal = os.openpty()
    command = [sys.executable, str(ROOT / "scripts" / "predict.py")]
    process = subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(100, process.kill)
    watchdog.start()
    os.write(master, b"i feel so happy\n")
    assert process.stdout.readline().startswith("joy")
    shown = ""
    while shown.count("> ") < 2:  # until it waits for another text
        shown += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    watchdog.cancel()
    assert "Ctrl-D ends" in shown and (process.returncode, rest) == (130, "\nerror: interrupted\n")
    os.close(master), os.close(terminal)


@pytest.mark.parametrize("name", ["predict.py", "run_batch.py", "run_publish.py"])
def test_flags_are_parsed_before_any_heavy_import(name):
    """A wrong flag, with every library masked that is not Python's own or tqdm."""
    code = (
        "import importlib.util, runpy, sys\n"
        "for name in 'numpy torch transformers pyarrow pydantic matplotlib onnxruntime tokenizers'.split(): "
        "sys.modules[name] = None\n"
        "sys.path.insert(0, sys.argv[1]); path = f'{sys.argv[1]}/{sys.argv[2]}'; sys.argv = [path, '--typo']\n"
        "runpy.run_path(path, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "scripts"), name], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
