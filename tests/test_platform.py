"""Any system and any container: modules that only Linux has, processors that are granted, locks, launched processes.

These tests need neither torch nor the fixtures: on Windows and macOS they run with requirements-inference.txt and
pytest.
"""

import copy
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from emotion import EmotionClassifier
from emotion.inference.model_folder import lock_output_dir
from emotion.utils import files
from emotion.utils.errors import UserError
from emotion.utils.machine import choose_threads, count_processors, is_main_process

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "weights" / "qat-int4"
TEXTS = ["i feel so happy that you came", "i miss my old home", "i am furious about this delay"]
LABELS = ["joy", "sadness", "anger"]
PREDICT = "import predict; from emotion.utils.command import run; run(predict.main)"
# What Windows lacks, in front of a program
WITHOUT_UNIX = """
import os, pathlib, sys
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline", "curses"):
    sys.modules[name] = None
for name in ("fork", "forkpty", "register_at_fork", "sched_getaffinity", "getuid", "geteuid", "getgid", "getpgid",
             "killpg", "setsid", "mkfifo", "sysconf", "getloadavg", "statvfs", "O_NOFOLLOW"):
    if hasattr(os, name):
        delattr(os, name)
def missing(*words, **options):
    raise NotImplementedError("Windows has none")
pathlib.Path.is_mount = pathlib.Path.symlink_to = os.symlink = missing
"""


def call(code: str, *args, **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"PYTHONPATH": str(ROOT / "scripts")} | environment
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=settings)


def test_the_class_answers_without_unix():
    code = (
        "import json; from emotion import EmotionClassifier\n"
        "classifier = EmotionClassifier.from_pretrained(sys.argv[1], threads=2)\n"
        "print(json.dumps([answer['label'] for answer in classifier.classify(json.loads(sys.argv[2]) * 30)]))"
    )
    done = call(WITHOUT_UNIX + code, MODEL, json.dumps(TEXTS))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == LABELS * 30


def test_without_a_name_the_recommended_model_answers_a_text_or_several():
    classifier = pickle.loads(pickle.dumps(EmotionClassifier()))
    assert classifier(TEXTS[0])["label"] == LABELS[0]
    assert classifier(TEXTS) == classifier.classify(TEXTS) == EmotionClassifier.from_pretrained(MODEL).classify(TEXTS)
    assert len(classifier(TEXTS[0], top_k=None)) == len(classifier.labels)


def test_the_command_answers_without_unix(tmp_path):
    """From words, and from a file with Windows' line ends and its old end of a file, the byte 26."""
    (tmp_path / "texts.txt").write_bytes("\r\n".join([TEXTS[0], f"\x1a {TEXTS[1]}", TEXTS[2]]).encode())
    for args, count in (([TEXTS[0]], 1), (["--file", tmp_path / "texts.txt"], 3)):
        done = call(WITHOUT_UNIX + PREDICT, "--model", MODEL, "--threads", 1, *args)
        assert done.returncode == 0, done.stderr
        assert [line.split()[0] for line in done.stdout.splitlines()] == LABELS[:count]
    assert "--threads" in call(WITHOUT_UNIX + PREDICT, "--help").stdout


