"""Chooses how the baseline is quantized: candidates against each other, and layer by layer.

Everything is scored on validation, with several baselines, and the test split is not touched. The rule: of the
candidates of one format that answer alike on every processor and whose mean macro F1 lies within 0.2 points of the
best of them, the fastest at batch 1. The winners stand in configs/ptq.yaml.

    python scripts/study_ptq.py weights/seeds/baseline-42 weights/seeds/baseline-43 weights/seeds/baseline-44
"""

import re
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import run_ptq
from emotion.common.command import run
from emotion.common.files import ROOT, write_json, write_text
from emotion.common.flags import parse_flags
from emotion.common.machine import choose_threads, describe_run
from emotion.common.recipe import read_recipe_of
from emotion.measure.benchmark import interleave
from emotion.measure.inspection import describe_scheme
from emotion.model.artifact import files_to_serve, weights_of
from emotion.model.classifier import OnnxClassifier, open_artifact, predict
from emotion.model.pretrained import load_trained_classifier
from emotion.quantize.int8_onnx import quantize_onnx
from emotion.quantize.layers import Layers, find_layers
from emotion.quantize.levels import SAFE_WEIGHT
from emotion.report.pages import MARGIN, render_study_pages
from emotion.report.plots import plot_sensitivity
from emotion.task.dataset import get_split, load_task_of
from emotion.task.scores import score

import numpy as np
from tqdm import tqdm

CANDIDATES = {
    "torchao": ("torchao", {}),
    "torchao, 8-bit weights": ("torchao", {"reduce_range": False}),
    "ONNX Runtime, dynamic": ("onnx", {}),
    "ONNX Runtime, dynamic, 8-bit weights": ("onnx", {"reduce_range": False}),
    "ONNX Runtime, static by extremes": ("onnx", {"onnx_calibration": "minmax"}),
    "ONNX Runtime, static by entropy": ("onnx", {"onnx_calibration": "entropy"}),
    "OpenVINO": ("openvino", {}),
    "OpenVINO, 8-bit weights": ("openvino", {"reduce_range": False}),
    "OpenVINO, SmoothQuant": ("openvino", {"smooth_quant": True}),
}
FLAGS = {  # which decide a format, and what they are in a candidate that does not change them
    "torchao": {"reduce_range": True, "keep_float": []},
    "onnx": {"reduce_range": True, "keep_float": [], "onnx_calibration": "none"},
    "openvino": {"reduce_range": True, "keep_float": [], "smooth_quant": False},
}


@dataclass
class StudyArguments:
    """On which baselines, and where the results go."""

    baselines: list[str] = field(
        metadata={"help": "Folders of run_baseline.py; speed, layers and processors are measured on the first."}
    )
    work_dir: str = field(default=str(ROOT / "build" / "ptq_study"), metadata={"help": "Where candidates are saved."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})
    rounds: int = field(default=10, metadata={"help": "Turns that each candidate gets when speed is measured."})


def main(argv=None) -> None:
    (arguments,) = parse_flags((StudyArguments,), positional="baselines", argv=argv)
    baselines, work = [Path(folder) for folder in arguments.baselines], Path(arguments.work_dir)
    results, threads = Path(arguments.results_dir), choose_threads(None)
    task = load_task_of(read_recipe_of(baselines[0]))
    rows = get_split(task, "validation")
    texts, labels = list(rows["text"]), np.asarray(rows["label"])
    about = describe_run(threads) | {
        "dataset": task.name,
        "dataset_source": task.source,
        "split": "validation",
        "examples": len(texts),
        "baselines": [read_recipe_of(folder).get("seed") for folder in baselines],
    }

    layers = measure_layers(baselines[0], texts, labels, threads)
    worst = max((one for one in layers if one["layer"] is not None), key=lambda one: one["mean_logit_shift"])
    write_json(results / "ptq_sensitivity.json", about | {"layers": layers})

    candidates = CANDIDATES | {"ONNX Runtime, dynamic, worst layer in float": ("onnx", {"keep_float": worst["names"]})}
    folders = {}
    for name, (format, changes) in tqdm(candidates.items(), desc="candidates"):
        for baseline in baselines:
            folder = work / re.sub(r"\W+", "-", name) / baseline.name
            flags = [word for key, value in (FLAGS[format] | changes).items() if value != []
                     for word in (f"--{key}", *_words(value))]  # fmt: skip
            run_ptq.main(["--baseline", str(baseline), "--output_dir", str(folder), "--formats", format, *flags])
            folders.setdefault(name, []).append(folder)
    reference = [logits_of(baseline, "onnx", texts, threads) for baseline in baselines]
    studied = {
        name: changes_of(candidates[name], folders[name], reference, texts, labels, threads) for name in candidates
    }
    timed = {"FP32": (baselines[0], "onnx")} | {name: (folders[name][0], candidates[name][0]) for name in candidates}
    speed = interleave(timed, texts, threads, arguments.rounds, texts_a_round=50, batches=8)
    fp32 = speed.pop("FP32")
    for name, measured in speed.items():
        studied[name] |= measured
    study = about | {
        "baseline": {"macro_f1": statistics.fmean(score(one, labels)["macro_f1"] for one in reference), **fp32},
        "candidates": studied,
        "chosen": choose(studied),
    }  # fmt: skip
    write_json(results / "ptq_study.json", study)
    for path, text in render_study_pages(results).items():
        write_text(path, text)
    plot_sensitivity(layers, results / "ptq_sensitivity")
    print((results / "ptq_study.md").read_text(encoding="utf-8"))


