"""The plain alternatives that a user would try first, made from an artifact and timed beside our own files.

A contender is named 'folder:format' like an artifact. The formats below exist only while they are timed.
"""

import shutil
from pathlib import Path

from emotion.common.errors import UserError
from emotion.measure import ctranslate2_peer, llamacpp_peer, openvino_forms
from emotion.measure.inspection import describe_scheme, summarize_matrices
from emotion.model.artifact import SHARED_FILES, files_to_serve, weights_of
from emotion.model.classifier import open_artifact

COMPILED = "-compiled"  # ending of a format whose model goes through torch.compile
# Libraries that artifacts do not hold, by the format that each makes of the FP32 folder: modules of equal members
PEERS = {peer.FORMAT: peer for peer in (ctranslate2_peer, llamacpp_peer)}
# Made by another library, with its defaults, from the FP32 folder -> the format in which the result is opened.
PLAIN = {
    "onnx-plain": "onnx",
    "onnx-dynamic": "onnx",
    "openvino-plain": "openvino",
    **{format: format for format in PEERS},
}
TITLES = {  # how tables call them
    "pytorch-compiled": "torch.compile, FP32",
    "bf16-compiled": "torch.compile, BF16",
    "torchao-compiled": "torch.compile, torchao",
    "onnx-plain": "ONNX Runtime, plain FP32",
    "onnx-dynamic": "ONNX Runtime, plain INT8",
    "openvino-plain": "OpenVINO, plain",
    ctranslate2_peer.FORMAT: "CTranslate2, INT8",
    llamacpp_peer.FORMAT: "llama.cpp, Q8_0",
}


def is_alternative(format: str) -> bool:
    """Whether the format is made here, so that no artifact holds it."""
    return format in PLAIN or format.endswith(COMPILED)


def file_of(format: str) -> str:
    """The format whose file a contender opens: `pytorch` of `pytorch-compiled`, `openvino` of `openvino-f32`."""
    return openvino_forms.FORMAT if openvino_forms.is_form(format) else format.removesuffix(COMPILED)


def leave_out_missing(named: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """The folders and formats that can be timed here; prints a line for each that needs a package which is not here.

    Raises:
        UserError: if nothing is left.
    """
    kept = []
    for folder, format in named:
        peer = PEERS.get(format)
        if peer and not peer.is_installed():
            print(f"left out: {folder}:{format} needs {peer.PACKAGE}; make {peer.MAKE_TARGET} installs it")
        else:
            kept.append((folder, format))
    if not kept:
        raise UserError("nothing is left to time")
    return kept


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
    if format in PEERS:
        PEERS[format].convert(folder, made)
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
    if format in PEERS:
        return PEERS[format].PeerClassifier(folder, threads, calls)
    if openvino_forms.is_form(format):
        return openvino_forms.open_form(folder, format, threads, calls)
    runtime = open_artifact(folder, file_of(format), threads, calls)
    if format.endswith(COMPILED):
        runtime.compile()
    return runtime


def describe_contender(runtime, folder: Path, format: str) -> dict:
    """The field `scheme` of an opened contender, as `describe_scheme` counts it."""
    if format in PEERS:
        return summarize_matrices(*PEERS[format].list_matrices(folder), format)
    return describe_scheme(runtime, weights_of(folder, file_of(format)), file_of(format))


def bytes_of(folder: Path, format: str) -> int:
    """Bytes of all files that an answer of a contender needs."""
    if format in PEERS:  # its folder holds nothing else
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(files_to_serve(folder, file_of(format)).values())
