"""Whatever a user hands over ends in an answer or in one line that says what to do, before anything is loaded."""

import ast
import importlib
import io
import os
import random
import re
import subprocess
import sys
import threading
import tracemalloc
from argparse import SUPPRESS
from dataclasses import is_dataclass
from types import SimpleNamespace

import pytest
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import run_baseline
import run_ptq
import run_qat
import run_qlora
from conftest import ROOT, run_script, seeds_for
from emotion import EmotionClassifier
from emotion.data import tokenization as tokens
from emotion.data.dataset import Task, load_task
from emotion.data.tokenization import TextEncoder
from emotion.inference import predict
from emotion.quantization import scheme
from emotion.utils import command
from emotion.utils.arguments import make_parser, parse_args_and_config, resolve_config
from emotion.utils.base_model import EMBEDDED_MODEL, find_base_model
from emotion.utils.command import Bar
from emotion.utils.errors import UsageError, UserError
from emotion.utils.files import sha256
from emotion.utils.machine import SCRIPTS, THREADS, choose_threads
from mutations import DATASETS, LETTERS, draw_config, draw_dataset, draw_flag, draw_text

COMMANDS = sorted(path.stem for path in SCRIPTS.glob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
METHODS = {"baseline": run_baseline, "ptq": run_ptq, "qat": run_qat, "qlora": run_qlora}


class Loaded(Exception):
    """The command went on to load its data."""


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    loading = "load_training_data"
    for module, name in ((run_baseline, loading), (run_qlora, loading), (scheme, "load_task")):
        monkeypatch.setattr(module, name, lambda *args, **options: raise_(Loaded()))


def end_of(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        command.run(main)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "flag", "value", "message"),
    [
        (run_baseline, "seed", "-1", "--seed: "),
        (run_baseline, "seed", "9" * 5000, "--seed"),
        (run_baseline, "learning_rate", "nan", "--learning_rate: "),
        (run_baseline, "num_train_epochs", "0", "--num_train_epochs: "),
        (run_baseline, "per_device_eval_batch_size", "1" + "0" * 30, "1000000000"),
        (run_baseline, "metric_for_best_model", "f1", "--metric_for_best_model: "),
        (run_baseline, "report_to", "nobody", "--report_to: "),
        (run_baseline, "accelerator_config", "nowhere.json", "FileNotFoundError"),
        (run_baseline, "deepspeed", "nowhere.json", ""),
        (run_baseline, "output_dir", "caf\udce9", "UTF-8"),
        (run_baseline, "output_dir", "a\0b", "value 0"),
        (run_qlora, "init_lora_weights", "zero", "--init_lora_weights: "),
        (run_qlora, "formats", "gguf", "--formats: "),
        (run_qat, "quantize_after", "-1", "--quantize_after: "),
        (run_qat, "model_name_or_path", "nowhere", "nowhere"),
        (run_ptq, "max_f1_drop", "-101", "--max_f1_drop: "),
    ],
)
def test_a_value_without_a_meaning_is_refused_before_anything_is_loaded(
    module, flag, value, message, nothing_is_loaded, encoder, capsys
):
    args = ["--model_name_or_path", str(encoder), "--output_dir", "out", f"--{flag}={value}"]
    status, error = end_of(lambda: module.main(args), capsys)
    assert status == (1 if value == "nowhere" else 2)  # the call is right, and the folder is missing
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert len(error) < 2100  # also of a value of 5,000 letters


def classes_of(name: str) -> list:
    module = importlib.import_module(name)
    tree = ast.parse((ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    return [vars(module)[one] for one in defined if is_dataclass(vars(module)[one]) and one.endswith("Arguments")]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "predict"])  # which has no dataclass
