"""Trainings that are killed, started twice, poisoned or damaged: what is resumed, what is refused, what is said."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_dataset
from transformers import Trainer, TrainingArguments

import run_baseline
import run_qat
import run_qlora
from conftest import FUZZ, color_features, edit_json, qat_flags, qlora_flags, read_json, save_dataset, train_flags
from emotion.inference.model_folder import RUN_FILE, find_formats
from emotion.training.checkpoints import CHECKSUMS, choose_checkpoint
from emotion.utils.base_model import read_recipe_of
from emotion.utils.errors import UserError
from emotion.utils.files import sha256
from emotion.utils.machine import SCRIPTS

COMMANDS = {"baseline": run_baseline, "qat": run_qat, "qlora": run_qlora}
# How often a training is killed, over all three commands, and how often two start at once
KILLS, PAIRS = (20, 10) if FUZZ > 1 else (3, 2)
EVERY_2 = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 3}


def flags_of(name: str, artifact: Path, encoder: Path, colors: Path, out: Path, **changes) -> list[str]:
    changes = {"max_steps": 8, **EVERY_2, **changes}
    if name == "qat":
        return qat_flags(artifact, out, bits=4, formats="onnx", **changes)
    flags = train_flags if name == "baseline" else qlora_flags
    return flags(encoder, colors, out, **changes)


def poison(monkeypatch, at_step: int, what: str) -> None:
    """Makes the loss, or the gradients, of one step NaN."""
    take_step = Trainer.training_step

    def poisoned(self, model, *args, **options):
        loss = take_step(self, model, *args, **options)
        if self.state.global_step + 1 != at_step:
            return loss
        for parameter in model.parameters():
            if what == "gradients" and parameter.grad is not None:
                parameter.grad.fill_(float("nan"))
        return loss * float("nan") if what == "loss" else loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_loss_of_nan_ends_every_training_at_its_step(name, artifact, encoder, colors, tmp_path, monkeypatch):
    poison(monkeypatch, 5, "loss")
    with pytest.raises(UserError, match="nan in step 5; .*checkpoint-4; .*--learning_rate"):
        COMMANDS[name].main(flags_of(name, artifact, encoder, colors, tmp_path / "out"))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("step", "changes", "message"),
    [
        (4, {}, "in step 4; .*checkpoint-2;"),  # where a checkpoint would be written
        (8, {"save_strategy": "no", "load_best_model_at_end": False}, "in step 8; there is no checkpoint"),
        (30, {"save_strategy": "epoch", "eval_strategy": "epoch", "max_steps": 60}, "in step 30; .* no checkpoint"),
    ],
)
def test_weights_that_are_no_numbers_are_never_saved(step, changes, message, encoder, colors, tmp_path, monkeypatch):
    poison(monkeypatch, step, "gradients")
    with pytest.raises(UserError, match=message):
        run_baseline.main(flags_of("baseline", None, encoder, colors, tmp_path / "out", **changes))
    assert not list(tmp_path.glob(f"out/checkpoint-{step}")) and not (tmp_path / "out" / "config.json").exists()


def test_the_score_is_that_of_the_weights_that_are_saved(encoder, colors, tmp_path, monkeypatch, capsys):
    scores = iter([0.1, 0.9, 0.3, 0.2] * 2)
    monkeypatch.setattr(run_baseline, "compute_metrics", lambda _: {"macro_f1": next(scores), "accuracy": 0.0})
    for best, expected in ((True, 0.9), (False, 0.2)):
        changes = {"load_best_model_at_end": best}
        run_baseline.main(flags_of("baseline", None, encoder, colors, tmp_path / "out", **changes))
        assert read_recipe_of(tmp_path / "out")["training"]["validation_macro_f1"] == expected
        lines = capsys.readouterr().out.splitlines()
        printed = [line.split("macro F1 ")[1][:6] for line in lines if line.startswith("epoch ")]
        assert printed == ["0.1000", "0.9000", "0.3000", "0.2000"]
        assert lines[-2].endswith(f"{expected:.4f}") and lines[-1] == f"saved {tmp_path / 'out'}"


@pytest.fixture(scope="module")
def interrupted(encoder, colors, tmp_path_factory) -> tuple[Path, list[str]]:
    """A training that ended before its artifact was saved: its folder, with a dataset of its own, and its flags."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(colors, folder / "data")
    flags = flags_of("baseline", None, encoder, folder / "data", folder / "out")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_baseline, "save_formats", _interrupt)
        run_baseline.main(flags)
    return folder, flags


