"""A classifier as one ONNX file, fused for ONNX Runtime: attention, bias + GELU, skip + layer norm.

Fusing must change no answer. The file is compared with the PyTorch model before it is kept. The plain graph is kept
instead if the fused one differs, or if the architecture has none.
"""

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path

from emotion.common.errors import UserError

import numpy as np
import torch

FUSED_ATTENTION = "onnx_multi_head_attention"  # the name under which Transformers knows the attention below
TOLERANCE = 1e-3  # largest gap of a logit between PyTorch and the file; both compute in FP32
# (texts, tokens). The first shape is traced; the others show that the file froze neither number.
SAMPLE_SHAPES = ((2, 7), (1, 12), (3, 5))


def _join_heads(states: torch.Tensor) -> torch.Tensor:
    """(batch, heads, tokens, head size) -> (batch, tokens, heads x head size)."""
    return states.transpose(1, 2).flatten(2)


def _fused_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention as ONNX Runtime's one operator; query, key and value are (batch, heads, tokens, head size)."""
    batch, heads, tokens, head_size = query.shape
    # A symbolic operator is a placeholder: the exporter writes it down by name, and PyTorch never computes it.
    context = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        # The operator splits the heads itself. The gap in the fourth place is a bias, which the projections have.
        (_join_heads(query), _join_heads(key), _join_heads(value), None, attention_mask),
        attrs={"num_heads": heads, "scale": float(scaling or head_size**-0.5)},
        dtype=query.dtype,
        shape=(batch, tokens, heads * head_size),
        version=1,
    )
    # Transformers expects (batch, tokens, heads, head size), and the attention weights, which nobody reads here.
    return context.unflatten(2, (heads, head_size)), None


def _padding_mask(attention_mask=None, **kwargs):
    """The mask as it comes, (batch, tokens): the operator needs none of shape (batch, 1, tokens, tokens)."""
    return attention_mask.to(torch.int32)


def export_onnx(model, tokenizer, path: Path, pack: bool = True, fuse: bool = True) -> dict:
    """Writes the classifier to ``path`` as one FP32 file.

    Its inputs are int64 (batch, tokens), named as the tokenizer names them; its output `logits` is float32
    (batch, labels).

    Args:
        pack: whether the three projections of attention become one product; ONNX Runtime has no static INT8 for that.
        fuse: whether to try the fused graph at all; without it this is the export that anyone gets.

    Returns:
        `fused` (bool) and `largest_logit_gap` to the PyTorch model, for the artifact's recipe.

    Raises:
        UserError: if not even the plain graph answers as the model does.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(FUSED_ATTENTION, _fused_attention)
    AttentionMaskInterface.register(FUSED_ATTENTION, _padding_mask)
    model = copy.deepcopy(model).cpu().float().eval()  # a copy: another attention is put into it below
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = [_sample_inputs(model, tokenizer, shape) for shape in SAMPLE_SHAPES]
    gap = float("inf")
    attempts = (True, False) if fuse else (False,)
    for fused in attempts:
        try:
            _write(model, samples[0], path, fused=fused, pack=pack)
            gap = _largest_gap(model, samples, path)
        except Exception:  # an architecture without this attention, or a pattern that the optimizer does not know
            if not fused:
                raise
            continue
        if gap <= TOLERANCE:
            return {"fused": fused, "largest_logit_gap": gap}
    raise UserError(
        f"the ONNX file does not answer as the model does: a logit differs by {gap:.3g}; nothing was saved"
    )


def _sample_inputs(model, tokenizer, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Random token ids, int64 of this shape, under the input names that tokenizer and model share."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[-1, -2:] = 0  # the last text is two tokens shorter, so that a mask without effect would show
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    # The padding id stands exactly where the mask is 0: RoBERTa counts its positions by the id, not by the mask.
    ids = ids.where((ids != tokenizer.pad_token_id) & mask.bool(), tokenizer.pad_token_id + 1)
    ids = ids.where(mask.bool(), tokenizer.pad_token_id)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    taken = set(inspect.signature(model.forward).parameters) & set(tokenizer.model_input_names)
    return {name: tensor for name, tensor in inputs.items() if name in taken}


def _write(model, inputs: dict[str, torch.Tensor], path: Path, fused: bool, pack: bool) -> None:
    """Exports the graph by tracing ``inputs``, and lets ONNX Runtime fuse the rest."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    model.set_attn_implementation(FUSED_ATTENTION if fused else "eager")
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}  # any number of texts, of any length
    program = torch.onnx.export(
        model,
        kwargs=inputs,
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(inputs, axes),
        dynamo=True,
        verbose=False,
    )
    # The exporter notes for each node where its call stands in the source: paths of this machine, which are nothing
    # for those who download the file.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.save(path, external_data=False)
    if fused:
        options = FusionOptions("bert")
        options.enable_attention = False  # done here instead: this fusion does not know the graph of Transformers 5
        options.enable_embed_layer_norm = False  # saves nothing, and INT8 needs each look-up as a node of its own
        optimized = optimize_model(str(path), model_type="bert", opt_level=1, optimization_options=options)
        if pack:
            _pack_projections(optimized)
        optimized.save_model_to_file(str(path))


