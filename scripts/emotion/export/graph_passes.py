"""Rewrites of an ONNX graph that keep its answers and save time; each changes ONNX Runtime's `OnnxModel` in place.

    fuse_attention      attention written out in single operators -> one operator
    join_heads          the reshapes around that operator go: it splits and joins the heads itself
    keep_cls_token      the last layer computes the [CLS] token alone, where the head reads no other
    pack_projections    query, key and value become one product
    share_matrices      equal weights are stored once (ALBERT's layers share theirs)
    write_sums          residual sums are written so that ONNX Runtime does not slow them down when it opens the file
    merge_products      dynamic INT8: rounding, product, scaling and bias become one operator

The graph is the exporter's for Transformers' encoders. Where a pattern is not found, nothing is changed.
"""

from collections import Counter

import numpy as np
import torch
from onnx import helper, numpy_helper

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
FIRST = "/first"  # ends the name of a tensor that holds the [CLS] token of another
SMALLEST_SHARED = 1024  # bytes of a matrix that is worth a look for equal ones
NUMBER = "#"  # begins what a name has beside those of its modules
SCORES = 5  # the input of attention that is added to its scores: (batch, heads, tokens of the queries, tokens)
# Operators that work token by token -> the inputs that hold tokens: (batch, tokens, width). Attention does so for its
# queries alone.
TOKEN_INPUTS = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), (0, 1)),
    **dict.fromkeys(("MatMul", "LayerNormalization", "Gelu", "Relu", "Tanh", "Cast"), (0,)),
    "MultiHeadAttention": (0, SCORES),
}


def constant_of(graph, name: str) -> np.ndarray | None:
    """The values of a constant of that name; None if there is none."""
    tensor = graph.get_initializer(name)
    return None if tensor is None else numpy_helper.to_array(tensor)


def tidy(graph) -> None:
    """Removes what nothing reads any longer, and brings the nodes into the order in which they run."""
    # The shapes that the exporter noted hold no longer, and ONNX Runtime warns of each that does not fit. The types
    # stay, since quantizers read them.
    for value in graph.model.graph.value_info:
        value.type.tensor_type.ClearField("shape")
    graph.prune_graph()
    graph.topological_sort()


def fuse_attention(graph, heads: int) -> None:
    """Makes `MultiHeadAttention` of attention that is written out, as in MPNet: softmax(Q K' x scale + terms) V."""
    producers, sums = graph.output_name_to_node(), {}
    for softmax in graph.get_nodes_by_op_type("Softmax"):
        found = _read_attention(graph, producers, softmax)
        if found is None:
            continue
        states, scale, terms, joined = found
        # All layers add the same terms, a mask and relative positions: these are summed once.
        if terms not in sums:
            sums[terms] = terms[0]
            for other in terms[1:]:
                before, sums[terms] = sums[terms], f"{sums[terms]}+{other}"
                graph.add_node(helper.make_node("Add", [before, other], [sums[terms]]))
        inputs = [*states, "", "", sums[terms]]  # the gaps are a bias, which the projections have, and a mask
        graph.remove_node(joined)
        options = {"domain": MICROSOFT, "num_heads": heads, "scale": scale}
        graph.add_node(helper.make_node("MultiHeadAttention", inputs, [joined.output[0]], **options))
    tidy(graph)


def _read_attention(graph, producers: dict, softmax):
    """What surrounds a softmax, if it is attention; None otherwise.

    Returns:
        The names of query, key and value, (batch, tokens, width); the scale; the names of the terms that are added to
        the scores; and the node that joins the heads at the end.
    """
    scale, terms, node = 1.0, (), producers[softmax.input[0]]
    while node.op_type in {"Add", "Mul", "Div"}:
        value = constant_of(graph, node.input[1])
        if node.op_type == "Add":
            terms = (*terms, node.input[1])
        elif value is not None and value.size == 1:
            scale *= float(value) if node.op_type == "Mul" else 1 / float(value)
        else:
            return None
        node = producers.get(node.input[0])
    weighted = graph.get_children(softmax)
    if node.op_type != "MatMul" or [one.op_type for one in weighted] != ["MatMul"] or not terms:
        return None
    states = []
    for name in (node.input[0], node.input[1], weighted[0].input[1]):
        transposed = producers.get(name)
        split = producers.get(transposed.input[0]) if transposed is not None else None
        if split is None or (transposed.op_type, split.op_type) != ("Transpose", "Reshape"):
            return None
        states.append(split.input[0])
    after = [child for one in graph.get_children(weighted[0]) for child in graph.get_children(one)]
    if [one.op_type for one in after] != ["Reshape"]:
        return None
    return states, scale, terms, after[0]


