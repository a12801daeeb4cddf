"""Recipes and flags: what beats what, and what an error says."""

import importlib
import io
import re
import subprocess
import sys
from dataclasses import fields

import run_baseline
import run_qat
from conftest import ROOT, run_script, train_flags
from emotion.common import command, progress
from emotion.common.arguments import parse_args_and_config
from emotion.common.errors import UserError
from emotion.common.machine import SCRIPTS
from emotion.common.progress import Bar
from emotion.model.training import RecipeTrainingArguments
from emotion.task.source import EMBEDDED_MODEL, name_base_model

import pytest
import yaml

CLASSES = (run_baseline.BaselineArguments, RecipeTrainingArguments)


def write_recipe(folder, **values):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "out"), **values}))
    return path


def test_a_flag_beats_the_recipe(encoder, tmp_path):
    recipe = write_recipe(tmp_path, model_name_or_path=str(encoder), learning_rate=1e-3, weight_decay=0.5)
    arguments, training, used = parse_args_and_config(CLASSES, recipe, ["--learning_rate", "2e-3"])
    assert (training.learning_rate, training.weight_decay) == (2e-3, 0.5)
    assert arguments.model_name_or_path == str(encoder)
    assert used.values["learning_rate"] == 2e-3 and used.values["weight_decay"] == 0.5
    assert "max_length" not in used.values  # neither the recipe nor a flag set it


def test_another_recipe_is_the_first_word(encoder, tmp_path):
    recipe = write_recipe(tmp_path, model_name_or_path=str(encoder), learning_rate=7e-3)
    _, training, used = parse_args_and_config(CLASSES, run_baseline.RECIPE, [str(recipe)])
    assert training.learning_rate == 7e-3 and used.path == recipe


def test_values_of_a_base_model_replace_the_recipes_but_not_a_flag(tmp_path):
    recipe = write_recipe(
        tmp_path,
        learning_rate=1e-5,
        weight_decay=0.1,
        per_model={EMBEDDED_MODEL: {"learning_rate": 3e-4, "weight_decay": 0.2}},
    )
    _, training, _ = parse_args_and_config(CLASSES, recipe, ["--weight_decay", "0.3"], name_base_model)
    assert (training.learning_rate, training.weight_decay) == (3e-4, 0.3)


def test_values_of_the_bits_replace_the_recipes_but_not_a_flag(tmp_path):
    values = {"learning_rate": 1e-5, "weight_decay": 0.1, "bits": 8}
    recipe = write_recipe(tmp_path, **values, per_bits={2: {"learning_rate": 3e-4, "weight_decay": 0.2}})
    classes = (run_qat.QatArguments, RecipeTrainingArguments)
    for flags, expected in (
        ([], (1e-5, 0.1)),
        (["--bits", "4"], (1e-5, 0.1)),
        (["--bits", "2"], (3e-4, 0.2)),
        (["--bits", "2", "--weight_decay", "0.3"], (3e-4, 0.3)),
    ):
        _, training, used = parse_args_and_config(classes, recipe, [*flags, "--output_dir", "out"])
        assert (training.learning_rate, training.weight_decay) == expected
        assert used.values["learning_rate"] == expected[0] and "per_bits" not in used.values


def test_a_base_model_has_values_of_its_own_for_the_bits(tmp_path):
    recipe = write_recipe(
        tmp_path,
        learning_rate=1e-5,
        per_bits={2: {"learning_rate": 3e-4}},
        per_model={"a/b": {"learning_rate": 2e-5, "per_bits": {4: {"learning_rate": 4e-5}}}},
    )
    classes = (run_qat.QatArguments, RecipeTrainingArguments)
    for name, bits, expected in (("a/b", 8, 2e-5), ("a/b", 4, 4e-5), ("a/b", 2, 2e-5), (None, 2, 3e-4)):
        flags = ["--bits", str(bits), "--output_dir", "out"]
        _, training, _ = parse_args_and_config(classes, recipe, flags, lambda _, name=name: name)
        assert training.learning_rate == expected


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        ({"learning_rat": 1e-3}, [], "unknown key 'learning_rat'. Did you mean learning_rate?"),
        ({"per_model": {"a/b": {"epochs": 3}}}, [], "unknown key 'epochs'"),
        ({"per_model": {"a/b": {"per_bits": {2: {"epochs": 3}}}}}, [], "unknown key 'epochs'"),
        ({"per_model": {"a/b": None}}, [], "per_model must hold lines such as"),
        ({"per_bits": {2: {"learning_rate": 1e-4}}}, [], "per_bits needs the flag --bits, which this script does not"),
        ({"num_train_epochs": "many"}, [], "invalid float value: 'many'"),
        ({}, ["--learning_rat", "1"], "unknown flag --learning_rat. Did you mean learning_rate?"),
        ({}, ["weights/baseline"], "expected a recipe that ends in .yaml"),
        ({}, ["missing.yaml"], "no recipe at missing.yaml"),
        ({"seed": 1.5}, [], "invalid int value: '1.5'"),
        ({"eval_strategy": "sometimes"}, [], "sometimes"),
    ],
)
def test_a_wrong_key_or_flag_is_named(values, flags, message, tmp_path):
    recipe = write_recipe(tmp_path, **values)
    with pytest.raises(UserError, match=".*") as error:
        parse_args_and_config(CLASSES, recipe, flags)
    assert message in str(error.value)