def _words(value) -> list[str]:
    return value if isinstance(value, list) else [str(value).lower()]


def logits_of(folder: Path, format: str, texts: list[str], threads: int) -> np.ndarray:
    classifier = open_artifact(folder, format, threads=threads)
    return predict(classifier, classifier.encode(texts))


def measure_layers(baseline: Path, texts: list[str], labels: np.ndarray, threads: int) -> list[dict]:
    """Quantizes one layer at a time, then one kind of layer at a time, and scores what that alone does (ONNX Runtime).

    Returns:
        An entry each: `kind`, `layer` (null for a whole kind), `names`, and what `compare` finds.
    """
    model = load_trained_classifier(baseline)
    everything = find_layers(model)
    units = {}
    for name in everything.embeddings:
        units[(name.rpartition(".")[2], "embeddings")] = [name]
    for name in everything.linear:
        layer = re.search(r"\.(\d+)\.", name)
        part = re.search(r"\.\d+\.(.*)", name).group(1)
        kind = part if part.count(".") == 0 else part.rpartition(".")[0]  # query, key and value are one product
        units.setdefault((kind, layer.group(1)), []).append(name)
    for kind in dict.fromkeys(kind for kind, layer in units if layer != "embeddings"):
        units[(kind, None)] = [
            name for (one, layer), names in units.items() if one == kind and layer for name in names
        ]
    graph = weights_of(baseline, "onnx")
    before = logits_of(baseline, "onnx", texts, threads)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for (kind, layer), names in tqdm(units.items(), desc="layer by layer"):
            part = Layers([name for name in names if name in everything.linear],
                          [name for name in names if name in everything.embeddings])  # fmt: skip
            quantize_onnx(model, graph, path, part)
            classifier = OnnxClassifier(baseline, path, threads=threads)
            after = predict(classifier, classifier.encode(texts))
            found.append({"kind": kind, "layer": layer, "names": names} | compare(before, after, labels))
    return found


def compare(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict:
    """What quantizing did to the logits (rows, classes), the labels that follow from them, and their score."""
    change = score(after, labels)["macro_f1"] - score(before, labels)["macro_f1"]
    return {
        "mean_logit_shift": float(np.abs(after - before).mean()),
        "flips": int((after.argmax(axis=-1) != before.argmax(axis=-1)).sum()),
        "macro_f1_change": change,
    }


def changes_of(candidate, folders: list[Path], reference: list[np.ndarray], texts, labels, threads: int) -> dict:
    """Means over the baselines of what a candidate does, and what was counted in the first one's file."""
    format, changes = candidate
    each = [
        compare(before, logits_of(folder, format, texts, threads), labels)
        for folder, before in zip(folders, reference, strict=True)
    ]
    files = files_to_serve(folders[0], format)
    scheme = describe_scheme(open_artifact(folders[0], format, threads), weights_of(folders[0], format), format)
    return {
        "format": format,
        "changes": changes,
        **{name: statistics.fmean(one[name] for one in each) for name in each[0]},
        "macro_f1_changes": [one["macro_f1_change"] for one in each],
        "megabytes": round(sum(files.values()) / 1e6, 2),
        "scheme": scheme,
    }


def choose(studied: dict) -> dict:
    """Format -> the winner by the rule above, and its flags."""
    chosen = {}
    for format in dict.fromkeys(one["format"] for one in studied.values()):
        ours = {name: one for name, one in studied.items() if one["format"] == format}
        safe = {name: one for name, one in ours.items() if one["scheme"]["largest_weight"] <= SAFE_WEIGHT} or ours
        best = max(one["macro_f1_change"] for one in safe.values())
        close = {name: one for name, one in safe.items() if one["macro_f1_change"] >= best - MARGIN}
        winner = max(close, key=lambda name: close[name]["times_faster_at_batch_1"]["median"])
        chosen[format] = {"candidate": winner, "flags": FLAGS[format] | close[winner]["changes"]}
    return chosen


if __name__ == "__main__":
    run(main)
