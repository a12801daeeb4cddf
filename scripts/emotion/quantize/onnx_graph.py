"""A classifier to one ONNX file, fused for ONNX Runtime: attention, bias + GELU, skip + layer norm.

Fusing must change no answer: the file is compared with the PyTorch model before it is taken, and the plain graph is
kept where the fused one differs or does not exist for an architecture.
"""

import copy
import inspect
from pathlib import Path

from emotion.common.errors import UserError

import numpy as np
import torch

FUSED_ATTENTION = "onnx_multi_head_attention"
TOLERANCE = 1e-3  # largest gap of a logit between PyTorch and the file; both compute in FP32


def _fused_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention as ONNX Runtime's one operator; query, key and value are (batch, heads, tokens, head size)."""
    batch, heads, tokens, head_size = query.shape
    query, key, value = (states.transpose(1, 2).flatten(2) for states in (query, key, value))
    context = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (query, key, value, None, attention_mask),
        attrs={"num_heads": heads, "scale": float(scaling or head_size**-0.5)},
        dtype=query.dtype,
        shape=(batch, tokens, heads * head_size),
        version=1,
    )
    return context.unflatten(2, (heads, head_size)), None


def _padding_mask(attention_mask=None, **kwargs):
    """The operator takes the mask (batch, tokens) as it comes, so none is built for (batch, 1, tokens, tokens)."""
    return attention_mask.to(torch.int32)


def export_onnx(model, tokenizer, path: Path, pack: bool = True, fuse: bool = True) -> dict:
    """Writes the classifier to ``path`` as one FP32 file with inputs (batch, tokens) and output `logits`.

    Args:
        pack: whether the projections of attention become one product; ONNX Runtime has no static INT8 for that.
        fuse: whether the fused graph is tried at all; without it this is the export that anyone gets.

    Returns:
        `fused` (bool) and `largest_logit_gap` to the PyTorch model, for the artifact's recipe.

    Raises:
        UserError: if not even the plain graph answers as the model does.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(FUSED_ATTENTION, _fused_attention)
    AttentionMaskInterface.register(FUSED_ATTENTION, _padding_mask)
    model = copy.deepcopy(model).cpu().float().eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = [_sample_inputs(model, tokenizer, shape) for shape in ((2, 7), (1, 12), (3, 5))]
    gap = float("inf")
    for fused in (True, False) if fuse else (False,):
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
    """Random token ids, the last row padded by two, named as the tokenizer and the model name them."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[-1, -2:] = 0
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    ids = ids.where((ids != tokenizer.pad_token_id) & mask.bool(), tokenizer.pad_token_id + 1)
    ids = ids.where(mask.bool(), tokenizer.pad_token_id)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    taken = set(inspect.signature(model.forward).parameters) & set(tokenizer.model_input_names)
    return {name: tensor for name, tensor in inputs.items() if name in taken}


def _write(model, inputs: dict[str, torch.Tensor], path: Path, fused: bool, pack: bool) -> None:
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    model.set_attn_implementation(FUSED_ATTENTION if fused else "eager")
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        model,
        kwargs=inputs,
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(inputs, axes),
        dynamo=True,
        verbose=False,
    )
    program.save(path, external_data=False)
    if fused:
        options = FusionOptions("bert")
        options.enable_attention = False  # done above and below: this one does not know the graph of Transformers 5
        options.enable_embed_layer_norm = False  # saves nothing, and INT8 wants the look-ups by themselves
        optimized = optimize_model(str(path), model_type="bert", opt_level=1, optimization_options=options)
        if pack:
            _pack_projections(optimized)
        optimized.save_model_to_file(str(path))


def _pack_projections(graph) -> None:
    """Query, key and value become one product inside the attention operator: fewer, larger multiplications.

    ``graph`` is ONNX Runtime's `OnnxModel`. The reshapes between a projection and the attention are those of the
    heads, there and back: the operator splits the heads itself.
    """
    from onnx import helper, numpy_helper

    producers = graph.output_name_to_node()

    def projection(name: str) -> tuple[str, np.ndarray, np.ndarray] | None:
        """The input, weights and bias of the linear layer that this tensor comes from."""
        node = producers.get(name)
        while node is not None and node.op_type == "Reshape":
            node = producers.get(node.input[0])
        product = producers.get(node.input[0]) if node is not None and node.op_type == "Add" else None
        if product is None or product.op_type != "MatMul":
            return None
        constants = [graph.get_initializer(constant) for constant in (product.input[1], node.input[1])]
        return None if None in constants else (product.input[0], *map(numpy_helper.to_array, constants))

    for node in graph.get_nodes_by_op_type("MultiHeadAttention"):
        parts = [projection(name) for name in node.input[:3]]
        if None in parts or len({states for states, _, _ in parts}) > 1:
            continue
        packed = {f"{node.output[0]}_weight": np.concatenate([weight for _, weight, _ in parts], axis=1),
                  f"{node.output[0]}_bias": np.concatenate([bias for _, _, bias in parts])}  # fmt: skip
        for name, array in packed.items():
            graph.add_initializer(numpy_helper.from_array(array, name))
        context = node.output[0]
        while [child.op_type for child in graph.get_children(producers[context])] == ["Reshape"]:
            context = graph.get_children(producers[context])[0].output[0]
        attention = helper.make_node(
            "Attention", [parts[0][0], *packed, node.input[4]], [context], domain="com.microsoft"
        )
        attention.attribute.extend(node.attribute)
        graph.remove_nodes([node, producers[context]] if context != node.output[0] else [node])
        graph.add_node(attention)
    graph.prune_graph()
    graph.topological_sort()


def _largest_gap(model, samples: list[dict[str, torch.Tensor]], path: Path) -> float:
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model.set_attn_implementation("eager")
    gaps = []
    for inputs in samples:
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        gaps.append(
            np.abs(session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0] - expected)
        )
    return float(max(gap.max() for gap in gaps))
