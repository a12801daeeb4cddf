"""Datasets as people have them: files and columns of many kinds, labels by name, texts without labels."""

import json
import os
import shutil
import socket
import ssl
import sys
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub.utils import get_session
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import run_baseline
import run_evaluation
import run_ptq
import run_qat
import run_qlora
from conftest import (
    COLORS,
    as_flags,
    build_rows,
    color_features,
    ptq_flags,
    qat_flags,
    read_json,
    run_script,
    save_dataset,
    train_flags,
)
from emotion.data.dataset import DEFAULT_DATASET, load_task, with_validation
from emotion.data.metrics import score
from emotion.inference.emotion_classifier import EmotionClassifier
from emotion.inference.model_folder import load_trained_classifier
from emotion.quantization import accuracy_aware
from emotion.quantization.scheme import save_float_onnx
from emotion.training.trainer import balanced_loss
from emotion.utils import command, hub_requests
from emotion.utils.errors import UserError

CSV = "text,label\n"
WORDS = [("red", "warm"), ("blue", "cold")]


def rows_of(task, split: str = "train") -> list[tuple[str, str]]:
    rows = task.splits[split]
    return [(text, task.labels[label]) for text, label in zip(rows["text"], rows["label"], strict=True)]


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", "text,label\nred,warm\nblue,cold\n", WORDS),
        ("a.tsv", "text\tlabel\nred\twarm\nblue\tcold\n", WORDS),
        ("a.jsonl", '{"text": "red", "label": "warm"}\n{"text": "blue", "label": "cold"}\n', WORDS),
        ("A.CSV", "\ufefftext,label\r\nred,warm\r\nblue,cold\r\n", WORDS),
        ("a.json", '\ufeff{"text": "red", "label": "warm"}\r\n{"text": "blue", "label": "cold"}\r\n', WORDS),
        ("a.csv", 'id,text,label\n1,"red\r\n""a""",warm\n2,"a, b",cold\n', [('red\r\n"a"', "warm"), ("a, b", "cold")]),
        ("a.csv", "text,label\nnull,NA\nNA,null\n2024,None\n", [("null", "NA"), ("NA", "null"), ("2024", "None")]),
        ("a.csv", "text,label\na,10\nb,9\nc,9\n", [("a", "10"), ("b", "9"), ("c", "9")]),
        ("a.jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": false}', [("a", "true"), ("b", "false")]),
    ],
)  # fmt: skip
def test_a_file_of_any_kind_is_read_as_it_is(name, content, rows, tmp_path):
    for path in (tmp_path / name, tmp_path / "folder" / name.lower()):  # a folder of one file is a dataset, too
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="")
        task = load_task(str(path if path.parent == tmp_path else path.parent))
        assert rows_of(task) == rows
        names = {label for _, label in rows}
        assert task.labels == sorted(names, key=int if "9" in names else str)


def test_parquet_and_columns_of_other_names_are_read(tmp_path):
    columns = {"text": ["x", "y"], "sentence": ["red", "blue"], "mood": ["warm", "cold"]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "a.parquet")
    task = load_task(str(tmp_path / "a.parquet"), None, "sentence", "mood")
    assert rows_of(task) == WORDS and task.name == "a.parquet"
    for kind in ("text", "label"):
        with pytest.raises(UserError, match=f"no column 'x' .*--{kind}_column_name"):
            load_task(
                str(tmp_path / "a.parquet"),
                None,
                **{"text_column": "sentence", "label_column": "mood"} | {f"{kind}_column": "x"},
            )


@pytest.mark.parametrize("labels", [("warm", "cold"), ("0", "1")])
def test_the_names_of_a_card_beside_the_files_are_kept(labels, tmp_path):
    (tmp_path / "train.csv").write_text(f"text,label\nred,{labels[0]}\nblue,{labels[1]}\n")
    features = (
        "  - {name: text, dtype: string}\n  - name: label\n    dtype: {class_label: {names: {'0': warm, '1': cold}}}\n"
    )
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  features:\n{features}---\n")
    task = load_task(str(tmp_path))
    assert rows_of(task) == WORDS and task.labels == ["warm", "cold"]


