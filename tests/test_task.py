"""Datasets and base models that are not as they must be, and where the default ones come from."""

import datasets
import pytest

from conftest import COLORS, build_rows, color_features, save_dataset
from emotion.data import dataset
from emotion.data.dataset import conflicting_texts, fingerprint, get_split, load_task
from emotion.data.tokenization import load_tokenizer, tokenize
from emotion.utils import base_model as source
from emotion.utils.base_model import EMBEDDED_MODEL, find_base_model
from emotion.utils.errors import UserError

INTEGERS = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("int64")})
NAMED = color_features()
NUMBERS = datasets.Features({"text": datasets.Value("int64"), "label": NAMED["label"]})


def test_labels_and_rows_come_from_the_dataset(colors):
    task = load_task(str(colors))
    assert task.labels == list(COLORS)
    assert (task.name, task.source) == ("colors", "folder")
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 480, "validation": 60, "test": 90}


def test_a_folder_saved_to_disk_opens_too(tmp_path):
    rows = datasets.Dataset.from_dict(build_rows(9), features=NAMED)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    assert load_task(str(tmp_path / "saved")).labels == list(COLORS)


@pytest.mark.parametrize(
    ("columns", "features", "message"),
    [
        ({"sentence": ["a"], "label": [0]}, None, "no column 'text'"),
        ({"text": ["a"], "labels": [0]}, None, "no column 'label'"),
        ({"text": ["a", "b"], "label": ["joy", None]}, None, "train row 1: label is None"),
        ({"text": ["a", "b"], "label": ["joy", " "]}, None, "train row 1: label is ' '"),
        ({"text": ["a", "b"], "label": [1, 1]}, INTEGERS, "column 'label' has 1 classes"),
        ({"text": ["a", "b"], "label": [0.5, 1.5]}, None, "column 'label' is float64"),
        ({"text": ["a", "b"], "label": ["0.5", "1"]}, None, "column 'label' holds numbers such as 0.5"),
        ({"text": ["a", "b"], "label": [[0], [0, 1]]}, None, "column 'label' holds List and not one name"),
        ({"text": ["a", "b"], "label": [0, -1]}, NAMED, "train row 1: label -1 is outside 0..2"),
        ({"text": ["a", "b"], "label": [0, None]}, NAMED, "train row 1: label None is outside 0..2"),
        ({"text": ["a", "  "], "label": [0, 1]}, NAMED, "train row 1: text is '  '"),
        ({"text": ["a", None], "label": [0, 1]}, NAMED, "train row 1: text is None"),
        ({"text": [1, 2], "label": [0, 1]}, None, "train row 0: text is 1"),
        ({"text": [1, 2], "label": [0, 1]}, NUMBERS, "train row 0: text is 1"),
    ],
)
def test_a_wrong_dataset_is_refused(columns, features, message, tmp_path):
    save_dataset(tmp_path / "data", {"train": columns}, features)
    with pytest.raises(UserError, match=".*") as error:
        load_task(str(tmp_path / "data"))
    assert message in str(error.value)


def test_what_is_not_there_is_said(colors):
    with pytest.raises(UserError, match="no split 'dev'; it has"):
        get_split(load_task(str(colors)), "dev")
    with pytest.raises(UserError, match="no such folder or file"):
        load_task("./nowhere")
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        load_task("someone/something")
    with pytest.raises(UserError, match="no config.json there"):
        find_base_model("./nowhere")
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        find_base_model("someone/something")


def test_without_the_hub_the_embedded_model_and_then_the_sample_stand_in(monkeypatch):
    base = find_base_model(source.DEFAULT_MODEL)
    assert (base.name, base.source) == (EMBEDDED_MODEL, "package")
    sample = [copy for copy in dataset.LOCAL_COPIES if copy[0] == "sample"]
    monkeypatch.setattr(dataset, "LOCAL_COPIES", tuple(sample))
    task = load_task(dataset.DEFAULT_DATASET)
    assert task.source == "sample" and "sample" in task.name
    assert task.labels == ["sadness", "joy", "love", "anger", "fear", "surprise"]
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 360, "validation": 90, "test": 90}


def test_long_texts_are_cut_counted_and_reported(encoder, tmp_path, capsys):
    save_dataset(tmp_path / "data", {"train": {"text": ["sky " * 100, "sky"], "label": [0, 1]}}, NAMED)
    rows = load_task(str(tmp_path / "data")).splits["train"]
    tokenizer = load_tokenizer(str(encoder), max_length=16)
    assert [len(ids) for ids in tokenize(rows, tokenizer, "train")["input_ids"]] == [16, 3]
    assert "train: 1 of 2 texts are longer than 16 tokens" in capsys.readouterr().out
    assert load_tokenizer(str(encoder), max_length=1000).model_max_length == 40  # the model's positions


def test_texts_with_two_labels_are_found():
    rows = {"text": ["a", "b", "a", "c"], "label": [0, 1, 2, 1]}
    assert conflicting_texts(rows) == {"a"}
    assert conflicting_texts(rows, {"text": ["c", "b"], "label": [0, 1]}) == {"a", "c"}


def test_the_fingerprint_sees_order_text_and_label():
    prints = {
        fingerprint({"text": texts, "label": labels})
        for texts, labels in ((["a", "b"], [0, 1]), (["b", "a"], [0, 1]), (["a", "b"], [1, 0]), (["a", "c"], [0, 1]))
    }
    assert len(prints) == 4
