"""QLoRA: what is trained, what is in the folder, that every way of opening it answers alike, what is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
import yaml
from packaging.version import Version
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import qlora_study
import run_qlora
from conftest import ENCODERS, ROOT, SHARED, build_rows, contents, logits_of, qlora_flags, read_json, scheme_of
from emotion.data.tokenization import TextEncoder
from emotion.inference.model_folder import adapter_bytes, build_classifier, find_formats, load_trained_classifier
from emotion.quantization.layers import CalibrationRows
from emotion.quantization.nf4 import round_to_nf4
from emotion.utils.arguments import resolve_config
from emotion.utils.errors import UserError

LABELS = ["warm", "cold", "none"]
TEXTS = build_rows(90)["text"]


def arguments_of(**changes) -> run_qlora.QloraArguments:
    return run_qlora.QloraArguments(**{"model_name_or_path": "unused", "init_lora_weights": "default"} | changes)


def test_the_folder_opens_without_knowing_how_it_was_made(adapted):
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert contents(adapted).keys() == SHARED | adapter | {"onnx/model_quantized.onnx"}
    assert list(find_formats(adapted)) == ["nf4", "onnx"]
    metadata = yaml.safe_load((adapted / "recipe.yaml").read_text())
    assert metadata["training"]["validation_macro_f1"] > 0.9  # the colours are learnt
    assert list(metadata["merged"])[:2] == ["fp32", "nf4"]
    assert metadata["merged"]["fp32"] == pytest.approx(metadata["training"]["validation_macro_f1"], abs=1e-6)
    logits = logits_of(adapted, "nf4", TEXTS)
    (answer,) = pipeline("text-classification", model=str(adapted))(TEXTS[0])
    assert answer["label"] == LABELS[logits[0].argmax()]
    scheme = scheme_of(adapted, "nf4")
    assert (scheme["quantized_layers"], scheme["linear_layers"]) == (12, 14)
    assert scheme["weights"] == "nf4 in blocks of 64"
    assert {"bert.pooler.dense", "classifier"} <= set(scheme["kept_in_float"])


# Transformers 5.24, not 5.5, leaves weights beside NF4 in the types of the file, and cannot compute in bfloat16 then.
KEPT = pytest.mark.skipif(Version(transformers.__version__) >= Version("5.6"), reason="a limit of Transformers")


@pytest.mark.parametrize("dtype", ["auto", torch.float32, pytest.param(torch.bfloat16, marks=KEPT)])
def test_the_root_opens_in_float32_unless_told_otherwise(dtype, adapted):
    """The norms too: of tensors under a checkpoint's legacy names, Transformers keeps the type of the file."""
    model = AutoModelForSequenceClassification.from_pretrained(adapted, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    floats = {name: part.dtype for name, part in model.named_parameters() if "LayerNorm.weight" in name}
    assert floats and set(floats.values()) == {expected}
    inputs = AutoTokenizer.from_pretrained(adapted)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits
    assert logits.dtype == expected
    np.testing.assert_allclose(logits.float().numpy(), logits_of(adapted, "nf4", TEXTS), atol=0.3)


def test_the_adapter_on_its_base_answers_as_the_merged_model(adapted, encoder):
    """Both from disk. The 4-bit merged model was rounded once more, so that its logits lie a little apart."""
    config = json.loads((adapted / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == encoder.name  # the name, not a path of this machine
    config = run_qlora.nf4_config(str(encoder), LABELS, bf16=False)
    base = build_classifier(str(encoder), LABELS, None, quantization_config=config)
    model = PeftModel.from_pretrained(base, adapted / "adapter").eval()
    inputs = AutoTokenizer.from_pretrained(adapted)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.numpy()
    for format in ("nf4", "onnx"):
        found = logits_of(adapted, format, TEXTS)
        assert np.abs(found - expected).mean() < 0.5
        assert (found.argmax(axis=-1) == expected.argmax(axis=-1)).mean() > 0.95


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"lora_r": 4}, 13),  # twelve in the layers, and the pooler
        ({"target_modules": ["query", "value"]}, 4),
        ({"use_dora": True}, 13),
        ({"init_lora_weights": "gaussian"}, 13),
        ({"init_lora_weights": "loftq"}, 13),
    ],
)
def test_only_the_adapter_that_the_flags_ask_for_and_the_head_learn(changes, count, encoder):
    model = run_qlora.build_model(str(encoder), LABELS, arguments_of(**changes), bf16=False)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in learning)
    assert sum("lora_A" in name for name in learning) == count
    assert not any("original_module" in name for name in learning)


def test_the_merged_model_is_rounded_so_that_it_answers_alike(artifact):
    """Not level by level: against plain rounding, with the same scales, the logits move less."""
    config = run_qlora.nf4_config(str(artifact), LABELS, bf16=False)
    exact, plain = load_trained_classifier(artifact), load_trained_classifier(artifact, quantization_config=config)
    tokenizer, encoder = AutoTokenizer.from_pretrained(artifact), TextEncoder(artifact)
    shown = CalibrationRows(encoder, encoder(build_rows(60)["text"]))
    chosen = round_to_nf4(artifact, shown, config)
    name = "bert.encoder.layer.0.output.dense"
    states = [model.get_submodule(name).weight.quant_state for model in (plain, chosen)]
    assert torch.equal(states[0].absmax, states[1].absmax)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        wanted, *found = (model.eval()(**inputs).logits for model in (exact, plain, chosen))
    plainly, chosenly = ((logits - wanted).abs().mean() for logits in found)
    assert chosenly < 0.7 * plainly