def test_a_split_whose_labels_are_hidden_is_left_out(tmp_path, capsys):
    rows = build_rows(9)
    save_dataset(tmp_path, {"train": rows, "test": rows | {"label": [-1] * 9}}, color_features())
    assert load_task(str(tmp_path)).splits.keys() == {"train"} and "test is left out" in capsys.readouterr().out


def test_names_are_those_of_all_splits_and_what_a_split_lacks_is_said(tmp_path, capsys):
    (tmp_path / "train.csv").write_text(CSV + "red,warm\nblue,cold\nblack,none\n")
    (tmp_path / "test.csv").write_text(CSV + "red,warm\nblack,none\n")
    task = load_task(str(tmp_path))
    assert task.labels == ["cold", "none", "warm"] and rows_of(task, "test") == [("red", "warm"), ("black", "none")]
    assert "test has no row of 1 classes (cold)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CSV + "red,warm\n,cold\n", "train row 1: text is ''"),
        (CSV + "red,warm\nblue\n", "train row 1: label is ''"),
        (CSV + "red,0.5\nblue,1\n", "numbers such as 0.5"),
        ("sentence,label\nred,warm\n", "no column 'text'"),
        ("text\nred\n", "no column 'label'"),
    ],
)
def test_what_cannot_be_used_is_named(content, message, tmp_path):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError) as error:
        load_task(str(tmp_path / "a.csv"))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.csv", "a.xlsx"])
def test_a_file_that_is_none_is_refused_before_the_hub_is_asked(name, tmp_path):
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(UserError, match="no such folder or file|unknown kind"):
        load_task(name)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text(CSV + "red,warm\nblue,cold\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/dev/null/datasets")
    with pytest.raises(UserError, match="^/dev/null/.* HF_HOME names another place"):
        load_task(str(tmp_path / "a.csv"))


def test_without_validation_a_stratified_tenth_of_train_is_held_out(tmp_path, capsys):
    lines = [f"text {row},{'rare' if row % 20 == 0 else 'common'}\n" for row in range(400)]
    (tmp_path / "train.csv").write_text(CSV + "".join(lines))
    tasks = [with_validation(load_task(str(tmp_path / "train.csv"))) for _ in range(2)]
    assert "a stratified tenth of train, 40 rows" in capsys.readouterr().out
    held_out, kept = rows_of(tasks[0], "validation"), rows_of(tasks[0])
    assert sum(label == "rare" for _, label in held_out) == 2 and sorted(held_out + kept) == sorted(
        rows_of(load_task(str(tmp_path / "train.csv")))
    )
    assert rows_of(tasks[1], "validation") == held_out  # every command holds out the same rows
    (tmp_path / "few.csv").write_text(CSV + "red,warm\nblue,cold\nsky,cold\n")
    with pytest.raises(UserError, match="no validation split"):
        with_validation(load_task(str(tmp_path / "few.csv")))


# A model and a dataset

ORDER = ["cold", "none", "warm"]  # of the permuted model; the dataset has warm, cold, none
TEXTS = {"i see the red house": "warm", "blue": "cold", "the sky is black": "none"}


@pytest.fixture(scope="session")
def permuted(artifact, build_once):
    """The tiny baseline as another program would save it, its classes in another order."""

    def fill(folder):
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(artifact / name, folder / name)
        weights = load_file(artifact / "model.safetensors")
        rows = torch.tensor([list(COLORS).index(name) for name in ORDER])
        for name in ("classifier.weight", "classifier.bias"):
            weights[name] = weights[name][rows].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        name_labels(folder, ORDER, read_json(artifact / "config.json"))
        save_float_onnx(load_trained_classifier(folder), folder, AutoTokenizer.from_pretrained(folder))

    return build_once("permuted", fill)


def name_labels(folder, names, config=None):
    config = config or read_json(folder / "config.json")
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))


def answers_right(folder) -> None:
    classifier = EmotionClassifier.from_pretrained(folder)
    assert classifier.labels == ORDER
    assert [one["label"] for one in classifier.classify(list(TEXTS))] == list(TEXTS.values())


SHORT = {"max_steps": 1, "learning_rate": 1e-7, "logging_strategy": "no", "save_strategy": "no"}
SHORT |= {"load_best_model_at_end": False}