@dataclass(frozen=True)
class Projection:
    """A linear layer of the graph.

    Attributes:
        source: name of the tensor that goes into it.
        weight: float32 (inputs, outputs), transposed from PyTorch's order.
        bias: float32 (outputs,).
    """

    source: str
    weight: np.ndarray
    bias: np.ndarray


def _pack_projections(graph) -> None:
    """Makes query, key and value one product inside the attention operator: one large multiplication for three.

    `MultiHeadAttention` takes three tensors that are projected already. `Attention` takes the states before the
    projection, and one weight that holds the three side by side.

    Args:
        graph: ONNX Runtime's `OnnxModel`, changed in place.
    """
    from onnx import helper, numpy_helper

    producers = graph.output_name_to_node()
    for node in graph.get_nodes_by_op_type("MultiHeadAttention"):
        projections = [_find_projection(graph, producers, name) for name in node.input[:3]]
        # Without a bias, or with states of two sources (cross-attention), the three products stay as they are.
        if None in projections or len({part.source for part in projections}) > 1:
            continue
        weight = np.concatenate([part.weight for part in projections], axis=1)  # outputs side by side
        bias = np.concatenate([part.bias for part in projections])
        weight_name, bias_name = f"{node.output[0]}_weight", f"{node.output[0]}_bias"
        graph.add_initializer(numpy_helper.from_array(weight, weight_name))
        graph.add_initializer(numpy_helper.from_array(bias, bias_name))
        # The exporter splits the heads of the result and joins them again. `Attention` gives them joined, so it
        # takes over the name of the last tensor of these reshapes, and the reshapes lose their use.
        context = node.output[0]
        while [child.op_type for child in graph.get_children(producers[context])] == ["Reshape"]:
            context = graph.get_children(producers[context])[0].output[0]
        inputs = [projections[0].source, weight_name, bias_name, node.input[4]]  # the last one is the mask
        attention = helper.make_node("Attention", inputs, [context], domain="com.microsoft")
        attention.attribute.extend(node.attribute)  # the number of heads and the scale keep their names
        # No two nodes may write one tensor: the node that wrote `context` goes. Pruning removes what hung between.
        graph.remove_nodes([node, producers[context]] if context != node.output[0] else [node])
        graph.add_node(attention)
    graph.prune_graph()
    graph.topological_sort()


def _find_projection(graph, producers: dict, name: str) -> Projection | None:
    """The linear layer that the tensor ``name`` comes from; None if it does not come from one with a bias.

    Args:
        producers: name of a tensor -> the node that writes it.
    """
    from onnx import numpy_helper

    node = producers.get(name)
    # Between a projection and the attention lie the reshapes that split the heads and join them again.
    while node is not None and node.op_type == "Reshape":
        node = producers.get(node.input[0])
    if node is None or node.op_type != "Add":
        return None
    product = producers.get(node.input[0])
    if product is None or product.op_type != "MatMul":
        return None
    weight, bias = graph.get_initializer(product.input[1]), graph.get_initializer(node.input[1])
    if weight is None or bias is None:  # computed, not stored: no linear layer
        return None
    return Projection(product.input[0], numpy_helper.to_array(weight), numpy_helper.to_array(bias))


def _largest_gap(model, samples: list[dict[str, torch.Tensor]], path: Path) -> float:
    """The largest difference of a logit between the file and the model in PyTorch, over all samples."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors only
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model.set_attn_implementation("eager")  # the fused one is a placeholder, which cannot compute
    gaps = []
    for inputs in samples:
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        (found,) = session.run(["logits"], arrays)
        gaps.append(np.abs(found - expected).max())
    return float(max(gaps))
