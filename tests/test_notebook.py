"""The notebook: it runs from top to bottom, its first half without PyTorch, and shows the released scores."""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pyarrow
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from pyarrow import parquet
from sklearn.metrics import f1_score

from conftest import ROOT
from emotion import EmotionClassifier
from emotion.data.dataset import load_task
from emotion.inference.model_folder import RELEASED
from emotion.utils.files import RECOMMENDED
from release import MACRO_F1_MARGIN

PATH = ROOT / "notebooks" / "inference_evaluation.ipynb"
HIDE = """
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *words):
        return None if name in {"torch", "transformers"} else super().find_spec(name, *words)

place = sys.meta_path.index(importlib.machinery.PathFinder)
sys.meta_path[place] = Finder
"""
SHOW = "sys.meta_path[place] = importlib.machinery.PathFinder"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def cell_of(notebook, name: str) -> int:
    (number,) = [number for number, cell in enumerate(notebook.cells) if cell.id == name]
    return number


def printed_by(notebook, name: str) -> str:
    """What a cell prints and shows, as plain text."""
    outputs = notebook.cells[cell_of(notebook, name)].outputs
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_it_runs_from_top_to_bottom(notebook, artifact, colors, tmp_path, monkeypatch):
    for variant in ("baseline", "ptq", RECOMMENDED):
        shutil.copytree(artifact, tmp_path / "weights" / variant)
    test = load_task(str(colors)).splits["test"]
    logits = EmotionClassifier.from_pretrained(artifact, "onnx").logits(test["text"])
    published = logits.copy()
    published[:5] *= -1  # as if FP32 had given five texts another label
    columns = {"row": range(len(test)), "label": list(test["label"]), "logits": list(published)}
    types = [("row", pyarrow.int64()), ("label", pyarrow.int64()), ("logits", pyarrow.list_(pyarrow.float32()))]
    (tmp_path / "results" / "predictions").mkdir(parents=True)
    path = tmp_path / "results" / "predictions" / "baseline-pytorch.parquet"
    parquet.write_table(pyarrow.table(columns, schema=pyarrow.schema(types)), path)
    for name, value in {"WEIGHTS": tmp_path / "weights", "RESULTS": tmp_path / "results", "DATASET": colors}.items():
        monkeypatch.setenv(f"EMOTION_{name}", str(value))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # this environment has what the notebook installs
    # The first half must do without PyTorch and Transformers.
    notebook.cells.insert(cell_of(notebook, "with-torch"), new_code_cell(SHOW))
    notebook.cells.insert(0, new_code_cell(HIDE))
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(PATH.parent)}}).execute()

    assert not [cell.id for cell in notebook.cells if "stderr" in str(cell.get("outputs"))]
    (line,) = [line for line in printed_by(notebook, "measure").splitlines() if line.startswith("ptq, onnx")]
    macro_f1 = 100 * f1_score(test["label"], logits.argmax(axis=-1), average="macro")
    assert float(line.split()[2]) == pytest.approx(macro_f1, abs=0.01) and int(line.split()[4]) == 5
    flips = [line for line in printed_by(notebook, "differ").splitlines() if line.startswith("ptq, onnx")]
    assert flips[0].startswith(f"ptq, onnx: 5 of {len(test)} labels differ")
    assert "baseline, bf16" in printed_by(notebook, "with-torch")
    drawn = [cell.id for cell in notebook.cells if "image/png" in str(cell.get("outputs"))]
    assert drawn == ["matrices", "with-torch-matrices"]


def test_outside_of_a_clone_it_makes_one(notebook, tmp_path):
    origin, work = tmp_path / "origin", tmp_path / "work"
    (origin / "scripts" / "emotion").mkdir(parents=True)
    (origin / "scripts" / "emotion" / "__init__.py").write_text("")
    (origin / "requirements-inference.txt").write_text("")
    work.mkdir()
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=origin, check=True)
    setup = re.sub(r"https://github\.com/[\w./-]+", origin.as_uri(), notebook.cells[cell_of(notebook, "setup")].source)
    words = [sys.executable, "-c", f"{setup}\nimport emotion\nprint(emotion.__file__)"]
    done = subprocess.run(words, cwd=work, capture_output=True, text=True, check=True)
    badge = re.search(r"google\.com/github/([^/]+/[^/]+)/blob/main/([\w./]+)", notebook.cells[0].source)
    assert f'"https://github.com/{badge[1]}"' in notebook.cells[cell_of(notebook, "setup")].source
    assert ROOT / badge[2] == PATH  # the badge opens what the first cell clones
    (clone,) = work.iterdir()
    assert done.stdout.strip() == str(clone / "scripts" / "emotion" / "__init__.py")


@pytest.mark.skipif(not (ROOT / "weights" / RECOMMENDED / "config.json").is_file(), reason="no released weights")
def test_what_is_stored_comes_from_one_run_on_the_released_weights(notebook):
    """`make notebook` stores it; it shows what the records say, no warnings, and nobody's folders."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    stored = [output for cell in code for output in cell.outputs]
    assert {output.get("name", "stdout") for output in stored} == {"stdout"}
    words = [output for output in stored if "image/png" not in output.get("data", {})]
    assert not re.search(r"/(home|root|work|Users|tmp)/", str(words))
    table = printed_by(notebook, "with-torch").splitlines()
    for variant, format in RELEASED.items():
        (line,) = [line for line in table if line.startswith(f"{variant}, {format} ")]
        record = json.loads((ROOT / "results" / "metrics" / f"{variant}-{format}.json").read_text())
        assert float(line.split()[2]) == pytest.approx(100 * record["quality"]["macro_f1"], abs=100 * MACRO_F1_MARGIN)
