"""Model folders that other programs wrote: opened, or refused in one line before any work."""

import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import run_baseline
import run_ptq
import run_qat
import run_qlora
from conftest import SIZES, build_rows, ptq_flags, qat_flags, qlora_flags, read_json, train_flags
from emotion import EmotionClassifier
from emotion.data.tokenization import TextEncoder, load_tokenizer
from emotion.export import onnx_export
from emotion.inference import predict
from emotion.inference.model_folder import FLOAT_FILES, find_formats, load_trained_classifier
from emotion.quantization import scheme
from emotion.utils.errors import UserError
from test_architectures import build_classifier

BERT = SIZES | {"max_position_embeddings": 42}
TEXTS = ["i see the red house today", "blue", " ".join(["black gray"] * 40)]


@pytest.fixture
def folder(tmp_path):
    build_classifier(tmp_path / "float", "bert", BERT)
    return tmp_path / "float"


def edit(path, remove: tuple = (), **changes) -> None:
    kept = {name: value for name, value in read_json(path).items() if name not in remove}
    path.write_text(json.dumps(kept | changes))


def edit_tokenizer(remove: tuple = (), **changes):
    return lambda folder: edit(folder / "tokenizer_config.json", remove, **changes)


def move_the_padding_token(folder):
    edit_tokenizer(("pad_token",))(folder)
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')


