"""Outlier channels: channels between a feed-forward pair whose activations are many times larger than all others.

ONNX Runtime's INT8 has one range for all inputs of a product. A few large channels leave every other one a
handful of its 256 levels, which ruins base-size encoders (Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication
for Transformers at Scale", NeurIPS 2022). A feed-forward pair can be split exactly: its outlier channels U get a thin
product of their own in floats, before and after the activation function f. The rest keeps INT8, with a narrow range:

    W2 f(W1 x + b1) + b2  =  W2' f(W1' x + b1') + W2u f(W1u x + b1u) + b2

W1', b1' and W2' are W1, b1 and W2 with zeros in the place of U: their shapes stay, and with them groups and alignment.
"""

import copy
from collections import Counter

import numpy as np
import torch
from onnx import helper, numpy_helper

from emotion.inference.model_folder import BRANCH
from emotion.quantization.layers import CalibrationRows, Plan, find_stack, watch_inputs

THRESHOLD = 2.0  # times the 99th percentile of a layer's channel maxima: chosen on validation
LARGEST_COUNT = 16  # channels per layer; with more they would be no outliers, and their product no longer thin
TEXTS = 256  # of train, which show the activations


def find_pairs(model, linear: list[str]) -> dict[str, str]:
    """The second product of each feed-forward pair -> its first.

    A pair is found by its shape, not by its name: two linear layers in a row of which the first widens its input and
    the second takes all that the first gives.
    """
    pairs, stack, modules = {}, f"{find_stack(model)}.", dict(model.named_modules())
    for first, second in zip(linear, linear[1:], strict=False):
        wide, narrow = modules[first], modules[second]
        same_layer = first.removeprefix(stack).split(".")[0] == second.removeprefix(stack).split(".")[0]
        if same_layer and wide.in_features < wide.out_features == narrow.in_features:
            pairs[second] = first
    return pairs


def outlier_metadata(outliers: dict[str, list[int]]) -> dict:
    """The entry of recipe.yaml on the channels that stay in float, and the rule that chose them; empty for none."""
    if not outliers:
        return {}
    rule = f"largest activation above {THRESHOLD:g} x the layer's 99th percentile, at most {LARGEST_COUNT}"
    return {"outlier_channels": {"rule": rule, "channels": outliers}}


def find_outliers(plan: Plan, rows: CalibrationRows) -> dict[str, list[int]]:
    """The second product of a pair -> its outlier channels, ascending; a pair without any is left out.

    A channel is an outlier if the largest activation that the rows show of it exceeds `THRESHOLD` times the 99th
    percentile of these maxima over the channels of its layer.
    """
    outliers, pairs = {}, find_pairs(plan.model, plan.layers.linear)
    for name, maxima in largest_inputs(plan, list(pairs), rows).items():
        limit = THRESHOLD * maxima.quantile(0.99)
        largest = maxima.argsort(descending=True)[:LARGEST_COUNT]
        channels = sorted(int(channel) for channel in largest if maxima[channel] > limit)
        if channels:
            outliers[name] = channels
    return outliers


def largest_inputs(plan: Plan, names: list[str], rows: CalibrationRows) -> dict[str, torch.Tensor]:
    """The largest absolute value of each input channel of the layers named, float32 (channels,) each.

    Layers that a text passes several times (ALBERT's) are left out: only one of their products could be split.
    """
    largest, calls = {}, Counter()

    def see(name, inputs):
        found = inputs.abs().amax(dim=0)
        largest[name] = torch.maximum(largest.get(name, found), found)
        calls[name] += 1

    watch_inputs(plan.model, names, rows, see, texts=TEXTS)
    return {name: found for name, found in largest.items() if calls[name] <= len(rows.token_ids[:TEXTS])}


def weight_without_outliers(plan: Plan, name: str) -> torch.Tensor:
    """A layer's weight, float32 (rows, columns), with zeros where its outlier channels are."""
    if name in plan.compensated:
        return plan.compensated[name]
    weight = plan.model.get_submodule(name).weight.detach()
    if not plan.outliers:
        return weight
    pairs, weight = find_pairs(plan.model, plan.layers.linear), weight.clone()
    for second, channels in plan.outliers.items():
        if name == second:
            weight[:, channels] = 0
        elif name == pairs[second]:
            weight[channels] = 0
    return weight


