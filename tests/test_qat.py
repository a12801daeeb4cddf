"""Quantization-aware training, and weights below 8 bits: what was trained is what the file answers."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import TrainerState

import run_evaluation
import run_ptq
import run_qat
from conftest import ENCODERS, build_rows, logits_of, ptq_flags, qat_flags, read_json, scheme_of
from emotion.inference.model_folder import LEVELS, find_formats, load_trained_classifier, weights_of
from emotion.quantization.fake_quantizers import LowBitGroups, convert, prepare, round_all, switch, to_integers
from emotion.quantization.int8 import quantize_torchao
from emotion.quantization.layers import Layers, Plan, find_layers
from emotion.quantization.lowbit import choose_scales, round_matrix
from emotion.quantization.qat import FakeQuantizeCallback
from emotion.quantization.scheme import SchemeArguments, make_plan
from emotion.utils.base_model import read_recipe_of
from emotion.utils.errors import UserError

TEXTS = build_rows(90)["text"]


def plan_of(model, **more) -> Plan:
    return Plan(Path(), model, Layers(["0"], []), **more)


def test_what_was_trained_is_what_was_converted_and_what_reopens(trained):
    for bits, formats in ((8, ["torchao", "onnx", "openvino"]), (2, ["onnx"])):
        metadata = read_recipe_of(trained / str(bits))
        assert list(find_formats(trained / str(bits))) == formats == list(metadata["seconds"])
        forms = metadata["forms"]
        assert list(forms) == ["fake", "converted", *(f"{format}, reopened" for format in formats)]
        scores = [one["validation_macro_f1"] for one in forms.values()]
        assert max(scores) - min(scores) <= 0.001 and scores[0] > 0.95
        spread = np.abs(logits_of(trained / str(bits), formats[0], TEXTS)).mean()
        assert forms["fake"]["mean_logit_gap"] == 0 < spread
        assert forms["converted"]["mean_logit_gap"] < 1e-4 * spread  # at most a value on the edge of two integers
        assert forms["onnx, reopened"]["mean_logit_gap"] < 0.02 * spread
    forms = read_recipe_of(trained / "8")["forms"]  # trained with ONNX Runtime's ranges, so torchao's differ a little
    gaps = [forms[f"{format}, reopened"]["mean_logit_gap"] for format in ("onnx", "torchao")]
    assert gaps[0] < gaps[1] < 0.05 * spread


def test_a_model_prepared_for_torchao_answers_as_its_file(artifact, tmp_path):
    model = load_trained_classifier(artifact).eval()
    plan = Plan(artifact, model, find_layers(model))
    quantize_torchao(plan, tmp_path)
    prepare(plan, "torchao")
    reopened, token_ids = load_trained_classifier(tmp_path).eval(), torch.randint(4, 23, (8, 12))
    with torch.no_grad():
        found, expected = model(token_ids).logits, reopened(token_ids).logits
        switch(model, enabled=False)
        floats = model(token_ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (floats - expected).abs().mean() > 1e-3  # the control


@pytest.mark.parametrize("bits", [4, 2])
def test_below_8_bits_the_layer_multiplies_the_integers_of_the_file(bits):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    values, scales = torch.randn(40, 64), {"0": choose_scales(model[0].weight, bits, 32)}
    prepare(plan_of(model, scales=scales))
    fake, converted = model(values), to_integers(model)
    integers = converted[0].weight
    assert torch.equal(integers, integers.round()) and integers.abs().max() <= 64
    multipliers = scales["0"].multiplier.int().repeat_interleave(32, dim=1)
    assert set((integers / multipliers).unique().tolist()) <= set(LEVELS[bits])
    assert torch.equal(fake, converted(values))  # to the last digit
    convert(model)
    assert type(model[0]) is torch.nn.Linear


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_activations_become_the_integers_of_onnx_runtime(shift):
    values = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) + shift
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 18]>
        graph (float[20, 64] values) => (uint8[20, 64] integers, float scale, uint8 zero) {
            integers, scale, zero = DynamicQuantizeLinear(values)
        }""")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    integers, scale, zero = session.run(None, {"values": values.numpy()})
    found, worth = round_all(values)
    assert worth.item() == scale
    np.testing.assert_array_equal(found.numpy(), integers.astype(int) - int(zero))
    halves = values.bfloat16()  # what a training's activations are
    assert torch.equal(round_all(halves)[0], round_all(halves.float())[0])


