"""INT8 for OpenVINO, by NNCF: weights per channel, and activations whose ranges the calibration rows fix."""

import io
import logging
import re
from pathlib import Path

from emotion.export.graph_passes import unpack_attention
from emotion.inference.model_folder import weights_of
from emotion.quantization.int8_onnx import load_float_graph
from emotion.quantization.layers import CalibrationRows, Plan, names_in_float
from emotion.utils.command import quiet_logging


def quantize_openvino(
    plan: Plan, folder: Path, rows: CalibrationRows, reduce_range: bool = True, smooth_quant: bool = False
) -> None:
    """Writes `openvino_model.xml` and `.bin`.

    Args:
        reduce_range: weights of 7 bits; see levels.py.
        smooth_quant: move outliers of the activations into the weights (Xiao et al., "SmoothQuant", ICML 2023).
    """
    import nncf
    from datasets import Dataset
    from optimum.intel import OVConfig, OVModelForSequenceClassification, OVQuantizationConfig, OVQuantizer

    nncf.set_log_level(logging.ERROR)
    kept = [f"{re.escape(name)}(/.*)?" for name in names_in_float(plan.model, plan.layers)]
    config = OVQuantizationConfig(
        sym=True,
        overflow_fix="enable" if reduce_range else "disable",
        # NNCF's strength for transformers; -1 turns it off.
        smooth_quant_alpha=0.95 if smooth_quant else -1,
        num_samples=len(rows.token_ids),
        # A pattern may fit nothing: OpenVINO folds token types, which are all zero, into a constant.
        ignored_scope=nncf.IgnoredScope(patterns=kept, validate=False),
    )
    with quiet_logging():
        exported = OVModelForSequenceClassification(convert(plan), config=plan.model.config, compile=False)
        taken = {port.get_any_name() for port in exported.model.inputs}
        batches = []
        for ids in rows.token_ids:
            arrays = rows.encoder.pad([ids])  # each row at its own length: padding would widen the ranges
            batches.append({name: array[0] for name, array in arrays.items() if name in taken})
        OVQuantizer(exported).quantize(
            calibration_dataset=Dataset.from_list(batches), ov_config=OVConfig(quantization_config=config)
        )
        exported.save_pretrained(folder)


def convert(plan: Plan):
    """The FP32 file of the plan as OpenVINO's model, with its rewrites and with operators named after the layers.

    OpenVINO's own export multiplies query, key and value one by one, and all tokens in the last layer.
    """
    import openvino

    graph = load_float_graph(weights_of(plan.folder, "onnx"))
    unpack_attention(graph)
    (last,) = [node for node in graph.nodes() if "logits" in node.output]
    model = openvino.convert_model(io.BytesIO(graph.model.SerializeToString()))
    # An operator that writes an output of the model bears the output's name.
    for operator in model.get_ops():
        if operator.get_friendly_name() == "logits":
            operator.set_friendly_name(last.name)
    return model
