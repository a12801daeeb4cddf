"""The plain alternatives that a user would try first, made from an artifact and timed beside our own files.

A contender is named 'folder:format' like an artifact. The formats below exist only while they are timed.
"""

import multiprocessing
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from emotion.common.errors import UserError, one_line
from emotion.common.machine import has_bf16
from emotion.common.progress import Bar
from emotion.measure import ctranslate2_peer, openvino_forms
from emotion.measure.inspection import describe_scheme, summarize_matrices
from emotion.model.artifact import FORMATS_OF_ROOT, SHARED_FILES, files_to_serve, read_config, weights_of
from emotion.model.classifier import open_artifact

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
    """The format whose file a contender opens: `pytorch` of `pytorch-compiled`, `openvino` of `openvino-f32`."""
    if openvino_forms.is_form(format):
        return openvino_forms.FORMAT
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
        return f"needs {ctranslate2_peer.PACKAGE}, which make peers installs"
    opened = file_of(format)
    if not any(opened in formats for formats in FORMATS_OF_ROOT.values()) or not (folder / "config.json").is_file():
        return None  # no format of PyTorch's; what is wrong with a folder is said when it is opened
    # "pytorch" and "bf16" are opened as they say, the others in the type that config.json names.
    stored = None if opened == "pytorch" else read_config(folder).get("dtype")
    if (opened == "bf16" or stored == "bfloat16") and not has_bf16(use_cpu=True):
        return "it computes in bfloat16, for which this processor has no instructions"
    return None


def make_contenders(named: list[tuple[Path, str]], work: Path) -> dict[tuple[Path, str], tuple[Path, str]]:
    """Makes each by `make_contender`, what libraries make in a process of its own: it may die there.

    Returns:
        What was named -> what to open. What a library could not make is missing, and a line says why.

    Raises:
        UserError: if a format of an artifact is not there, or nothing is left.
    """
    made = {}
    for folder, format in Bar(named, desc="made"):
        try:
            made[folder, format] = (_make_apart if format in PLAIN else make_contender)(folder, format, work)
        except UserError as error:
            if not is_alternative(format):
                raise
            Bar.write(f"left out: {error}")
    if not made:
        raise UserError("nothing is left to time")
    return made


def _make_apart(folder: Path, format: str, work: Path) -> tuple[Path, str]:
    """`make_contender` in a process of its own; whatever goes wrong there is a `UserError`."""
    # "spawn" starts a bare Python; a forked process would inherit the libraries that are loaded here already.
    fault, spawn = f"{folder}:{format} cannot be made", multiprocessing.get_context("spawn")
    with one_line(fault), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(make_contender, folder, format, work).result()
        except BrokenProcessPool as error:  # its own message speaks of futures
            raise UserError(f"{fault}: the process that made it died") from error


def make_contender(folder: Path, format: str, work: Path) -> tuple[Path, str]:
    """Makes the files that the format needs, in the folder ``work``; a format of the artifact needs none.

    Returns:
        The folder and the format to open. A compiled format keeps its ending: it is compiled when it is opened.

    Raises:
        UserError: if the folder lacks the format that it is made from, or the machine has no compiler.
    """
    if format.endswith(COMPILED):
        weights_of(folder, file_of(format))  # raises here, before anything is timed
        # Found out now: torch.compile itself fails late, inside a worker, and with a trace of many pages.
        if not (shutil.which("g++") or shutil.which("clang++")):
            raise UserError(f"{folder}:{format}: torch.compile needs a C++ compiler; install g++ or leave it out")
        return folder, format
    weights_of(folder, "pytorch" if format in PLAIN else file_of(format))
    if format not in PLAIN:
        return folder, format
    # The folder above is part of the name: several folders called `baseline` may be timed in one run.
    made = work / f"{folder.resolve().parent.name}-{folder.name}-{format}"
    made.mkdir(parents=True, exist_ok=True)
    for name in SHARED_FILES:
        shutil.copy(folder / name, made / name)
    if format == CTRANSLATE2:
        ctranslate2_peer.convert(folder, made)
    elif format == "openvino-plain":
        _export_openvino(folder, made / "openvino")  # which it opens in bfloat16 where it can
    else:
        _export_onnx(folder, made / "onnx", quantized=format == "onnx-dynamic")
    return made, PLAIN[format]


def _export_onnx(folder: Path, target: Path, quantized: bool) -> None:
    """The exporter's own graph, or ONNX Runtime's dynamic INT8 of it with no option given."""
    from emotion.common.quiet import quiet_logging
    from emotion.model.pretrained import load_trained_classifier
    from emotion.quantize.onnx_graph import export_onnx

    from onnxruntime.quantization import quantize_dynamic
    from transformers import AutoTokenizer

    path = target / "model.onnx"
    # Not rewritten: that is our own work on the graph, which a plain export does not have.
    export_onnx(load_trained_classifier(folder), AutoTokenizer.from_pretrained(folder), path, rewrite=False)
    if quantized:
        with quiet_logging():
            quantize_dynamic(path, target / "model_quantized.onnx")
        path.unlink()  # the FP32 graph, which nobody opens here


def _export_openvino(folder: Path, target: Path) -> None:
    """The file that optimum-intel makes of the folder."""
    from emotion.common.quiet import quiet_logging

    from optimum.intel import OVModelForSequenceClassification

    with quiet_logging():
        OVModelForSequenceClassification.from_pretrained(
            folder, export=True, compile=False, trust_remote_code=False
        ).save_pretrained(target)


def open_contender(folder: Path, format: str, threads: int, calls: int = 1):
    """Opens what `make_contender` returned; arguments, result and errors are those of `open_artifact`."""
    if format == CTRANSLATE2:
        return ctranslate2_peer.PeerClassifier(folder, threads, calls)
    if openvino_forms.is_form(format):
        return openvino_forms.open_form(folder, format, threads, calls)
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


def describe_contender(runtime, folder: Path, format: str) -> dict:
    """The field `scheme` of an opened contender, as `describe_scheme` counts it."""
    if format == CTRANSLATE2:
        return summarize_matrices(*ctranslate2_peer.list_matrices(folder), format)
    return describe_scheme(runtime, weights_of(folder, file_of(format)), file_of(format))


def bytes_of(folder: Path, format: str) -> int:
    """Bytes of all files that an answer of a contender needs."""
    if format == CTRANSLATE2:  # its folder holds nothing else
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(files_to_serve(folder, file_of(format)).values())
