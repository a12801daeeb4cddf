"""Chooses the quantization scheme of PTQ: compares candidates, and measures the sensitivity of each layer.

All are scored on validation, with several baselines. Of the candidates that answer alike on every processor and in
every batch, and whose mean macro F1 lies within 0.2 points of the best, the fastest at batch 1 wins; of equally fast
ones, the best. The winners are the defaults of run_ptq.py.

    python studies/ptq_study.py weights/seeds/baseline-42 weights/seeds/baseline-43 weights/seeds/baseline-44
"""

import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emotion.data.dataset import Task, load_task_of
from emotion.data.metrics import VALIDATION_NOISE, score
from emotion.evaluation.benchmark import Protocol, interleave
from emotion.evaluation.inspection import describe_scheme
from emotion.inference.model_folder import (
    LARGEST_SAFE_WEIGHT,
    files_to_serve,
    load_trained_classifier,
    new_artifact,
    weights_of,
)
from emotion.inference.runtimes import open_artifact
from emotion.quantization.accuracy_aware import compare, copy_shared_files, logits_of, measure_layers, save_format
from emotion.quantization.activation_ranges import RULES
from emotion.quantization.scheme import Samples, SchemeArguments, load_samples, make_plan, quantized_metadata
from emotion.utils.arguments import COUNT, Recipe, flag, parse_args
from emotion.utils.base_model import base_model_of, read_recipe_of
from emotion.utils.command import Bar, run
from emotion.utils.files import ROOT, write_json
from emotion.utils.machine import describe_run

CALIBRATION_SAMPLES = 300
TIMING_NOISE = 0.03  # two files whose times differ by less count as equally fast


@dataclass(frozen=True)
class Candidate:
    """A format, and the flags of run_ptq.py that differ from `FLAGS`."""

    format: str
    changes: dict = field(default_factory=dict)


DYNAMIC = "ONNX Runtime, dynamic"
CANDIDATES = {
    "torchao": Candidate("torchao"),
    DYNAMIC: Candidate("onnx", {"activation_quantization": "dynamic"}),
    **{f"ONNX Runtime, {rule}": Candidate("onnx", {"activation_quantization": rule}) for rule in RULES},
    "ONNX Runtime, minmax, outliers split": Candidate("onnx", {"split_outliers": True}),
    "ONNX Runtime, minmax, 8-bit weights": Candidate("onnx", {"reduce_range": False}),
    "OpenVINO": Candidate("openvino"),
    "OpenVINO, 8-bit weights": Candidate("openvino", {"reduce_range": False}),
    "OpenVINO, SmoothQuant": Candidate("openvino", {"smooth_quant": True}),
}
# Format -> its flags where a candidate does not change them; the defaults of run_ptq.py are earlier winners.
ALL_LAYERS = {"modules_to_not_convert": []}
FLAGS = {
    "torchao": ALL_LAYERS,
    "onnx": ALL_LAYERS | {"reduce_range": True, "activation_quantization": "minmax", "split_outliers": False},
    "openvino": ALL_LAYERS | {"reduce_range": True, "smooth_quant": False},
}


@dataclass
class StudyArguments:
    """The baselines to study, and where the results go."""

    baselines: list[str] = flag(help="Baselines; speed and layers are measured on the first.")
    work_dir: str = flag(str(ROOT / "build" / "ptq_study"), "Where candidates are saved.")
    results_dir: str = flag(str(ROOT / "results"), "Where the results are written.")
    layer_texts: int | None = flag(None, "Texts that each layer is measured on; all by default.", COUNT)
    leave_out: list[str] = flag([], "Candidates that are not made.", CANDIDATES)
    rounds: int = flag(10, "Counted rounds of the timing.", COUNT)


