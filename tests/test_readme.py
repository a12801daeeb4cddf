"""The README: what it tells to type exists, its snippets answer, and its map is the house."""

import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from emotion.evaluation.schema import read_study
from emotion.inference.released import RECOMMENDED, RELEASED
from report.front import TITLES, validation_scores

README = (ROOT / "README.md").read_text(encoding="utf-8")
# The weights that a clone holds, or that a command above the snippet makes; any tiny model stands in for them here
MADE = ["mine/ptq"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Each command of the Bash blocks as words; a pipe makes two."""
    found = []
    for block in blocks("bash"):
        text = re.sub(r"(^| +)# .*", "", block.replace("\\\n", " "), flags=re.MULTILINE)
        lexer = shlex.shlex(text, posix=True, punctuation_chars="|\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " ", True, ""
        words = []
        for word in [*lexer, "\n"]:
            if set(word) <= {"|", "\n"}:
                found += [words] if words else []
                words = []
            else:
                words.append(word)
    return found


COMMANDS = commands()
SCRIPTS = [words for words in COMMANDS if any(word.startswith("scripts/") for word in words)]


def flags_of(script: str) -> set[str]:
    """The names of all flags of a command: the fields of its dataclasses, or what it gives to argparse."""
    module = importlib.import_module(Path(script).stem)
    names = set(re.findall(r'add_argument\(\s*"--(\w+)"', Path(module.__file__).read_text(encoding="utf-8")))
    for value in vars(module).values():
        if isinstance(value, type) and dataclasses.is_dataclass(value):
            names |= {field.name for field in dataclasses.fields(value)}
    return names


def test_the_commands_are_found():
    assert len(SCRIPTS) > 15 and ["make", "verify"] in COMMANDS
    assert ["python", "scripts/predict.py", "i miss my old home"] in COMMANDS


@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_each_command_and_its_flags_exist(words):
    place = next(index for index, word in enumerate(words) if word.startswith("scripts/"))
    assert (ROOT / words[place]).is_file()
    flags = {word[2:] for word in words[place + 1 :] if word.startswith("--")}
    assert flags <= flags_of(words[place]), f"{words[place]} has no {flags - flags_of(words[place])}"


def test_each_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z-]+)`", README))
    named |= {word for words in COMMANDS if words[0] == "make" for word in words[1:]}
    missing = {name for name in named if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)}
    assert named and not missing


def test_each_link_leads_somewhere():
    for link in re.findall(r'(?:\]\(|src=")([^)"]+)', README):
        assert "://" in link or (ROOT / link).exists(), link


def test_what_is_released_has_its_form_and_its_name():
    assert RECOMMENDED in RELEASED and TITLES.keys() <= set(RELEASED)
    assert f"weights/{RECOMMENDED}" in README


def test_validation_chose_the_recommended_variant():
    scores = validation_scores(read_study(ROOT / "results" / "bits.json"))
    assert len(scores) == 3 and max(scores, key=scores.get) == RECOMMENDED
    assert f"highest on validation: {100 * scores[RECOMMENDED]:.2f} %" in README


@pytest.fixture
def clone(artifact, quantized, adapted, tmp_path) -> Path:
    """A folder like a clone, whose weights are tiny; of the variants one stands for all."""
    stand_ins = {"baseline": artifact, "qlora": adapted}
    for name in (*RELEASED, *MADE):
        (tmp_path / "weights" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "weights" / name).symlink_to(stand_ins.get(name, quantized))
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "texts.txt").write_text("a red house\nthe blue sky\n")
    (tmp_path / "texts.csv").write_text("text\na red house\nthe blue sky\n")
    return tmp_path


def run_in(folder: Path, command, timeout: int = 200, **options) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
@pytest.mark.parametrize("place", range(len(blocks("python"))))
def test_each_python_block_answers(place, clone):
    paths = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}  # instead of `pip install .`
    printed = run_in(clone, [sys.executable, "-c", blocks("python")[place]], env=paths)
    assert re.search("warm|cold|none", printed)


@pytest.mark.processes
def test_the_commands_that_answer_answer(clone):
    """As a shell runs them, with the tiny weights in place of the default's."""
    answered = 0
    python = f"alias python={shlex.quote(sys.executable)}\n"
    for line in re.sub(r"\\\n", " ", "".join(blocks("bash"))).splitlines():
        if re.search(r"scripts/(predict|run_batch)\.py", line) and "user/" not in line:
            if "--model" not in line:
                line = line.replace("predict.py", f"predict.py --model weights/{RECOMMENDED}")
            printed = run_in(clone, ["bash", "-c", f"shopt -s expand_aliases\n{python}{line}"])
            assert re.search("warm|cold|none", printed) or (clone / "answers").is_dir()
            answered += 1
    assert answered == 6


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_the_steps_run_one_after_the_other(encoder, colors, tmp_path):
    """The chain of commands as it stands, on a tiny encoder and a small dataset, trained shortly."""
    (chain,) = [block for block in blocks("bash") if "run_qat.py configs/" in block]
    lines = re.sub(r"\\\n *", "", chain).splitlines()
    assert lines[0] == "source .venv/bin/activate"  # the environment is this one
    ran = []
    for line in lines[1:]:
        (script,) = re.findall(r"scripts/run_(\w+)\.py", line) or [None]
        if script is None:
            assert line.startswith("#")
            continue
        if script in ("baseline", "qlora"):
            # The others take the dataset and the encoder of their baseline.
            line += f" --dataset_name {shlex.quote(str(colors))} --model_name_or_path {shlex.quote(str(encoder))}"
        # Tiny models that learnt little lose more than a recipe allows.
        line += {"ptq": " --allow_drop true", "evaluation": "", "benchmark": " --rounds 2"}.get(
            script, " --num_train_epochs 1 --per_device_train_batch_size 16"
        )
        ran.append(line)
    for name in ("scripts", "configs", "accelerate_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    printed = run_in(tmp_path, ["bash", "-ec", "\n".join(ran)], timeout=500, env=os.environ | path)
    assert len(ran) == 6 and (tmp_path / "build" / "results" / "metrics" / "ptq-onnx.json").is_file()
    assert {path.name for path in (tmp_path / "weights" / "mine").iterdir()} >= {
        "baseline",
        "ptq",
        "qat-int2",
        "qlora",
    }
    assert "ptq:onnx" in printed
