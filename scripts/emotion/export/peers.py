"""Makes the peers of a model with other libraries and their defaults; they exist only while they are timed."""

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from emotion.evaluation import ctranslate2_peer
from emotion.evaluation.peers import COMPILED, CTRANSLATE2, PLAIN, file_of, find_obstacle, is_peer
from emotion.inference.model_folder import SHARED_FILES, weights_of
from emotion.utils.command import Bar, quiet_logging
from emotion.utils.errors import UserError, one_line


def make_peers(named: list[tuple[Path, str]], work: Path) -> dict[tuple[Path, str], tuple[Path, str]]:
    """Calls `make_peer` for each folder and format, with other libraries in a process of their own: they may crash.

    Returns:
        Folder and format -> folder and format to open. What this machine does not support and peers that failed are
        missing, and a message says why.

    Raises:
        UserError: if a folder lacks a format that is not a peer, or nothing is left.
    """
    opened = {}
    for folder, format in Bar(named, desc="prepared"):
        if obstacle := find_obstacle(folder, format):
            Bar.write(f"left out: {folder}:{format}: {obstacle}")
            continue
        try:
            make = _make_in_process if format in PLAIN else make_peer
            opened[folder, format] = make(folder, format, work)
        except UserError as error:
            if not is_peer(format):
                raise
            Bar.write(f"left out: {error}")
    if not opened:
        raise UserError("nothing is left to time")
    return opened


def _make_in_process(folder: Path, format: str, work: Path) -> tuple[Path, str]:
    """`make_peer` in a process of its own; whatever goes wrong there is a `UserError`."""
    # "spawn" starts a bare Python; a forked process would inherit the libraries that are loaded here already.
    fault, spawn = f"{folder}:{format} cannot be made", multiprocessing.get_context("spawn")
    with one_line(fault), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(make_peer, folder, format, work).result()
        except BrokenProcessPool as error:
            raise UserError(f"{fault}: its process died") from error


def make_peer(folder: Path, format: str, work: Path) -> tuple[Path, str]:
    """Makes the files of a peer in the folder ``work``; a format of the model folder needs none.

    Returns:
        The folder and the format to open. A compiled format keeps its suffix: it is compiled when it is opened.

    Raises:
        UserError: if the folder lacks the format that the peer is made from, or the machine has no compiler.
    """
    weights_of(folder, "pytorch" if format in PLAIN else file_of(format))
    # Checked now: torch.compile itself fails late, inside a worker, with a traceback of many pages.
    if format.endswith(COMPILED) and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError(f"{folder}:{format}: torch.compile needs a C++ compiler; install g++ or leave it out")
    if format not in PLAIN:
        return folder, format
    # The folder above is part of the name: several folders called `baseline` may be timed in one run.
    target = work / f"{folder.resolve().parent.name}-{folder.name}-{format}"
    target.mkdir(parents=True, exist_ok=True)
    for name in SHARED_FILES:
        shutil.copy(folder / name, target / name)
    if format == CTRANSLATE2:
        ctranslate2_peer.convert(folder, target)
    elif format == "openvino-plain":
        _export_openvino(folder, target / "openvino")
    else:
        _export_onnx(folder, target / "onnx", quantized=format == "onnx-dynamic")
    return target, PLAIN[format]


def _export_onnx(folder: Path, target: Path, quantized: bool) -> None:
    """Writes the exporter's own graph, or ONNX Runtime's dynamic INT8 of it with the default options."""
    from onnxruntime.quantization import quantize_dynamic
    from transformers import AutoTokenizer

    from emotion.export.onnx_export import export_onnx
    from emotion.inference.model_folder import load_trained_classifier

    path = target / "model.onnx"
    # Without the graph passes of this project, which a plain export does not have.
    export_onnx(load_trained_classifier(folder), AutoTokenizer.from_pretrained(folder), path, rewrite=False)
    if quantized:
        with quiet_logging():
            quantize_dynamic(path, target / "model_quantized.onnx")
        path.unlink()


def _export_openvino(folder: Path, target: Path) -> None:
    """Writes optimum-intel's export of the folder."""
    from optimum.intel import OVModelForSequenceClassification

    options = {"export": True, "compile": False, "trust_remote_code": False}
    with quiet_logging():
        OVModelForSequenceClassification.from_pretrained(folder, **options).save_pretrained(target)
