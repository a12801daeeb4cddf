"""What commands write: nothing of the user's is destroyed, half a file is never seen, two at once never mix."""

import os
import shutil
import socket
from pathlib import Path

import pytest
import yaml

import run_baseline
import run_benchmark
import run_evaluation
import run_ptq
import run_publish
import run_qat
from conftest import ROOT, contents, copy_to_edit, locked, ptq_flags, qat_flags, read_json, run_code, train_flags
from emotion.data.dataset import load_task
from emotion.evaluation.schema import Record
from emotion.inference.emotion_classifier import fetch
from emotion.inference.model_folder import ARTIFACT, METADATA_FIELDS
from emotion.quantization import scheme
from emotion.utils.base_model import find_base_model, read_recipe_of
from emotion.utils.errors import UserError, check_repo_id
from emotion.utils.files import atomic_folder, atomic_write, check_replaceable, output_lock, write_json, write_text
from emotion.utils.hub_requests import check_can_publish

OURS = {"config.json": "{}", "onnx/model.onnx": "graph", "adapter/adapter_config.json": "{}"}
OURS["recipe.yaml"] = yaml.safe_dump(dict.fromkeys(METADATA_FIELDS))
STARTED = {"training_run.json": '{"train_fingerprint": "0"}', "checkpoint-5/optimizer.pt": "state"}


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def texts_in(folder: Path) -> dict[str, str]:
    return {name: content.decode() for name, content in contents(folder).items()}


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def replace(folder: Path, kind=ARTIFACT) -> None:
    with atomic_folder(folder, kind) as new:
        (new / "config.json").write_text("new")


@pytest.mark.parametrize("files", [OURS, STARTED, {}])
def test_what_this_project_made_is_replaced(files, tmp_path):
    (tmp_path / "out").mkdir()
    replace(fill(tmp_path / "out", files))
    assert texts_in(tmp_path) == {"out/config.json": "new"}  # and nothing is left beside it


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        (ARTIFACT, {"thesis.txt": "all of it"}, "holds something else"),
        (ARTIFACT, {"recipe.yaml": "title: pancakes"}, "holds something else"),
        (ARTIFACT, {"recipe.yaml": "{not: [yaml"}, "holds something else"),
        (ARTIFACT, OURS | {"thesis.txt": "all of it"}, "holds thesis.txt"),
        (ARTIFACT, OURS | {"README.md": "my notes"}, "holds README.md"),
        (ARTIFACT, OURS | {"onnx/config.json": "{}"}, "holds onnx/config.json"),
        (ARTIFACT, OURS | {"photos/one.jpg": ""}, "holds photos, photos/one.jpg"),
        (ARTIFACT, {"checkpoint-5/optimizer.pt": "not by this project"}, "holds something else"),
        (ARTIFACT, {"training_run.json": '{"title": "pancakes"}'}, "holds something else"),
        (ARTIFACT, STARTED | {"notes.txt": "mine"}, "holds notes.txt"),
        (ARTIFACT, STARTED | {"checkpoint-5/notes.txt": "mine"}, "holds checkpoint-5/notes.txt"),
        (None, OURS, "holds something else"),
    ],
)
def test_what_the_user_made_is_not(kind, files, message, tmp_path):
    fill(tmp_path / "out", files)
    with pytest.raises(UserError, match=message):
        replace(tmp_path / "out", kind)
    with pytest.raises(UserError, match=message):
        check_replaceable(tmp_path / "out", kind)
    assert texts_in(tmp_path / "out") == files


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (Path.touch, "file"),
        (os.mkfifo, "pipe"),
        (make_socket, "socket"),
        (lambda path: path.symlink_to("/dev/null"), "device"),
    ],
)
def test_what_is_no_folder_stays(make, what, tmp_path):
    make(tmp_path / "out")
    before = os.lstat(tmp_path / "out")
    with pytest.raises(UserError, match=f"out.* is a .*{what}"):
        replace(tmp_path / "out")
    if what != "file":
        with pytest.raises(UserError, match=f"out.* is a .*{what}"):
            write_text(tmp_path / "out", "new")
    assert os.lstat(tmp_path / "out") == before and list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("output", [".", "/", "../.."])