def flags_of(main, model, data, out, **more) -> list[str]:
    if main is run_evaluation:
        return [str(model), *as_flags(dataset_name=data, results_dir=out, latency_runs=0, **more)]
    if main is run_ptq:
        return ptq_flags(model, out, dataset_name=data, formats="onnx", **more)
    if main is run_qat:
        return qat_flags(model, out, dataset_name=data, formats="onnx", **(SHORT | more))
    more |= {"formats": "nf4"} if main is run_qlora else {}  # the others are exported
    return train_flags(model, data, out, **(SHORT | more))


COMMANDS = [run_ptq, run_qat, run_baseline, run_qlora, run_evaluation]


@pytest.mark.parametrize("main", COMMANDS)
def test_labels_are_matched_by_name(main, permuted, colors, tmp_path, monkeypatch):
    references = []

    def compare(before, after, labels, *options):
        references.append(score(before, labels)["macro_f1"])
        return compared(before, after, labels, *options)

    compared = accuracy_aware.compare
    monkeypatch.setattr(accuracy_aware, "compare", compare)
    more = {"class_weights": "balanced"} if main in (run_baseline, run_qat) else {}
    main.main(flags_of(main, permuted, colors, tmp_path / "out", **more))
    if main is run_evaluation:
        (path,) = (tmp_path / "out" / "metrics").glob("*.json")
        quality = read_json(path)["quality"]
        assert quality["macro_f1"] > 0.95 and quality["labels"] == ORDER
        return
    answers_right(tmp_path / "out")
    if main is run_ptq:
        assert min(references) > 0.95
    made = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert made["recipe"]["dataset_name"] == str(colors)
    run_evaluation.main([str(tmp_path / "out"), *as_flags(results_dir="again", latency_runs=0)])  # on that dataset


@pytest.mark.parametrize("main", COMMANDS)
@pytest.mark.parametrize("names", [["sadness", "joy", "love", "anger"], ["warm", "cold", "grey"], ["0", "1", "2"]])
def test_other_labels_are_refused_before_any_work(main, names, permuted, tmp_path):
    lines = [f"text {row},{names[row % len(names)]}\n" for row in range(60)]
    for split in ("train", "validation", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.csv").write_text(CSV + "".join(lines))
    with pytest.raises(UserError) as error:
        main.main(flags_of(main, permuted, tmp_path / "data", tmp_path / "out"))
    assert "3 labels (cold, none, warm)" in str(error.value) and ", ".join(sorted(names)) in str(error.value)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".safetensors", ".onnx")]


def test_letter_case_is_no_difference_and_default_names_fit_integers_alone(permuted, colors, tmp_path):
    folder = shutil.copytree(permuted, tmp_path / "model")
    rows = build_rows(90)
    name_labels(folder, [name.upper() for name in ORDER])
    run_evaluation.main(flags_of(run_evaluation, folder, colors, tmp_path / "upper"))
    name_labels(folder, ["LABEL_0", "LABEL_1", "LABEL_2"])
    with pytest.raises(UserError, match=r"LABEL_0, LABEL_1, LABEL_2.*warm, cold, none"):
        run_evaluation.main(flags_of(run_evaluation, folder, colors, tmp_path / "default"))
    rows["label"] = [ORDER.index(list(COLORS)[label]) for label in rows["label"]]
    save_dataset(tmp_path / "integers", {"test": rows})
    run_evaluation.main(flags_of(run_evaluation, folder, tmp_path / "integers", tmp_path / "default"))
    for out in ("upper", "default"):
        assert read_json(tmp_path / out / "metrics" / "model-pytorch.json")["quality"]["macro_f1"] > 0.95


@pytest.mark.parametrize("main", [run_ptq, run_qat, run_evaluation])
def test_a_strangers_model_needs_a_dataset_name(main, permuted, tmp_path):
    flags = {run_ptq: ptq_flags, run_qat: qat_flags}.get(
        main, lambda model, out: [str(model), "--results_dir", str(out)]
    )
    with pytest.raises(UserError, match=r"cold, none, warm.* --dataset_name"):
        main.main(flags(permuted, tmp_path / "out"))