def test_the_repositorys_own_recipe_is_valid():
    _, training, recipe = parse_args_and_config(
        CLASSES, run_baseline.RECIPE, ["--output_dir", "weights/x"], name_base_model
    )
    assert training.metric_for_best_model == "macro_f1" and training.load_best_model_at_end
    assert recipe.values["learning_rate"] == training.learning_rate
    assert training.output_dir.endswith("weights/checkpoints/x")  # beside the artifact, not in it


def test_an_error_is_one_line_and_a_status(encoder, tmp_path):
    flags = train_flags(encoder, tmp_path / "nowhere", tmp_path / "out")
    done = run_script("run_baseline.py", *flags)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: --dataset_name") and "no such folder" in line


def test_a_traceback_only_when_asked_for(monkeypatch):
    monkeypatch.setenv("EMOTION_TRACEBACK", "1")
    done = run_script("run_evaluation.py", "nowhere")
    assert "Traceback" in done.stderr and done.stderr.strip().splitlines()[-1].startswith("error: no folder nowhere")


COMMANDS = sorted(path.stem for path in SCRIPTS.glob("*.py"))
TRAININGS = ("run_baseline", "run_qat", "run_qlora")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_what_a_command_does_and_an_example(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, "__main__", script)  # as if it had been started
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    about, _, flags = capsys.readouterr().out.partition("\nflags:\n")
    first, example = about.split("\n\n")[:2]
    assert script.__doc__.strip().startswith(first) and first.endswith(".")
    assert example.startswith("    ") and f"scripts/{name}.py" in example
    # Each flag once, and no default of a machine's own folders
    shown = re.findall(r"^  (--\w+)", flags, flags=re.MULTILINE)
    assert shown and len(shown) == len(set(shown)) and "--adam_beta1" not in shown and str(ROOT) not in flags
    assert ("--help_all" in shown) == (name in TRAININGS)


def test_help_shows_the_recipes_values_and_help_all_every_flag_of_the_trainer(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "__main__", run_qat)
    seen = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit):
            run_qat.main([flag])
        seen[flag] = " ".join(capsys.readouterr().out.split())
    values = yaml.safe_load(run_qat.RECIPE.read_text())
    assert (
        f"--per_device_train_batch_size {{1 or more}} The batch size per device for training. (default: "
        f"{values['per_device_train_batch_size']})" in seen["--help"]
    )
    assert "--bits {8,4,3,2}" in seen["--help"] and "recipe configs/qat.yaml" in seen["--help"]
    missing = [field.name for field in fields(RecipeTrainingArguments) if f"--{field.name} " not in seen["--help_all"]]
    assert not missing and "--adam_beta1 {0 to below 1}" in seen["--help_all"]
    assert len(seen["--help_all"]) > 2 * len(seen["--help"])


def test_help_of_a_started_command():
    done = run_script("predict.py", "--help")
    assert done.returncode == 0 and done.stdout.startswith("Tells the emotion of sentences") and not done.stderr


class Terminal(io.StringIO):
    def __init__(self, is_one: bool):
        super().__init__()
        self.isatty = lambda: is_one


def work_with_bars() -> None:
    for _ in Bar(range(3), desc="outer"):
        for step in Bar(range(40), desc="inner"):
            if step == 20:
                Bar.write("in the middle")


@pytest.mark.parametrize("seconds", [0, 30])
def test_a_log_gets_plain_lines_and_a_terminal_keeps_none(seconds, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_S", seconds)
    log = Terminal(False)
    monkeypatch.setattr(sys, "stderr", log)
    work_with_bars()
    assert capsys.readouterr().out == "in the middle\n" * 3
    lines = log.getvalue().splitlines()
    assert all(re.fullmatch(r"(inner|outer): \d+ of (3|40), 00:0\d gone, (00:0\d|\?) to go", line) for line in lines)
    assert bool(lines) == (seconds == 0)  # quick work leaves no line in a log

    terminal = Terminal(True)
    monkeypatch.setattr(sys, "stderr", terminal)
    work_with_bars()
    assert "outer" in terminal.getvalue() and terminal.getvalue().endswith(" \r")  # the last bar is wiped away
    assert capsys.readouterr().out == "in the middle\n" * 3


def test_an_error_closes_the_bars(monkeypatch, capsys):
    def fail():
        for _ in Bar(range(3)):
            raise UserError("no more")

    terminal = Terminal(True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(command, "_prepare_streams", lambda: None)
    with pytest.raises(SystemExit):
        command.run(fail)
    assert terminal.getvalue().endswith(" \rerror: no more\n")


def test_make_run_says_what_it_takes_before_it_starts_and_what_to_try_at_its_end():
    words = ["make", "--dry-run", "--no-print-directory", "-C", str(ROOT), "run"]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "minutes" in lines[0] and "GB of disk" in lines[1] and all(line.startswith("echo ") for line in lines[:2])
    assert "predict.py --model build/run/ptq" in lines[-2] and "README.md" in lines[-1]
