"""INT8 for ONNX Runtime and transformers.js, in one file."""

from pathlib import Path

from emotion.export.graph_passes import cls_only_products, merge_products, name_nodes, write_sums
from emotion.inference.model_folder import weights_of
from emotion.quantization.activation_ranges import fix_ranges
from emotion.quantization.layers import Plan
from emotion.quantization.outlier_channels import split_channels
from emotion.utils.command import quiet_logging


def quantize_onnx(plan: Plan, path: Path, reduce_range: bool = True) -> None:
    """Writes one INT8 file for ONNX Runtime, with the plan's ranges of activations.

    A plan without ranges gives a file with dynamic ones, which ONNX Runtime measures anew for every batch.

    Args:
        reduce_range: whether weights have 7 bits; see levels.py.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.onnx_model import OnnxModel

    path.parent.mkdir(parents=True, exist_ok=True)
    graph = load_float_graph(weights_of(plan.folder, "onnx")).model
    chosen = {*plan.layers.linear, *plan.layers.embeddings}
    nodes = [name for name in name_nodes(graph.graph, plan.model) if set(name.split()) <= chosen]
    split_channels(graph.graph, plan)  # finds the pairs by the names of the nodes
    with quiet_logging():
        quantize_dynamic(
            graph,
            path,
            op_types_to_quantize=["MatMul", "Attention", "Gather"],
            nodes_to_quantize=nodes,
            per_channel=True,
            reduce_range=reduce_range,
        )
    graph = OnnxModel(onnx.load(path))
    merge_products(graph)
    write_sums(graph, "Sub")
    if plan.ranges:
        fix_ranges(graph, plan.ranges)
    graph.save_model_to_file(str(path))


def load_float_graph(path: Path):
    """The FP32 file as ONNX Runtime's `OnnxModel`, with each linear layer's weight as the module has it."""
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    graph = OnnxModel(onnx.load(path))
    write_sums(graph, "Add")
    return graph


def cls_only_layers(plan: Plan) -> list[str]:
    """The linear layers that see the [CLS] token alone in the FP32 file of the plan: those of the last layer."""
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    # A file that computes the [CLS] token alone is the exporter's, which has named its nodes after the layers.
    graph = OnnxModel(onnx.load(weights_of(plan.folder, "onnx")))
    return [name for node in cls_only_products(graph) for name in node.name.split()]
