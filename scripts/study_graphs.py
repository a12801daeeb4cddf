"""Measures what each rewrite of the ONNX graph gives: the INT8 file with all of them, and without one at a time.

Beside them stand forms that were tried and not taken. All are made from one baseline and timed in turns. In floats the
rewrites change nothing; the labels that differ, since activations are rounded to another integer, are counted on
validation.

    python scripts/study_graphs.py weights/baseline
    python scripts/study_graphs.py weights/base/baseline --results_dir results/base
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.arguments import COUNT, parse_args
from emotion.common.command import run
from emotion.common.files import ROOT, write_json
from emotion.common.machine import THREADS, choose_threads, describe_run
from emotion.common.progress import Bar
from emotion.common.recipe import base_model_of, read_recipe_of
from emotion.measure.benchmark import Protocol, interleave
from emotion.measure.sensitivity import compare, logits_of, validation_rows
from emotion.model.artifact import weights_of
from emotion.model.pretrained import load_trained_classifier
from emotion.quantize.graph_passes import MICROSOFT, constant_of, tidy
from emotion.quantize.int8_onnx import quantize_onnx
from emotion.quantize.layers import Plan, find_layers
from emotion.quantize.onnx_graph import export_onnx
from emotion.quantize.scheme import copy_shared_files
from emotion.report.figures import write_studies
from emotion.report.pages import page_of
from emotion.task.dataset import load_task_of

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.transformers.onnx_model import OnnxModel
from transformers import AutoTokenizer

# What is timed -> the passes that are left out.
REWRITES = {
    "all rewrites": (),
    "without the first token alone": ("keep_first_token",),
    "without sums as differences": ("write_sums",),
    "without bias and GELU in the product": ("merge_products",),
    "without projections in one product": ("pack_projections",),
    "none of these": ("keep_first_token", "write_sums", "merge_products", "pack_projections"),
}


def drop_mask(graph) -> None:
    """Takes the padding mask from attention: right only where all texts of a batch are equally long."""
    for node in graph.nodes():
        place = {"QAttention": 5, "MultiHeadAttention": 4}.get(node.op_type)
        if place and len(node.input) > place:
            node.input[place] = ""
    tidy(graph)


def fix_ranges(graph) -> None:
    """Rounds activations by one fixed range, so that no pass over them has to find it; for the time it takes alone."""
    scale, zero = "fixed/scale", "fixed/zero"
    graph.add_initializer(numpy_helper.from_array(np.float32(0.05), scale))
    graph.add_initializer(numpy_helper.from_array(np.uint8(128), zero))
    for node in graph.get_nodes_by_op_type("DynamicQuantizeMatMul"):
        states, weight, weight_scale, _, bias = node.input
        rounded = f"{node.output[0]}/rounded"
        inputs = [rounded, weight, scale, weight_scale, zero, "", bias]
        graph.add_node(helper.make_node("QuantizeLinear", [states, scale, zero], [rounded]))
        graph.add_node(helper.make_node("MatMulIntegerToFloat", inputs, list(node.output), domain=MICROSOFT))
        graph.remove_node(node)
    tidy(graph)


def widen_embeddings(graph) -> None:
    """Holds the embeddings in float32, so that no row has to be scaled when it is looked up."""
    producers = graph.output_name_to_node()
    for node in graph.get_nodes_by_op_type("DequantizeLinear"):
        look_up = producers[node.input[0]]
        integers, scale, zero = (constant_of(graph, name) for name in (look_up.input[0], *node.input[1:]))
        values = (integers.astype(np.float32) - zero) * scale
        table = numpy_helper.from_array(values, f"{look_up.input[0]}/float")
        graph.add_initializer(table)
        graph.add_node(helper.make_node("Gather", [table.name, look_up.input[1]], list(node.output)))
        graph.remove_node(node)
    tidy(graph)


# Tried and not taken -> the change to the file with all rewrites.
TRIED = {
    "no mask, for texts of equal length": drop_mask,
    "fixed ranges of activations": fix_ranges,
    "embeddings in float32": widen_embeddings,
}


@dataclass
class GraphArguments:
    """The baseline to make the files from, and how long they are timed."""

    baseline: str = field(metadata={"help": "Folder of run_baseline.py."})
    rounds: int = field(default=12, metadata={"help": "Turns that each file gets.", "choices": COUNT})
    threads: int | None = field(
        default=None, metadata={"help": "Threads to compute with; all if not given.", "choices": THREADS}
    )
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    """Makes the files, times them and writes the page; ``argv``: the flags, those of the command line if not given."""
    (arguments,) = parse_args((GraphArguments,), positional="baseline", argv=argv)
    baseline, results = Path(arguments.baseline), Path(arguments.results_dir)
    task, threads = load_task_of(read_recipe_of(baseline)), choose_threads(arguments.threads)
    rows = validation_rows(task, threads)
    with tempfile.TemporaryDirectory() as work:
        folders = make_files(baseline, Path(work))
        effects, before = {}, logits_of(folders["none of these"], "onnx", rows)
        for name, folder in folders.items():
            effects[name] = compare(before, logits_of(folder, "onnx", rows), rows.labels)
        protocol = Protocol(threads=threads, rounds=arguments.rounds)
        timed = interleave({name: (folder, "onnx") for name, folder in folders.items()}, rows.texts, protocol)
    study = describe_run(threads) | {
        "base_model": base_model_of(baseline),
        "dataset": task.name,
        "examples": len(rows.texts),
        "rounds": arguments.rounds,
        "files": {name: timed[name] | effects[name] for name in folders},
    }
    write_json(results / "graphs.json", study)
    print(write_studies(results)[page_of(results, "speed")])


def make_files(baseline: Path, work: Path) -> dict[str, Path]:
    """Makes the INT8 file with each set of rewrites; returns name -> a folder that opens like any artifact."""
    model, tokenizer = load_trained_classifier(baseline), AutoTokenizer.from_pretrained(baseline)
    folders = {}
    for name, leave_out in Bar(REWRITES.items(), desc="files"):
        floats = new_folder(work / f"floats-{len(folders)}", baseline)
        export_onnx(model, tokenizer, floats / "onnx" / "model.onnx", leave_out=leave_out)
        folders[name] = new_folder(work / f"int8-{len(folders)}", baseline)
        target = folders[name] / "onnx" / "model_quantized.onnx"
        quantize_onnx(Plan(floats, model, find_layers(model)), target, leave_out=leave_out)
    for name, change in TRIED.items():
        folders[name] = new_folder(work / f"int8-{len(folders)}", baseline)
        graph = OnnxModel(onnx.load(weights_of(folders["all rewrites"], "onnx")))
        change(graph)
        graph.save_model_to_file(str(folders[name] / "onnx" / "model_quantized.onnx"))
    return folders


def new_folder(folder: Path, baseline: Path) -> Path:
    """A folder with the baseline's tokenizer and configuration, for one ONNX file."""
    (folder / "onnx").mkdir(parents=True)
    copy_shared_files(baseline, folder)
    return folder


if __name__ == "__main__":
    run(main)