def test_every_number_that_a_flag_takes_has_a_range_that_its_help_shows(name):
    classes = classes_of(name)
    assert classes
    parser = make_parser(classes, "")
    shown = " ".join(parser.format_help().split())
    for action in parser._actions:
        if action.type in (int, float) and action.dest != "local_rank":  # the launcher's, not the user's
            assert action.choices, f"{name}: --{action.dest} takes any number"
            if action.help != SUPPRESS:
                assert f"--{action.dest} {{{','.join(map(str, action.choices))}}}" in shown
            assert float("nan") not in action.choices and float("inf") not in action.choices


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", seeds_for(1))
def test_random_flags_end_in_one_line_or_are_taken(seed, nothing_is_loaded, encoder, capsys, record_property):
    rng = random.Random(seed)
    record_property("draws", 60)
    names = [action.dest for action in make_parser(run_qlora.ARGUMENTS, "")._actions if "help" not in action.dest]
    ends = []
    for _ in range(60):
        about, args = draw_flag(rng, names)
        given = ["--model_name_or_path", str(encoder), "--output_dir", "out", *args]
        try:
            run_qlora.main(given)
        except (UserError, Loaded) as end:
            ends.append(type(end))
        except OSError as error:  # of a name of 5,000 letters; the boundary names the file
            assert error.filename and error.strerror, about
        unset_hf_deepspeed_config()  # a value of --deepspeed stays in the process, and every model asks for it
    assert ends.count(UsageError) > 20 and ends.count(Loaded) > 3


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", seeds_for(1))
def test_random_configs_end_in_one_line_or_are_taken(seed, encoder, tmp_path, record_property):
    rng = random.Random(seed)
    record_property("draws", 80)
    names = ["learning_rate", "seed", "output_dir", "eval_strategy", "bf16", "target_modules", "lr_scheduler_kwargs"]
    refused = 0
    for _ in range(80):
        about, content = draw_config(rng, names)
        (tmp_path / "config.yaml").write_bytes(content)
        try:
            flags = ["config.yaml", "--model_name_or_path", str(encoder), "--output_dir", "out"]
            parse_args_and_config(run_qlora.ARGUMENTS, flags)
        except UserError as error:
            refused += 1
            assert "config.yaml" in str(error) or "--" in str(error), about
    assert refused > 45


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: -1", "--seed"),
        (b"learning_rate: .nan", "--learning_rate"),
        (b"learning_rate: [1, 2]", "--learning_rate"),
        (b"learning_rate: null", "--learning_rate"),
        (b"bf16: 5", "--bf16"),
        (b"output_dir: 2026-11-26", "--output_dir"),
        (b"output_dir: {a: 1}", "--output_dir"),
        (b"seed: 1\nseed: 2", "line 1: 'seed'"),
        (b"1: 2", "'1'"),
        (b"help: x", "'help'"),
        (b"no_bf16: true", "'no_bf16'"),
        (b"seed: caf\xe9", "not valid YAML"),
        (b"a: &a [*a]", "aliases"),
        (b"seed: !!python/object/apply:os.getpid []", "tags"),
        (b"seed: " + b"[" * 5_000, "not valid YAML"),
        (b"#" * 100_001, "100,001 bytes"),
        (b"per_model: {a: {seed: 1}}", "'per_model'"),
        (b"learning_rat: 1", "learning_rat.* learning_rate"),
        (b"num_train_epochs: many", "config.yaml: --num_train_epochs"),
        (b"eval_strategy: sometimes", "--eval_strategy|sometimes"),
    ],
)
def test_a_config_that_is_none_is_refused(content, message, encoder, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        parse_args_and_config(run_qlora.ARGUMENTS, ["config.yaml", "--model_name_or_path", "a", "--output_dir", "out"])
    assert len(str(error.value).splitlines()) == 1


# Valid datasets
GOOD = {"good", "text of a megabyte", "text of one long word", "text of zero characters", "one row each"}
GOOD |= {"labels without names", "labels as words", "CSV"}
GOOD |= {"100 classes", "no train", "no validation", "no test"}
# By chance, or the library's own choice
EITHER = {"Parquet with flipped bits", "program", "card of other columns", "saved to disk"}


def opens(folder, kind: str) -> bool:
    try:
        return isinstance(load_task(str(folder)), Task)
    except UserError as error:
        assert len(str(error).splitlines()) == 1, kind
        return False


@pytest.mark.parametrize("kind", DATASETS)
def test_a_dataset_of_any_content_opens_or_is_refused(kind, tmp_path):
    (tmp_path / "data").mkdir()
    DATASETS[kind](random.Random(kind), tmp_path / "data")
    assert opens(tmp_path / "data", kind) == (kind in GOOD) or kind in EITHER


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", seeds_for(4))
def test_a_random_dataset_opens_or_is_refused(seed, tmp_path):
    opens(tmp_path / "data", draw_dataset(random.Random(seed), tmp_path / "data"))


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", seeds_for(2))
def test_random_texts_have_one_finite_answer_each(seed, artifact, record_property):
    rng = random.Random(seed)
    texts = [draw_text(rng)[1] for _ in range(40)]
    record_property("draws", len(texts))
    classifier = EmotionClassifier.from_pretrained(artifact, "onnx", threads=1)
    answers = classifier.classify(texts, top_k=None)
    assert len(answers) == len(texts)
    for one in answers:
        assert abs(sum(label["score"] for label in one) - 1) < 1e-4


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory):
    """A tokenizer of RoBERTa's kind, whose words hold the space before them."""
    folder = tmp_path_factory.mktemp("bytes")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<pad>"])
    tokenizer.train_from_iterator(["i feel so happy today and the sky is red"] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "model_max_length": 64}')
    return folder


