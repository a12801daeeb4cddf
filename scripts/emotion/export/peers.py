"""The peers that other libraries make of an artifact, with their defaults; they exist only while they are timed."""

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from emotion.evaluation import ctranslate2_peer
from emotion.evaluation.peers import COMPILED, CTRANSLATE2, PLAIN, file_of, is_alternative
from emotion.inference.model_folder import SHARED_FILES, weights_of
from emotion.utils.errors import UserError, one_line
from emotion.utils.progress import Bar


def make_peers(named: list[tuple[Path, str]], work: Path) -> dict[tuple[Path, str], tuple[Path, str]]:
    """Makes each by `make_peer`, what libraries make in a process of its own: it may die there.

    Returns:
        What was named -> what to open. What a library could not make is missing, and a line says why.

    Raises:
        UserError: if a format of an artifact is not there, or nothing is left.
    """
    made = {}
    for folder, format in Bar(named, desc="made"):
        try:
            made[folder, format] = (_make_apart if format in PLAIN else make_peer)(folder, format, work)
        except UserError as error:
            if not is_alternative(format):
                raise
            Bar.write(f"left out: {error}")
    if not made:
        raise UserError("nothing is left to time")
    return made


def _make_apart(folder: Path, format: str, work: Path) -> tuple[Path, str]:
    """`make_peer` in a process of its own; whatever goes wrong there is a `UserError`."""
    # "spawn" starts a bare Python; a forked process would inherit the libraries that are loaded here already.
    fault, spawn = f"{folder}:{format} cannot be made", multiprocessing.get_context("spawn")
    with one_line(fault), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(make_peer, folder, format, work).result()
        except BrokenProcessPool as error:  # its own message speaks of futures
            raise UserError(f"{fault}: the process that made it died") from error


def make_peer(folder: Path, format: str, work: Path) -> tuple[Path, str]:
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
    from onnxruntime.quantization import quantize_dynamic
    from transformers import AutoTokenizer

    from emotion.export.onnx_export import export_onnx
    from emotion.inference.pretrained import load_trained_classifier
    from emotion.utils.command import quiet_logging

    path = target / "model.onnx"
    # Not rewritten: that is our own work on the graph, which a plain export does not have.
    export_onnx(load_trained_classifier(folder), AutoTokenizer.from_pretrained(folder), path, rewrite=False)
    if quantized:
        with quiet_logging():
            quantize_dynamic(path, target / "model_quantized.onnx")
        path.unlink()  # the FP32 graph, which nobody opens here


def _export_openvino(folder: Path, target: Path) -> None:
    """The file that optimum-intel makes of the folder."""
    from optimum.intel import OVModelForSequenceClassification

    from emotion.utils.command import quiet_logging

    with quiet_logging():
        OVModelForSequenceClassification.from_pretrained(
            folder, export=True, compile=False, trust_remote_code=False
        ).save_pretrained(target)
