"""Configs and flags: what overrides what, and what an error says."""

import importlib
import io
import re
import sys

import pytest
import yaml

import run_baseline
import run_ptq
import run_qat
import run_qlora
from conftest import ROOT, run_script
from emotion.utils import command
from emotion.utils.arguments import parse_args_and_config, resolve_config
from emotion.utils.command import Bar
from emotion.utils.errors import UserError
from emotion.utils.files import sha256
from emotion.utils.machine import SCRIPTS

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*/*.yaml"))
METHODS = {"baseline": run_baseline, "ptq": run_ptq, "qat": run_qat, "qlora": run_qlora}


def write_config(folder, **values):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "out"), **values}))
    return str(path)


def test_a_flag_overrides_the_config(encoder, tmp_path):
    config = write_config(tmp_path, model_name_or_path=str(encoder), learning_rate=1e-3, weight_decay=0.5)
    args = [config, "--learning_rate", "2e-3", "--adam_beta1", "0.8"]
    arguments, training, used = parse_args_and_config(run_baseline.ARGUMENTS, args)
    assert (training.learning_rate, training.weight_decay) == (2e-3, 0.5)
    assert arguments.model_name_or_path == str(encoder)
    assert used.values["learning_rate"] == 2e-3 and used.values["weight_decay"] == 0.5
    assert used.values["max_seq_length"] == 128  # a default of ours
    assert used.values["adam_beta1"] == 0.8 and "adam_beta2" not in used.values  # of a library: what is not usual
    assert used.sha256 == sha256(tmp_path / "config.yaml")


def test_without_a_config_the_defaults_hold():
    arguments, hub, used = parse_args_and_config(run_ptq.ARGUMENTS, ["--model_name_or_path", "any"])
    assert arguments.bits == 8 and arguments.output_dir == "weights/ptq" and used.path is used.sha256 is None
    with pytest.raises(UserError, match="--model_name_or_path"):
        parse_args_and_config(run_ptq.ARGUMENTS, [])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_is_valid_and_holds_only_what_differs_from_the_defaults(path):
    command_of = METHODS[path.stem.split("-")[0]]
    args = ["--model_name_or_path", "any", "--output_dir", "out"]
    used = resolve_config(command_of.ARGUMENTS, [path, *args]).values
    usual = resolve_config(command_of.ARGUMENTS, args).values
    given = yaml.safe_load(path.read_text())
    assert given.pop("output_dir").endswith(f"/{path.stem}")
    given.pop("model_name_or_path", None)
    assert {name for name in used if used[name] != usual.get(name)} == given.keys()


def test_an_encoder_has_a_config_for_each_method():
    names = {}
    for path in CONFIGS:
        names.setdefault(path.parent.name, set()).add(path.stem)
    assert names.keys() == {"bert-base-uncased", "minilm", "mpnet-base"}
    assert len(set(map(frozenset, names.values()))) == 1


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        ({"learning_rat": 1e-3}, [], "learning_rat.* learning_rate"),
        ({"per_model": {"a/b": {"epochs": 3}}}, [], "per_model"),
        ({"num_train_epochs": "many"}, [], "config.yaml: --num_train_epochs: .*many"),
        ({}, ["--learning_rat", "1"], "--learning_rat.* learning_rate"),
        ({"seed": 1.5}, [], "--seed: .*1.5"),
        ({"eval_strategy": "sometimes"}, [], "sometimes"),
    ],
)
def test_a_wrong_key_or_flag_is_named(values, flags, message, encoder, tmp_path):
    config = write_config(tmp_path, model_name_or_path=str(encoder), **values)
    with pytest.raises(UserError, match=message):
        parse_args_and_config(run_baseline.ARGUMENTS, [config, *flags])


@pytest.mark.parametrize("word", ["weights/baseline", "missing.yaml"])
def test_a_word_before_the_flags_is_a_config(word):
    with pytest.raises(UserError, match=word):
        parse_args_and_config(run_baseline.ARGUMENTS, [word])


@pytest.mark.parametrize("traceback", ["", "1"])
def test_an_error_is_one_line_and_a_status(traceback, monkeypatch):
    monkeypatch.setenv("EMOTION_TRACEBACK", traceback)
    done = run_script("run_evaluation.py", "nowhere")
    *lines, last = done.stderr.splitlines()
    assert done.returncode == 1 and last.startswith("error: no folder nowhere") and not done.stdout
    assert bool(lines) == ("Traceback" in done.stderr) == bool(traceback)


COMMANDS = sorted(path.stem for path in SCRIPTS.glob("*.py"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short_and_begins_with_what_a_command_does(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, "__main__", script)  # as if it had been started
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    about, _, flags = capsys.readouterr().out.partition("\noptions:\n")
    assert script.__doc__.strip() in about and f"scripts/{name}.py" in about
    # Each flag once, and no default of a machine's own folders
    shown = re.findall(r"^  (--\w+)", flags, flags=re.MULTILINE)
    assert shown and len(shown) == len(set(shown)) <= 55 and str(ROOT) not in flags


def test_help_shows_ranges_and_the_defaults_of_the_config(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "__main__", run_qat)
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit):
        run_qat.main([str(ROOT / "configs" / "minilm" / "qat-int4.yaml"), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--per_device_train_batch_size \{1 or more\} The batch size .{0,60}default: 32", shown)
    assert re.search(r"--bits \{8,4,2\} [^-]*default: 4", shown) and "--adam_beta1" not in shown


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
    monkeypatch.setattr(command, "LINE_S", seconds)
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
