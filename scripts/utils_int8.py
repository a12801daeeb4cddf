"""A classifier in FP32 to INT8, once for each runtime: torchao (Transformers' own format), ONNX Runtime, OpenVINO.

The same layers become INT8 in all of them: the linear layers of the encoder, by type, and the embeddings of words and
positions. What lies outside the encoder's layers, pooler and head, stays in float: it is small, and its errors reach
the logits at once.
"""

import contextlib
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from utils_classifier import TextEncoder, load_trained_classifier
from utils_cli import UserError


def find_stack(model) -> str:
    """The name of the module list that holds the encoder's layers: the longest one."""
    stacks = {name: len(part) for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)}
    if not stacks:
        raise UserError(f"{type(model).__name__} has no list of layers")
    return max(stacks, key=stacks.get)


@dataclass(frozen=True)
class Layers:
    """Names of the modules that become INT8."""

    linear: list[str]
    embeddings: list[str]


def find_layers(model, keep_float: list[str] = ()) -> Layers:
    """The linear layers of the encoder and its embeddings, without those whose name begins as one of ``keep_float``.

    Raises:
        UserError: if a name of `keep_float` fits no layer.
    """
    stack = f"{find_stack(model)}."
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and stack in name]
    width = model.get_input_embeddings().embedding_dim
    embeddings = [
        name
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.Embedding) and part.embedding_dim == width and part.num_embeddings > 2
    ]
    for prefix in keep_float:
        if not any(name.startswith(prefix) for name in linear + embeddings):
            raise UserError(f"--keep_float {prefix}: no layer has such a name; they are {', '.join(linear[:6])}, ...")
    kept = tuple(keep_float)
    return Layers(*([name for name in names if not name.startswith(kept)] if kept else names
                    for names in (linear, embeddings)))  # fmt: skip


def names_in_float(model, layers: Layers) -> list[str]:
    """The linear layers and embeddings of the model that do not become INT8."""
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    int8 = {*layers.linear, *layers.embeddings}
    return [name for name, part in model.named_modules() if isinstance(part, kinds) and name not in int8]


def quantize_torchao(baseline: Path, folder: Path, layers: Layers, reduce_range: bool = True) -> torch.nn.Module:
    """Writes `model.safetensors` and `config.json` with INT8 weights, and INT8 activations scaled token by token.

    Args:
        reduce_range: weights of 7 bits. A processor without VNNI adds two products of 8 bits in 16 bits, where
            full-range weights overflow (2 x 255 x 127 > 32767); with 7 bits every processor gives the same answer.

    Returns:
        The quantized model, as it was before it was saved.
    """
    from torchao.quantization import (
        FqnToConfig,
        Int8DynamicActivationInt8WeightConfig,
        IntxWeightOnlyConfig,
        PerAxis,
    )
    from transformers import TorchAoConfig

    linear = Int8DynamicActivationInt8WeightConfig(reduce_range=reduce_range)
    table = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    schemes = {f"{name}.weight": linear for name in layers.linear}
    schemes |= {f"{name}.weight": table for name in layers.embeddings}
    config = TorchAoConfig(FqnToConfig(schemes), include_input_output_embeddings=True)
    # It must be quantized while it is loaded: a model quantized in place cannot be saved.
    model = load_trained_classifier(baseline, quantization_config=config, dtype=torch.float32)
    for name in layers.linear:  # torchao reduces the activations too, which halves their precision and is not needed
        weight = model.get_submodule(name).weight
        weight.act_quant_kwargs = replace(weight.act_quant_kwargs, reduce_range=False)
    model.save_pretrained(folder)
    return model


def name_nodes(graph, model) -> list[str]:
    """Names the nodes that hold a linear layer or an embedding after the module; attention after its three.

    Returns:
        The names, in the order of the graph.
    """
    from onnx import numpy_helper

    owners = {}
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
            weight = part.weight.detach().numpy()
            for array in (weight, weight.T):
                owners.setdefault(np.ascontiguousarray(array).tobytes(), name)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 2}
    named = []
    for node in graph.node:
        for array in (arrays[name] for name in node.input if name in arrays):
            parts = np.split(array, 3, axis=1) if node.op_type == "Attention" else [array]
            modules = [owners.get(np.ascontiguousarray(part).tobytes()) for part in parts]
            if None not in modules:
                node.name = " ".join(modules)
                named.append(node.name)
    return named