def split_channels(graph, plan: Plan) -> None:
    """Gives the outlier channels of the plan a branch of their own in an FP32 ONNX graph, in place.

    Args:
        graph: the GraphProto, with its nodes named after their modules; see `name_nodes`.
    """
    pairs, nodes = find_pairs(plan.model, plan.layers.linear), {node.name: node for node in graph.node}
    for name, channels in plan.outliers.items():
        _split_pair(graph, nodes[pairs[name]], nodes[name], channels)


def _split_pair(graph, first, second, channels: list[int]) -> None:
    """Copies all from the first product of a pair to the second for the channels alone, and adds the result."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    width = tensors[second.input[1]].dims[0]  # ONNX multiplies with the transposed weight: (columns, rows)

    def take(name: str, axis: int) -> str:
        """The channels' part of a constant, as a new constant; in the old one they become zeros."""
        array = numpy_helper.to_array(tensors[name]).copy()
        part = numpy_helper.from_array(np.ascontiguousarray(np.take(array, channels, axis=axis)), f"{name}{BRANCH}")
        graph.initializer.append(part)
        array[(slice(None),) * axis + (channels,)] = 0
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
        return part.name

    part = take(first.input[1], axis=1)
    branch = [helper.make_node("MatMul", [first.input[0], part], [f"{first.output[0]}{BRANCH}"])]
    # Between the products stand the bias and the activation function, fused or not, whatever it is.
    for node in _nodes_between(graph, first, second):
        copied = copy.deepcopy(node)
        for index, source in enumerate(node.input):
            if source in tensors and list(tensors[source].dims) == [width]:  # the bias; scalars serve both branches
                copied.input[index] = take(source, axis=0)
            elif source not in tensors:
                copied.input[index] = f"{source}{BRANCH}"
        copied.output[0] = f"{node.output[0]}{BRANCH}"
        branch.append(copied)
    result = f"{second.output[0]}{BRANCH}"
    branch.append(helper.make_node("MatMul", [branch[-1].output[0], take(second.input[1], axis=0)], [result]))
    branch.append(_sum_with(graph, second, result))
    # A graph lists its nodes in the order in which they run: the branch joins right behind the second product.
    position = list(graph.node).index(second) + 1
    for offset, node in enumerate(branch):
        node.name = f"{second.name}{BRANCH}{offset}"
        graph.node.insert(position + offset, node)


def _sum_with(graph, second, result: str):
    """The node that adds the result of the branch, wherever that leaves other rewrites possible."""
    residual = _residual_sum(graph, second)
    if residual is None:
        whole, second.output[0] = second.output[0], f"{second.output[0]}/rest"
        return helper.make_node("Add", [second.output[0], result], [whole])
    # Added to the states that skip the pair, so that product, bias and sum stay side by side.
    node, index = residual
    added = helper.make_node("Add", [node.input[index], result], [f"{result}/sum"])
    node.input[index] = added.output[0]
    return added


def _residual_sum(graph, product):
    """The node that adds a product with its bias to other states, and the index of these; None if there is none."""
    name = product.output[0]
    for _ in range(2):  # the sum with the bias, then that with the states
        readers = [node for node in graph.node if name in node.input]
        if [node.op_type for node in readers] != ["Add"]:
            return None
        before, name = name, readers[0].output[0]
    index = 1 - list(readers[0].input).index(before)
    constants = {tensor.name for tensor in graph.initializer}
    return None if readers[0].input[index] in constants else (readers[0], index)


def _nodes_between(graph, first, second) -> list:
    """The nodes from one product to another, in the order of the graph."""
    producers = {output: node for node in graph.node for output in node.output}
    found, waiting = [], [second.input[0]]
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or node.name == first.name or node in found:
            continue
        found.append(node)
        waiting += node.input
    return [node for node in graph.node if node in found]
