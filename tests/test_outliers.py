"""Rewrites of graphs, for real encoders and for one that has outliers on purpose: they change no answer."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.transformers.onnx_model import OnnxModel
from transformers import AutoTokenizer

import run_evaluation
import run_ptq
from conftest import ENCODERS, build_rows, copy_to_edit, logits_of, ptq_flags, read_json, scheme_of
from emotion.data.tokenization import TextEncoder
from emotion.export.graph_passes import FIRST, keep_cls_token, name_nodes
from emotion.export.onnx_export import export_onnx
from emotion.inference.model_folder import load_trained_classifier, weights_of
from emotion.inference.runtimes import ModelInMemory, OnnxClassifier, predict
from emotion.quantization.accuracy_aware import save_format
from emotion.quantization.fake_quantizers import prepare, to_integers
from emotion.quantization.int8 import cls_only_layers, quantize_onnx
from emotion.quantization.layers import CalibrationRows, Plan, find_layers
from emotion.quantization.lowbit import apply_gptq, multiply_inputs, round_matrix
from emotion.quantization.outlier_channels import find_outliers, split_channels, weight_without_outliers
from emotion.quantization.scheme import SchemeArguments, make_plan
from emotion.utils.base_model import read_recipe_of
from emotion.utils.errors import UserError

CONSTANT = 200.0  # the activation of one hidden unit in each layer
UNIT = 5
TEXTS = build_rows(90)["text"]


@pytest.fixture(scope="module")
def spoiled(artifact, tmp_path_factory):
    """The artifact with a unit of constant activation in each layer, whose effect the next bias takes back."""
    folder = copy_to_edit(artifact, tmp_path_factory.mktemp("outliers") / "baseline")
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
def plan_and_rows(spoiled):
    dynamic = SchemeArguments(activation_quantization="dynamic")
    plan = make_plan(spoiled, load_trained_classifier(spoiled), dynamic)
    encoder = TextEncoder(spoiled)
    return plan, CalibrationRows(encoder, encoder(TEXTS))


def logits_of_file(folder, path):
    classifier = OnnxClassifier(folder, path, threads=1)
    return predict(classifier, classifier.encode(TEXTS))


@pytest.fixture(scope="module")
def expected(spoiled):
    return logits_of(spoiled, "onnx", TEXTS)


def test_the_unit_is_found_in_each_layer_and_nothing_where_there_is_none(plan_and_rows, artifact):
    plan, rows = plan_and_rows
    outliers = find_outliers(plan, rows)
    assert set(outliers) == {f"bert.encoder.layer.{layer}.output.dense" for layer in (0, 1)}
    assert all(UNIT in units for units in outliers.values())
    sound = make_plan(artifact, load_trained_classifier(artifact), SchemeArguments(), rows)
    assert all(UNIT not in units for units in find_outliers(sound, rows).values())


def test_splitting_alone_changes_no_answer(plan_and_rows, spoiled, expected, tmp_path):
    plan, rows = plan_and_rows
    graph = onnx.load(weights_of(spoiled, "onnx"))
    name_nodes(graph.graph, plan.model)
    split_channels(graph.graph, replace(plan, outliers=find_outliers(plan, rows)))
    onnx.checker.check_model(graph)
    onnx.save(graph, tmp_path / "split.onnx")
    np.testing.assert_allclose(logits_of_file(spoiled, tmp_path / "split.onnx"), expected, atol=1e-3)


def test_the_split_gives_int8_its_labels_back(plan_and_rows, spoiled, expected, tmp_path):
    plan, rows = plan_and_rows
    gaps = []
    for name, outliers in (("plain", {}), ("split", find_outliers(plan, rows))):
        quantize_onnx(replace(plan, outliers=outliers), tmp_path / f"{name}.onnx")
        found = logits_of_file(spoiled, tmp_path / f"{name}.onnx")
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
    file = logits_of_file(spoiled, tmp_path / "onnx" / "model_quantized.onnx")
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
def test_every_format_keeps_its_labels(bits, spoiled, expected, tmp_path):
    out = tmp_path / "ptq"
    run_ptq.main(ptq_flags(spoiled, out, bits=bits, max_f1_drop=2))
    for format in ["torchao", "onnx", "openvino"] if bits == 8 else ["onnx"]:
        found = logits_of(out, format, TEXTS)
        assert (found.argmax(axis=-1) == expected.argmax(axis=-1)).mean() > 0.9, format
    scheme = scheme_of(out)
    assert (scheme["quantized_layers"], scheme["linear_layers"]) == (12, 14)  # the branches are no layers


def test_what_loses_too_much_is_refused_or_its_fallbacks_are_in_the_record(artifact, spoiled, tmp_path):
    out = tmp_path / "ptq"
    # The second has outlier channels in layers that are kept in float; with all layers in float, nothing is left.
    for baseline, bits in ((artifact, 8), (spoiled, 8), (artifact, 2)):
        with pytest.raises(UserError, match="--max_f1_drop"):
            run_ptq.main(ptq_flags(baseline, out, formats="onnx", bits=bits, max_f1_drop=-100))
        assert not out.exists()
    run_ptq.main(ptq_flags(spoiled, out, formats="onnx", max_f1_drop=-0.5, allow_drop=True))
    run_evaluation.main([str(out), "--format", "onnx", "--latency_runs", "0", "--results_dir", "results"])
    made = read_json(tmp_path / "results" / "metrics" / "ptq-onnx.json")["provenance"]
    assert [one["fallback"].split(",")[0] for one in made["fallbacks"]["onnx"]][:2] == ["plain", "channel splitting"]
    assert UNIT in made["outlier_channels"]["channels"]["bert.encoder.layer.0.output.dense"]


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


def opened(path, folder):
    """The graph that ONNX Runtime makes of a file when anyone opens it, with its own fusions."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "opened.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return OnnxModel(onnx.load(folder / "opened.onnx"))


