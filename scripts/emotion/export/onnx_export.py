"""A classifier as one ONNX file, rewritten for speed by the passes of graph_passes.py.

Rewriting must change no answer. The file is compared with the PyTorch model before it is kept. The next plainer graph
is kept instead if the rewritten one differs, or if the architecture has none.
"""

import contextlib
import copy
import inspect
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.optimizer import optimize_model
from transformers import AttentionInterface, AutoModelForSequenceClassification
from transformers.masking_utils import AttentionMaskInterface

from emotion.data.tokenization import LONGEST_TEXT, TokenTypes, longest_text
from emotion.export import graph_passes as passes
from emotion.inference.model_folder import build_classifier, build_config
from emotion.utils.errors import UserError, reason_of
from emotion.utils.files import scratch_folder

FUSED_ATTENTION = "onnx_multi_head_attention"  # the name under which Transformers knows the attention below
IR_VERSION = 9  # the newest that ONNX Runtime 1.17 opens
TOLERANCE = 1e-3  # largest gap of a logit between PyTorch and the file; both compute in FP32
# (texts, tokens). The first shape is traced; the others show that the file froze neither number. The longest text that
# the model takes is added, up to 1,024 tokens: windows of attention and tables of positions end there.
SAMPLE_SHAPES = ((2, 7), (1, 12), (3, 5))
REAL_TEXTS = 8  # on which a file is compared, too
LARGEST_FILE = 2**31  # bytes; protobuf, ONNX's format, takes no more
# Families whose export a test checks for every release: `check_export` need not try them
EXPORTED = {"bert", "distilbert", "roberta", "xlm-roberta", "camembert", "mpnet", "electra", "albert", "modernbert"}


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


class ExportError(UserError):
    """An architecture that has no ONNX file: the error names the library that cannot make one or read it."""


def check_export(base: str, labels: list[str], tokenizer) -> bool:
    """Whether a classifier on a base model, a folder or Hub id, can be exported; says before a training if not."""
    config = build_config(base, labels, None)
    try:
        check_size(config)
    except ExportError as error:
        print(f"left out: onnx; {error}")
        return False
    if config.model_type in EXPORTED:
        return True
    with scratch_folder() as temporary:
        return bool(try_export(build_classifier(base, labels, None), tokenizer, Path(temporary) / "model.onnx"))


def check_size(config) -> None:
    """Raises `ExportError` if the classifier of a configuration is too large for one file; no weights are read."""
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForSequenceClassification.from_config(config)
    if 4 * sum(parameter.numel() for parameter in model.parameters()) >= LARGEST_FILE:
        raise ExportError(f"{type(model).__name__} has no ONNX file: it would be larger than 2 GB, the limit of one")


def try_export(model, tokenizer, path: Path, texts=()) -> dict:
    """Calls `export_onnx`; if there is no such file, prints why and returns an empty dictionary."""
    try:
        return export_onnx(model, tokenizer, path, texts=texts)
    except ExportError as error:
        path.unlink(missing_ok=True)
        print(f"left out: onnx; {error}")
        return {}


def export_onnx(model, tokenizer, path: Path, rewrite: bool = True, texts=()) -> dict:
    """Writes the classifier to ``path`` as one FP32 file; without ``rewrite``, it is the export that anyone gets.

    It is compared with the model on random texts and on some of the ``texts``.

    Its inputs are int64 (batch, tokens), named as the tokenizer names them; its output `logits` is float32
    (batch, labels).

    Returns:
        `fused` (bool: whether attention is one operator), `cls_only` (bool: whether the last layer computes the [CLS]
        token alone) and `largest_logit_gap` to the PyTorch model, for the artifact's recipe.

    Raises:
        ExportError: if not even the plain graph can be made and answers as the model does.
    """
    AttentionInterface.register(FUSED_ATTENTION, _fused_attention)
    AttentionMaskInterface.register(FUSED_ATTENTION, _padding_mask)
    model = copy.deepcopy(model).cpu().float().eval()  # a copy: another attention is put into it below
    model.config.use_cache = False  # of a decoder: its keys and values would be outputs
    name = f"{type(model).__name__} has no ONNX file"
    check_size(model.config)
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = sample_inputs(model, tokenizer, texts)
    if rewrite and (found := _export_rewritten(model, samples, path)):
        return found
    try:
        library = "PyTorch's exporter cannot make it"
        _write(model, samples[0], path, "eager")
        library = "ONNX Runtime cannot run it"
        gap = largest_gap(model, samples, path)
    except Exception as error:  # the exporter's own error is a page of advice, and its cause the reason
        raise ExportError(f"{name}: {library} ({reason_of(error.__cause__ or error):.200})") from error
    if not gap <= TOLERANCE:
        raise ExportError(f"{name}: the exported graph does not answer as the model, a logit differs by {gap:.3g}")
    return {"fused": False, "cls_only": False, "largest_logit_gap": gap}