@pytest.mark.parametrize("kind", ["wordpiece", "words", "bytes"])
def test_a_text_that_is_cut_before_the_tokenizer_has_the_same_tokens(kind, encoder, bytes_tokenizer, monkeypatch):
    folders = {"wordpiece": find_base_model(EMBEDDED_MODEL).path, "words": encoder, "bytes": bytes_tokenizer}
    cutting, whole = TextEncoder(folders[kind]), TextEncoder(folders[kind])
    rng, shortened = random.Random(0), 0
    for _ in range(60):
        about, text = draw_text(rng)
        expected = whole._tokenizer.encode(text)
        found = cutting([text])[0]
        read = tokens.shorten(text, cutting._tokenizer, cutting.max_length)
        shortened += len(read) < len(text)
        last = tokens.LETTERS[-1] * cutting.max_length
        if len(read) < last:  # beyond that bound a text is cut even if its tokens are few
            assert found == expected.ids, about
    assert shortened > 10 and cutting.texts_cut >= shortened


def test_of_an_endless_text_a_bounded_part_is_tokenized(encoder):
    watched, read = TextEncoder(encoder), []

    def watch(function):
        return lambda texts: (read.append(len(texts if isinstance(texts, str) else texts[0])), function(texts))[1]

    whole = watched._tokenizer
    watched._tokenizer = SimpleNamespace(encode=watch(whole.encode), encode_batch_fast=watch(whole.encode_batch_fast))
    for text in ("s" * 20_000_000, "sky " * 5_000_000, " " * 20_000_000 + "sky"):
        watched([text])
    assert watched.texts_cut == 3 and 0 < max(read) <= tokens.LETTERS[-1] * watched.max_length


def test_a_line_without_an_end_takes_bounded_memory(capsys):
    """64 MB without a line end, then short lines, of which none is lost."""
    reading, writing = os.pipe()

    def write():
        with os.fdopen(writing, "wb") as stream:
            stream.write(b"first\n")
            for _ in range(64):
                stream.write(b"x" * 1_000_000)
            stream.write(b"\nlast\nno end")

    threading.Thread(target=write, daemon=True).start()
    tracemalloc.start()
    lines = [line for batch in predict.read_lines(reading) for line in batch]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    os.close(reading)
    assert [lines[0], *lines[2:]] == ["first", "last", "no end"]
    assert lines[1] == "x" * predict.LINE and peak < 12 * predict.LINE
    assert "line 2 is longer than 1,048,576 bytes" in capsys.readouterr().err


def test_lines_are_the_same_however_they_are_read(tmp_path, monkeypatch):
    rng = random.Random(0)
    text = "".join(rng.choices([*LETTERS, "\n"], k=3000)).encode(errors="replace") + rng.randbytes(300)
    (tmp_path / "text").write_bytes(text)
    expected = text.split(b"\n")[: None if not text.endswith(b"\n") else -1]
    for chunk in (1, 7, 1 << 14):
        monkeypatch.setattr(predict, "CHUNK", chunk)
        descriptor = os.open(tmp_path / "text", os.O_RDONLY)
        lines = [line for batch in predict.read_lines(descriptor) for line in batch]
        os.close(descriptor)
        assert lines == [line.decode(errors="replace") for line in expected]


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_are_bounded(threads, capsys):
    with pytest.raises(UserError, match="it takes 1 to"):
        choose_threads(threads)
    status, error = end_of(lambda: predict.main(["--threads", str(threads), "red"]), capsys)
    assert status == 2 and "--threads: " in error and THREADS.most < 100_000


def test_words_and_output_of_other_encodings(artifact):
    """One process for each: what Python makes of its words and streams is decided as it starts."""
    args = [sys.executable, ROOT / "scripts" / "predict.py", "--model", artifact]
    latin = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run([*args, b"the red caf\xe9", "snow \u2603"], capture_output=True, env=latin, check=True)
    first, second = done.stdout.splitlines()
    assert first.endswith(b"the red caf\\ufffd") and second.endswith(b"snow \\u2603")
    done = subprocess.run([*args, "--json", "\U0001f600 \xe9"], capture_output=True, env=latin, check=True)
    assert b'"\\ud83d\\ude00 \\u00e9"' in done.stdout  # JSON, not Python's own escapes


@pytest.mark.parametrize(
    ("closed", "status", "error"),
    [
        ("<&-", 2, "error: standard input is closed; give sentences or --file\n"),
        ("red >&-", 0, ""),
        ("red 2>&-", 0, ""),
    ],
)
def test_a_closed_stream_is_no_traceback(closed, status, error, artifact):
    command = f"{sys.executable} {ROOT}/scripts/predict.py --model {artifact} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (status, error)


def raise_(error):
    raise error


