"""Training: what is saved, resumed, refused; other encoders; several processes."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainingArguments, pipeline

import predict
import run_baseline
import run_evaluation
from conftest import ENCODERS, ROOT, SHARED, a_full_disk, contents, copy_to_edit, logits_of, read_json, train_flags
from emotion.inference.model_folder import build_classifier
from emotion.utils import command
from emotion.utils.errors import UserError
from mutations import edit_config


def test_the_artifact_holds_what_it_needs_and_nothing_else(artifact):
    assert contents(artifact).keys() == SHARED | {"model.bf16.safetensors", "onnx/model.onnx"}
    assert {path.stat().st_mode & 0o777 for path in artifact.rglob("*") if path.is_file()} == {0o644}
    metadata = yaml.safe_load((artifact / "recipe.yaml").read_text())
    assert metadata["seed"] == 42 and metadata["recipe"]["learning_rate"] == 5e-3
    assert metadata["provenance"]["dataset_source"] == "folder"
    assert metadata["training"]["validation_macro_f1"] > 0.9  # the colours are learnt
    assert metadata["onnx"]["fused"] is True and metadata["onnx"]["cls_only"] is True


def test_a_stranger_opens_it_and_finds_no_path_of_this_machine(artifact, quantized):
    answer = pipeline("text-classification", model=str(artifact))("i see the orange house")
    assert answer[0]["label"] == "warm" and answer[0]["score"] > 0.5  # the dataset's names
    for path in (artifact / "onnx" / "model.onnx", quantized / "onnx" / "model_quantized.onnx"):
        content = path.read_bytes()
        assert b"site-packages" not in content and str(ROOT).encode() not in content


def test_the_three_forms_answer_alike(artifact):
    texts = ["i see a red house", "blue", "the very black sky and the white house today"]
    logits = {format: logits_of(artifact, format, texts) for format in ("pytorch", "bf16", "onnx")}
    np.testing.assert_allclose(logits["onnx"], logits["pytorch"], atol=1e-4)
    assert 0 < np.abs(logits["bf16"] - logits["pytorch"]).max() < 0.2
    weights = load_file(artifact / "model.bf16.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "bert"])
def test_other_encoders_train_evaluate_and_answer(kind, encoder_of, colors, tmp_path, capsys):
    run_baseline.main(train_flags(encoder_of(kind), colors, tmp_path / "out", attention_dropout=0.1))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    dropout = {"attention_probs_dropout_prob", "attention_dropout"} & vars(model.config).keys()
    assert [getattr(model.config, name) for name in dropout] == [0.1]
    run_evaluation.main([str(tmp_path / "out"), "--format", "onnx", "--results_dir", "results", "--latency_runs", "0"])
    assert read_json(tmp_path / "results" / "metrics" / "baseline-onnx.json")["quality"]["macro_f1"] > 0.9
    predict.main(["--model", str(tmp_path / "out"), "the blue sky"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("cold ")


def test_the_same_recipe_and_seed_give_the_same_weights(artifact, encoder, colors, tmp_path):
    folders = [artifact, tmp_path / "again", tmp_path / "other"]
    for folder, seed in zip(folders[1:], (42, 7), strict=True):
        run_baseline.main(train_flags(encoder, colors, folder, seed=seed))
    first, again, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_best_checkpoint_is_saved_whole(encoder, colors, tmp_path, monkeypatch):
    """Every weight, the LayerNorms' too, is that of the best evaluation and not of the last step."""
    constant = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    run_baseline.main(train_flags(encoder, colors, tmp_path / "one", num_train_epochs=1, **constant))
    scores = iter([0.9, 0.1, 0.2])
    monkeypatch.setattr(run_baseline, "compute_metrics", lambda _: {"macro_f1": next(scores), "accuracy": 0.0})
    run_baseline.main(train_flags(encoder, colors, tmp_path / "best", num_train_epochs=3, **constant))
    one, best = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "best"))
    assert "bert.embeddings.LayerNorm.weight" in one
    assert all(torch.equal(one[name], best[name]) for name in one)


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_each_layer_learns_slower_than_the_one_above(kind, encoder_of):
    model = build_classifier(str(encoder_of(kind)), ["warm", "cold", "none"], None)
    arguments = TrainingArguments(output_dir="unused", learning_rate=1.0, weight_decay=0.1, use_cpu=True)
    trainer = run_baseline.BaselineTrainer(0.5, recipe=None, data=None, model=model, args=arguments)
    rates = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            rates[parameter] = group["lr"]
            assert parameter.ndim > 1 or group["weight_decay"] == 0  # biases and LayerNorms
    rates = {name: rates[parameter] for name, parameter in trainer.model.named_parameters()}
    assert {rate for name, rate in rates.items() if "embeddings" in name} == {0.125}
    assert {rate for name, rate in rates.items() if "layer.0." in name} == {0.25}
    assert {rate for name, rate in rates.items() if "layer.1." in name} == {0.5}
    assert {rate for name, rate in rates.items() if "classifier" in name or "pooler" in name} == {1.0}


def test_a_disk_that_fills_leaves_the_old_artifact(artifact, encoder, colors, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(artifact, tmp_path / "baseline")
    before, save = contents(out), run_baseline.save_formats

    def save_on_a_full_disk(*args):
        with a_full_disk(20_000):
            return save(*args)

    monkeypatch.setattr(run_baseline, "save_formats", save_on_a_full_disk)
    flags = train_flags(encoder, colors, out, num_train_epochs=1)
    with pytest.raises(SystemExit, match="1"):
        command.run(lambda: run_baseline.main(flags))
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: cannot write") and "free some space" in message
    after = contents(out)
    assert before == {name: after[name] for name in before} and not list(tmp_path.glob(".baseline*"))
    monkeypatch.undo()  # the disk has space again: the training is not lost
    run_baseline.main([*flags, "--resume_from_checkpoint", "true"])
    assert yaml.safe_load((out / "recipe.yaml").read_text())["training"]["resumed"] is True


def test_a_classifier_of_other_classes_is_no_base(artifact, tmp_path):
    base = copy_to_edit(artifact, tmp_path / "two")
    edit_config(base / "config.json", id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    with pytest.raises(UserError, match="2 classes .* 3"):
        build_classifier(str(base), ["warm", "cold", "none"], None)


@pytest.mark.processes
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_launches_it(processes, encoder, colors, tmp_path):
    flags = train_flags(encoder, colors, tmp_path / "out", per_device_train_batch_size=16 // processes)
    several = ["--num_processes", "2", *["--multi_gpu"] * (processes > 1)]  # without it, there is one all the same
    config = ["--config_file", str(ROOT / "accelerate_config.yaml")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *config, *several]
    command = [*launch, str(ROOT / "scripts" / "run_baseline.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"saved {tmp_path}") == 1  # one process speaks and saves
    assert ("add --multi_gpu" in done.stdout) == (processes == 1)
    metadata = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert metadata["training"]["processes"] == processes
    assert metadata["training"]["validation_macro_f1"] > 0.9
