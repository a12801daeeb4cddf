"""Draws the ladder: 8, 4 and 2 bits per weight, rounded after the training (PTQ) or trained for it (QAT).

Both methods round alike at the same bits and groups. Each cell is a real file for ONNX Runtime, scored on test against
the FP32 baseline of the same seed; the recipes were chosen on validation. The control of QAT is the same training
without rounding: a gain that it has too is the training's, and not the quantizer's. A cell that stands is not made
again. Cells of other bits stay in `bits.json`, so that the ladder can be drawn step by step.

    python studies/bits_study.py
    python studies/bits_study.py --bits 2 --seeds 42
"""

from dataclasses import dataclass, field
from pathlib import Path

from emotion.evaluation.schema import SUMMARIZED
from emotion.quantization.scheme import CONTROL, name_variant
from emotion.utils.arguments import SEED, parse_args
from emotion.utils.command import run
from emotion.utils.files import ROOT, read_json, write_json
from emotion.utils.levels import BITS
from emotion.utils.machine import choose_threads, describe_run
from emotion.utils.recipe import base_model_of
from seeds import CONFIGS, check_seeds, make_and_score, summarize_scores


@dataclass
class BitsArguments:
    """Which cells of the ladder are drawn, and where they go."""

    bits: list[int] = field(default_factory=lambda: list(BITS), metadata={"help": "Bits per weight.", "choices": BITS})
    seeds: list[int] = field(
        default_factory=lambda: [42, 43, 44], metadata={"help": "Seeds of the baselines.", "choices": SEED}
    )
    controls: bool = field(default=True, metadata={"help": "Train on in floats, too, to compare QAT with."})
    config_dir: str = field(default=str(CONFIGS), metadata={"help": "Folder of the encoder's configs."})
    weights_dir: str = field(default=str(ROOT / "weights"), metadata={"help": "Where the artifacts are saved."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    """Makes the cells and draws the ladder; ``argv``: the flags, those of the command line if not given."""
    (arguments,) = parse_args((BitsArguments,), positional="bits", argv=argv)
    check_seeds(arguments.seeds)
    weights, results = Path(arguments.weights_dir), Path(arguments.results_dir)
    path = results / "bits.json"
    # Cells of other bits, measured before, stay in the study.
    study = read_json(path) if path.is_file() else {"cells": {}}
    study["base_model"] = base_model_of(weights / "seeds" / f"baseline-{arguments.seeds[0]}")
    for bits in arguments.bits:
        controls = [("qat", CONTROL)] if arguments.controls else []
        for method, ending in [("ptq", ""), ("qat", ""), *controls]:
            variant = name_variant(method, bits) + ending
            runs = [
                make_and_score(seed, variant, weights, results, Path(arguments.config_dir)) for seed in arguments.seeds
            ]
            cell = {"method": method + ending, "bits": bits} | describe_cell(variant, runs, results)
            study["cells"][variant] = cell
            write_study(study, path)  # after each cell: the ladder takes hours, and may be interrupted
    print(f"wrote the study to {results}; make report renders it")


def describe_cell(variant: str, runs: list[dict], results: Path) -> dict:
    """The size and the scores of a cell, seed by seed and in the mean.

    `training` and `formats` are null for PTQ, which does not train.
    """
    records, scores = [], []
    for one in runs:
        metrics = results / "seeds" / str(one["seed"]) / "metrics"
        # ONNX alone, though INT8 has other formats: below 8 bits there is no other, and one ladder needs one runtime.
        records.append(read_json(metrics / f"{variant}-onnx.json"))
        scores.append({"seed": one["seed"]} | one["formats"]["onnx"])
    # Bytes, scheme and cost hardly depend on the seed: they are shown of the first one.
    record = records[0]
    baseline = read_json(results / "seeds" / str(runs[0]["seed"]) / "metrics" / "baseline-pytorch.json")
    training, formats = None, None
    if variant.startswith("qat"):
        cost = record["provenance"]["training"]
        training = {name: cost.get(name) for name in ("seconds", "peak_memory_mb", "threads")}
        formats = [one["provenance"].get("forms") for one in records]  # what converting and saving did, for each seed
    return {
        "weights": record["scheme"]["weights"],
        "embeddings": record["scheme"]["embeddings"],
        "activations": record["scheme"]["activations"],
        "megabytes": record["size"]["megabytes"],
        "share_of_fp32": record["size"]["bytes_to_serve"] / baseline["size"]["bytes_to_serve"],
        "dataset": record["provenance"]["dataset"],
        "examples": record["quality"]["examples"],
        # A cell that stands is not made again: it may be of another commit than the cells beside it.
        "made_at": sorted({one["provenance"]["git_commit"] for one in records} - {None}),
        **summarize_scores(scores, SUMMARIZED),
        "training": training,
        "formats": formats,
        "runs": scores,
    }


def write_study(study: dict, path: Path) -> None:
    """Writes the study so far, with the date, the commit and the machine of this run."""
    write_json(path, study | describe_run(choose_threads(None)))


if __name__ == "__main__":
    run(main)
