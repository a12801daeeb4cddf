"""Measures other ways to make and to open the INT8 file for OpenVINO, timed in turns.

The file that the variants ship has one product for query, key and value, takes batches of any shape, and computes what
is not quantized in the precision that OpenVINO chooses. Beside it stand: the same model with three products, fixed
precisions, and a compiled model for each shape of batch. Many strings are answered with one stream per thread, and
with a single stream.

    python scripts/study_openvino.py weights/baseline
    python scripts/study_openvino.py weights/base/baseline --results_dir results/base
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.arguments import COUNT, parse_args
from emotion.common.command import run
from emotion.common.files import ROOT, write_json
from emotion.common.machine import THREADS, choose_threads, describe_run
from emotion.common.recipe import base_model_of, read_recipe_of
from emotion.measure.benchmark import Protocol, interleave
from emotion.measure.openvino_forms import FORMAT, FORMS
from emotion.model.pretrained import load_trained_classifier
from emotion.quantize.int8_openvino import quantize_openvino
from emotion.quantize.layers import CalibrationRows, Plan, find_layers
from emotion.quantize.onnx_graph import export_onnx
from emotion.quantize.scheme import copy_shared_files, draw_calibration_rows
from emotion.report.figures import write_studies
from emotion.report.pages import page_of
from emotion.task.dataset import get_split, load_task_of
from emotion.task.tokens import TextEncoder

from transformers import AutoTokenizer

CALIBRATION_ROWS = 300
ONE_STREAM = "-one-stream"  # it differs where callers compute side by side: from many strings alone
SHIPPED, APART = "as shipped", "query, key and value apart"


@dataclass
class OpenVinoArguments:
    """The baseline to make the files from, and how long they are timed."""

    baseline: str = field(metadata={"help": "Folder of run_baseline.py."})
    rounds: int = field(default=10, metadata={"help": "Turns that each form gets.", "choices": COUNT})
    strings: int = field(
        default=1024, metadata={"help": "Texts per turn from strings to labels, in one call.", "choices": COUNT}
    )
    threads: int | None = field(
        default=None, metadata={"help": "Threads to compute with; all if not given.", "choices": THREADS}
    )
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    """Makes the files, times them and writes the page; ``argv``: the flags, those of the command line if not given."""
    (arguments,) = parse_args((OpenVinoArguments,), positional="baseline", argv=argv)
    baseline, results = Path(arguments.baseline), Path(arguments.results_dir)
    task, threads = load_task_of(read_recipe_of(baseline)), choose_threads(arguments.threads)
    rows = draw_calibration_rows(task, TextEncoder(baseline), CALIBRATION_ROWS, seed=42)
    texts = list(get_split(task, "validation")["text"])
    with tempfile.TemporaryDirectory() as work:
        joined = make_file(baseline, Path(work) / "joined", rows)
        apart = make_file(baseline, Path(work) / "apart", rows, leave_out=("pack_projections",))
        forms = {SHIPPED: (joined, FORMAT), APART: (apart, FORMAT)}
        for form, title in FORMS.items():
            if form != ONE_STREAM:
                forms[title] = joined, f"{FORMAT}{form}"
        timed = interleave(forms, texts, Protocol(threads, arguments.rounds))
        # By themselves: a model compiled for each shape would meet new shapes in every turn.
        streams = {SHIPPED: (joined, FORMAT), FORMS[ONE_STREAM]: (joined, f"{FORMAT}{ONE_STREAM}")}
        protocol = Protocol(threads, arguments.rounds, strings_per_round=arguments.strings)
        from_strings = interleave(streams, texts, protocol)
    study = describe_run(threads) | {
        "base_model": base_model_of(baseline),
        "dataset": task.name,
        "rounds": arguments.rounds,
        "forms": timed,
        "streams": from_strings,
    }
    write_json(results / "openvino.json", study)
    print(write_studies(results)[page_of(results, "speed")])


def make_file(baseline: Path, folder: Path, rows: CalibrationRows, leave_out: tuple[str, ...] = ()) -> Path:
    """Makes the INT8 file without some rewrites of the graph; returns a folder that opens like any artifact."""
    model, floats = load_trained_classifier(baseline), folder / "floats"
    for made in (floats, folder):
        made.mkdir(parents=True, exist_ok=True)
        copy_shared_files(baseline, made)
    path = floats / "onnx" / "model.onnx"
    export_onnx(model, AutoTokenizer.from_pretrained(baseline), path, leave_out=leave_out)
    quantize_openvino(Plan(floats, model, find_layers(model)), folder / "openvino", rows)
    return folder


if __name__ == "__main__":
    run(main)
