"""INT8 for OpenVINO, by NNCF."""

import logging
import re
from pathlib import Path

from emotion.common.quiet import quiet_logging
from emotion.quantize.layers import Layers, names_in_float
from emotion.task.tokens import TextEncoder


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
    with quiet_logging():
        exported = OVModelForSequenceClassification.from_pretrained(
            baseline, export=True, load_in_8bit=False, compile=False, trust_remote_code=False
        )
        taken = {port.get_any_name() for port in exported.model.inputs}
        rows = [{name: array[0] for name, array in encoder.pad([ids]).items() if name in taken} for ids in token_ids]
        OVQuantizer(exported).quantize(
            calibration_dataset=Dataset.from_list(rows), ov_config=OVConfig(quantization_config=config)
        )
        exported.save_pretrained(folder)