def test_a_folder_that_holds_the_current_one_is_refused(output, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(UserError, match="holds the folder you are in"):
        replace(Path(output))
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("output", ["read", "read/below", "."])
def test_an_input_is_never_the_output(output, tmp_path, monkeypatch):
    fill(tmp_path / "work" / "read", OURS)
    with pytest.raises(UserError, match="this run reads .*read"):
        check_replaceable(tmp_path / "work" / output, ARTIFACT, [tmp_path / "work" / "read"])
    (tmp_path / "link").symlink_to(tmp_path / "work" / output)
    with pytest.raises(UserError, match="this run reads"):
        check_replaceable(tmp_path / "link", ARTIFACT, [tmp_path / "work" / "read"])
    check_replaceable(tmp_path / "work" / "other", ARTIFACT, [tmp_path / "work" / "read"])


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(exists, tmp_path):
    (tmp_path / "large").mkdir()
    if exists:
        fill(tmp_path / "large" / "weights", OURS)
    (tmp_path / "out").symlink_to(tmp_path / "large" / "weights")
    replace(tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and texts_in(tmp_path / "large") == {"weights/config.json": "new"}
    shutil.rmtree(tmp_path / "large")
    fill(tmp_path, {"large/result.json": "old"} if exists else {"large/other": ""})
    (tmp_path / "large" / "other").unlink(missing_ok=True)
    (tmp_path / "result.json").symlink_to("large/result.json")
    write_text(tmp_path / "result.json", "new")
    assert (tmp_path / "result.json").is_symlink() and texts_in(tmp_path / "large") == {"result.json": "new"}


def test_a_link_in_a_circle_a_link_inside_and_what_the_user_puts_there_meanwhile_stay(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UserError, match="circle"):
        replace(tmp_path / "circle")
    fill(tmp_path / "out", OURS)
    with pytest.raises(UserError, match="holds late.txt"), atomic_folder(tmp_path / "out", ARTIFACT):
        fill(tmp_path / "out", {"late.txt": "mine"})
    assert texts_in(tmp_path / "out") == OURS | {"late.txt": "mine"}
    (tmp_path / "out" / "late.txt").unlink()
    (tmp_path / "out" / "openvino").symlink_to(fill(tmp_path / "large", {"file": "theirs"}))
    with pytest.raises(UserError, match="holds openvino"):
        replace(tmp_path / "out")
    assert texts_in(tmp_path / "large") == {"file": "theirs"}


KILLED = """
import os, pathlib, signal, sys
from emotion.utils import files
from emotion.inference.model_folder import ARTIFACT
place, moment = pathlib.Path(sys.argv[1]), sys.argv[2]
rename = pathlib.Path.rename

def die(*words):
    os.kill(os.getpid(), signal.SIGKILL)

def killed_before(self, target):
    if self.name == "new":
        die()
    return rename(self, target)

def killed_after(self, target):
    renamed = rename(self, target)
    if self.name == "new":
        die()
    return renamed

pathlib.Path.rename = {"before": killed_before, "after": killed_after}.get(moment, rename)
with files.atomic_folder(place, ARTIFACT) as new:
    (new / "config.json").write_text("new")
    if moment == "inside":
        die()
"""


@pytest.mark.parametrize(("moment", "left"), [("inside", OURS), ("before", OURS), ("after", {"config.json": "new"})])
def test_a_killed_process_leaves_the_old_or_the_new(moment, left, tmp_path):
    fill(tmp_path / "out", OURS)
    done = run_code(KILLED, tmp_path / "out", moment)
    assert done.returncode < 0 and len(list(tmp_path.iterdir())) > 1  # its lock, and what it had begun
    with output_lock(tmp_path / "out") as place:  # the next one
        assert texts_in(place) == left
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_half_a_file_of_a_killed_process_is_removed(tmp_path):
    fill(tmp_path, {"result.json": "old", ".result.json.partial": "ne"})
    write_text(tmp_path / "result.json", "new")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "result.json") as partial:
        partial.write_text("ne")
        raise ZeroDivisionError
    assert texts_in(tmp_path) == {"result.json": "new"}


def test_a_place_belongs_to_one_process(tmp_path):
    with locked(tmp_path / "out"):
        with pytest.raises(UserError, match="another process is writing .*out"):
            replace(tmp_path / "out")
        with output_lock(tmp_path / "other"):  # another place is free
            pass
    replace(tmp_path / "out")
    with output_lock(tmp_path / "new"), output_lock(tmp_path / "new"):  # the same process may come in again
        replace(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]


def flags_of(command, artifact, encoder, colors, out) -> list[str]:
    if command is run_ptq:
        return ptq_flags(artifact, out)
    return qat_flags(artifact, out) if command is run_qat else train_flags(encoder, colors, out)


@pytest.mark.parametrize("command", [run_ptq, run_qat])
@pytest.mark.parametrize("where", ["", "below"])
def test_what_a_run_reads_is_never_its_output(command, where, artifact, encoder, colors, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in artifact.rglob("*")}
    with pytest.raises(UserError, match="this run reads .*baseline"):
        command.main(flags_of(command, artifact, encoder, colors, artifact / where))
    assert {path: path.stat().st_mtime_ns for path in artifact.rglob("*")} == before
    recipe = tmp_path / "mine" / "recipe.yaml"
    recipe.parent.mkdir()
    shutil.copy(run_baseline.CONFIG, recipe)
    for out in (encoder, colors, recipe.parent):
        with pytest.raises(UserError, match="this run reads"):
            run_baseline.main([str(recipe), *train_flags(encoder, colors, out)])
        assert any(out.iterdir())


@pytest.mark.parametrize("command", [run_baseline, run_ptq, run_qat])
def test_a_command_refuses_before_any_work(command, artifact, encoder, colors, tmp_path, monkeypatch):
    monkeypatch.setattr(*((command, "load_training_data") if command is run_baseline else (scheme, "load_task")), None)
    fill(tmp_path / "out", OURS | {"thesis.txt": "all of it"})
    (tmp_path / "file").touch()
    for out, noun in (("out", "thesis.txt"), ("file/below", "file")):
        with pytest.raises(UserError, match=noun):
            command.main(flags_of(command, artifact, encoder, colors, tmp_path / out))


def test_a_result_replaces_an_earlier_one_alone(tmp_path):
    path = tmp_path / "dataset.json"
    for before in ('{"macro_f1": 1, "older": 2}', ""):
        path.write_text(before)
        write_json(path, {"macro_f1": 2})
        assert read_json(path) == {"macro_f1": 2}
    for before in ('{"text": "i see", "label": 1}', '{"text": "a"}\n{"text": "b"}', "[1]", "\xff"):
        path.write_text(before)
        with pytest.raises(UserError, match="dataset.json"):
            write_json(path, {"macro_f1": 2})
        assert path.read_text() == before


def test_a_benchmark_replaces_no_other_file(artifact, tmp_path):
    fill(tmp_path, {"notes.json": '{"mine": 1}'})
    with pytest.raises(UserError, match="notes.json"):
        run_benchmark.main([f"{artifact}:onnx", "--output", str(tmp_path / "notes.json")])
    with pytest.raises(UserError, match="/dev/null is a device"):
        run_benchmark.main([f"{artifact}:onnx", "--output", "/dev/null"])
    assert texts_in(tmp_path) == {"notes.json": '{"mine": 1}'}


@pytest.mark.parametrize("variant", ["../../X", "/tmp/X", "..", "a/b", "a\\b", "x\n", "", 7, None, ["x"]])
def test_a_strangers_variant_is_a_name_and_no_path(variant, artifact, tmp_path):
    folder = copy_to_edit(artifact, tmp_path / "in" / "downloaded")
    made = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made | {"variant": variant}))
    with pytest.raises(UserError, match="recipe.yaml: "):
        run_evaluation.main([str(folder), "--results_dir", str(tmp_path / "in" / "results"), "--latency_runs", "0"])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["x\ny", "<script>", "a|b", 7])