def test_the_adapter_alone(encoder, colors, tmp_path):
    run_qlora.main(qlora_flags(encoder, colors, tmp_path / "qlora", formats="adapter", num_train_epochs=1))
    adapter = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert contents(tmp_path / "qlora").keys() == adapter | {"recipe.yaml", "SHA256SUMS"}
    assert adapter_bytes(tmp_path / "qlora") == (tmp_path / "qlora/adapter/adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "bert"])
def test_other_encoders(kind, encoder_of, colors, tmp_path):
    run_qlora.main(qlora_flags(encoder_of(kind), colors, tmp_path / "qlora"))
    formats = list(find_formats(tmp_path / "qlora"))  # a form of 16 bits where validation allows no 4
    root, onnx = (logits_of(tmp_path / "qlora", format, TEXTS) for format in (formats[0], "onnx"))
    assert root.shape == onnx.shape == (90, 3)
    assert (root.argmax(axis=-1) == onnx.argmax(axis=-1)).mean() > 0.9


def test_a_collapse_to_one_class_is_said_aloud(encoder, colors, tmp_path, capsys):
    run_qlora.main(qlora_flags(encoder, colors, tmp_path / "qlora", learning_rate=5.0, num_train_epochs=1))
    assert "WARNING: the model predicts a single class" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "qvery"}, "--target_modules qvery: .* attention.output"),
        ({"modules_to_save": "head"}, "--modules_to_save head"),
        ({"init_lora_weights": "loftq", "load_in_4bit": False}, "default for a float base"),
        ({"lora_rank": 8}, "--lora_rank.* lora_r"),
    ],
)
def test_flags_that_make_no_sense_are_refused(changes, message, encoder, colors, tmp_path):
    with pytest.raises(UserError, match=message):
        run_qlora.main(qlora_flags(encoder, colors, tmp_path / "qlora", **changes))


def test_a_machine_that_bitsandbytes_does_not_know_is_told_so(encoder, monkeypatch):
    monkeypatch.setattr("transformers.integrations.bitsandbytes.get_available_devices", lambda: ["abacus"])
    with pytest.raises(UserError, match="None of the available devices"):
        run_qlora.build_model(str(encoder), LABELS, arguments_of(), bf16=False)


@pytest.mark.processes
def test_accelerate_launches_two_processes_that_score_each_row_once(encoder, colors, adapted, tmp_path):
    config = str(ROOT / "accelerate_config.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--multi_gpu"]
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    command = [*launch, "--num_processes", "2", str(ROOT / "scripts" / "run_qlora.py")]
    command += qlora_flags(encoder, colors, tmp_path / "out", **sizes)
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    metadata = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert metadata["training"]["processes"] == 2
    assert metadata["training"]["validation_rows"] == 60  # each row once, also in the last batches
    alone = yaml.safe_load((adapted / "recipe.yaml").read_text())["training"]
    assert metadata["training"]["validation_macro_f1"] == pytest.approx(alone["validation_macro_f1"], abs=0.1)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").num_labels == 3


def test_the_sweep_scores_candidates_on_validation_and_trains_none_twice(
    encoder, colors, tmp_path, capfd, in_this_process
):
    config = {"model_name_or_path": str(encoder), "dataset_name": str(colors), "bf16": False, "disable_tqdm": True}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    flags = ["centre", "rank 8", "--seed", "42", "43"]
    flags += ["--config", "tiny.yaml", "--work_dir", "work", "--results_dir", "results"]
    qlora_study.main(flags)
    sweep = read_json(tmp_path / "results" / "qlora_sweep.json")
    assert sweep["chosen"] in {"centre", "rank 8"} and sweep["recipe"] is None  # that has LoftQ
    for one in sweep["candidates"].values():
        assert [run["seed"] for run in one["runs"]] == [42, 43]
        scores = [run["validation_macro_f1"] for run in one["runs"]]
        assert one["validation_macro_f1"]["mean"] == pytest.approx(sum(scores) / 2)
    assert sweep["candidates"]["rank 8"]["adapter_bytes"] < sweep["candidates"]["centre"]["adapter_bytes"]
    capfd.readouterr()
    qlora_study.main(flags)
    assert "saved" not in capfd.readouterr().out  # both stand


def test_a_candidate_of_one_class_never_wins_and_that_of_the_recipe_is_found():
    recipe = resolve_config(run_qlora.ARGUMENTS, [qlora_study.CONFIG]).values
    assert qlora_study.find_recipe(recipe, list(qlora_study.CANDIDATES)) == "LoftQ"
    narrow = recipe | qlora_study.CENTRE | {"target_modules": ["query", "value"]}
    assert qlora_study.find_recipe(narrow, list(qlora_study.CANDIDATES)) == "query and value only"
    scores = {"validation_macro_f1": {"mean": 0.9}, "validation_loss": {"mean": 0.2}}
    good, bad = {"predicted_classes": 3}, {"predicted_classes": 1}
    collapsed = scores | {"validation_loss": {"mean": 0.1}, "runs": [good, bad]}
    scores["runs"] = [good, good]
    assert qlora_study.choose({"good": scores, "collapsed": collapsed}) == "good"
    with pytest.raises(UserError, match="learning rates"):
        qlora_study.choose({"collapsed": collapsed})
