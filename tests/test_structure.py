"""The structure, read from the imports: a folder imports only those before it, and no command another."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import emotion
from conftest import ROOT

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


def test_a_folder_imports_only_those_before_it():
    for module, imported in IMPORTS.items():
        for other in imported:
            if folder_of(module) and folder_of(other):
                assert ORDER.index(folder_of(other)) <= ORDER.index(folder_of(module)), f"{module} imports {other}"


def test_no_circles():
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, naming the circle


def test_scripts_import_neither_commands_nor_studies_nor_tools():
    for module, imported in IMPORTS.items():
        if MODULES[module].is_relative_to(SCRIPTS):
            others = {name for name in imported if name.split(".")[0] != "emotion"}
            assert not others, f"{module} imports {others}"


def test_studies_import_no_tools():
    for module, imported in IMPORTS.items():
        if MODULES[module].is_relative_to(ROOT / "studies"):
            others = {name for name in imported if MODULES[name].is_relative_to(ROOT / "tools")}
            assert not others, f"{module} imports {others}"


def test_errors_of_the_hub_come_from_its_own_library():
    """Which HTTP library it uses changes with its version."""
    http = {"aiohttp", "httpx", "httpx2", "requests", "urllib3"}
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not http & {name.split(".")[0] for name in names}, path


def test_another_script_is_started_in_one_place():
    """A script as a process: `run_script` alone knows how."""
    for path in MODULES.values():
        if path.name != "machine.py":
            text = path.read_text(encoding="utf-8")
            assert "sys.executable" not in text, f"{path} starts a process by itself; call run_script"