@pytest.mark.parametrize(
    ("runtime", "bits", "reduce_range", "largest"),
    [("onnx", 2, True, None), ("onnx", 8, True, {64}), ("onnx", 8, False, {127}), ("torchao", 8, True, {127, 128})],
)
def test_gradients_pass_straight_through(runtime, bits, reduce_range, largest):
    model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    scales = {"0": choose_scales(model[0].weight, bits, 32)} if bits < 8 else {}
    prepare(plan_of(model, scales=scales), runtime, reduce_range)
    values = torch.randn(3, 5, 64, requires_grad=True)
    integers, scale = model[0].activation_fake_quantizer.round(values.detach())
    weights, row = model[0].weight_fake_quantizer.round(model[0].weight.detach())
    assert bits < 8 or weights.abs().max().item() in largest
    model(values).sum().backward()
    torch.testing.assert_close(values.grad, (weights * row).sum(dim=0).expand(3, 5, 64))
    torch.testing.assert_close(model[0].weight.grad, (integers * scale).sum(dim=(0, 1)).expand(8, 64))
    torch.testing.assert_close(model[0].bias.grad, torch.full((8,), 15.0))


def test_scales_lose_less_than_the_largest_weight_would_make_them():
    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    for bits in LEVELS:
        scales = choose_scales(weight, bits, 32)
        error = (round_matrix(weight, scales) - weight).square().mean()
        step = weight.unflatten(1, (2, 32)).abs().amax(dim=-1, keepdim=True) / -LEVELS[bits][0]
        plain = weight.unflatten(1, (2, 32)) / step
        nearest = torch.tensor(list(LEVELS[bits]), dtype=torch.float32)
        plain = nearest[(plain.unsqueeze(-1) - nearest).abs().argmin(dim=-1)] * step
        assert error < (plain.flatten(1) - weight).square().mean()
        again = round_matrix(round_matrix(weight, scales), scales)
        torch.testing.assert_close(again, round_matrix(weight, scales))  # what is rounded stays
        assert scales.multiplier.min() >= 1 and torch.equal(scales.multiplier, scales.multiplier.round())


@pytest.mark.parametrize("bits", [4, 2])
def test_the_file_is_packed_and_runs_in_int8(bits, artifact, tmp_path):
    out = tmp_path / "ptq"
    run_ptq.main(ptq_flags(artifact, out, bits=bits, max_f1_drop=100))  # no fallback
    scheme = scheme_of(out)
    assert (scheme["quantized_layers"], scheme["linear_layers"]) == (12, 14)
    assert scheme["weights"] == scheme["embeddings"] == f"int{bits} in groups of 32"
    assert scheme["activations"] == "int8 static per-tensor" and scheme["largest_weight"] <= 64
    assert set(scheme["kept_in_float"]) == {"bert.pooler.dense", "classifier", "bert.embeddings.token_type_embeddings"}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    onnxruntime.InferenceSession(str(weights_of(out, "onnx")), options, providers=["CPUExecutionProvider"])
    opened = onnx.load(tmp_path / "opened.onnx").graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in opened.initializer}
    products = [node for node in opened.node if node.op_type in {"MatMulIntegerToFloat", "QAttention"}]
    # Four in the first layer; in the last one queries have a product of their own, since one token alone asks.
    assert len(products) == 9 and all(constants[node.input[1]].dtype == np.int8 for node in products)
    model = load_trained_classifier(artifact)
    names = [f"bert.encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")]
    scales = [choose_scales(model.get_submodule(name).weight, bits, 32) for name in names]
    rounded = []
    for name, one in zip(names, scales, strict=True):
        rounded.append(round_matrix(model.get_submodule(name).weight, one) / one.row)
    attention = next(node for node in products if node.op_type == "QAttention")
    expected = torch.cat(rounded).round().T.detach().numpy()  # the very integers, unpacked
    np.testing.assert_array_equal(constants[attention.input[1]], expected)
    # Fewer bits are fewer bytes.
    layers, graph = find_layers(model), onnx.load(weights_of(out, "onnx")).graph
    count = sum(model.get_submodule(name).weight.numel() for name in layers.linear + layers.embeddings)
    assert sum(len(one.raw_data) for one in graph.initializer if "/codes" in one.name) == bits * count // 8


