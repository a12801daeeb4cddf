"""Draws the ladder: 8, 4, 3 and 2 bits a weight, rounded after the training (PTQ) and trained for it (QAT).

Both methods round alike at the same bits and groups. Each cell is a real file for ONNX Runtime, scored on test against
the FP32 baseline of the same seed; what the recipes hold was chosen on validation. A cell that stands is not made
again, and cells of other bits stay in `results/bits.json`, so that the ladder can be drawn step by step.

    python scripts/study_bits.py
    python scripts/study_bits.py --bits 3 --seeds 42
"""

from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.command import run
from emotion.common.files import ROOT, read_json, write_json, write_text
from emotion.common.flags import parse_flags
from emotion.common.machine import choose_threads, describe_run
from emotion.measure.seeds import make, make_and_score, mean_and_deviation
from emotion.quantize.scheme import name_variant
from emotion.report.pages import render_pages
from emotion.report.plots import plot_bits, plot_rounding

CHOICES = {"as in the recipe": {}, "without distillation": {"distillation_weight": 0}}


@dataclass
class BitsArguments:
    """Which cells of the ladder."""

    bits: list[int] = field(default_factory=lambda: [8, 4, 3, 2], metadata={"help": "Bits of a weight."})
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44], metadata={"help": "Seeds of the baselines."})
    weights_dir: str = field(default=str(ROOT / "weights"), metadata={"help": "Where the artifacts are saved."})
    work_dir: str = field(default=str(ROOT / "build" / "bits_study"), metadata={"help": "Where choices are saved."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    (arguments,) = parse_flags((BitsArguments,), positional="bits", argv=argv)
    weights, results = Path(arguments.weights_dir), Path(arguments.results_dir)
    path = results / "bits.json"
    study = read_json(path) if path.is_file() else {"cells": {}, "choices": {}}
    for bits in arguments.bits:
        for method in ("ptq", "qat"):
            variant = name_variant(method, bits)
            runs = [make_and_score(seed, variant, weights, results) for seed in arguments.seeds]
            study["cells"][variant] = {"method": method, "bits": bits} | describe_cell(variant, runs, results)
            save(study, path)
    if 2 in arguments.bits:
        study["choices"] = try_choices(arguments.seeds[0], weights, Path(arguments.work_dir))
        save(study, path)
    for page, text in render_pages(results).items():
        write_text(page, text)
    plot_bits(study, results / "bits")
    plot_rounding(results / "rounding")
    print((results / "bits.md").read_text(encoding="utf-8"))


def describe_cell(variant: str, runs: list[dict], results: Path) -> dict:
    """What a cell weighs and how it scores, seed by seed and in the mean."""
    folders = [results / "seeds" / str(one["seed"]) / "metrics" for one in runs]
    records = [read_json(folder / f"{variant}-onnx.json") for folder in folders]
    record, baseline = records[0], read_json(folders[0] / "baseline-pytorch.json")
    scores = [{"seed": one["seed"]} | one["formats"]["onnx"] for one in runs]
    return {
        "weights": record["scheme"]["weights"],
        "embeddings": record["scheme"]["embeddings"],
        "activations": record["scheme"]["activations"],
        "megabytes": record["size"]["megabytes"],
        "share_of_fp32": record["size"]["bytes_to_serve"] / baseline["size"]["bytes_to_serve"],
        "dataset": record["made"]["dataset"],
        "examples": record["quality"]["examples"],
        **{name: mean_and_deviation(scores, name) for name in ("macro_f1", "accuracy", "change", "flips")},
        "training": {name: record["made"]["training"].get(name) for name in ("seconds", "peak_memory_mb", "threads")}
        if variant.startswith("qat") else None,
        "forms": [one["made"]["forms"] for one in records] if variant.startswith("qat") else None,
        "runs": scores,
    }  # fmt: skip


def try_choices(seed: int, weights: Path, work: Path) -> dict:
    """What a setting of the recipe is worth at 2 bits: validation macro F1 of the file, with it and without."""
    found = {}
    for name, changes in CHOICES.items():
        folder = weights / "seeds" / f"{name_variant('qat', 2)}-{seed}"
        if changes:
            folder = work / "-".join(map(str, ["qat", seed, *sum(changes.items(), ())]))
        made = make(folder, "qat", {"bits": 2} | changes, seed, weights)
        found[name] = {"seed": seed} | made["forms"]["onnx, reopened"]
    return found


def save(study: dict, path: Path) -> None:
    write_json(path, study | describe_run(choose_threads(None)))


if __name__ == "__main__":
    run(main)
