"""An environment that only answers: what it takes to install, and that its answers are those of the full one."""

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

from conftest import ROOT, contents
from emotion import EmotionClassifier
from hub_server import Repository

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]  # seconds; a slow registry is no fault
LIMIT = 0.25e9  # bytes of the whole environment, pip included; the README names it
TEXTS = ["i see the blue sky", "a red house", "gray"]
PACKAGED = ["pyproject.toml", "README.md", "LICENSE", ".gitignore", "scripts"]


def call(*command, **options) -> str:
    """Standard output of a command that must succeed; what it says on standard error is the test's report."""
    options.setdefault("env", {name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def installed(python: Path) -> dict[str, str]:
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
def packaged(light, build_once) -> Path:
    """A copy of the repository, whose package `pip install .` has put into that environment."""

    def copy(folder: Path) -> None:
        folder.mkdir()
        for name in PACKAGED:
            path = ROOT / name
            shutil.copytree(path, folder / name) if path.is_dir() else shutil.copy(path, folder)
        call("git", "init", "--quiet", folder)
        call("git", "-C", folder, "add", ".")

    folder = build_once("clone", copy)
    call(light, "-m", "pip", "install", "--quiet", folder)
    return folder


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
    # Without a model being named
    command = [light, ROOT / "scripts" / "predict.py", "--json", "i miss my old home", "i feel so happy that you came"]
    assert [json.loads(line)["label"] for line in call(*command).splitlines()] == ["sadness", "joy"]


def test_predict_fetches_a_repository(light, artifact, hub):
    files = {name: content for name, content in contents(artifact).items() if name != "SHA256SUMS"}
    hub.repositories["user/colors"] = Repository(commits=[files])
    args = [ROOT / "scripts" / "predict.py", "--model", "user/colors", "a red house"]
    assert call(light, *args).startswith("warm")


@pytest.mark.parametrize("format", ["pytorch", "bf16"])
def test_a_format_whose_runtime_is_not_there_is_one_line(format, light, artifact):
    args = [ROOT / "scripts" / "predict.py", "--model", artifact, "--format", format, "red"]
    done = subprocess.run(list(map(str, [light, *args])), capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .* needs torch, which is not installed; pip install -r .*\n", done.stderr)


def test_the_installed_package_answers(light, packaged, quantized, tmp_path):
    code = (
        "import emotion, json, sys; from emotion import EmotionClassifier\n"
        "answers = EmotionClassifier.from_pretrained(sys.argv[1]).classify(sys.argv[2:])\n"
        "print(json.dumps([emotion.__file__, answers]))"
    )
    place, answers = json.loads(call(light, "-I", "-c", code, quantized, *TEXTS, cwd=tmp_path))  # -I: no other path
    assert Path(place).is_relative_to(light.parent.parent) and "site-packages" in place
    assert answers == EmotionClassifier.from_pretrained(quantized).classify(TEXTS)


def test_every_installed_module_finds_those_of_this_project_that_it_imports(light, packaged, tmp_path):
    code = (
        "import importlib, pkgutil, emotion\n"
        "for module in pkgutil.walk_packages(emotion.__path__, 'emotion.'):\n"
        "    try: importlib.import_module(module.name)\n"
        "    except ModuleNotFoundError as error: assert not error.name.startswith('emotion'), error\n"
        "    print(module.name)"
    )
    modules = call(light, "-I", "-c", code, cwd=tmp_path).split()
    assert {"emotion.inference.emotion_classifier", "emotion.data.tokenization"} <= set(modules)
    # Installing has left no file that git would track.
    assert call("git", "-C", packaged, "ls-files", "--others", "--exclude-standard") == ""


def test_it_needs_what_the_environment_for_answering_has_or_newer(light, packaged, tmp_path):
    code = "import json; from importlib import metadata; print(json.dumps(metadata.requires('bert-emotion')))"
    listed = json.loads(call(light, "-I", "-c", code, cwd=tmp_path))
    needed = [name for name in listed if "extra ==" not in name]
    pinned = {}
    for line in (ROOT / "requirements-inference.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, version = line.split(";")[0].split("==")
            pinned.setdefault(name, []).append(version)
    oldest = {f"{name}>={min(versions, key=Version)}" for name, versions in pinned.items()}
    assert len(needed) == len(oldest) and set(needed) == oldest
