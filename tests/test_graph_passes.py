"""The rewrites of ONNX graphs: what they do to real encoders, and where they keep their hands off."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.transformers.onnx_model import OnnxModel

from conftest import ENCODERS
from emotion.export.graph_passes import FIRST, keep_cls_token, write_sums
from emotion.inference.model_folder import load_trained_classifier, weights_of
from emotion.quantization.int8 import cls_only_layers, load_float_graph, quantize_onnx
from emotion.quantization.layers import Plan, find_layers
from emotion.utils.base_model import read_recipe_of


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


def test_a_sum_written_back_has_the_weights_of_the_model(artifact):
    graph = load_float_graph(weights_of(artifact, "onnx"))
    assert "Sub" not in {node.op_type for node in graph.nodes()}
    weight = load_trained_classifier(artifact).bert.encoder.layer[0].output.dense.weight.detach().numpy()
    (product,) = [node for node in graph.nodes() if node.name == "bert.encoder.layer.0.output.dense"]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(graph.get_initializer(product.input[1])), weight.T)
    write_sums(graph, "Sub")
    stored = onnx.numpy_helper.to_array(graph.get_initializer(product.input[1]))
    np.testing.assert_array_equal(stored, -weight.T)


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