def main(argv=None) -> None:
    (arguments,) = parse_args((StudyArguments,), positional="baselines", argv=argv)
    baselines, results = [Path(folder) for folder in arguments.baselines], Path(arguments.results_dir)
    task = load_task_of(read_recipe_of(baselines[0]))
    _, rows = load_samples(task, baselines[0], CALIBRATION_SAMPLES, seed=42)
    about = describe_run(rows.threads) | {
        "base_model": base_model_of(baselines[0]),
        "dataset": task.name,
        "dataset_source": task.source,
        "split": "validation",
        "examples": len(rows.texts),
        "baselines": [read_recipe_of(folder).get("seed") for folder in baselines],
    }

    # Sensitivity of each layer
    few = rows.first(arguments.layer_texts)
    layers = measure_layers(baselines[0], few)
    write_json(results / "ptq_sensitivity.json", about | {"examples": len(few.texts), "layers": layers})
    worst = max((row for row in layers if row["layer"] is not None), key=lambda row: row["mean_logit_shift"])
    without_worst = Candidate("onnx", {"modules_to_not_convert": worst["names"]})
    candidates = CANDIDATES | {"ONNX Runtime, minmax, worst layer in float": without_worst}
    candidates = {name: value for name, value in candidates.items() if name not in arguments.leave_out}

    # Make, score and time the candidates
    folders = make_candidates(candidates, baselines, task, Path(arguments.work_dir))
    reference = [logits_of(baseline, "onnx", rows) for baseline in baselines]
    timed = {name: (folders[name][0], candidate.format) for name, candidate in candidates.items()}
    protocol = Protocol(rounds=arguments.rounds, texts_end_to_end=0, cold_starts=0, threads=rows.threads)
    speed = interleave({"FP32": (baselines[0], "onnx")} | timed, rows.texts, protocol)
    fp32 = {"macro_f1": statistics.fmean(score(logits, rows.labels)["macro_f1"] for logits in reference)}
    fp32 |= speed.pop("FP32")
    studied = {}
    for name, candidate in candidates.items():
        studied[name] = describe_candidate(candidate, folders[name], reference, rows) | speed[name]
    study = about | {"baseline": fp32, "candidates": studied, "chosen": choose(studied)}
    write_json(results / "ptq_study.json", study)
    print(f"wrote the study to {results}; make report renders it")


def make_candidates(
    candidates: dict[str, Candidate], baselines: list[Path], task: Task, work: Path
) -> dict[str, list[Path]]:
    """Quantizes every baseline by every candidate; returns name -> one folder per baseline, in their order."""
    folders = {name: [] for name in candidates}
    for baseline in baselines:
        model, baseline_metadata = load_trained_classifier(baseline), read_recipe_of(baseline)
        rows, _ = load_samples(task, baseline, CALIBRATION_SAMPLES, seed=42)
        for name, candidate in Bar(candidates.items(), desc=f"candidates of {baseline.name}"):
            format, flags = candidate.format, FLAGS[candidate.format] | candidate.changes
            arguments = SchemeArguments(formats=[format], num_calibration_samples=CALIBRATION_SAMPLES, **flags)
            plan = make_plan(baseline, model, arguments, rows)
            metadata = quantized_metadata("ptq", Recipe(None, flags), baseline_metadata, plan, arguments)
            folder = work / re.sub(r"\W+", "-", name) / baseline.name
            with new_artifact(folder, metadata) as output:  # without fallbacks
                copy_shared_files(baseline, output)
                save_format(plan, output, format, rows, arguments)
            folders[name].append(folder)
    return folders


def describe_candidate(candidate: Candidate, folders: list[Path], reference: list[np.ndarray], rows: Samples) -> dict:
    """The changes that a candidate makes, as means over the baselines, and size and scheme of the first one's file.

    Args:
        folders: one per baseline.
        reference: FP32 logits (rows, classes) of each baseline, in the same order.
    """
    format, effects = candidate.format, []
    for folder, before in zip(folders, reference, strict=True):
        effects.append(compare(before, logits_of(folder, format, rows), rows.labels))
    files, weights = files_to_serve(folders[0], format), weights_of(folders[0], format)
    return {
        "format": format,
        "changes": candidate.changes,
        **{name: statistics.fmean(effect[name] for effect in effects) for name in effects[0]},
        "macro_f1_changes": [effect["macro_f1_change"] for effect in effects],
        "megabytes": round(sum(files.values()) / 1e6, 2),
        "scheme": describe_scheme(open_artifact(folders[0], format, rows.threads), weights, format),
    }


def choose(studied: dict) -> dict:
    """Format -> the winner by the rule at the top of this file, and its flags."""
    chosen = {}
    for format in dict.fromkeys(candidate["format"] for candidate in studied.values()):
        largest = {name: one["scheme"]["largest_weight"] for name, one in studied.items() if one["format"] == format}
        # Larger weights overflow on processors without VNNI, and dynamic ranges are those of a batch. If no candidate
        # is safe, all compete.
        safe = [name for name in largest if largest[name] <= LARGEST_SAFE_WEIGHT and name != DYNAMIC]
        changes = {name: studied[name]["macro_f1_change"] for name in safe or largest}
        close = [name for name in changes if changes[name] >= max(changes.values()) - VALIDATION_NOISE]
        speeds = {name: studied[name]["times_faster_at_batch_1"]["median"] for name in close}
        fastest = [name for name in close if speeds[name] >= max(speeds.values()) * (1 - TIMING_NOISE)]
        winner = max(fastest, key=changes.get)
        chosen[format] = {"candidate": winner, "flags": FLAGS[format] | studied[winner]["changes"]}
    return chosen


if __name__ == "__main__":
    run(main)