def join_heads(graph) -> None:
    """Removes the reshapes that split the heads before attention and join them behind it."""
    producers = graph.output_name_to_node()
    for node in graph.get_nodes_by_op_type("MultiHeadAttention"):
        for index in range(3):
            while (before := producers.get(node.input[index])) is not None and before.op_type == "Reshape":
                node.input[index] = before.input[0]
        last = node
        while [child.op_type for child in graph.get_children(last)] == ["Reshape"]:
            last = graph.get_children(last)[0]
        if last is not node:  # no two nodes may write one tensor
            graph.remove_node(last)
            node.output[0] = last.output[0]
    tidy(graph)


def keep_cls_token(graph) -> None:
    """Computes the [CLS] token alone wherever the head reads no other: in the last layer, behind keys and values.

    The heads of BERT, DistilBERT, RoBERTa and MPNet read the first token alone. What leads to it token by token is
    followed back from there, and the [CLS] token is taken where the path begins. The nodes must stand in the order in
    which they run, as every pass leaves them.
    """
    consumers, outputs = graph.input_name_to_nodes(), {value.name for value in graph.model.graph.output}
    alone = []  # nodes of which only the [CLS] token is read, the last of the graph first

    def read_alone(name: str) -> bool:
        """Whether all that read the tensor read only its [CLS] token."""
        for node in consumers.get(name, []):
            if takes_cls_token(graph, node):
                continue
            places = [index for index, source in enumerate(node.input) if source == name]
            if node not in alone or not set(places) <= set(TOKEN_INPUTS[node.op_type]):
                return False
        return name in consumers and name not in outputs

    for node in reversed(graph.nodes()):
        if node.op_type in TOKEN_INPUTS and read_alone(node.output[0]):
            alone.append(node)
    computed, taken = {node.output[0] for node in alone}, set()
    for node in alone:
        for index in TOKEN_INPUTS[node.op_type]:
            name = node.input[index] if index < len(node.input) else ""
            if name and name not in computed and graph.get_initializer(name) is None:
                node.input[index] = f"{name}{FIRST}"
                taken.add((name, 2 if node.op_type == "MultiHeadAttention" and index == SCORES else 1))
    for name, axis in sorted(taken):
        bounds = []
        for key, value in (("start", 0), ("end", 1), (f"axis{axis}", axis)):
            bounds.append(f"first/{key}")
            if graph.get_initializer(bounds[-1]) is None:
                graph.add_initializer(numpy_helper.from_array(np.array([value]), bounds[-1]))
        graph.add_node(helper.make_node("Slice", [name, *bounds], [f"{name}{FIRST}"]))
    tidy(graph)


def takes_cls_token(graph, node) -> bool:
    """Whether a node takes the first token of states (batch, tokens, width), as a head does."""
    if node.op_type != "Gather":
        return False
    index, axis = constant_of(graph, node.input[1]), {one.name: one.i for one in node.attribute}.get("axis", 0)
    return axis == 1 and index is not None and index.ndim == 0 and index == 0


def cls_only_products(graph) -> list:
    """The products with a weight that see the [CLS] token alone, after `keep_cls_token`."""
    found, first = [], set()
    for node in graph.nodes():
        if node.op_type == "Slice" and node.output[0].endswith(FIRST):
            first.add(node.output[0])
        places = [index for index, name in enumerate(node.input) if name in first]
        if places and set(places) <= set(TOKEN_INPUTS.get(node.op_type, ())):
            first.update(node.output)
            if node.op_type == "MatMul":
                found.append(node)
    return found


def find_projection(graph, producers: dict, name: str):
    """The product and the bias of the linear layer that the tensor ``name`` comes from: two nodes; None for none."""
    bias = producers.get(name)
    product = producers.get(bias.input[0]) if bias is not None and bias.op_type == "Add" else None
    if product is None or product.op_type != "MatMul":
        return None
    stored = graph.get_initializer(product.input[1]), graph.get_initializer(bias.input[1])
    return None if None in stored else (product, bias)  # computed, not stored: no linear layer