def test_a_lock_that_a_killed_process_left_is_taken(tmp_path, monkeypatch):
    """Where the system has no locks, the file that stands for one stays behind."""
    hold = (
        "from emotion.utils.files import output_lock\n"
        "with output_lock(sys.argv[1]): print(os.listdir('.'), flush=True); os.kill(os.getpid(), int(sys.argv[2]))"
    )
    take = "from emotion.utils.files import write_text; write_text(sys.argv[1], 'new'); print('written')"
    monkeypatch.chdir(tmp_path)
    kill = getattr(signal, "SIGKILL", signal.SIGTERM)
    for without in (WITHOUT_UNIX, "import os, sys\n"):
        assert ".out.lock" in call(without + hold, "out", int(kill)).stdout
        assert call(without + take, "out").stdout == "written\n"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_whose_file_cannot_be_removed_is_free_all_the_same(tmp_path, monkeypatch):
    """Windows removes no open file."""
    unlink = Path.unlink

    def refuse(path, *args, **options):
        if path.name.endswith(".lock"):
            raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(path, *args, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    for text in ("first", "second"):
        files.write_text(tmp_path / "out", text)
    assert (tmp_path / "out").read_text() == "second"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_does_not_own_its_parents_locks(tmp_path, monkeypatch):
    code = (
        "import os, sys; from emotion.utils.errors import UserError\n"
        "from emotion.utils.files import output_lock, write_text\n"
        "with output_lock('out'):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        write_text('other', 'written')\n"
        "        try:\n"
        "            with output_lock('out'): os._exit(4)\n"
        "        except UserError: os._exit(3)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    monkeypatch.chdir(tmp_path)
    done = call(code)
    assert done.stdout == "3\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("group", "quotas", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1),
        ("0::/\n", {"cpu.max": "20000 100000"}, 1),  # a fifth of a processor
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "broken"}, 8),
        ("0::/a/b\n", {"cpu.max": "700000 100000", "a/cpu.max": "200000 100000", "a/b/cpu.max": "max 1"}, 2),
        ("0::/a/b.scope\n", {"a/b.scope/cpu.max": "500000 100000"}, 5),
        ("0::/docker/of-the-machine\n", {"cpu.max": "400000 100000"}, 4),  # a name that the container does not see
        ("9:memory:/\n4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs": (250000, 100000)}, 2),
        ("4:cpuacct,cpu:/pod/c\n0::/\n", {"cpu/pod/c/cpu.cfs": (-1, 100000), "cpu/pod/cpu.cfs": (600000, 100000)}, 6),
        ("4:cpu:/\n", {"cpu/cpu.cfs": (-1, 100000)}, 8),
        (None, {}, 8),  # not Linux
    ],
)
def test_the_quota_of_a_container_bounds_the_threads(group, quotas, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    places = {} if group is None else {"proc/self/cgroup": group}
    for name, quota in quotas.items():
        if isinstance(quota, str):
            places[f"sys/fs/cgroup/{name}"] = quota
        else:
            places[f"sys/fs/cgroup/{name}_quota_us"], places[f"sys/fs/cgroup/{name}_period_us"] = map(str, quota)
    for name, content in places.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert count_processors(tmp_path) == choose_threads(None, tmp_path) == expected
    assert choose_threads(7, tmp_path) == 7  # who names a number gets it


@pytest.mark.parametrize(
    ("value", "expected"), [("3", 3), ("4,2", 4), (" 2 ", 2), ("64", 8), ("x", 8), ("", 8), ("0", 8), ("-1", 8)]
)
def test_the_threads_of_openmp_are_taken(value, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert choose_threads(None, tmp_path) == expected and choose_threads(5, tmp_path) == 5


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted by Linux")
@pytest.mark.parametrize("threads", [1, 3])
def test_texts_are_tokenized_by_as_many_threads_as_asked_for(threads):
    """The library would start a thread for each processor, or as many as this setting says."""
    code = (
        "import os, sys; from emotion.data.tokenization import TextEncoder\n"
        "encoder, before = TextEncoder(sys.argv[1], threads=int(sys.argv[2])), len(os.listdir('/proc/self/task'))\n"
        "encoder(['i feel so happy that you came'] * 4000)\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    environment = {"RAYON_NUM_THREADS": "7"}
    done = call(f"import os; os.environ.pop('TOKENIZERS_PARALLELISM', None)\n{code}", MODEL, threads, **environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 0 if threads == 1 else 1 <= int(done.stdout) <= threads


def test_a_copy_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(MODEL.parent)
    classifier = EmotionClassifier.from_pretrained(MODEL.name, threads=1, verify=False)
    expected = classifier.classify(TEXTS)
    pickled = pickle.dumps(classifier)
    assert len(pickled) < 1000  # the folder's name, and none of its weights
    monkeypatch.chdir(tmp_path)
    for other in (pickle.loads(pickled), copy.deepcopy(classifier), copy.copy(classifier)):
        assert other is not classifier and other.classify(TEXTS) == expected
        assert other.format == "onnx" and other.runtime is not classifier.runtime
        assert pickle.dumps(other) == pickled  # threads and `verify` too


def test_a_pickle_opens_what_it_was_made_of(tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "copy")
    checked, unchecked = (
        pickle.dumps(EmotionClassifier.from_pretrained(folder, verify=verify)) for verify in (True, False)
    )
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"joy"', '"glee"'))
    with pytest.raises(UserError, match="config.json differs from"):
        pickle.loads(checked)
    assert pickle.loads(unchecked).classify(TEXTS[:1])[0]["label"] == "glee"


def test_a_worker_process_answers():
    """As on Windows and macOS, where processes are started afresh and get everything as a pickle."""
    classifier = EmotionClassifier.from_pretrained(MODEL, threads=1)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(classifier.classify, TEXTS).result(timeout=120) == classifier.classify(TEXTS)


LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"RANK": "1"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pytorchjob-master-0"}, True),  # Kubeflow, on each machine
        ({"RANK": "x"}, True),
        (LAUNCHED | {"WORLD_SIZE": "1"}, True),
        (LAUNCHED | {"WORLD_SIZE": "x"}, True),
        (LAUNCHED | {"RANK": "0", "LOCAL_RANK": "0"}, True),
        (LAUNCHED | {"RANK": "x"}, True),
        (LAUNCHED, False),
        (LAUNCHED | {"LOCAL_RANK": "0"}, False),  # the first process of the second machine
    ],
)
def test_which_process_speaks_and_saves(environment, expected, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_main_process() == expected


def test_a_rank_without_a_launcher_skips_no_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    recipe = SimpleNamespace(path=ROOT / "configs")  # all that is asked of it
    with lock_output_dir(tmp_path / "out", None, recipe):
        assert (tmp_path / ".out.lock").exists()


@pytest.mark.parametrize(("environment", "lines"), [({"RANK": "1"}, 1), ({"RANK": "x"}, 1), (LAUNCHED, 0)])
def test_a_rank_without_a_launcher_silences_no_command(environment, lines):
    environment = {"LOCAL_RANK": "", "WORLD_SIZE": ""} | environment
    done = call(PREDICT, "--model", MODEL, TEXTS[0], **environment)
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == lines