@pytest.mark.parametrize(("kind", "bits"), [(kind, bits) for kind in ENCODERS if kind != "bert" for bits in (8, 2)])
def test_other_encoders(kind, bits, baseline_of, tmp_path):
    baseline = baseline_of(kind)
    run_qat.main(qat_flags(baseline, tmp_path / "qat", bits=bits, formats="onnx", num_train_epochs=1))
    scheme = scheme_of(tmp_path / "qat")
    assert (scheme["quantized_layers"], scheme["linear_layers"]) == (12, 14) and f"int{bits}" in scheme["weights"]
    forms = read_recipe_of(tmp_path / "qat")["forms"]
    assert forms["onnx, reopened"]["validation_macro_f1"] > forms["fake"]["validation_macro_f1"] - 0.05
    labels = np.array(build_rows(90)["label"])
    folders = (baseline, tmp_path / "qat")
    before, after = ((logits_of(one, "onnx", TEXTS).argmax(axis=-1) == labels).mean() for one in folders)
    assert after > before - 0.1 > 0.6  # which weights a tiny encoder begins with depends on Transformers


def test_the_record_tells_how_it_was_made(trained, tmp_path):
    run_evaluation.main([str(trained / "2"), "--latency_runs", "0", "--results_dir", str(tmp_path)])
    record = read_json(tmp_path / "metrics" / "qat-int2-onnx.json")
    assert record["scheme"]["weights"] == "int2 in groups of 32"
    assert set(record["scheme"]["kept_in_float"].values()) == {"outside the encoder's layers"}
    metadata = record["provenance"]
    assert metadata["forms"]["fake"]["validation_macro_f1"] > 0.9 and metadata["training"]["frozen_parameters"] == 0
    assert metadata["recipe"]["freeze"] == [] and metadata["recipe"]["baseline"]["learning_rate"] == 5e-3
    assert metadata["train_rows"] == 480 and record["quality"]["macro_f1"] > 0.9


def test_the_control_is_trained_on_in_floats(artifact, tmp_path):
    run_qat.main(qat_flags(artifact, tmp_path / "control", bits=2, fake_quantize=False, num_train_epochs=1))
    metadata = read_recipe_of(tmp_path / "control")
    assert metadata["variant"] == "qat-int2-float" and list(find_formats(tmp_path / "control")) == ["onnx"]
    assert scheme_of(tmp_path / "control")["quantized_layers"] == 0
    file = logits_of(tmp_path / "control", "onnx", TEXTS)
    assert np.abs(file - logits_of(artifact, "onnx", TEXTS)).mean() > 0.01  # it has learnt on


def test_rounding_starts_when_told_and_is_always_scored(artifact):
    model = load_trained_classifier(artifact)
    prepare(make_plan(artifact, model, SchemeArguments(bits=2, activation_quantization="dynamic")))
    probe = next(part for part in model.modules() if isinstance(part, LowBitGroups))
    callback, seen = FakeQuantizeCallback(quantize_after=2), []
    for step in range(4):
        callback.on_step_begin(None, TrainerState(global_step=step), None, model=model)
        seen.append(probe.enabled)
        callback.on_step_end(None, TrainerState(global_step=step + 1), None, model=model)
        assert probe.enabled  # an evaluation may follow
    assert seen == [False, False, True, True]


def test_frozen_parts_stay_as_they_were(artifact, tmp_path):
    run_qat.main(qat_flags(artifact, tmp_path / "qat", bits=4, freeze="bert.embeddings", num_train_epochs=1))
    run_ptq.main(ptq_flags(artifact, tmp_path / "ptq", bits=4))
    metadata = read_recipe_of(tmp_path / "qat")
    table = load_trained_classifier(artifact).bert.embeddings
    assert metadata["training"]["frozen_parameters"] == sum(one.numel() for one in table.parameters())
    graphs = [onnx.load(weights_of(tmp_path / name, "onnx")).graph for name in ("qat", "ptq")]
    tables, others = ({tensor.name: tensor.raw_data for tensor in graph.initializer} for graph in graphs)
    names = [name for name in tables if name.endswith("codes0")]
    assert {name for name in names if tables[name] == others[name]} == {name for name in names if "embeddings" in name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "--bits"),
        ({"bits": 4, "formats": "torchao"}, "--formats torchao"),
        ({"bits": 4, "group_size": 24}, "--group_size 24: bert.encoder.layer.0"),
        ({"bits": 4, "group_size": 12}, "--group_size 12: "),
        ({"freeze": "roberta"}, "--freeze roberta: .* bert.embeddings"),
        ({"learning_rate": 1e30, "save_steps": 1, "eval_steps": 1}, "checkpoint-1;"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message, artifact, tmp_path):
    with pytest.raises(UserError, match=message):
        run_qat.main(qat_flags(artifact, tmp_path / "qat", **changes))
    assert not (tmp_path / "qat" / "config.json").exists()