def pack_projections(graph) -> None:
    """Makes query, key and value one product: one large multiplication for three.

    `MultiHeadAttention` takes three tensors that are projected already. `Attention` takes the states before the
    projection, and one weight that holds the three side by side. It has no place for scores that are added, and none
    for queries of fewer tokens: there the product stands before the attention, and is split behind it.
    """
    producers = graph.output_name_to_node()
    for node in graph.get_nodes_by_op_type("MultiHeadAttention"):
        projections = [find_projection(graph, producers, name) for name in node.input[:3]]
        if None in projections:
            continue
        sources = [product.input[0] for product, _ in projections]
        together = [index for index in range(3) if sources[index] == sources[1]]  # all, or key and value
        weights = [constant_of(graph, projections[index][0].input[1]) for index in together]
        biases = [constant_of(graph, projections[index][1].input[1]) for index in together]
        name = node.output[0]
        graph.add_initializer(numpy_helper.from_array(np.concatenate(weights, axis=1), f"{name}_weight"))
        graph.add_initializer(numpy_helper.from_array(np.concatenate(biases), f"{name}_bias"))
        if len(together) == 3 and len(node.input) <= SCORES:
            inputs = [sources[0], f"{name}_weight", f"{name}_bias", node.input[4]]  # the last one is the mask
            packed = helper.make_node("Attention", inputs, [name], domain=MICROSOFT)
            packed.attribute.extend(node.attribute)  # the number of heads and the scale keep their names
            graph.remove_node(node)
            graph.add_node(packed)
            continue
        parts = _split_behind(graph, sources[1], f"{name}_weight", f"{name}_bias", len(together), name)
        for index, part in zip(together, parts, strict=True):
            node.input[index] = part
    tidy(graph)


def _split_behind(graph, states: str, weight: str, bias: str, count: int, attention: str, name: str = "") -> list[str]:
    """Makes a linear layer whose outputs are ``count`` tensors of equal width; returns their names.

    They begin with the output of the ``attention``: several may share a weight (ALBERT).
    """
    product, projected = f"{attention}_weight_product", f"{attention}_weight_projected"
    parts = [f"{projected}_{index}" for index in range(count)]
    graph.add_node(helper.make_node("MatMul", [states, weight], [product], name=name))
    graph.add_node(helper.make_node("Add", [product, bias], [projected]))
    graph.add_node(helper.make_node("Split", [projected], parts, axis=2, num_outputs=count))
    return parts


def unpack_attention(graph) -> None:
    """Takes the products out of `Attention` again, for other runtimes, which see each product by its own name."""
    for node in graph.get_nodes_by_op_type("Attention"):
        parts = _split_behind(graph, *node.input[:3], count=3, attention=node.output[0], name=node.name)
        inputs = [*parts, "", node.input[3]]
        graph.remove_node(node)
        attention = helper.make_node("MultiHeadAttention", inputs, list(node.output), domain=MICROSOFT)
        attention.attribute.extend(node.attribute)
        graph.add_node(attention)
    tidy(graph)


def write_sums(graph, kind: str) -> None:
    """Writes each residual sum before a layer norm as a + b ('Add'), or as a - (-b) ('Sub').

    When ONNX Runtime opens a file, it fuses `Add` and `LayerNormalization` to one operator, whose loops for the CPU
    are not vectorized: a third of the time of a batch. A difference it leaves alone. For that the linear layer gives
    the negative of its result: its weight (or the scales of its integers) and its bias change their signs, which
    changes no digit of the answer.
    """
    producers, other = graph.output_name_to_node(), {"Add": "Sub", "Sub": "Add"}[kind]
    for norm in graph.get_nodes_by_op_type("LayerNormalization"):
        node = producers.get(norm.input[0])
        if node is None or node.op_type != other or len(graph.get_children(node)) > 1:
            continue
        # Of a difference it is the second; of a sum either one.
        for index in (1,) if kind == "Add" else (1, 0):
            if negated := _constants_with_sign(graph, producers, node.input[index]):
                for tensor in negated:
                    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
                inputs = [node.input[1 - index], node.input[index]]
                graph.remove_node(node)
                graph.add_node(helper.make_node(kind, inputs, list(node.output)))
                break
    graph.topological_sort()


