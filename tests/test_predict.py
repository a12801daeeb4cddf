"""predict.py as a user calls it: words, files, a stream; light and quick."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from conftest import ROOT, run_script


def test_sentences_of_the_command_line(artifact):
    done = run_script("predict.py", "--model", artifact, "i see the blue sky", "a red house")
    assert done.returncode == 0 and done.stderr == ""
    answers = [line.split("\t") for line in done.stdout.splitlines()]
    assert [(scores.split()[0], text) for scores, text in answers] == [
        ("cold", "i see the blue sky"),
        ("warm", "a red house"),
    ]


def test_all_classes_as_json(artifact):
    done = run_script("predict.py", "--model", artifact, "--json", "--top_k", 9, "the gray sky")
    answer = json.loads(done.stdout)
    assert answer["text"] == "the gray sky" and answer["label"] == "none" == answer["top_k"][0]["label"]
    scores = [one["score"] for one in answer["top_k"]]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-4) and len(scores) == 3


def test_neither_torch_nor_transformers_is_imported(artifact):
    code = (
        "import sys; sys.argv = ['predict.py', '--model', sys.argv[1], 'a red house']; import predict; predict.main();"
        "assert not {'torch', 'transformers', 'pandas', 'sklearn'} & set(sys.modules), 'heavy imports'"
    )
    path = {"PYTHONPATH": str(ROOT / "scripts"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, env=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("warm")


def test_the_first_answer_comes_soon(artifact):
    """In hardly more than importing the libraries takes that compute it; torch alone takes many times as long."""
    libraries = "import numpy, onnxruntime, tokenizers; onnxruntime.InferenceSession"
    answering, importing = [], []
    for _ in range(4):  # in turns, so that what else runs on the machine disturbs both alike
        start = time.monotonic()
        assert run_script("predict.py", "--model", artifact, "red").returncode == 0
        answering.append(time.monotonic() - start)
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", libraries], check=True)
        importing.append(time.monotonic() - start)
    assert min(answering) < 3 * min(importing)


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
        "import resource, sys; sys.path.insert(0, sys.argv[2]); model = sys.argv[1]\n"
        "import predict; predict.main(['--model', model])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks = []
    for lines in (2_000, 40_000):
        file = tmp_path / "many.txt"
        file.write_text("".join(f"the {('red', 'blue', 'black')[row % 3]} sky\n" for row in range(lines)))
        args = [sys.executable, "-c", code, str(artifact), str(ROOT / "scripts")]
        with file.open() as stream:
            done = subprocess.run(args, stdin=stream, capture_output=True, text=True, timeout=120)
        answers = done.stdout.splitlines()
        assert len(answers) == lines
        assert [line.split()[0] for line in answers] == (["warm", "cold", "none"] * lines)[:lines]
        peaks.append(int(done.stderr))
    assert peaks[1] < peaks[0] * 1.1


def test_empty_lines_keep_their_place_and_are_reported(artifact):
    done = run_script("predict.py", "--model", artifact, "--json", input="red\n\nblue\n")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer.get("label") for answer in answers] == ["warm", None, "cold"]
    assert answers[1]["error"] == "empty text"
    assert done.returncode == 1 and "error: 1 text was empty" in done.stderr


def test_long_and_strange_texts_are_answered(artifact):
    done = run_script("predict.py", "--model", artifact, "blue " * 5000, "\N{SNOWMAN} ünknown wörds")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert "1 text was longer than the model takes and cut" in done.stderr


def test_a_reader_that_goes_away_is_no_error(artifact):
    command = f"set -o pipefail; yes red | {sys.executable} {ROOT}/scripts/predict.py --model {artifact} | head -n 3"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert len(done.stdout.splitlines()) == 3 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "message", "status"),
    [
        (["--model", "nowhere", "text"], "error: no folder nowhere; take one that the repository holds", 1),
        (["--file", "nowhere.txt"], "error: --file nowhere.txt: no such file", 1),
        (["--file", "a.csv"], "error: --file a.csv is a table or compressed, and this command takes plain lines; ", 1),
        (["--file", "a.Parquet"], "error: --file a.Parquet is a table", 1),
        (["--file", "lines.txt.gz"], "error: --file lines.txt.gz is a table or compressed", 1),
        (["--top_k", "0", "text"], "error: --top_k", 2),
        (["--top-k", "0", "text"], "error: --top_k", 2),
        (["--tpo_k", "1", "text"], "error: unknown flag --tpo_k. Did you mean top_k?", 2),
        (["--file", "a.txt", "text"], "error: give sentences or --file, not both", 2),
    ],
)
def test_what_cannot_be_answered_is_said(args, message, status):
    done = run_script("predict.py", *args)
    assert done.returncode == status and done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1


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