def _interrupt(*args):
    raise KeyboardInterrupt


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forget(name: str):
    """As if `Trainer` had never written that file."""

    def change(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        edit_json(checkpoint / CHECKSUMS, name, ...)

    return change


DAMAGES = {
    "cut off": (lambda folder: (folder / CHECKSUMS).unlink(), "was cut off"),
    "cut off in the checksums": (lambda folder: (folder / CHECKSUMS).write_text('{"a'), "was cut off"),
    "checksums of another kind": (lambda folder: (folder / CHECKSUMS).write_text("[1]"), "was cut off"),
    "a bit of the weights": (lambda folder: flip_a_bit(folder / "model.safetensors"), "is damaged .model.safetensors"),
    "a bit of the optimizer": (lambda folder: flip_a_bit(folder / "optimizer.pt"), "is damaged .optimizer.pt"),
    "half a state": (lambda folder: os.truncate(folder / "trainer_state.json", 40), "is damaged .trainer_state"),
    "lost weights": (lambda folder: (folder / "model.safetensors").unlink(), "is damaged .model.safetensors"),
    "no optimizer": (forget("optimizer.pt"), "has no optimizer.pt"),
    "no scheduler": (forget("scheduler.pt"), "has no scheduler.pt"),
    "no random state": (forget("rng_state.pth"), "has no rng_state.pth"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_whole_one_before_it(damage, interrupted, tmp_path, capsys):
    folder = shutil.copytree(interrupted[0] / "out", tmp_path / "out")
    last, before = (folder / f"checkpoint-{step}" for step in (8, 6))
    change, reason = DAMAGES[damage]
    run = read_json(folder / RUN_FILE)
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none")
    assert choose_checkpoint(arguments, "true", run) == last
    change(last)
    capsys.readouterr()
    assert choose_checkpoint(arguments, "true", run) == before == choose_checkpoint(arguments, str(before), run)
    assert re.search(f"checkpoint-8 {reason}.*: it is not used", capsys.readouterr().out.splitlines()[0])
    with pytest.raises(UserError, match=f"--resume_from_checkpoint: .*checkpoint-8 {reason}"):
        choose_checkpoint(arguments, str(last), run)


def test_a_checkpoint_needs_the_best_one(interrupted, tmp_path, capsys):
    folder = shutil.copytree(interrupted[0] / "out", tmp_path / "out")
    state = folder / "checkpoint-8" / "trainer_state.json"
    edit_json(state, "best_model_checkpoint", "elsewhere/checkpoint-4")
    edit_json(folder / "checkpoint-8" / CHECKSUMS, "trainer_state.json", sha256(state))
    flip_a_bit(folder / "checkpoint-4" / "model.safetensors")
    arguments = TrainingArguments(str(folder), load_best_model_at_end=True, eval_strategy="steps", use_cpu=True)
    choose_checkpoint(arguments, "true", read_json(folder / RUN_FILE))
    assert "checkpoint-8 needs the best one, " in capsys.readouterr().out


def test_another_recipe_or_other_rows_are_not_resumed(interrupted):
    folder, flags = interrupted
    rows = load_dataset(str(folder / "data"))
    changed = {split: {"text": list(rows[split]["text"]), "label": list(rows[split]["label"])} for split in rows}
    changed["train"]["text"][7] = "the very red house"
    save_dataset(folder / "data", changed, color_features())
    with pytest.raises(UserError, match="cannot resume .*: learning_rate, the rows of train changed"):
        run_baseline.main([*flags, "--learning_rate", "1e-3", "--resume_from_checkpoint", "true"])
    assert (folder / "out" / "checkpoint-8").is_dir()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_training_that_was_ended_before_it_saved_its_model_goes_on(name, artifact, encoder, colors, tmp_path):
    """From its own last checkpoint or from one elsewhere; an older model stays where the new one will be saved."""
    whole, out = tmp_path / "whole", shutil.copytree(artifact, tmp_path / "out")
    before = weights_in(out)
    COMMANDS[name].main(flags_of(name, artifact, encoder, colors, whole))
    flags = flags_of(name, artifact, encoder, colors, out)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(COMMANDS[name].model_folder, "new_artifact", _interrupt)
        COMMANDS[name].main(flags)
    assert weights_in(out).items() >= before.items() and find_formats(out).keys() == find_formats(artifact).keys()
    with pytest.raises(UserError, match="--resume_from_checkpoint: no folder .*checkpoint-7"):
        COMMANDS[name].main([*flags, "--resume_from_checkpoint", str(out / "checkpoint-7")])
    elsewhere = min(shutil.copytree(out, tmp_path / "elsewhere").glob("checkpoint-*"))
    assert elsewhere.name != "checkpoint-8"
    again = shutil.copytree(out, tmp_path / "again")
    for folder, checkpoint in ((out, elsewhere), (again, "true")):  # the second takes no further step
        flags = flags_of(name, artifact, encoder, colors, folder)
        COMMANDS[name].main([*flags, "--resume_from_checkpoint", str(checkpoint)])
        training = read_recipe_of(folder)["training"]
        assert training["resumed"] is True and training["steps"] == read_recipe_of(whole)["training"]["steps"] == 8
        assert weights_in(folder) == weights_in(whole) and not list(folder.glob("checkpoint-*"))


def start(name: str, flags: list[str], log: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the order of sums depends on the number of threads
    with log.open("w") as output:
        command = [sys.executable, str(SCRIPTS / f"run_{name}.py"), *flags]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def weights_in(folder: Path) -> dict[str, str]:
    paths = [*folder.rglob("*.safetensors"), *folder.rglob("*.onnx")]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


@pytest.mark.fuzz
@pytest.mark.processes
@pytest.mark.timeout(200 + 120 * KILLS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_training_that_is_killed_ends_as_if_nothing_had_happened(name, encoder, colors, tmp_path, request):
    artifact = request.getfixturevalue("artifact") if name == "qat" else None
    draw, kills = random.Random(f"{name} {KILLS}"), len(range(list(COMMANDS).index(name), KILLS, len(COMMANDS)))
    began = time.monotonic()
    whole = flags_of(name, artifact, encoder, colors, tmp_path / "whole", max_steps=24)
    assert start(name, whole, tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    took, expected = time.monotonic() - began, weights_in(tmp_path / "whole")
    assert expected
    done = 0
    while done < kills:
        out = tmp_path / f"out-{done}"
        flags = [*flags_of(name, artifact, encoder, colors, out, max_steps=24), "--resume_from_checkpoint", "true"]
        ended, moments = None, []
        while ended is None:  # killed again and again, then left alone
            process = start(name, flags, tmp_path / "log")
            wait = draw.uniform(0.2, 0.9) * took if done < kills else None
            try:
                ended = process.wait(wait)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                done += 1
                moments.append(f"{len(list(out.glob('checkpoint-*')))} at {wait:.1f} s")
        assert ended == 0, (tmp_path / "log").read_text()
        assert weights_in(out) == expected
        assert not list(tmp_path.glob(".*")) and not list(out.glob("checkpoint-*")) and not (out / RUN_FILE).exists()
        request.node.user_properties.append(("draws", len(moments)))
        print(f"{name}: killed {len(moments)} times (checkpoints: {', '.join(moments)}), equal weights", flush=True)


@pytest.mark.fuzz
@pytest.mark.processes
@pytest.mark.timeout(200 + 120 * PAIRS)
def test_two_trainings_at_once_never_mix(encoder, colors, tmp_path, record_property):
    record_property("draws", PAIRS)
    expected, lost = {}, 0
    for seed in (1, 2):
        flags = flags_of("baseline", None, encoder, colors, tmp_path / f"whole-{seed}", seed=seed)
        assert start("baseline", flags, tmp_path / "log").wait() == 0
        expected[seed] = weights_in(tmp_path / f"whole-{seed}")
    assert expected[1] != expected[2]
    for _ in range(PAIRS):
        out, both = tmp_path / "out", []
        for seed in (1, 2):
            log = tmp_path / f"log-{seed}"
            both.append((start("baseline", flags_of("baseline", None, encoder, colors, out, seed=seed), log), log))
        statuses = [process.wait() for process, _ in both]
        for status, (_, log) in zip(statuses, both, strict=True):
            last = log.read_text().splitlines()[-1]
            refused = status == 1 and last.startswith("error: another process is writing")
            assert status == 0 or refused, log.read_text()
            lost += status
        assert 0 in statuses
        assert weights_in(out) == expected[read_recipe_of(out)["seed"]]
        print(f"two at once: statuses {statuses}, the artifact is that of one", flush=True)
        assert not list(out.glob("checkpoint-*")) and not list(tmp_path.glob(".*"))
    assert lost > 0