def quantize_onnx(model, float_graph: Path, path: Path, layers: Layers, reduce_range: bool = True) -> None:
    """Writes one INT8 file for ONNX Runtime, which measures the range of the activations anew for every batch.

    Args:
        model: the same classifier in PyTorch; its weights tell which node is which layer.
        float_graph: the FP32 file of `export_onnx`.
        reduce_range: as for torchao.
    """
    from onnxruntime.quantization import quantize_dynamic

    graph, options = _prepare(model, float_graph, path, layers, reduce_range)
    with quiet():
        quantize_dynamic(graph, path, op_types_to_quantize=["MatMul", "Attention", "Gather"], **options)


def quantize_onnx_static(
    model,
    float_graph: Path,
    path: Path,
    layers: Layers,
    encoder: TextEncoder,
    token_ids: list[list[int]],
    method: str,
    reduce_range: bool = True,
) -> None:
    """The same with ranges of the activations that are fixed by the calibration rows.

    Args:
        float_graph: an FP32 file of `export_onnx` with ``pack=False``.
        encoder, token_ids: the rows' word pieces, and what pads them.
        method: 'minmax' takes the extremes, 'entropy' the range that loses least information (Migacz, "8-bit
            Inference with TensorRT", GTC 2017).
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

    graph, options = _prepare(model, float_graph, path, layers, reduce_range)
    names = [value.name for value in graph.graph.input]
    # Each row has its own length, but ONNX Runtime's histograms take rows of one length only.
    padded = encoder.pad(token_ids) if method == "entropy" else None
    batches = [
        {name: padded[name][row : row + 1] for name in names} if padded else
        {name: array for name, array in encoder.pad([ids]).items() if name in names}
        for row, ids in enumerate(token_ids)
    ]  # fmt: skip

    class Reader(CalibrationDataReader):
        rows = iter(batches)

        def get_next(self):
            return next(self.rows, None)

    with quiet():
        quantize_static(
            graph,
            path,
            Reader(),
            op_types_to_quantize=["MatMul", "Gather"],
            activation_type=QuantType.QUInt8,
            calibrate_method={"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}[method],
            **options,
        )


def _prepare(model, float_graph: Path, path: Path, layers: Layers, reduce_range: bool) -> tuple:
    """The graph with its nodes named, and what dynamic and static quantization share."""
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    graph = onnx.load(float_graph)
    wanted = {*layers.linear, *layers.embeddings}
    nodes = [name for name in name_nodes(graph.graph, model) if set(name.split()) <= wanted]
    return graph, {"per_channel": True, "reduce_range": reduce_range, "nodes_to_quantize": nodes}


@contextlib.contextmanager
def quiet():
    """The quantizers report each layer that they pass; what was quantized is counted afterwards."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def quantize_openvino(
    baseline: Path,
    folder: Path,
    model,
    layers: Layers,
    encoder: TextEncoder,
    token_ids: list[list[int]],
    reduce_range: bool = True,
    smooth_quant: bool = False,
) -> None:
    """Writes `openvino_model.xml` and `.bin` with INT8 weights, and INT8 activations whose ranges the rows have fixed.

    For the arguments see the functions above; ``smooth_quant`` follows Xiao et al., "SmoothQuant", ICML 2023.
    """
    import nncf
    from datasets import Dataset
    from optimum.intel import OVConfig, OVModelForSequenceClassification, OVQuantizationConfig, OVQuantizer

    nncf.set_log_level(logging.ERROR)
    kept = [f"__module\\.{re.escape(name)}/.*" for name in names_in_float(model, layers)]
    config = OVQuantizationConfig(
        sym=True,
        overflow_fix="enable" if reduce_range else "disable",
        smooth_quant_alpha=0.95 if smooth_quant else -1,
        num_samples=len(token_ids),
        ignored_scope=nncf.IgnoredScope(patterns=kept, validate=False),
    )
    with quiet():
        exported = OVModelForSequenceClassification.from_pretrained(
            baseline, export=True, load_in_8bit=False, compile=False, trust_remote_code=False
        )
        taken = {port.get_any_name() for port in exported.model.inputs}
        rows = [{name: array[0] for name, array in encoder.pad([ids]).items() if name in taken} for ids in token_ids]
        OVQuantizer(exported).quantize(
            calibration_dataset=Dataset.from_list(rows), ov_config=OVConfig(quantization_config=config)
        )
        exported.save_pretrained(folder)
