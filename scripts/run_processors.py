"""Scores artifacts as smaller processors would: do they answer alike?

A processor without VNNI adds two products of 8 bits in 16 bits, which can overflow. oneDNN, which multiplies for
PyTorch and OpenVINO, can be told to use no more than a given instruction set; ONNX Runtime cannot be limited from
outside. Scored on validation, each limit in a process of its own.

    python scripts/run_processors.py weights/ptq:torchao weights/ptq:openvino
"""

import datetime
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from utils_cli import ROOT, UserError, parse_flags, run

# isort: split
import numpy as np
from run_benchmark import name_of, split_name
from tqdm import tqdm
from utils_artifact import choose_threads
from utils_files import write_json, write_text
from utils_record import git_commit, markdown_table, read_json, read_logits
from utils_ruler import describe_environment

REFERENCE = "AVX512_CORE_VNNI"  # exact integer products, and all else in FP32
LIMITS = ("AVX2", "AVX512_CORE", None)


@dataclass
class ProcessorArguments:
    """What is scored, and where the results go."""

    artifacts: list[str] = field(metadata={"help": "folder:format words, of torchao or openvino."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    (arguments,) = parse_flags((ProcessorArguments,), positional="artifacts", argv=argv)
    results, named = Path(arguments.results_dir), [split_name(name) for name in arguments.artifacts]
    found = {
        name_of(folder, format): compare_limits(folder, format) for folder, format in tqdm(named, desc="artifacts")
    }
    about = {"date": datetime.date.today().isoformat(), "git_commit": git_commit(), "split": "validation",
             "reference": REFERENCE, "environment": describe_environment(choose_threads(None))}  # fmt: skip
    write_json(results / "ptq_processors.json", about | {"artifacts": found})
    for path, text in render_pages(results).items():
        write_text(path, text)
        print(text)


def compare_limits(folder: Path, format: str) -> dict:
    """Maps each limit of oneDNN to the share of equal labels and the gaps of the logits against the reference.

    Both are null where the runtime does not work with a limit; `why_not` is then what it said.
    """
    with tempfile.TemporaryDirectory() as temporary:
        reference = score_limited(folder, format, REFERENCE, Path(temporary) / "reference")
        if isinstance(reference, str):
            raise UserError(f"{folder} could not be scored: {reference}")
        found = {}
        for limit in LIMITS:
            logits = score_limited(folder, format, limit, Path(temporary) / str(limit))
            if isinstance(logits, str):
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
    """The logits (rows, classes) that a processor with no more than ``limit`` gives, or its error."""
    environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": limit} if limit else {})
    if limit == "AVX2":
        environment["ATEN_CPU_CAPABILITY"] = "avx2"  # PyTorch's own kernels
    command = [sys.executable, str(ROOT / "scripts" / "run_evaluation.py"), str(folder), "--format", format,
               "--split", "validation", "--latency_runs", "0", "--results_dir", str(results)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    (path,) = (results / "predictions").glob("*.parquet")
    return read_logits(path)


def render_pages(results: Path) -> dict[Path, str]:
    """The page, from its JSON file alone; none where there is no such file."""
    if not (results / "ptq_processors.json").is_file():
        return {}
    measured = read_json(results / "ptq_processors.json")
    rows = [
        [name, "none" if limit == "None" else limit, *shown(one)]
        for name, limits in measured["artifacts"].items()
        for limit, one in limits.items()
    ]
    head = ["artifact", "limit of oneDNN", "equal labels %", "mean gap", "largest gap"]
    page = (
        "# The same answers on smaller processors\n\n"
        "A processor without VNNI adds two products of 8 bits in 16 bits: with an 8-bit activation they overflow if a "
        "weight exceeds 64 (2 x 255 x 64 < 2^15), so the shipped weights have 7 bits. ONNX Runtime cannot be limited "
        "from outside; there the largest weight, counted in its record, is the proof. PyTorch and OpenVINO multiply "
        "with oneDNN, which was limited; labels and logits are compared with the limit "
        f"{REFERENCE}, where integer products are exact and all else is FP32. Without a limit OpenVINO computes what "
        "is not INT8 in bfloat16, if the processor has it. A dash: the runtime does not work so limited.\n\n"
        f"{markdown_table(head, rows)}\n{measured['environment']['cpu']}, {measured['date']}.\n"
    )
    return {results / "ptq_processors.md": page}


def shown(one: dict) -> list[str]:
    if one["equal_labels"] is None:
        return ["-", "-", "-"]
    gaps = [f"{one['mean_logit_gap']:.4f}", f"{one['largest_logit_gap']:.3f}"]
    return [f"{100 * one['equal_labels']:.2f}", *gaps]


if __name__ == "__main__":
    run(main)