# As of torch.save on a disk that fills up
PAST_THE_END = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 14144 vs 14102")


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (lambda: raise_(UserError("two\nlines")), "two lines"),
        (lambda: raise_(UserError("x" * 10**6)), "xxx ... xxx"),
        (lambda: open("nowhere/file"), "nowhere/file: No such file or directory"),  # noqa: PTH123, SIM115
        (lambda: open("x" * 5000), "File name too long"),  # noqa: PTH123, SIM115
        (lambda: importlib.import_module("nobody_has_this"), "pip install"),
        (lambda: transformers.get_scheduler("cosine_with_min_lr", None, 1, None), "EMOTION_TRACEBACK=1"),
        (lambda: raise_(MemoryError()), "smaller batches"),
        (lambda: raise_(PAST_THE_END), "the disk is full"),
    ],
)
def test_what_a_user_can_mend_is_one_line(main, message, capsys):
    status, error = end_of(main, capsys)
    assert status == 1 and message in error and error.count("\n") == 1 and len(error) < 2100


@pytest.mark.parametrize("main", [lambda: {}["key"], lambda: importlib.import_module("emotion.x")])
def test_a_mistake_of_the_program_keeps_its_traceback(main, capsys):
    status, error = end_of(main, capsys)
    assert status == 1 and "Traceback" in error


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
    config = write_config(tmp_path, lr_scheduler_kwargs={"num_cycles": 2}, target_modules="query")
    arguments, training, _ = parse_args_and_config(run_qlora.ARGUMENTS, [config, "--model_name_or_path", "a"])
    assert training.lr_scheduler_kwargs == {"num_cycles": 2} and arguments.target_modules == ["query"]


def test_without_a_config_the_defaults_hold():
    arguments, hub, used = parse_args_and_config(run_ptq.ARGUMENTS, ["--model_name_or_path", "any"])
    assert arguments.bits == 8 and arguments.output_dir == "weights/ptq" and used.path is used.sha256 is None
    for args in ([], ["missing.yaml"], ["weights/baseline"], ["--bit", "4", "--model_name_or_path", "any"]):
        with pytest.raises(UserError, match=args[0] if args else "--model_name_or_path"):
            parse_args_and_config(run_ptq.ARGUMENTS, args)


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
    encoders, names = {path.parent.name for path in CONFIGS}, {path.stem for path in CONFIGS}
    assert encoders == {"bert-base-uncased", "minilm", "mpnet-base"} and len(CONFIGS) == 3 * len(names)


@pytest.mark.parametrize("traceback", ["", "1"])
def test_an_error_is_one_line_and_a_status(traceback, monkeypatch):
    monkeypatch.setenv("EMOTION_TRACEBACK", traceback)
    done = run_script("run_evaluation.py", "nowhere")
    *lines, last = done.stderr.splitlines()
    assert done.returncode == 1 and last.startswith("error: no folder nowhere") and not done.stdout
    assert bool(lines) == ("Traceback" in done.stderr) == bool(traceback)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short_and_begins_with_what_a_command_does(name, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, "__main__", script)  # as if it had been started
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    about, _, flags = capsys.readouterr().out.partition("\noptions:\n")
    shown = re.findall(r"^  (--\w+)", flags, flags=re.MULTILINE)
    assert f"scripts/{name}.py" in about and shown and len(shown) == len(set(shown)) <= 55  # each flag once
    assert str(ROOT) not in flags  # no default of a machine's own folders


def test_help_shows_ranges_and_the_defaults_of_the_config(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "__main__", run_qat)
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit):
        run_qat.main([str(ROOT / "configs" / "minilm" / "qat-int4.yaml"), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--per_device_train_batch_size \{1 or more\} The batch size .{0,60}default: 32", shown)
    assert re.search(r"--bits \{8,4,2\} [^-]*default: 4", shown) and "--adam_beta1" not in shown


@pytest.mark.parametrize(("terminal", "seconds"), [(False, 0), (False, 30), (True, 30)])
def test_a_log_gets_plain_lines_and_a_terminal_keeps_none(terminal, seconds, monkeypatch, capsys):
    def work(error=None):
        for _ in Bar(range(3), desc="outer"):
            for step in Bar(range(40), desc="inner"):
                if step == 20:
                    Bar.write("in the middle")
                    if error:
                        raise error

    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(command, "LINE_S", seconds)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(command, "_prepare_streams", lambda: None)
    work()
    assert capsys.readouterr().out == "in the middle\n" * 3
    shown = stream.getvalue()
    if terminal:
        assert "outer" in shown and shown.endswith(" \r")  # the last bar is wiped away
        with pytest.raises(SystemExit):
            command.run(lambda: work(UserError("no more")))
        assert stream.getvalue().endswith(" \rerror: no more\n")
    else:
        lines = shown.splitlines()
        assert bool(lines) == (seconds == 0)  # quick work leaves no line in a log
        assert all(re.match(r"(inner|outer): \d+ of (3|40), ", line) for line in lines)