@pytest.mark.parametrize("name", ["texts.txt", "texts.csv"])
def test_texts_alone_calibrate_and_are_compared_with_fp32(name, permuted, tmp_path, capsys):
    texts = build_rows(300)["text"]
    (tmp_path / name).write_text("\n".join(["\ufefftext"] * (name[-3:] == "csv") + texts) + "\n\n")
    run_ptq.main(flags_of(run_ptq, permuted, name, tmp_path / "out"))
    out = capsys.readouterr().out
    assert "60 rows calibrate, 240 others are compared" in out and "% agree with FP32" in out
    answers_right(tmp_path / "out")
    made = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    (attempt,) = made["fallbacks"]["onnx"]
    assert attempt["rows"] == 240 and attempt["flips"] <= 2 and 0 < attempt["mean_probability_change"] < 0.05
    assert (made["recipe"]["dataset_name"], made["provenance"]["calibration_dataset"]) == (name, name)
    for main in (run_evaluation, run_qat):  # these need labels
        with pytest.raises(UserError, match="no column 'label'"):
            main.main(flags_of(main, permuted, name, tmp_path / "no"))


def test_classes_of_unequal_size_weigh_the_same():
    rows, task = Dataset.from_dict({"label": [0] * 200 + [1]}), SimpleNamespace(labels=["common", "rare"])
    loss, logits = balanced_loss(SimpleNamespace(rows=rows, task=task), 0.0), torch.zeros(201, 2, requires_grad=True)
    labels = torch.tensor(rows["label"])
    halves = [loss({"logits": logits[half]}, labels[half], 201) for half in (slice(0, 100), slice(100, 201))]
    for whole in (loss({"logits": logits}, labels), sum(halves)):
        assert torch.allclose(whole, torch.tensor(2.0).log())
    whole.backward()
    assert torch.allclose(logits.grad[:200, 0].sum(), logits.grad[200, 1])


# The Hub


httpx = sys.modules[type(get_session()).__module__.split(".")[0]]  # of huggingface_hub: httpx, or httpx2 since 2.4
NO_NETWORK = httpx.ConnectError("[Errno -2] Name or service not known"), socket.gaierror()
CERTIFICATE = httpx.ConnectError("self-signed certificate"), ssl.SSLCertVerificationError()
REFUSED, SCHEME = httpx.ProxyError("403 Forbidden"), httpx.UnsupportedProtocol("no http://")


@pytest.mark.parametrize(
    ("endpoint", "error", "cause", "refused"),
    [
        (None, *NO_NETWORK, False),
        (None, httpx.ConnectTimeout("timed out"), None, False),
        (None, *CERTIFICATE, True),
        (None, REFUSED, None, True),
        ("https://mirror.example", *NO_NETWORK, True),
        ("localhost:1", SCHEME, None, True),
    ],
)
def test_only_no_network_at_all_is_no_error(endpoint, error, cause, refused, monkeypatch):
    def head(*args, **options):
        raise error from cause

    monkeypatch.setenv("HF_ENDPOINT", endpoint or "")
    if not endpoint:
        monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setattr(hub_requests, "get_session", lambda: SimpleNamespace(head=head))
    if refused:
        with pytest.raises(UserError, match=rf"no useful answer of .* \({type(error).__name__}: "):
            hub_requests.check_endpoint()
    else:
        assert not hub_requests.check_endpoint()


def test_a_local_copy_is_said_first_and_last(monkeypatch, capsys):
    monkeypatch.setattr(command, "LAST_LINES", [])
    with pytest.raises(SystemExit) as end:
        command.run(lambda: (load_task(DEFAULT_DATASET), print("work", file=sys.stderr), sys.exit(0)))
    assert end.value.code == 0
    command.run(lambda: None)
    first, work, last = capsys.readouterr().err.splitlines()
    assert first == last and "without the Hub" in first and work == "work"


def test_an_endpoint_that_is_no_address_is_one_line():
    environment = os.environ | {"HF_ENDPOINT": "https://[bad"}
    done = run_script("run_ptq.py", env=environment)
    assert done.returncode == 1 and done.stderr.startswith("error: HF_ENDPOINT https://[bad: ")
    assert len(done.stderr.splitlines()) == 1
