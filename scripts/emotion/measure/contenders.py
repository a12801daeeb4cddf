"""What is timed beside our own files: the plain alternatives that a user would pick, made on the fly from an artifact.

A contender is named 'folder:format' like an artifact; these formats exist only while they are timed.
"""

import shutil
from pathlib import Path

from emotion.common.errors import UserError
from emotion.model.artifact import SHARED_FILES, weights_of

COMPILED = "-compiled"  # ending of a format whose model goes through torch.compile
PLAIN = {  # what another library makes of the FP32 folder when it is left to its defaults
    "onnx-plain": "onnx",
    "onnx-dynamic": "onnx",
    "openvino-plain": "openvino",
}
TITLES = {
    "pytorch": "PyTorch, FP32",
    "bf16": "PyTorch, BF16",
    "pytorch-compiled": "torch.compile, FP32",
    "bf16-compiled": "torch.compile, BF16",
    "torchao-compiled": "torch.compile, torchao",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "onnx-plain": "ONNX Runtime, plain FP32",
    "onnx-dynamic": "ONNX Runtime, plain INT8",
    "openvino-plain": "OpenVINO, plain",
}


def is_alternative(format: str) -> bool:
    return format in PLAIN or format.endswith(COMPILED)


def make_contender(folder: Path, format: str, work: Path) -> tuple[Path, str]:
    """Makes what the format needs, in the folder ``work``.

    Returns:
        The folder and the format to open; the format of a compiled one keeps its ending.

    Raises:
        UserError: if the folder does not have what it is made from, or there is no compiler.
    """
    if format.endswith(COMPILED):
        weights_of(folder, format.removesuffix(COMPILED))
        if not (shutil.which("g++") or shutil.which("clang++")):
            raise UserError(f"{folder}:{format}: torch.compile needs a C++ compiler; install g++ or leave it out")
        return folder, format
    weights_of(folder, "pytorch" if format in PLAIN else format)
    if format not in PLAIN:
        return folder, format
    made = work / f"{folder.resolve().parent.name}-{folder.name}-{format}"
    made.mkdir(parents=True, exist_ok=True)
    for name in SHARED_FILES:
        shutil.copy(folder / name, made / name)
    if format == "openvino-plain":
        _export_openvino(folder, made / "openvino")
    else:
        _export_onnx(folder, made / "onnx", quantized=format == "onnx-dynamic")
    return made, PLAIN[format]


def _export_onnx(folder: Path, target: Path, quantized: bool) -> None:
    """The exporter's own graph, and ONNX Runtime's dynamic INT8 of it with no option given."""
    from emotion.common.quiet import quiet_logging
    from emotion.model.pretrained import load_trained_classifier
    from emotion.quantize.onnx_graph import export_onnx

    from onnxruntime.quantization import quantize_dynamic
    from transformers import AutoTokenizer

    path = target / "model.onnx"
    export_onnx(load_trained_classifier(folder), AutoTokenizer.from_pretrained(folder), path, pack=False, fuse=False)
    if quantized:
        with quiet_logging():
            quantize_dynamic(path, target / "model_quantized.onnx")
        path.unlink()


def _export_openvino(folder: Path, target: Path) -> None:
    from emotion.common.quiet import quiet_logging

    from optimum.intel import OVModelForSequenceClassification

    with quiet_logging():
        OVModelForSequenceClassification.from_pretrained(
            folder, export=True, compile=False, trust_remote_code=False
        ).save_pretrained(target)
