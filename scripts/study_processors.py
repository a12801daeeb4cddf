"""Scores artifacts as smaller processors would, to see whether they answer alike.

A processor without VNNI adds two products of 8 bits in 16 bits, and that sum can overflow. PyTorch and OpenVINO
multiply with oneDNN, which can be limited to a given instruction set. ONNX Runtime cannot be limited from outside. The
artifacts are scored on validation, with each limit in a process of its own.

    python scripts/study_processors.py weights/ptq:torchao weights/ptq:openvino
"""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.arguments import parse_args
from emotion.common.command import run
from emotion.common.errors import UserError
from emotion.common.files import ROOT, write_json
from emotion.common.machine import choose_threads, describe_run, run_script
from emotion.common.progress import Bar
from emotion.measure.benchmark import name_of, split_name
from emotion.measure.record import read_logits
from emotion.report.figures import write_studies
from emotion.report.pages import page_of

import numpy as np

# Values of oneDNN's ONEDNN_MAX_CPU_ISA, each of which allows the instruction sets below it too.
REFERENCE = "AVX512_CORE_VNNI"  # exact integer products, and all else in FP32
# Both limits are without VNNI; None is the processor as it is, which may compute in bfloat16.
LIMITS = ("AVX2", "AVX512_CORE", None)


@dataclass
class ProcessorArguments:
    """Which artifacts are scored, and where the results go."""

    artifacts: list[str] = field(metadata={"help": "folder:format words, of torchao or openvino."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    """Scores the artifacts and writes the page; ``argv``: the flags, those of the command line if not given."""
    (arguments,) = parse_args((ProcessorArguments,), positional="artifacts", argv=argv)
    results, named = Path(arguments.results_dir), [split_name(name) for name in arguments.artifacts]
    found = {}  # artifact -> limit -> what was compared
    for folder, format in Bar(named, desc="artifacts"):
        found[name_of(folder, format)] = compare_limits(folder, format)
    about = {"split": "validation", "reference": REFERENCE, "artifacts": found}
    measured = describe_run(choose_threads(None)) | about
    write_json(results / "ptq_processors.json", measured)
    print(write_studies(results)[page_of(results, "ptq")])


def compare_limits(folder: Path, format: str) -> dict[str, dict]:
    """Maps each limit of oneDNN to the share of equal labels and the gaps of the logits, against the reference.

    Both are null where the runtime does not work with a limit; `why_not` then holds its error.

    Raises:
        UserError: if the artifact cannot be scored with the reference.
    """
    with tempfile.TemporaryDirectory() as temporary:
        reference = score_limited(folder, format, REFERENCE, Path(temporary) / "reference")
        # A string is an error. Without a reference there is nothing to compare with.
        if isinstance(reference, str):
            raise UserError(f"{folder} could not be scored: {reference}")
        found = {}
        for limit in LIMITS:
            logits = score_limited(folder, format, limit, Path(temporary) / str(limit))
            if isinstance(logits, str):  # a result like any other: this runtime needs more than the limit allows
                found[str(limit)] = {"equal_labels": None, "largest_logit_gap": None, "why_not": logits}
                continue
            gaps = np.abs(logits - reference)
            found[str(limit)] = {
                "equal_labels": float((logits.argmax(axis=-1) == reference.argmax(axis=-1)).mean()),
                "mean_logit_gap": float(gaps.mean()),
                "largest_logit_gap": float(gaps.max()),
            }
    return found


def score_limited(folder: Path, format: str, limit: str | None, results: Path) -> np.ndarray | str:
    """The logits (rows, classes) that a processor with no more than ``limit`` gives, or the last line of its error."""
    # Set for a fresh process: oneDNN reads its limit once, while it is loaded.
    environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": limit} if limit else {})
    if limit == "AVX2":
        environment["ATEN_CPU_CAPABILITY"] = "avx2"  # PyTorch's own kernels
    words = ["--format", format, "--split", "validation", "--latency_runs", 0, "--results_dir", results]
    done = run_script("run_evaluation.py", folder, *words, env=environment, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    (path,) = (results / "predictions").glob("*.parquet")  # one: the folder was empty before
    return read_logits(path)


if __name__ == "__main__":
    run(main)