def keep_the_vocabulary_alone(folder):
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def save_as_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def save_in_shards(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert not (folder / FLOAT_FILES[0]).exists() and (folder / FLOAT_FILES[1]).exists()


def add_a_pretraining_head(folder):
    tensors = load_file(folder / "model.safetensors") | {"cls.predictions.bias": torch.zeros(4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


FORMS = {
    "no limit": edit_tokenizer(("model_max_length",)),
    "a limit of 10^30": edit_tokenizer(model_max_length=10**30),
    "more tokens than positions": edit_tokenizer(model_max_length=512),
    "no padding token": edit_tokenizer(("pad_token",)),
    "padding token in another file": move_the_padding_token,
    "no tokenizer_config.json": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "vocab.txt alone": keep_the_vocabulary_alone,
    "pickle": save_as_a_pickle,
    "shards": save_in_shards,
    "pretraining head": add_a_pretraining_head,
}


@pytest.mark.parametrize("form", FORMS)
def test_what_transformers_opens_is_quantized(form, folder, colors, tmp_path):
    expected = EmotionClassifier.from_pretrained(folder, "pytorch").logits(TEXTS)
    FORMS[form](folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    flags = ptq_flags(folder, tmp_path / "ptq", dataset_name=colors, num_calibration_samples=20, max_f1_drop=100)
    run_ptq.main([*flags, "--formats", "torchao"])
    found = EmotionClassifier.from_pretrained(tmp_path / "ptq").logits(TEXTS)
    # Not of the long text: 40 tokens fill the limit before the change, 42 the positions.
    assert np.abs(found - expected)[:2].mean() < 0.1 * expected.std()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert TextEncoder(tmp_path / "ptq").max_length in {40, 42}


def test_a_sentencepiece_model_alone_is_enough(folder, colors, tmp_path):
    model, pieces = build_classifier(folder, "xlm-roberta", BERT), io.BytesIO()
    rows = build_rows(300)["text"]
    SentencePieceTrainer.train(
        sentence_iterator=iter(rows), model_writer=pieces, vocab_size=60, hard_vocab_limit=False
    )
    model.resize_token_embeddings(70)
    model.save_pretrained(folder)
    keep_the_vocabulary_alone(folder)
    (folder / "vocab.txt").unlink()
    (folder / "sentencepiece.bpe.model").write_bytes(pieces.getvalue())
    flags = ptq_flags(folder, tmp_path / "ptq", dataset_name=colors, num_calibration_samples=20, max_f1_drop=100)
    run_ptq.main([*flags, "--formats", "torchao"])
    assert TextEncoder(tmp_path / "ptq")(rows) == AutoTokenizer.from_pretrained(folder)(rows)["input_ids"]


def test_two_labels_without_names(tmp_path):
    build_classifier(tmp_path, "bert", BERT)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    assert "id2label" not in read_json(tmp_path / "config.json")
    assert EmotionClassifier.from_pretrained(tmp_path, "pytorch").labels == ["LABEL_0", "LABEL_1"]


def test_padding_and_token_types_are_those_of_the_tokenizer(tmp_path):
    build_classifier(tmp_path, "xlnet", {"d_model": 64, "n_layer": 1, "n_head": 2, "d_inner": 64})
    tokenizer, encoder = load_tokenizer(str(tmp_path), 100), TextEncoder(tmp_path)
    assert tokenizer.model_max_length == 40  # its config says -1 positions
    expected, found = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="np"), encoder.pad(encoder(TEXTS))
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(found[name], expected[name])
    mask = expected["attention_mask"]
    np.testing.assert_array_equal(found["token_type_ids"] * mask, expected["token_type_ids"] * mask)
    assert found["token_type_ids"].max() == 2
    classifier = EmotionClassifier.from_pretrained(tmp_path, "pytorch")
    together, alone = classifier.logits(TEXTS), np.concatenate([classifier.logits([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_only_an_export_of_these_weights_is_the_original(build_once, tmp_path):
    def fill(folder):
        model = build_classifier(folder, "bert", BERT)
        onnx_export.export_onnx(model, load_tokenizer(str(folder), 100), folder / "onnx" / "model.onnx")

    folder = shutil.copytree(build_once("exported", fill), tmp_path / "float")
    file = folder / "onnx" / "model.onnx"

    def is_original() -> bool:
        return scheme._has_its_logits(folder, load_trained_classifier(folder), load_tokenizer(str(folder), 100))

    assert is_original()
    shutil.copy(file, folder / "onnx" / "model_quantized.onnx")
    assert not is_original()  # it would be opened in place of the other
    file.unlink()
    assert not is_original()
    (folder / "onnx" / "model_quantized.onnx").rename(file)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert not is_original()  # of older weights


@pytest.fixture
def no_export(monkeypatch):
    def fail(*args):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(onnx_export, "_write", fail)
    monkeypatch.setattr(onnx_export, "EXPORTED", set())


def test_without_an_export_the_other_formats_are_saved(no_export, folder, colors, encoder, tmp_path, capsys):
    flags = {"dataset_name": colors, "num_calibration_samples": 20}
    reason = "BertForSequenceClassification has no ONNX file: PyTorch's exporter cannot make it"
    for bits, formats in ((8, "onnx"), (4, "onnx")):
        with pytest.raises(UserError, match=reason):
            run_ptq.main(ptq_flags(folder, tmp_path / "ptq", bits=bits, formats=formats, **flags))
    run_ptq.main(ptq_flags(folder, tmp_path / "ptq", max_f1_drop=100, **flags))
    run_qat.main(qat_flags(folder, tmp_path / "qat", max_steps=2, **flags))
    run_baseline.main(train_flags(encoder, colors, tmp_path / "baseline", max_steps=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: onnx")]
    assert len(lines) == 4 and all(reason in line for line in lines)  # of the baseline before and after the training
    for name, formats in (("ptq", ["torchao"]), ("qat", ["torchao"]), ("baseline", ["pytorch", "bf16"])):
        assert list(find_formats(tmp_path / name)) == formats


def test_what_is_too_large_is_refused(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 1000)
    model = load_trained_classifier(folder)
    with pytest.raises(UserError, match="2 GB"):
        onnx_export.export_onnx(model, load_tokenizer(str(folder), 100), tmp_path / "model.onnx")


def test_a_configuration_of_more_than_2_gb_is_refused_before_its_weights_are_read(folder, colors, tmp_path, capsys):
    edit(folder / "config.json", hidden_size=4096, num_hidden_layers=20, intermediate_size=16384)
    for method, flags in ((run_ptq, ptq_flags), (run_qat, qat_flags)):
        with pytest.raises(UserError, match="larger than 2 GB"):
            method.main(flags(folder, tmp_path / "out", dataset_name=colors, formats="onnx"))
    assert not onnx_export.check_export(str(folder), ["warm", "cold", "none"], None)
    assert "left out: onnx; BertForSequenceClassification has no ONNX file" in capsys.readouterr().out


def test_an_export_is_compared_on_real_texts_too(folder, colors):
    model, tokenizer = load_trained_classifier(folder), load_tokenizer(str(folder), 100)
    tokenizer.padding_side = "left"
    *_, short, long, single, longest = onnx_export.sample_inputs(model, tokenizer, build_rows(90)["text"])
    for inputs in (short, long, longest):
        assert inputs.keys() == {"input_ids", "attention_mask", "token_type_ids"}
        assert (inputs["attention_mask"][:, 0] == 0).any() and (inputs["attention_mask"][:, -1] == 1).all()
    assert single["input_ids"].shape[0] == 1 and longest["input_ids"].shape == (2, 40)
    assert short["input_ids"].shape[1] < long["input_ids"].shape[1]


def test_several_labels_have_a_sigmoid_each(folder):
    edit(folder / "config.json", problem_type="multi_label_classification")
    (expected,) = pipeline("text-classification", str(folder))(TEXTS[:1], top_k=None)
    (found,) = EmotionClassifier.from_pretrained(folder).classify(TEXTS[:1], top_k=None)
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-4)
    assert abs(sum(one["score"] for one in found) - 1) > 1e-3


PROBLEMS = {
    "several labels": ({"problem_type": "multi_label_classification"}, "several labels"),
    "regression": ({"problem_type": "regression"}, "regression"),
    "one logit": ({"id2label": {"0": "quality"}, "label2id": {"quality": 0}}, "regression"),
    "pairs": ({"id2label": {"0": "entailment", "1": "neutral", "2": "contradiction"}}, "two texts"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_that_are_not_trained(problem, folder, colors, tmp_path):
    changes, message = PROBLEMS[problem]
    edit(folder / "config.json", **changes)
    mains = [
        (run_qat.main, qat_flags(folder, tmp_path / "out", dataset_name=colors)),
        (run_baseline.main, train_flags(folder, colors, tmp_path / "out")),
        (run_qlora.main, qlora_flags(folder, colors, tmp_path / "out")),
    ]
    if problem != "several labels":
        mains.append((run_ptq.main, ptq_flags(folder, tmp_path / "out", dataset_name=colors)))
    for main, flags in mains:
        with pytest.raises(UserError, match=message):
            main(flags)
    if message == "regression":
        with pytest.raises(UserError):
            EmotionClassifier.from_pretrained(folder, "pytorch")
    assert not (tmp_path / "out").exists()


class Table:
    """Like a DataFrame: iterating over it gives the names of its columns."""

    columns = ["text"]

    def __iter__(self):
        return iter(self.columns)


def test_what_is_no_list_of_texts_is_refused(folder):
    classifier = EmotionClassifier.from_pretrained(folder, "pytorch")
    for texts in ({"text": ["red"]}, Table(), 7, "red"):
        with pytest.raises(TypeError, match="must be a list of strings"):
            classifier.classify(texts)
    for top_k in (True, "all", 0, 1.5):
        with pytest.raises(UserError, match="top_k"):
            classifier.classify(["red"], top_k=top_k)
    assert len(classifier.classify(["red"], top_k=np.int64(2))[0]) == 2
    with pytest.raises(UserError, match="threads '2'"):
        EmotionClassifier.from_pretrained(folder, "pytorch", threads="2")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig", "utf-8"])
def test_a_byte_order_mark_names_the_encoding(encoding, tmp_path):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    lines = [f"the violet house {row} \u00e9\U0001f600" for row in range(2000)]
    (tmp_path / "texts.txt").write_bytes((mark + "\n".join(lines)).encode(encoding))
    batches = predict.read_lines(os.open(tmp_path / "texts.txt", predict.READ_BYTES))
    assert [line for batch in batches for line in batch] == lines
