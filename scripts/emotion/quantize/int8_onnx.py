"""INT8 for ONNX Runtime and transformers.js: one file, with activations rounded as they come or by fixed ranges."""

import tempfile
from pathlib import Path

from emotion.common.quiet import quiet_logging
from emotion.model.artifact import weights_of
from emotion.quantize.layers import CalibrationRows, Plan
from emotion.quantize.onnx_graph import export_onnx
from emotion.quantize.outliers import split_outliers

import numpy as np
import torch
from transformers import AutoTokenizer


def name_nodes(graph, model) -> list[str]:
    """Names each node that holds a linear layer or an embedding after the module; attention after its three.

    The exporter gives nodes names of its own, so a node is recognised by its weights, which are the module's.

    Returns:
        The names, in the order of the graph.
    """
    from onnx import numpy_helper

    owners = {}
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
            weight = part.weight.detach().numpy()
            # A product holds a layer's weight transposed, a look-up holds the table as it is.
            for array in (weight, weight.T):
                owners.setdefault(np.ascontiguousarray(array).tobytes(), name)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 2}
    named = []
    for node in graph.node:
        for array in (arrays[name] for name in node.input if name in arrays):
            # The attention operator multiplies query, key and value at once: its weights lie side by side.
            parts = np.split(array, 3, axis=1) if node.op_type == "Attention" else [array]
            modules = [owners.get(np.ascontiguousarray(part).tobytes()) for part in parts]
            if None not in modules:
                node.name = " ".join(modules)
                named.append(node.name)
    return named


def quantize_onnx(plan: Plan, path: Path, reduce_range: bool = True) -> None:
    """Writes one INT8 file for ONNX Runtime, which measures the range of the activations anew for every batch.

    Args:
        reduce_range: weights of 7 bits; see levels.py.
    """
    from onnxruntime.quantization import quantize_dynamic

    graph, options = _prepare(plan, weights_of(plan.folder, "onnx"), path, reduce_range)
    with quiet_logging():
        quantize_dynamic(graph, path, op_types_to_quantize=["MatMul", "Attention", "Gather"], **options)


def quantize_onnx_static(
    plan: Plan, path: Path, rows: CalibrationRows, method: str, reduce_range: bool = True
) -> None:
    """The same with ranges of the activations that are fixed by the calibration rows.

    Args:
        method: 'minmax' takes the extremes, 'entropy' the range that loses least information (Migacz, "8-bit
            Inference with TensorRT", GTC 2017).
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as temporary:
        # ONNX Runtime has no static INT8 for attention with its three projections in one product.
        unpacked = Path(temporary) / "model.onnx"
        export_onnx(plan.model, AutoTokenizer.from_pretrained(plan.folder), unpacked, pack=False)
        graph, options = _prepare(plan, unpacked, path, reduce_range)
    names = [value.name for value in graph.graph.input]
    with quiet_logging():
        quantize_static(
            graph,
            path,
            _reader(_batches(rows, names, one_length=method == "entropy")),
            op_types_to_quantize=["MatMul", "Gather"],
            activation_type=QuantType.QUInt8,
            calibrate_method={"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}[method],
            **options,
        )


def _batches(rows: CalibrationRows, names: list[str], one_length: bool) -> list[dict[str, np.ndarray]]:
    """The calibration rows one by one, int64 arrays (1, tokens); of one length where histograms are added up."""
    padded = rows.encoder.pad(rows.token_ids)
    batches = []
    for row, ids in enumerate(rows.token_ids):
        if one_length:  # ONNX Runtime's histograms take rows of one length only
            batches.append({name: padded[name][row : row + 1] for name in names})
        else:
            arrays = rows.encoder.pad([ids])
            batches.append({name: arrays[name] for name in names})
    return batches


def _reader(batches: list[dict[str, np.ndarray]]):
    """The batches as ONNX Runtime's quantizer asks for them: one per call, then None."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        rest = iter(batches)

        def get_next(self):
            return next(self.rest, None)

    return Reader()


def _prepare(plan: Plan, float_graph: Path, path: Path, reduce_range: bool) -> tuple:
    """The FP32 graph with its nodes named, and the options that dynamic and static quantization share."""
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    graph = onnx.load(float_graph)
    wanted = {*plan.layers.linear, *plan.layers.embeddings}
    nodes = [name for name in name_nodes(graph.graph, plan.model) if set(name.split()) <= wanted]
    split_outliers(graph.graph, plan)  # once the nodes have names, by which it finds the pairs
    return graph, {"per_channel": True, "reduce_range": reduce_range, "nodes_to_quantize": nodes}
