"""Environments that only answer, with a clone or the wheel: what they take, and that they answer as the full one."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

import emotion
from conftest import ROOT
from emotion.utils.files import check_covered
from hub_server import WRITE, Repository, running_hub

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]  # seconds; a slow registry is no fault
LIMIT = 0.25e9  # bytes of the whole environment, pip included; the README names it
TEXTS = ["i see the blue sky", "a red house", "gray"]
NOWHERE = "http://127.0.0.1:9"  # where no Hub answers
CACHES = shutil.ignore_patterns("__pycache__")
PACKAGED = ["pyproject.toml", "README.md", "LICENSE", ".gitignore", "scripts", "weights/LICENSE", "weights/qat-int4"]


def call(*command, **options) -> str:
    """Standard output of a command that must succeed; what it says on standard error is the test's report."""
    options.setdefault("env", {name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def dependencies() -> list[str]:
    """What the package needs, each with its lower bound."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return json.loads(re.search(r"^dependencies = (\[.+\])$", text, re.MULTILINE)[1])


def installed(python: Path) -> dict[str, str]:
    """Name -> version of every package in an environment."""
    packages = json.loads(call(python, "-m", "pip", "list", "--format", "json"))
    return {package["name"].lower().replace("_", "-"): package["version"] for package in packages}


@pytest.fixture(scope="module")
def light(build_once) -> Path:
    """The Python of an environment made as the README says, for answering alone."""

    def install(folder: Path) -> None:
        call(sys.executable, "-m", "venv", folder)
        requirements = ROOT / "requirements-inference.txt"
        call(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "-r", requirements)

    return build_once("light", install) / "bin" / "python"


@pytest.fixture(scope="module")
def built(build_once) -> Path:
    """A copy of the repository, with the wheel in build/."""

    def build(folder: Path) -> None:
        for name in PACKAGED:
            path, copy = ROOT / name, folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(path, copy, ignore=CACHES) if path.is_dir() else shutil.copy(path, copy)
        call("git", "init", "--quiet", folder)
        call("git", "-C", folder, "add", ".")
        call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder / "build", folder)

    return build_once("clone", build)


@pytest.fixture(scope="module", params=["oldest", "newest"])
def wheel(request, built, build_once) -> Path:
    """The Python of an environment with the wheel, and the oldest or the newest versions of what it needs."""
    pinned = [line.replace(">=", "==") for line in dependencies()] if request.param == "oldest" else []

    def install(folder: Path) -> None:
        call(sys.executable, "-m", "venv", folder)
        call(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *pinned, *(built / "build").glob("*.whl"))

    return build_once(f"wheel-{request.param}", install) / "bin" / "python"


def test_it_is_small_and_has_the_same_versions(light):
    size = sum(path.lstat().st_size for path in light.parent.parent.rglob("*") if path.is_file())
    assert size < LIMIT
    assert "0.25 GB" in (ROOT / "README.md").read_text(encoding="utf-8")
    packages = installed(light)
    assert not {"torch", "transformers"} & packages.keys()
    for name in ("onnxruntime", "tokenizers", "numpy", "huggingface-hub"):
        assert packages[name] == metadata.version(name)


def test_predict_answers_as_in_the_full_environment(light, quantized):
    args = [ROOT / "scripts" / "predict.py", "--model", quantized, "--json", *TEXTS]
    answers = call(light, *args)
    assert answers == call(sys.executable, *args)
    assert [json.loads(line)["label"] for line in answers.splitlines()] == ["cold", "warm", "none"]


def test_a_clone_answers_without_a_model_being_named(light):
    command = [light, ROOT / "scripts" / "predict.py", "--json", "i miss my old home", "i feel so happy that you came"]
    assert [json.loads(line)["label"] for line in call(*command).splitlines()] == ["sadness", "joy"]


@pytest.mark.parametrize("format", ["pytorch", "bf16"])
def test_a_format_whose_runtime_is_not_there_is_one_line(format, light, artifact):
    args = [ROOT / "scripts" / "predict.py", "--model", artifact, "--format", format, "red"]
    done = subprocess.run(list(map(str, [light, *args])), capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .* needs torch; pip install -r .*\n", done.stderr)


@pytest.mark.parametrize(
    "command",
    [
        ["run_batch.py", ROOT / "README.md", "answers"],
        ["run_ptq.py", "--model_name_or_path", ROOT / "weights" / "baseline"],
        ["run_publish.py", ROOT / "weights" / "qat-int4", "--repo_id", "user/model", "--dry_run"],
    ],
    ids=lambda command: command[0],
)
def test_a_command_that_needs_the_full_environment_says_so(command, light):
    done = subprocess.run([light, ROOT / "scripts" / command[0], *command[1:]], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: No module named '\w+'; pip install -r requirements.txt installs it\n", done.stderr)


def test_the_wheel_answers_alone(wheel, tmp_path):
    """In an empty folder, without the repository and without a network."""
    settings = os.environ | {"HF_ENDPOINT": NOWHERE, "PYTHONPATH": ""}
    command = [wheel.parent / "bert-emotion", "--json", "i feel so happy", "i miss my old home"]
    answers = [json.loads(line) for line in call(*command, cwd=tmp_path, env=settings).splitlines()]
    assert [answer["label"] for answer in answers] == ["joy", "sadness"]
    code = (
        "import emotion, json; classifier = emotion.EmotionClassifier()\n"
        "print(json.dumps([emotion.__file__, emotion.__version__, classifier('i feel so happy')]))"
    )
    place, version, answer = json.loads(call(wheel, "-I", "-c", code, cwd=tmp_path))  # -I: no other path
    assert Path(place).is_relative_to(wheel.parent.parent) and (Path(place).parent / "py.typed").is_file()
    assert version == emotion.__version__ and answer["label"] == "joy"
    check_covered(Path(place).parent / "model")


def test_the_wheel_asks_the_hub(wheel, tmp_path):
    """A private repository with and without the token, then the cache while the Hub is down, and an empty cache."""
    folder = ROOT / "weights" / "qat-int4"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    cache = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": "", "HF_HOME": str(tmp_path / "cache")}

    def ask(**settings):
        command = [wheel.parent / "bert-emotion", "--model", "user/mine", "i feel so happy"]
        env = os.environ | cache | settings
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    with running_hub() as hub:
        hub.repositories["user/mine"] = Repository(private=True, commits=[files])
        refused = ask(HF_ENDPOINT=hub.url)
        answered = ask(HF_ENDPOINT=hub.url, HF_TOKEN=WRITE)
    cached = ask(HF_ENDPOINT=NOWHERE)
    down = ask(HF_ENDPOINT=NOWHERE, HF_HOME=str(tmp_path / "empty"))
    assert answered.stdout.startswith("joy") and cached.stdout == answered.stdout, answered.stderr + cached.stderr
    for done in (refused, down):
        assert done.returncode == 1 and done.stderr.startswith("error: no folder user/mine; ")
        assert done.stderr.count("\n") == 1


def test_every_installed_module_finds_those_of_this_project_that_it_imports(wheel, tmp_path):
    """The folders that train and measure stay behind: nothing that is installed may need one of them."""
    code = (
        "import importlib, pkgutil, emotion\n"
        "for module in pkgutil.walk_packages(emotion.__path__, 'emotion.'):\n"
        "    try: importlib.import_module(module.name)\n"
        "    except ModuleNotFoundError as error: assert not error.name.startswith('emotion'), error\n"
        "    print(module.name)"
    )
    modules = call(wheel, "-I", "-c", code, cwd=tmp_path).split()
    needed = {"emotion.inference.emotion_classifier", "emotion.utils.errors", "emotion.data.tokenization"}
    assert needed <= set(modules)


def test_installing_leaves_no_file_that_git_would_track(built):
    assert call("git", "-C", built, "ls-files", "--others", "--exclude-standard") == ""


def test_it_needs_what_the_environment_for_answering_has_or_newer():
    pinned = {}
    for line in (ROOT / "requirements-inference.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, version = line.split(";")[0].split("==")
            pinned.setdefault(name, []).append(version)
    oldest = {f"{name}>={min(versions, key=Version)}" for name, versions in pinned.items()}
    assert sorted(dependencies()) == sorted(oldest)
