"""The plain alternatives that a user would try first, made from an artifact and timed beside our own files.

A peer is named 'folder:format' like an artifact. The formats below exist only while they are timed.
"""

import warnings
from pathlib import Path

from emotion.evaluation import ctranslate2_peer
from emotion.evaluation.inspection import describe_scheme, summarize_matrices
from emotion.inference.model_folder import FORMATS_OF_ROOT, files_to_serve, read_config, weights_of
from emotion.inference.runtimes import open_artifact
from emotion.utils.errors import UserError
from emotion.utils.machine import has_bf16

COMPILED = "-compiled"  # ending of a format whose model goes through torch.compile
DYNAMIC = "pytorch-dynamic"  # PyTorch's own dynamic INT8, made of the FP32 model when it is opened
CTRANSLATE2 = ctranslate2_peer.FORMAT
# Made by another library, with its defaults, from the FP32 folder -> the format in which the result is opened.
PLAIN = {"onnx-plain": "onnx", "onnx-dynamic": "onnx", "openvino-plain": "openvino", CTRANSLATE2: CTRANSLATE2}
TITLES = {  # how tables call them
    "pytorch-compiled": "torch.compile, FP32",
    "bf16-compiled": "torch.compile, BF16",
    "torchao-compiled": "torch.compile, torchao",
    DYNAMIC: "PyTorch, quantize_dynamic",
    "onnx-plain": "ONNX Runtime, plain FP32",
    "onnx-dynamic": "ONNX Runtime, plain INT8",
    "openvino-plain": "OpenVINO, plain",
    CTRANSLATE2: "CTranslate2, INT8",
}


def is_alternative(format: str) -> bool:
    """Whether the format is made here, so that no artifact holds it."""
    return format in PLAIN or format == DYNAMIC or format.endswith(COMPILED)


def file_of(format: str) -> str:
    """The format whose file a peer opens: `pytorch` of `pytorch-compiled`."""
    return "pytorch" if format == DYNAMIC else format.removesuffix(COMPILED)


def leave_out_unfit(named: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """The folders and formats that can be timed here; prints a line for each that cannot, or would take hours.

    Raises:
        UserError: if nothing is left.
    """
    kept = []
    for folder, format in named:
        if reason := find_obstacle(folder, format):
            print(f"left out: {folder}:{format}: {reason}")
        else:
            kept.append((folder, format))
    if not kept:
        raise UserError("nothing is left to time")
    return kept


def find_obstacle(folder: Path, format: str) -> str | None:
    """Why a format is not timed on this machine; None if it is.

    Without the instructions for it, PyTorch's bfloat16 takes ten times as long as FP32: nobody would use it.
    """
    if format == CTRANSLATE2 and not ctranslate2_peer.is_installed():
        return f"needs {ctranslate2_peer.PACKAGE}, which make benchmark installs"
    opened = file_of(format)
    if not any(opened in formats for formats in FORMATS_OF_ROOT.values()) or not (folder / "config.json").is_file():
        return None  # no format of PyTorch's; what is wrong with a folder is said when it is opened
    # "pytorch" and "bf16" are opened as they say, the others in the type that config.json names.
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
        runtime.model = _quantize_dynamic(runtime.model)
    return runtime


def _quantize_dynamic(model):
    """The model as PyTorch's tutorial on dynamic quantization of BERT makes it: all linear layers, the head too."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that is what makes it a peer and no format of ours
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def summarize_peer(runtime, folder: Path, format: str) -> dict:
    """The field `scheme` of an opened peer, as `describe_scheme` counts it."""
    if format == CTRANSLATE2:
        return summarize_matrices(*ctranslate2_peer.list_matrices(folder), format)
    return describe_scheme(runtime, weights_of(folder, file_of(format)), file_of(format))


def bytes_of(folder: Path, format: str) -> int:
    """Bytes of all files that an answer of a peer needs."""
    if format == CTRANSLATE2:  # its folder holds nothing else
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(files_to_serve(folder, file_of(format)).values())