@pytest.mark.parametrize("kind", ENCODERS)
def test_each_encoder_gets_all_rewrites(kind, baseline_of, tmp_path):
    baseline = baseline_of(kind)
    made = read_recipe_of(baseline)["onnx"]
    assert made["fused"] and made["cls_only"] and made["largest_logit_gap"] < 1e-3
    model = load_trained_classifier(baseline)
    layers = find_layers(model)
    plan = Plan(baseline, model, layers)
    # Of the six linear layers of the last layer, key and value alone see all tokens.
    assert len(cls_only_layers(plan)) == 4
    quantize_onnx(plan, tmp_path / "int8.onnx")
    for path in (weights_of(baseline, "onnx"), tmp_path / "int8.onnx"):
        # Shapes from before the rewrites would be a warning for each when anyone opens the file.
        assert not any(value.type.tensor_type.HasField("shape") for value in onnx.load(path).graph.value_info)
        graph = opened(path, tmp_path)
        kinds = {node.op_type for node in graph.nodes()}
        # The slow operator must not come back when a stranger opens the file; and no attention is left in parts.
        assert "Softmax" not in kinds and "Sub" in kinds
        # Of all norms that of the embeddings alone may be fused: no linear layer stands before it.
        assert len(graph.get_nodes_by_op_type("SkipLayerNormalization")) <= 1
        attention = [node for node in graph.nodes() if node.op_type.endswith("Attention")]
        assert len(attention) == 2
    assert {"MatMulInteger", "BiasGelu"}.isdisjoint(kinds)


@pytest.mark.parametrize(
    ("head", "first"),
    [
        ("Gather <axis = 1> (states, zero)", True),
        ("ReduceMean <keepdims = 0> (states, one)", False),  # a head that reads all tokens
    ],
)
def test_the_first_token_is_kept_only_where_the_head_reads_no_other(head, first):
    text = f"""
        <ir_version: 9, opset_import: ["" : 18]>
        graph (float[texts, tokens, 4] x) => (float[texts, 4] logits)
        <int64 zero = {{0}}, int64[1] one = {{1}}, float[4, 4] weight = {{{", ".join(map(str, range(16)))}}}>
        {{
            product = MatMul(x, weight)
            added = Add(product, x)
            states = Tanh(added)
            logits = {head}
        }}"""
    model = onnx.parser.parse_model(text)
    # A constant of the text format has one dimension; a head's index has none.
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array(0), "zero"))
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    answers = []
    for change in (False, True):
        graph = OnnxModel(model)
        if change:
            keep_cls_token(graph)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {"x": x})[0])
    np.testing.assert_array_equal(*answers)
    assert any(name.endswith(FIRST) for node in graph.nodes() for name in node.output) == first
