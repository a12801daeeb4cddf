"""Compares PTQ with QAT at 8, 4 and 2 bits per weight.

Each cell is an ONNX file, scored on test against the FP32 baseline of the same seed; the recipes were chosen on
validation. The float fine-tuning control is QAT without fake quantization: a gain that it has too is not due to
quantization. A cell that is up to date is not made again, and cells of other bits stay in `bits.json`.

    python studies/bits_study.py
    python studies/bits_study.py --bits 2 --seeds 42
"""

from dataclasses import dataclass, field
from pathlib import Path

from emotion.evaluation.schema import SUMMARIZED
from emotion.evaluation.seeds import CONFIGS, check_seeds, make_and_score, summarize_scores
from emotion.quantization.scheme import CONTROL, name_variant
from emotion.utils.arguments import SEED, parse_args
from emotion.utils.command import run
from emotion.utils.files import ROOT, read_json, write_json
from emotion.utils.levels import BITS
from emotion.utils.machine import choose_threads, describe_run
from emotion.utils.recipe import base_model_of


@dataclass
class BitsArguments:
    """Which cells are measured, and where they are saved."""

    bits: list[int] = field(default_factory=lambda: list(BITS), metadata={"help": "Bits per weight.", "choices": BITS})
    seeds: list[int] = field(
        default_factory=lambda: [42, 43, 44], metadata={"help": "Seeds of the baselines.", "choices": SEED}
    )
    controls: bool = field(default=True, metadata={"help": "Measure the float fine-tuning control too."})
    config_dir: str = field(default=str(CONFIGS), metadata={"help": "Folder of the encoder's configs."})
    weights_dir: str = field(default=str(ROOT / "weights"), metadata={"help": "Where the models are saved."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    """Makes the cells and scores them."""
    (arguments,) = parse_args((BitsArguments,), positional="bits", argv=argv)
    check_seeds(arguments.seeds)
    weights, results = Path(arguments.weights_dir), Path(arguments.results_dir)
    path = results / "bits.json"
    # Cells of other bits, measured before, stay in the study.
    study = read_json(path) if path.is_file() else {"cells": {}}
    study["base_model"] = base_model_of(weights / "seeds" / f"baseline-{arguments.seeds[0]}")
    for bits in arguments.bits:
        controls = [("qat", CONTROL)] if arguments.controls else []
        for method, suffix in [("ptq", ""), ("qat", ""), *controls]:
            variant, configs = name_variant(method, bits) + suffix, Path(arguments.config_dir)
            runs = [make_and_score(seed, variant, weights, results, configs) for seed in arguments.seeds]
            cell = {"method": method + suffix, "bits": bits} | describe_cell(variant, runs, results)
            study["cells"][variant] = cell
            # After each cell: the study takes hours, and may be interrupted.
            write_json(path, study | describe_run(choose_threads(None)))
    print(f"wrote the study to {results}; make report renders it")


def describe_cell(variant: str, runs: list[dict], results: Path) -> dict:
    """Returns the size and the scores of a cell, by seed and in the mean; `formats` is null for PTQ."""
    records, scores = [], []
    for seed_run in runs:
        metrics = results / "seeds" / str(seed_run["seed"]) / "metrics"
        # Only ONNX, the one format with fewer than 8 bits
        records.append(read_json(metrics / f"{variant}-onnx.json"))
        scores.append({"seed": seed_run["seed"]} | seed_run["formats"]["onnx"])
    # Size, scheme and cost hardly depend on the seed: they are those of the first one.
    first = records[0]
    baseline = read_json(results / "seeds" / str(runs[0]["seed"]) / "metrics" / "baseline-pytorch.json")
    training, formats = None, None
    if variant.startswith("qat"):
        cost = first["provenance"]["training"]
        training = {name: cost.get(name) for name in ("seconds", "peak_memory_mb", "threads")}
        formats = [record["provenance"].get("forms") for record in records]
    return {
        "weights": first["scheme"]["weights"],
        "embeddings": first["scheme"]["embeddings"],
        "activations": first["scheme"]["activations"],
        "megabytes": first["size"]["megabytes"],
        "share_of_fp32": first["size"]["bytes_to_serve"] / baseline["size"]["bytes_to_serve"],
        "dataset": first["provenance"]["dataset"],
        "examples": first["quality"]["examples"],
        "made_at": sorted({record["provenance"]["git_commit"] for record in records} - {None}),
        **summarize_scores(scores, SUMMARIZED),
        "training": training,
        "formats": formats,
        "runs": scores,
    }


if __name__ == "__main__":
    run(main)
