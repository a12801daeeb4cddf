"""INT8 for ONNX Runtime and transformers.js: one file, with activations rounded as they come or by fixed ranges."""

import tempfile
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from emotion.export.graph_passes import merge_products, name_nodes, products_of_first_token, write_sums
from emotion.export.onnx_export import export_onnx
from emotion.inference.model_folder import weights_of
from emotion.quantization.layers import CalibrationRows, Plan
from emotion.quantization.outlier_channels import split_outliers
from emotion.utils.command import quiet_logging


def quantize_onnx(plan: Plan, path: Path, reduce_range: bool = True, leave_out: tuple[str, ...] = ()) -> None:
    """Writes one INT8 file for ONNX Runtime, which measures the range of the activations anew for every batch.

    Args:
        reduce_range: weights of 7 bits; see levels.py.
        leave_out: passes of graph_passes.py that are not wanted, by their names.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.onnx_model import OnnxModel

    graph, options = _prepare(plan, weights_of(plan.folder, "onnx"), path, reduce_range)
    with quiet_logging():
        quantize_dynamic(graph, path, op_types_to_quantize=["MatMul", "Attention", "Gather"], **options)
    graph = OnnxModel(onnx.load(path))
    if "merge_products" not in leave_out:
        merge_products(graph)
    if "write_sums" not in leave_out:
        write_sums(graph, "Sub")
    graph.save_model_to_file(str(path))


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
        export_onnx(plan.model, AutoTokenizer.from_pretrained(plan.folder), unpacked, leave_out=("pack_projections",))
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


def load_float_graph(path: Path):
    """The FP32 file as ONNX Runtime's `OnnxModel`, with each linear layer's weight as the module has it."""
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    graph = OnnxModel(onnx.load(path))
    write_sums(graph, "Add")
    return graph


def layers_of_first_token(plan: Plan) -> list[str]:
    """The linear layers that see the first token alone in the FP32 file of the plan: those of the last layer."""
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    # A file that computes the first token alone is the exporter's, which has named its nodes after the layers.
    graph = OnnxModel(onnx.load(weights_of(plan.folder, "onnx")))
    return [name for node in products_of_first_token(graph) for name in node.name.split()]


def _prepare(plan: Plan, float_graph: Path, path: Path, reduce_range: bool) -> tuple:
    """The FP32 graph with its nodes named, and the options that dynamic and static quantization share."""
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = load_float_graph(float_graph).model
    wanted = {*plan.layers.linear, *plan.layers.embeddings}
    nodes = [name for name in name_nodes(graph.graph, plan.model) if set(name.split()) <= wanted]
    split_outliers(graph.graph, plan)  # once the nodes have names, by which it finds the pairs
    return graph, {"per_channel": True, "reduce_range": reduce_range, "nodes_to_quantize": nodes}