@pytest.mark.parametrize("key", ["base_model", "dataset"])
def test_a_strangers_model_is_one_line(key, name, tmp_path):
    made = {"variant": "ptq", "recipe": {}, "seed": 1, "provenance": {key: name}, "training": None}
    fill(tmp_path, {"recipe.yaml": yaml.safe_dump(made)})
    with pytest.raises(UserError, match="recipe.yaml: "):
        read_recipe_of(tmp_path)


def test_a_strangers_record_names_no_path():
    record = read_json(ROOT / "results" / "metrics" / "ptq-onnx.json")
    for field, value in {"variant": "../x", "format": "a/b", "sha256": {"../../.ssh/id": "0"}}.items():
        with pytest.raises(UserError, match=f"file: '{field}"):
            Record.check(record | {field: value}, "file")


DEMO = [str(ROOT / "docs" / "demo"), "--dry_run", "--repo_id"]
BAD_IDS = ["user/x\n", 'x"); alert(1); ("', "</script>", "user/x y", "a/b/c", "../x", "user/", "/x", "û/x"]


@pytest.mark.parametrize("repo_id", BAD_IDS)
def test_a_repositorys_name_is_one_wherever_it_enters(repo_id, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    enter = [
        lambda: check_can_publish(repo_id),
        lambda: fetch(repo_id, ["onnx"]),
        lambda: find_base_model(repo_id),
        lambda: load_task(repo_id),
        lambda: run_publish.main([*DEMO, "user/x", "--model_id", repo_id]),
        lambda: run_publish.main([*DEMO, repo_id]),
    ]
    for call in enter:
        with pytest.raises(UserError, match="is no name for a repository|no config.json there|no such folder"):
            call()
    for good in ("user/bert-emotion-ptq", "gpt2", "o_0/a.b-c"):
        check_repo_id(good)
