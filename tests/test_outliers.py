"""Outliers: an encoder that has them on purpose keeps its labels in every format, and the split changes no answer."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoTokenizer

import run_evaluation
import run_ptq
from conftest import build_rows, copy_to_edit, read_json
from emotion.data.tokenization import TextEncoder
from emotion.evaluation.inspection import describe_scheme
from emotion.export.graph_passes import name_nodes
from emotion.export.onnx_export import export_onnx
from emotion.inference.model_folder import load_trained_classifier, weights_of
from emotion.inference.runtimes import ModelInMemory, OnnxClassifier, open_artifact, predict
from emotion.quantization.accuracy_aware import save_format
from emotion.quantization.fake_quantizers import prepare, to_integers
from emotion.quantization.int8 import quantize_onnx
from emotion.quantization.layers import CalibrationRows
from emotion.quantization.lowbit import apply_gptq, multiply_inputs, round_matrix
from emotion.quantization.outlier_channels import find_outliers, find_pairs, split_channels, weight_without_outliers
from emotion.quantization.scheme import SchemeArguments, make_plan
from emotion.utils.errors import UserError

CONSTANT = 200.0  # the activation of one hidden unit in each layer
UNIT = 5
TEXTS = build_rows(90)["text"]


def make_outliers(artifact, folder):
    """The artifact with a unit of constant activation in each layer, whose effect the next bias takes back."""
    copy_to_edit(artifact, folder)
    model = load_trained_classifier(artifact)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight[UNIT] = 0
            layer.intermediate.dense.bias[UNIT] = CONSTANT
            layer.output.dense.bias -= CONSTANT * layer.output.dense.weight[:, UNIT]
    model.save_pretrained(folder)
    export_onnx(model, AutoTokenizer.from_pretrained(artifact), folder / "onnx" / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def spoiled(artifact, tmp_path_factory):
    return make_outliers(artifact, tmp_path_factory.mktemp("outliers") / "baseline")


@pytest.fixture(scope="module")
def plan_and_rows(spoiled):
    dynamic = SchemeArguments(activation_quantization="dynamic")
    plan = make_plan(spoiled, load_trained_classifier(spoiled), dynamic)
    encoder = TextEncoder(spoiled)
    return plan, CalibrationRows(encoder, encoder(TEXTS))


def logits_of(folder, path):
    classifier = OnnxClassifier(folder, path, threads=1)
    return predict(classifier, classifier.encode(TEXTS))


def test_the_unit_is_found_in_each_layer_and_nothing_where_there_is_none(plan_and_rows, artifact):
    plan, rows = plan_and_rows
    outliers = find_outliers(plan, rows)
    assert set(outliers) == {f"bert.encoder.layer.{layer}.output.dense" for layer in (0, 1)}
    assert all(UNIT in units for units in outliers.values())
    sound = make_plan(artifact, load_trained_classifier(artifact), SchemeArguments(), rows)
    assert all(UNIT not in units for units in find_outliers(sound, rows).values())


def test_pairs_are_found_by_their_shape(plan_and_rows):
    plan, _ = plan_and_rows
    assert find_pairs(plan.model, plan.layers.linear) == {
        f"bert.encoder.layer.{layer}.output.dense": f"bert.encoder.layer.{layer}.intermediate.dense"
        for layer in (0, 1)
    }


def test_splitting_alone_changes_no_answer(plan_and_rows, spoiled, tmp_path):
    plan, rows = plan_and_rows
    graph = onnx.load(weights_of(spoiled, "onnx"))
    name_nodes(graph.graph, plan.model)
    split_channels(graph.graph, replace(plan, outliers=find_outliers(plan, rows)))
    onnx.checker.check_model(graph)
    onnx.save(graph, tmp_path / "split.onnx")
    before, after = logits_of(spoiled, weights_of(spoiled, "onnx")), logits_of(spoiled, tmp_path / "split.onnx")
    np.testing.assert_allclose(after, before, atol=1e-3)


def test_the_split_gives_int8_its_labels_back(plan_and_rows, spoiled, tmp_path):
    plan, rows = plan_and_rows
    expected = logits_of(spoiled, weights_of(spoiled, "onnx"))
    gaps = []
    for name, outliers in (("plain", {}), ("split", find_outliers(plan, rows))):
        quantize_onnx(replace(plan, outliers=outliers), tmp_path / f"{name}.onnx")
        found = logits_of(spoiled, tmp_path / f"{name}.onnx")
        gaps.append(np.abs(found - expected).mean())
    assert gaps[1] < gaps[0] / 3  # the cure is needed, and it works
    assert (found.argmax(axis=-1) == expected.argmax(axis=-1)).mean() > 0.95


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_training_rounds_as_the_file_with_the_same_units_in_floats(bits, spoiled, plan_and_rows, tmp_path):
    _, rows = plan_and_rows
    arguments = SchemeArguments(bits=bits, split_outliers=True)
    plan = make_plan(spoiled, load_trained_classifier(spoiled).eval(), arguments, rows)
    assert plan.outliers
    save_format(plan, tmp_path, "onnx", rows, arguments)
    file = logits_of(spoiled, tmp_path / "onnx" / "model_quantized.onnx")
    prepare(plan)
    fake = predict(ModelInMemory(plan.model, rows.encoder), rows.token_ids)
    integers = predict(ModelInMemory(to_integers(plan.model), rows.encoder), rows.token_ids)
    np.testing.assert_allclose(integers, fake, atol=1e-4 * np.abs(fake).mean())
    assert np.abs(file - fake).mean() < 0.02 * np.abs(fake).mean()
    # The control: without the split, the training would learn another model than that of the file.
    whole = make_plan(spoiled, load_trained_classifier(spoiled).eval(), SchemeArguments(bits=bits), rows)
    prepare(whole)
    plain = predict(ModelInMemory(whole.model, rows.encoder), rows.token_ids)
    assert np.abs(file - plain).mean() > 5 * np.abs(file - fake).mean()


def test_both_products_of_a_pair_learn_their_units(spoiled, plan_and_rows):
    _, rows = plan_and_rows
    plan = make_plan(spoiled, load_trained_classifier(spoiled).eval(), SchemeArguments(split_outliers=True), rows)
    prepare(plan)
    inputs = {name: torch.from_numpy(array) for name, array in rows.encoder.pad(rows.token_ids[:8]).items()}
    plan.model(**inputs).logits[:, 0].sum().backward()
    exact = load_trained_classifier(spoiled).eval()
    exact(**inputs).logits[:, 0].sum().backward()
    for name, units in (("intermediate.dense", (UNIT,)), ("output.dense", (slice(None), UNIT))):
        name = f"bert.encoder.layer.0.{name}"
        found, wanted = (model.get_submodule(name).weight.grad[units] for model in (plan.model, exact))
        assert (found - wanted).norm() < 0.2 * wanted.norm() and wanted.norm() > 0


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_format_keeps_its_labels(bits, spoiled, tmp_path):
    out = tmp_path / "ptq"
    words = ["--model_name_or_path", str(spoiled), "--output_dir", str(out), "--num_calibration_samples", "60"]
    run_ptq.main([*words, "--bits", str(bits), "--max_f1_drop", "2"])
    expected = logits_of(spoiled, weights_of(spoiled, "onnx")).argmax(axis=-1)
    for format in ["torchao", "onnx", "openvino"] if bits == 8 else ["onnx"]:
        classifier = open_artifact(out, format, threads=1)
        assert (predict(classifier, classifier.encode(TEXTS)).argmax(axis=-1) == expected).mean() > 0.9, format
    scheme = describe_scheme(open_artifact(out, "onnx", threads=1), weights_of(out, "onnx"), "onnx")
    assert (scheme["quantized_layers"], scheme["linear_layers"]) == (12, 14)  # the branches are no layers


def test_the_remedy_is_in_the_record(spoiled, tmp_path, capsys):
    out = tmp_path / "ptq"
    run_ptq.main(
        [
            "--model_name_or_path",
            str(spoiled),
            "--output_dir",
            str(out),
            "--formats",
            "onnx",
            "--max_f1_drop",
            "-0.5",
            "--allow_drop",
            "true",
        ]
    )
    assert "onnx, plain: validation macro F1" in capsys.readouterr().out
    run_evaluation.main([str(out), "--format", "onnx", "--latency_runs", "0", "--results_dir", "results"])
    made = read_json(tmp_path / "results" / "metrics" / "ptq-onnx.json")["provenance"]
    assert [one["fallback"].split(",")[0] for one in made["fallbacks"]["onnx"]] == ["plain", "channel splitting"]
    assert (
        UNIT in made["outlier_channels"]["channels"]["bert.encoder.layer.0.output.dense"]
        and "percentile" in made["outlier_channels"]["rule"]
    )


def test_what_loses_too_much_is_not_saved(artifact, tmp_path):
    words = ["--model_name_or_path", str(artifact), "--output_dir", str(tmp_path / "ptq"), "--formats", "onnx"]
    with pytest.raises(UserError, match="points of validation macro F1 at best, more than --max_f1_drop -100"):
        run_ptq.main([*words, "--max_f1_drop", "-100", "--num_calibration_samples", "30"])
    assert not (tmp_path / "ptq").exists()


def test_rounding_by_outputs_keeps_them_and_leaves_outlier_units_alone(spoiled, plan_and_rows):
    _, rows = plan_and_rows
    plan = make_plan(spoiled, load_trained_classifier(spoiled), SchemeArguments(bits=2, split_outliers=True), rows)
    better = apply_gptq(plan, rows)
    products = multiply_inputs(plan.model, plan.layers.linear, rows)
    for name in plan.layers.linear:
        weight, units = weight_without_outliers(plan, name), plan.outliers.get(name, [])
        products[name][units], products[name][:, units] = 0, 0
        errors = []
        for one in (plan, better):  # squared errors of the outputs, summed over all word pieces
            gap = round_matrix(weight_without_outliers(one, name), plan.scales[name]) - weight
            errors.append(((gap @ products[name]) * gap).sum().item())
        assert errors[1] < errors[0], name