def _constants_with_sign(graph, producers: dict, name: str) -> list:
    """The constants that give the tensor ``name`` its sign, if it comes from a linear layer and serves once."""
    projection, product = find_projection(graph, producers, name), producers.get(name)
    if projection:
        product, bias = projection
        names = [product.input[1], bias.input[1]]
    elif product is not None and product.op_type == "DynamicQuantizeMatMul" and len(product.input) == 5:
        names = [name for name in (product.input[2], product.input[4]) if name]  # its scales and its bias, if any
    else:
        return []
    readers = graph.input_name_to_nodes()
    # A weight that several layers share (ALBERT) has to keep its sign.
    once = all(len(readers[one]) == 1 for one in [name, *names])
    return [graph.get_initializer(one) for one in names] if once else []


def name_nodes(graph, model) -> list[str]:
    """Names each node that holds a linear layer or an embedding after the module; a product of several after all.

    The exporter gives nodes names of its own, so a node is recognised by its weights, which are the module's. Where
    several nodes compute one module (ALBERT), all but the first also get a number; `modules_of` takes it off.
    ``graph`` is the model's GraphProto, with each residual sum written as a sum; see `write_sums`.

    Returns:
        The names, in the order of the graph.
    """
    owners = {}
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
            weight = part.weight.detach().numpy()
            # A product holds a layer's weight transposed, a look-up holds the table as it is.
            for array in (weight, weight.T):
                owners.setdefault(np.ascontiguousarray(array).tobytes(), name)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 2}
    named, counts = [], Counter()
    for node in graph.node:
        for array in (arrays[name] for name in node.input if name in arrays):
            # Of query, key and value all three, or the last two, may be one product: their weights lie side by side.
            for count in (1, 2, 3):
                parts = np.array_split(array, count, axis=1)
                modules = [owners.get(np.ascontiguousarray(part).tobytes()) for part in parts]
                if None not in modules:
                    name = " ".join(modules)
                    node.name = f"{name} {NUMBER}{counts[name]}" if counts[name] else name
                    counts[name] += 1
                    named.append(node.name)
                    break
    return named


def modules_of(name: str) -> list[str]:
    """The modules that a node computes, by the name that `name_nodes` gave it and ONNX Runtime's quantizer may end."""
    return [part for part in name.removesuffix("_quant").split() if not part.startswith(NUMBER)]


def share_matrices(graph) -> None:
    """Stores equal matrices once."""
    kept, renamed = {}, {}
    for tensor in graph.model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 2 and array.nbytes >= SMALLEST_SHARED:
            first = kept.setdefault((array.dtype, array.shape, array.tobytes()), tensor.name)
            if first != tensor.name:
                renamed[tensor.name] = first
    if not renamed:
        return
    for node in graph.nodes():
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    graph.prune_graph()


def merge_products(graph) -> None:
    """Makes one `DynamicQuantizeMatMul` of rounding, product, scaling and bias: the products of dynamic INT8."""
    producers = graph.output_name_to_node()
    for product in graph.get_nodes_by_op_type("MatMulInteger"):
        rounding = producers[product.input[0]]
        (cast,) = graph.get_children(product)
        (scaled,) = graph.get_children(cast)
        # The scale of the activations times those of the weights.
        (scales,) = [producers[name] for name in scaled.input if name != cast.output[0]]
        (scale,) = [name for name in scales.input if name not in rounding.output]
        bias, last = "", scaled
        for child in graph.get_children(scaled):
            added = [name for name in child.input if graph.get_initializer(name) is not None]
            if child.op_type == "Add" and added and len(graph.get_children(scaled)) == 1:
                bias, last = added[0], child
        graph.remove_nodes([scaled] if last is scaled else [scaled, last])
        # The gap is a zero point: there is none, as the weights are symmetric.
        inputs, options = [rounding.input[0], product.input[1], scale, "", bias], {"domain": MICROSOFT}
        options["name"] = product.name
        graph.add_node(helper.make_node("DynamicQuantizeMatMul", inputs, list(last.output), **options))
    tidy(graph)
