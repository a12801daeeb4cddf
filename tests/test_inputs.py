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

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import run_baseline
import run_ptq
import run_qat
import run_qlora
from conftest import ROOT, seeds_for
from emotion import EmotionClassifier
from emotion.data import tokenization as tokens
from emotion.data.dataset import Task, load_task
from emotion.data.tokenization import TextEncoder
from emotion.inference import predict
from emotion.utils import command
from emotion.utils.arguments import make_parser, parse_args_and_config
from emotion.utils.base_model import EMBEDDED_MODEL, find_base_model
from emotion.utils.errors import UsageError, UserError
from emotion.utils.machine import THREADS, choose_threads
from mutations_inputs import DATASETS, LETTERS, draw_config, draw_dataset, draw_flag, draw_text

LIGHT = {"predict", "demo"}  # their flags are no dataclasses, whose parser would load torch
COMMANDS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem not in LIGHT)


class Loaded(Exception):
    """The command went on to load its data."""


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def refuse(*args):
        raise Loaded

    for module in (run_baseline, run_qlora):
        monkeypatch.setattr(module, "load_training_data", refuse)
    for module in (run_ptq, run_qat):
        monkeypatch.setattr(module, "load_task_of", refuse)


def end_of(main, capsys) -> tuple[int, str]:
    """The status with which a command's process would end, and its standard error."""
    with pytest.raises(SystemExit) as end:
        command.run(main)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "flag", "value", "message"),
    [
        (run_baseline, "seed", "-1", "--seed: "),
        (run_baseline, "seed", "9" * 5000, "--seed"),
        (run_baseline, "learning_rate", "-1", "--learning_rate: "),
        (run_baseline, "learning_rate", "nan", "--learning_rate: "),
        (run_baseline, "num_train_epochs", "0", "--num_train_epochs: "),
        (run_baseline, "num_train_epochs", "inf", "--num_train_epochs: "),
        (run_baseline, "weight_decay", "-1", "--weight_decay: "),
        (run_baseline, "warmup_steps", "-0.1", "--warmup_steps: "),
        (run_baseline, "per_device_train_batch_size", "0", "--per_device_train_batch_size: "),
        (run_baseline, "per_device_eval_batch_size", "1" + "0" * 30, "1000000000"),
        (run_baseline, "max_grad_norm", "-1", "--max_grad_norm: "),
        (run_baseline, "max_seq_length", "0", "--max_seq_length: "),
        (run_baseline, "max_train_samples", "0", "--max_train_samples: "),
        (run_baseline, "attention_dropout", "-1", "--attention_dropout: "),
        (run_baseline, "layerwise_lr_decay", "0", "--layerwise_lr_decay: "),
        (run_baseline, "metric_for_best_model", "f1", "--metric_for_best_model: "),
        (run_baseline, "report_to", "nobody", "--report_to: "),
        (run_baseline, "accelerator_config", "nowhere.json", "FileNotFoundError"),
        (run_baseline, "deepspeed", "nowhere.json", ""),
        (run_baseline, "output_dir", "caf\udce9", "is not UTF-8"),
        (run_baseline, "output_dir", "a\0b", "character of value 0"),
        (run_qlora, "lora_r", "0", "--lora_r: "),
        (run_qlora, "lora_dropout", "1", "--lora_dropout: "),
        (run_qlora, "init_lora_weights", "zero", "--init_lora_weights: "),
        (run_qlora, "formats", "gguf", "--formats: "),
        (run_qat, "quantize_after", "-1", "--quantize_after: "),
        (run_qat, "model_name_or_path", "nowhere", "no folder nowhere"),
        (run_ptq, "bits", "7", "--bits: "),
        (run_ptq, "max_f1_drop", "-101", "--max_f1_drop: "),
        (run_ptq, "num_calibration_samples", "0", "--num_calibration_samples: "),
        (run_ptq, "model_name_or_path", "nowhere", "no folder nowhere"),
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
    """The dataclasses whose fields are the flags of a command."""
    module = importlib.import_module(name)
    tree = ast.parse((ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    return [vars(module)[one] for one in defined if is_dataclass(vars(module)[one]) and one.endswith("Arguments")]


@pytest.mark.parametrize("name", COMMANDS)
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
        (b"learning_rate: [1, 2]", "--learning_rate: .* list"),
        (b"learning_rate: null", "--learning_rate: .* nothing"),
        (b"learning_rate: true", "--learning_rate: .*True"),
        (b"bf16: 5", "--bf16"),
        (b"target_modules: [[1]]", "--target_modules: .* list"),
        (b"output_dir: 2026-11-26", "--output_dir: .* date"),
        (b"output_dir: no", "--output_dir: .* bool"),
        (b"output_dir: {a: 1}", "--output_dir: .* dict"),
        (b"seed: 1\nseed: 2", "line 1: 'seed' is there 2 times"),
        (b"lr_scheduler_kwargs: {a: 1, a: 2}", "'a' is there 2 times"),
        (b"1: 2", "'1'"),
        (b"help: x", "'help'"),
        (b"no_bf16: true", "'no_bf16'"),
        (b"seed: caf\xe9", "not valid YAML"),
        (b"a: &a [*a]", "aliases"),
        (b"seed: !!python/object/apply:os.getpid []", "tags"),
        (b"seed: " + b"[" * 5_000, "not valid YAML"),
        (b"#" * 100_001, "100,001 bytes"),
        (b"per_model: {a: {seed: 1}}", "'per_model'"),
    ],
)
def test_a_config_that_is_none_is_refused(content, message, encoder, tmp_path):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        parse_args_and_config(run_qlora.ARGUMENTS, ["config.yaml", "--model_name_or_path", "a", "--output_dir", "out"])
    assert re.search(message, str(error.value)) and len(str(error.value).splitlines()) == 1


def test_a_config_may_write_out_a_mapping(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "lr_scheduler_kwargs: {num_cycles: 2}\noutput_dir: out\ntarget_modules: query"
    )
    arguments, training, _ = parse_args_and_config(run_qlora.ARGUMENTS, ["config.yaml", "--model_name_or_path", "a"])
    assert training.lr_scheduler_kwargs == {"num_cycles": 2} and arguments.target_modules == ["query"]


# Valid datasets
GOOD = {
    "good",
    "text of a megabyte",
    "text of one long word",
    "text of zero characters",
    "one row each",
    "100 classes",
}
GOOD |= {"no train", "no validation", "no test", "classes without letters", "classes of two lines"}
# By chance, or the library's own choice
EITHER = {"Parquet with flipped bits", "program", "card of other columns", "saved to disk"}


def opens(folder, kind: str) -> bool:
    """Whether a dataset opens, and not as an error of several lines."""
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
        read = tokens.shorten(text, cutting._tokenizer, cutting._max_length)
        shortened += len(read) < len(text)
        last = tokens.LETTERS[-1] * cutting._max_length
        if len(read) < last:  # beyond that bound a text is cut even if its tokens are few
            assert found == expected.ids, about
    assert shortened > 10 and cutting.texts_cut >= shortened


def test_of_an_endless_text_a_bounded_part_is_tokenised(encoder):
    read = []

    class Watched(TextEncoder):
        def __init__(self, folder):
            super().__init__(folder)
            tokenizer, self._tokenizer = self._tokenizer, self
            self.encode, self.encode_batch_fast = self.watch(tokenizer.encode), self.watch(tokenizer.encode_batch_fast)

        def watch(self, function):
            return lambda texts: (read.append(len(texts if isinstance(texts, str) else texts[0])), function(texts))[1]

    watched = Watched(encoder)
    for text in ("s" * 20_000_000, "sky " * 5_000_000, " " * 20_000_000 + "sky"):
        watched([text])
    assert watched.texts_cut == 3
    assert max(read) <= tokens.LETTERS[-1] * watched._max_length
    assert read[-3:] != [20_000_000] * 3


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


def write_past_the_end():
    """As torch.save on a disk that fills up."""
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 14144 vs 14102")


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (lambda: (_ for _ in ()).throw(UserError("two\nlines")), "two lines"),
        (lambda: (_ for _ in ()).throw(UserError("x" * 10**6)), "xxx ... xxx"),
        (lambda: open("nowhere/file"), "nowhere/file: No such file or directory"),  # noqa: PTH123, SIM115
        (lambda: open("/"), "/: Is a directory"),  # noqa: PTH123, SIM115
        (lambda: open("x" * 5000), "File name too long"),  # noqa: PTH123, SIM115
        (lambda: importlib.import_module("nobody_has_this"), "pip install -r requirements.txt installs it"),
        (lambda: transformers.get_scheduler("cosine_with_min_lr", None, 1, None), "EMOTION_TRACEBACK=1 shows where"),
        (lambda: raise_(MemoryError()), "take smaller batches"),
        (write_past_the_end, "the disk is full"),
    ],
)
def test_what_a_user_can_mend_is_one_line(main, message, capsys):
    status, error = end_of(main, capsys)
    assert status == 1 and message in error and error.count("\n") == 1 and len(error) < 2100


@pytest.mark.parametrize(
    "main",
    [
        lambda: {}["key"],
        lambda: int("x"),
        lambda: [][1],
        lambda: None.name,
        lambda: importlib.import_module("emotion.x"),
    ],
)
def test_a_mistake_of_the_program_keeps_its_traceback(main, capsys):
    status, error = end_of(main, capsys)
    assert status == 1 and "Traceback" in error


def test_the_boundary_prints_into_any_stream(monkeypatch):
    for encoding in ("ascii", "latin-1", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        command.run(lambda: print("\u2603 caf\udce9"))
        stream.flush()
        assert stream.buffer.getvalue().endswith(b"caf\\udce9\n")
