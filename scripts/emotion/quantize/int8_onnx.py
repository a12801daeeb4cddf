"""A classifier in FP32 to INT8, once for each runtime: torchao (Transformers' own format), ONNX Runtime, OpenVINO.

The same layers become INT8 in all of them: the linear layers of the encoder, by type, and the embeddings of words and
positions. What lies outside the encoder's layers, pooler and head, stays in float: it is small, and its errors reach
the logits at once.
"""

from pathlib import Path

from emotion.common.quiet import quiet_logging
from emotion.quantize.layers import Layers
from emotion.task.tokens import TextEncoder

import numpy as np
import torch


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
    with quiet_logging():
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

    with quiet_logging():
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
