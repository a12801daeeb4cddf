"""INT8 for each runtime: torchao for Transformers, ONNX Runtime (also for transformers.js), and NNCF for OpenVINO."""

import io
import logging
import re
from importlib.util import find_spec
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.onnx_model import OnnxModel
from transformers import TorchAoConfig

from emotion.export import graph_passes as passes
from emotion.inference.model_folder import load_trained_classifier, save_compact, weights_of
from emotion.quantization.activation_ranges import fix_ranges
from emotion.quantization.layers import CalibrationRows, Plan, names_in_float
from emotion.quantization.outlier_channels import split_channels
from emotion.utils.command import quiet_logging

# How the file holds the embedding tables: floats of 8 bits. Transformers widens them to float32 when it opens the
# file, and a text looks its rows up in a plain table. torchao's own INT8 tables are restored whole for each look-up,
# all 30,522 rows of BERT's vocabulary: a text took seven times as long as in FP32.
TABLE_DTYPE = torch.float8_e4m3fn


def quantize_torchao(plan: Plan, folder: Path) -> torch.nn.Module:
    """Writes `model.safetensors`, with INT8 linear layers and float8 embedding tables, and `config.json`.

    Activations stay in float: an eager product of integers pays on no processor, and without VNNI it takes 8 to 25
    times as long as one of floats.

    Returns:
        The quantized model as `from_pretrained` opens it: its tables are float32, with the values of the file.
    """
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig  # here: it takes seconds

    # Without the settings of torch.compile, which would be those of every model of the process that opens the file.
    linear = Int8WeightOnlyConfig(set_inductor_config=False)
    # Keys that name a module would quantize its bias too; these name weights.
    config = TorchAoConfig(FqnToConfig({f"{name}.weight": linear for name in plan.layers.linear}))
    # It must be quantized while it is loaded: a model quantized in place cannot be saved.
    model = load_trained_classifier(plan.folder, quantization_config=config, dtype=torch.float32)
    tables = [model.get_submodule(name) for name in plan.layers.embeddings]
    for table in tables:
        table.weight.data = table.weight.data.to(TABLE_DTYPE)
    save_compact(model, folder)
    for table in tables:
        table.weight.data = table.weight.data.float()
    return model


def quantize_onnx(plan: Plan, path: Path, reduce_range: bool = True) -> None:
    """Writes one INT8 file for ONNX Runtime, with the plan's ranges of activations.

    A plan without ranges gives a file with dynamic ones, which ONNX Runtime measures anew for every batch.

    Args:
        reduce_range: whether weights have 7 bits; see `LARGEST_SAFE_WEIGHT`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = load_float_graph(weights_of(plan.folder, "onnx")).model
    chosen = {*plan.layers.linear, *plan.layers.embeddings}
    nodes = [name for name in passes.name_nodes(graph.graph, plan.model) if set(passes.modules_of(name)) <= chosen]
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
    passes.merge_products(graph)
    passes.write_sums(graph, "Sub")
    if plan.ranges:
        fix_ranges(graph, plan.ranges)
    passes.share_matrices(graph)
    graph.save_model_to_file(str(path))


def load_float_graph(path: Path):
    """The FP32 file as ONNX Runtime's `OnnxModel`, with each linear layer's weight as the module has it."""
    graph = OnnxModel(onnx.load(path))
    passes.write_sums(graph, "Add")
    return graph


def cls_only_layers(plan: Plan) -> list[str]:
    """The linear layers that see the [CLS] token alone in the FP32 file of the plan: those of the last layer."""
    # A file that computes the [CLS] token alone is the exporter's, which has named its nodes after the layers.
    graph = OnnxModel(onnx.load(weights_of(plan.folder, "onnx")))
    alone = passes.cls_only_products(graph)
    # A module that several layers share (ALBERT) sees all tokens in the others.
    shared = {name for node in graph.nodes() if node not in alone for name in passes.modules_of(node.name)}
    return [name for node in alone for name in passes.modules_of(node.name) if name not in shared]


def quantize_openvino(
    plan: Plan, folder: Path, rows: CalibrationRows, reduce_range: bool = True, smooth_quant: bool = False
) -> None:
    """Writes `openvino_model.xml` and `.bin`.

    Args:
        reduce_range: weights of 7 bits; see `LARGEST_SAFE_WEIGHT`.
        smooth_quant: move outliers of the activations into the weights (Xiao et al., "SmoothQuant", ICML 2023).
    """
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    kept = [f"{re.escape(name)}(/.*)?" for name in names_in_float(plan.model, plan.layers)]
    # A pattern may fit nothing: OpenVINO folds token types, which are all zero, into a constant.
    scope = nncf.IgnoredScope(patterns=kept, validate=False)
    alpha = 0.95 if smooth_quant else -1  # NNCF's strength for transformers; -1 turns it off
    with quiet_logging():
        exported = convert_to_openvino(plan)
        taken = {port.get_any_name() for port in exported.inputs}
        batches = []
        for ids in rows.token_ids:
            arrays = rows.encoder.pad([ids])  # each row at its own length: padding would widen the ranges
            batches.append({name: array for name, array in arrays.items() if name in taken})
        overflow_fix = "enable" if reduce_range else "disable"
        quantized = _quantize_graph(exported, plan.model.config, batches, scope, overflow_fix, alpha)
    plan.model.config.save_pretrained(folder)  # for optimum-intel
    openvino.save_model(quantized, folder / "openvino_model.xml", compress_to_fp16=False)


def _quantize_graph(graph, config, batches: list[dict], scope, overflow_fix: str, alpha: float):
    """The quantized `openvino.Model`, of optimum-intel, or of NNCF as optimum-intel calls it."""
    import nncf

    if find_spec("optimum"):
        from datasets import Dataset
        from optimum.intel import OVConfig, OVModelForSequenceClassification, OVQuantizationConfig, OVQuantizer

        options = OVQuantizationConfig(
            sym=True,
            overflow_fix=overflow_fix,
            smooth_quant_alpha=alpha,
            num_samples=len(batches),
            ignored_scope=scope,
        )
        exported = OVModelForSequenceClassification(graph, config=config, compile=False)
        dataset = Dataset.from_list([{name: array[0] for name, array in batch.items()} for batch in batches])
        OVQuantizer(exported).quantize(calibration_dataset=dataset, ov_config=OVConfig(quantization_config=options))
        return exported.model
    # optimum-intel does not install beside the newest Transformers.
    smooth_quant = nncf.AdvancedSmoothQuantParameters(matmul=alpha)
    return nncf.quantize(
        graph,
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
        ignored_scope=scope,
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix(overflow_fix), smooth_quant_alphas=smooth_quant
        ),
    )


def convert_to_openvino(plan: Plan):
    """The FP32 file of the plan as OpenVINO's model, with its rewrites and with operators named after the layers.

    OpenVINO's own export multiplies query, key and value one by one, and all tokens in the last layer.
    """
    import openvino

    graph = load_float_graph(weights_of(plan.folder, "onnx"))
    passes.unpack_attention(graph)
    (last,) = [node for node in graph.nodes() if "logits" in node.output]
    model = openvino.convert_model(io.BytesIO(graph.model.SerializeToString()))
    # An operator that writes an output of the model bears the output's name.
    for operator in model.get_ops():
        if operator.get_friendly_name() == "logits":
            operator.set_friendly_name(last.name)
    return model