def _export_rewritten(model, samples: list[dict[str, torch.Tensor]], path: Path) -> dict | None:
    """Writes the file rewritten for speed; returns what `export_onnx` does, or None if no such file answers alike."""
    # An architecture without this attention, or a pattern that a pass does not know, may raise any error.
    with contextlib.suppress(Exception):
        _write(model, samples[0], path, FUSED_ATTENTION)
        exported = path.read_bytes()
        for cls_only in (True, False):  # the plainer, the later
            with contextlib.suppress(Exception):
                path.write_bytes(exported)
                found = _rewrite(model, path, cls_only)
                if (gap := largest_gap(model, samples, path)) <= TOLERANCE:
                    return {**found, "largest_logit_gap": gap}
    return None


def sample_inputs(model, tokenizer, texts=()) -> list[dict[str, torch.Tensor]]:
    """Inputs of several shapes to compare a file with its model on: random ones, then some of the texts as batches.

    The texts are of all lengths, with padding and token types as the tokenizer gives them, and the longest that the
    model takes is made of them.
    """
    longest = min(longest_text(tokenizer, model.config), 2 * LONGEST_TEXT)
    inputs = [_sample_inputs(model, tokenizer, shape) for shape in (*SAMPLE_SHAPES, (2, longest))]
    if not len(texts):
        return inputs
    ordered = sorted(texts, key=len)
    drawn = [ordered[place] for place in np.linspace(0, len(ordered) - 1, REAL_TEXTS).astype(int)]
    whole = " ".join(drawn)
    whole *= 1 + 16 * longest // len(whole)  # more letters than the longest text has
    for batch in (drawn[: REAL_TEXTS // 2], drawn[REAL_TEXTS // 2 :], drawn[-1:], [whole, drawn[0]]):
        encoded = tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        inputs.append({name: encoded[name] for name in inputs[0]})
    return inputs


def _sample_inputs(model, tokenizer, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Random token ids, int64 of this shape, under the input names that tokenizer and model share."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(shape, dtype=torch.int64)
    # The last text is two tokens shorter, so that a mask without effect would show.
    padding = slice(2) if tokenizer.padding_side == "left" else slice(-2, None)
    mask[-1, padding] = 0
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    # The padding id stands exactly where the mask is 0: RoBERTa counts its positions by the id, not by the mask.
    ids = ids.where((ids != tokenizer.pad_token_id) & mask.bool(), tokenizer.pad_token_id + 1)
    ids = ids.where(mask.bool(), tokenizer.pad_token_id)
    types = torch.zeros_like(ids) + torch.tensor(TokenTypes(tokenizer.backend_tokenizer)(shape[1]))
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    taken = set(inspect.signature(model.forward).parameters) & set(tokenizer.model_input_names)
    return {name: tensor for name, tensor in inputs.items() if name in taken}


def _write(model, inputs: dict[str, torch.Tensor], path: Path, attention: str) -> None:
    """Exports the graph by tracing ``inputs``, with an attention that Transformers knows by name."""
    model.set_attn_implementation(attention)
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
    program.model.ir_version = IR_VERSION
    program.save(path, external_data=False)


def _rewrite(model, path: Path, cls_only: bool) -> dict[str, bool]:
    """Rewrites the file of the model for speed, and names its nodes after its layers.

    Returns:
        `fused` and `cls_only` of `export_onnx`, as the graph has them.
    """
    options = FusionOptions("bert")
    # Of ONNX Runtime's own fusions only those of layer norm and GELU from their parts are wanted. Its attention does
    # not know the graph of Transformers 5; the others are slower on a CPU, or hide what INT8 needs as single nodes.
    options.enable_attention = options.enable_embed_layer_norm = options.enable_bias_gelu = False
    options.enable_skip_layer_norm = options.enable_bias_skip_layer_norm = False
    graph = optimize_model(str(path), model_type="bert", opt_level=1, optimization_options=options)
    passes.fuse_attention(graph, model.config.num_attention_heads)
    passes.join_heads(graph)
    if cls_only:
        passes.keep_cls_token(graph)
    passes.pack_projections(graph)
    passes.name_nodes(graph.model.graph, model)
    passes.write_sums(graph, "Sub")
    passes.share_matrices(graph)
    # ONNX Runtime declares all of its domains, some in versions that 1.17 does not know.
    declared = [one for one in graph.model.opset_import if one.domain in {"", "com.microsoft"}]
    del graph.model.opset_import[:]
    graph.model.opset_import.extend(declared)
    graph.save_model_to_file(str(path))
    # A head that reads all tokens leaves the pass nothing to do.
    return {
        "fused": any(node.op_type in {"Attention", "MultiHeadAttention"} for node in graph.nodes()),
        "cls_only": any(name.endswith(passes.FIRST) for node in graph.nodes() for name in node.output),
    }


def largest_gap(model, samples: list[dict[str, torch.Tensor]], path: Path) -> float:
    """The largest difference of a logit between the file and the model in PyTorch, over all samples."""
    onnxruntime.set_default_logger_severity(3)  # errors only
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model.set_attn_implementation("eager")  # the fused one is a placeholder, which cannot compute
    gap, taken = 0.0, {value.name for value in session.get_inputs()}  # a graph without token types drops them
    for inputs in samples:
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items() if name in taken})
        gap = np.maximum(gap, np.abs(found - expected).max())  # not a number, if any logit is none
    return float(gap)
