"""INT8 for OpenVINO, by NNCF: weights per channel, and activations whose ranges the calibration rows fix."""

import logging
import re
from pathlib import Path

from emotion.common.quiet import quiet_logging
from emotion.quantize.layers import CalibrationRows, Plan, names_in_float


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
    # OpenVINO names an operator after the module that it was traced from.
    kept = [f"__module\\.{re.escape(name)}/.*" for name in names_in_float(plan.model, plan.layers)]
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
        exported = OVModelForSequenceClassification.from_pretrained(
            plan.folder, export=True, load_in_8bit=False, compile=False, trust_remote_code=False
        )
        taken = {port.get_any_name() for port in exported.model.inputs}
        batches = []
        for ids in rows.token_ids:
            arrays = rows.encoder.pad([ids])  # each row at its own length: padding would widen the ranges
            batches.append({name: array[0] for name, array in arrays.items() if name in taken})
        OVQuantizer(exported).quantize(
            calibration_dataset=Dataset.from_list(batches), ov_config=OVConfig(quantization_config=config)
        )
        exported.save_pretrained(folder)
