"""Peers: what other libraries make of a model with their defaults, timed beside the formats of its folder.

A peer is named 'folder:format' like a model of the project. The formats below exist only while they are timed.
"""

import warnings
from pathlib import Path

from emotion.evaluation import ctranslate2_peer
from emotion.evaluation.inspection import describe_scheme
from emotion.inference.model_folder import FORMATS_OF_ROOT, files_to_serve, read_config, weights_of
from emotion.inference.runtimes import open_artifact
from emotion.utils.machine import has_bf16

COMPILED = "-compiled"  # suffix of a format whose model goes through torch.compile
DYNAMIC = "pytorch-dynamic"  # PyTorch's dynamic INT8, made from the FP32 model when it is opened
CTRANSLATE2 = ctranslate2_peer.FORMAT
# What another library makes from the FP32 folder, with its defaults -> the format in which the result is opened.
PLAIN = {"onnx-plain": "onnx", "onnx-dynamic": "onnx", "openvino-plain": "openvino", CTRANSLATE2: CTRANSLATE2}
TITLES = {  # in tables
    "pytorch-compiled": "torch.compile, FP32",
    "bf16-compiled": "torch.compile, BF16",
    "torchao-compiled": "torch.compile, torchao",
    DYNAMIC: "PyTorch, quantize_dynamic",
    "onnx-plain": "ONNX Runtime, plain FP32",
    "onnx-dynamic": "ONNX Runtime, plain INT8",
    "openvino-plain": "OpenVINO, plain",
    CTRANSLATE2: "CTranslate2, INT8",
}


def is_peer(format: str) -> bool:
    """Whether the format is made only to be timed, so that no model folder has it."""
    return format in PLAIN or format == DYNAMIC or format.endswith(COMPILED)


def file_of(format: str) -> str:
    """The format whose file a peer opens: `pytorch` for `pytorch-compiled`."""
    return "pytorch" if format == DYNAMIC else format.removesuffix(COMPILED)


def find_obstacle(folder: Path, format: str) -> str | None:
    """Why a format is not timed on this machine; None if it is.

    Without instructions for it, PyTorch's bfloat16 takes ten times as long as FP32: nobody would use it.
    """
    if format == CTRANSLATE2 and not ctranslate2_peer.is_installed():
        return f"needs {ctranslate2_peer.PACKAGE}, which make benchmark installs"
    opened = file_of(format)
    if not any(opened in formats for formats in FORMATS_OF_ROOT.values()) or not (folder / "config.json").is_file():
        return None  # not a format of PyTorch; what is wrong with a folder is reported when it is opened
    # "pytorch" and "bf16" are opened in their own type, the others in the type that config.json names.
    stored = None if opened == "pytorch" else read_config(folder).get("dtype")
    if (opened == "bf16" or stored == "bfloat16") and not has_bf16(use_cpu=True):
        return "it computes in bfloat16, for which this processor has no instructions"
    return None


def open_peer(folder: Path, format: str, threads: int, calls: int = 1):
    """Opens what `make_peer` returned; arguments, result and errors are those of `open_artifact`."""
    if format == CTRANSLATE2:
        return ctranslate2_peer.PeerClassifier(folder, threads, calls)
    runtime = open_artifact(folder, file_of(format), threads, calls)
    if format.endswith(COMPILED):
        runtime.compile()
    elif format == DYNAMIC:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # All linear layers, with the head, as in PyTorch's tutorial on dynamic quantization of BERT
            layers = {torch.nn.Linear}
            runtime.model = torch.ao.quantization.quantize_dynamic(runtime.model, layers, dtype=torch.qint8)
    return runtime


def describe_peer(runtime, folder: Path, format: str) -> dict:
    """Returns the `scheme` of an opened peer or model, as `describe_scheme` does."""
    if format == CTRANSLATE2:
        return ctranslate2_peer.SCHEME
    return describe_scheme(runtime, weights_of(folder, file_of(format)), file_of(format))


def bytes_of(folder: Path, format: str) -> int:
    """The bytes of all files that inference with a peer or model needs."""
    if format == CTRANSLATE2:  # its folder has no other files
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(files_to_serve(folder, file_of(format)).values())
