"""The repository: its commands, flags, make targets and links exist, its snippets run, its imports have one order."""

import ast
import dataclasses
import importlib
import os
import re
import shlex
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import emotion
from conftest import ROOT, read_json
from emotion import EmotionClassifier
from emotion.hub.comparison import validation_scores
from emotion.inference.model_folder import RELEASED
from emotion.utils.files import RECOMMENDED

README = ROOT / "README.md"
USAGE = ROOT / "docs" / "usage.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPT = re.compile(r"(scripts|studies|tools)/(\w+)\.py")
LABELS = "sadness|joy|love|anger|fear|surprise|warm|cold|none"  # of the released models, and of the tests' tiny ones


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return lines + re.findall(r"`((?:make|python) [^`\n]+)`", page.read_text(encoding="utf-8"))


def flags_of(script: str) -> set[str]:
    """The names of all flags of a command: the fields of its dataclasses, or what it gives to argparse."""
    module = importlib.import_module(script)
    path = Path(module.main.__code__.co_filename)
    names = set(re.findall(r'add_argument\(\s*"--(\w+)"', path.read_text(encoding="utf-8")))
    for value in vars(module).values():
        if isinstance(value, type) and dataclasses.is_dataclass(value):
            names |= {field.name for field in dataclasses.fields(value)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_with_its_flags_and_each_target_of_make_exist(page):
    for command in commands(page):
        if script := SCRIPT.search(command):
            assert (ROOT / script[0]).is_file(), command
            arguments = shlex.split(command[script.end() :], comments=True)
            flags = {argument[2:] for argument in arguments if argument.startswith("--")}
            assert flags <= flags_of(script[2]), command
            configs = [argument for argument in arguments if argument.startswith("configs/")]
            assert all((ROOT / config).is_file() for config in configs), command
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands(page):
        name, *arguments = shlex.split(command, comments=True) or [""]
        for argument in arguments if name == "make" else []:
            variable, is_variable, value = argument.partition("=")
            rule = rf"^{variable} \?=" if is_variable else rf"^{argument}:"
            assert re.search(rule, makefile, flags=re.MULTILINE), command
            assert not is_variable or value in makefile, command


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_somewhere(page):
    for link in re.findall(r'(?:\]\(|src=")([^)"]+)', page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert "://" in link or target.exists(), link
        assert "://" in link or not anchor or anchor in anchors_of(target), link


def test_validation_chose_the_recommended_variant():
    scores = validation_scores(read_json(ROOT / "results" / "comparison.json"))
    assert max(scores, key=scores.get) == RECOMMENDED


def test_the_recommended_model_has_the_limit_that_the_readme_names():
    (text, label) = re.search(r'"(.*)" is answered \*(\w+)\*', README.read_text(encoding="utf-8")).groups()
    assert EmotionClassifier.from_pretrained(ROOT / "weights" / RECOMMENDED)(text)["label"] == label


@pytest.fixture
def clone(quantized, tmp_path) -> Path:
    """What the README's commands find in a clone; a tiny model is where one of them saves a model."""
    for name in ("scripts", "configs", "accelerate_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "weights" / "mine").mkdir(parents=True)
    for name in RELEASED:
        (tmp_path / "weights" / name).symlink_to(ROOT / "weights" / name)
    (tmp_path / "weights" / "mine" / "ptq").symlink_to(quantized)
    (tmp_path / "texts.txt").write_text("a red house\nthe blue sky\n")
    (tmp_path / "texts.csv").write_text("text\na red house\nthe blue sky\n")
    return tmp_path


def run_in(folder: Path, command: list[str], timeout: int = 200) -> str:
    """Standard output of a command that must succeed, with this environment's Python and the package on its path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
@pytest.mark.parametrize("code", blocks(README, "python") + blocks(USAGE, "python"))
def test_each_python_block_answers(code, clone):
    assert re.search(LABELS, run_in(clone, [sys.executable, "-c", code]))


@pytest.mark.processes
def test_the_commands_that_answer_answer(clone):
    local = [
        line for line in commands(README) + commands(USAGE) if re.search(r"scripts/(predict|run_batch)\.py", line)
    ]
    local = [line for line in local if "user/" not in line]
    assert local
    for line in local:
        printed = run_in(clone, ["bash", "-c", line])
        assert re.search(LABELS, printed) or list((clone / "answers").glob("part-*")), line


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_the_steps_run_one_after_the_other(clone, encoder, colors):
    """The README's chain of commands, on a tiny encoder and a small dataset, with short trainings."""
    (clone / "weights" / "mine" / "ptq").unlink()
    # The others take the dataset and the encoder of their baseline.
    task = f" --dataset_name {shlex.quote(str(colors))} --model_name_or_path {shlex.quote(str(encoder))}"
    short = " --num_train_epochs 1 --per_device_train_batch_size 16"
    added = {
        "baseline": task + short,
        "qlora": task + short,
        "qat": short,
        "ptq": " --allow_drop true",  # a tiny model that has learnt little loses more than the default allows
        "evaluation": "",
        "benchmark": " --rounds 2",
    }
    (chain,) = [block for block in blocks(README, "bash") if "run_qat.py configs/" in block]
    steps = []
    for line in chain.replace("\\\n", " ").splitlines():
        if script := re.search(r"scripts/run_(\w+)\.py", line):
            command = line.partition(" #")[0]
            steps.append(command + added[script[1]])
    printed = run_in(clone, ["bash", "-ec", "\n".join(steps)], timeout=500)
    assert len(steps) == len(added) and "ptq:onnx" in printed
    assert (clone / "build" / "results" / "metrics" / "ptq-onnx.json").is_file()
    for name in ("baseline", "ptq", "qat-int4", "qlora"):
        assert (clone / "weights" / "mine" / name / "SHA256SUMS").is_file()


SCRIPTS = ROOT / "scripts"
ORDER = ["utils", "data", "inference", "evaluation", "export", "quantization", "training", "hub"]
METHODS = ["run_baseline", "run_ptq", "run_qat", "run_qlora"]
MODULES = {}  # name -> its file
for place in (SCRIPTS, ROOT / "studies", ROOT / "tools"):
    for path in sorted(place.rglob("*.py")):
        MODULES[".".join(path.relative_to(place).with_suffix("").parts).removesuffix(".__init__")] = path


def imports_of(path: Path) -> set[str]:
    """The modules of this project that a file imports, inside its functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & MODULES.keys() or {node.module}
    return found & MODULES.keys()


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def folder_of(module: str) -> str | None:
    """`emotion.data.tokenization` -> `data`; None for a command and for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "emotion" and len(parts) > 2 else None


def test_there_is_one_version():
    release = re.search(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert release[1] == emotion.__version__
    assert f"version: {release[1]}\ndate-released: {release[2]}\n" in citation


def test_scripts_holds_ten_commands_and_the_package_eight_folders():
    commands = [path.stem for path in SCRIPTS.glob("*.py")]
    assert len(commands) == 10 and all(name == "predict" or name.startswith("run_") for name in commands)
    folders = {path.name for path in (SCRIPTS / "emotion").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ORDER)


def test_a_folder_imports_only_those_before_it_and_nothing_imports_commands_studies_or_tools():
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, naming a circle
    for module, imported in IMPORTS.items():
        for other in imported:
            if folder_of(module) and folder_of(other):
                assert ORDER.index(folder_of(other)) <= ORDER.index(folder_of(module)), f"{module} imports {other}"
            if MODULES[module].is_relative_to(SCRIPTS):
                assert other.split(".")[0] == "emotion", f"{module} imports {other}"
            if MODULES[module].is_relative_to(ROOT / "studies"):
                assert not MODULES[other].is_relative_to(ROOT / "tools"), f"{module} imports {other}"


def test_errors_of_the_hub_come_from_its_own_library():
    """Which HTTP library it uses changes with its version."""
    http = {"aiohttp", "httpx", "httpx2", "requests", "urllib3"}
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not http & {name.split(".")[0] for name in names}, path
