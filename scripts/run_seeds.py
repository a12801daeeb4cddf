"""Trains one recipe with several seeds, scores each, and keeps the seed that is best on validation.

One seed's score says little: the spread over seeds is part of the result. The chosen artifact becomes
`weights/<variant>`, the summary `results/seeds/<variant>.json`. A seed that is trained already is not trained again
unless the recipe has changed; one that was interrupted goes on where it stopped.

    python scripts/run_seeds.py baseline --seeds 42 43 44 45 46
"""

import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from utils_cli import ROOT, UserError, parse_flags, read_recipe, run

# isort: split
from utils_artifact import RECIPE_FILE, read_recipe_of
from utils_files import whole_folder, write_json
from utils_record import read_json
from utils_task import find_base_model, load_task
from utils_training import comparable

SCRIPTS = ROOT / "scripts"


@dataclass
class SeedsArguments:
    """Which variant, which seeds."""

    variant: str = field(metadata={"help": "baseline, qat or qlora: run_<variant>.py with configs/<variant>.yaml."})
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44, 45, 46], metadata={"help": "Seeds to train with."})
    weights_dir: str = field(default=str(ROOT / "weights"), metadata={"help": "Where the artifacts are saved."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    (arguments,) = parse_flags((SeedsArguments,), positional="variant", argv=argv)
    script, recipe = SCRIPTS / f"run_{arguments.variant}.py", recipe_of(arguments.variant)
    if not script.is_file():
        raise UserError(f"variant {arguments.variant}: no {script.name}")
    weights, results = Path(arguments.weights_dir), Path(arguments.results_dir)
    runs = [train_and_score(seed, script, recipe, arguments.variant, weights, results) for seed in arguments.seeds]
    best = max(runs, key=lambda one: one["validation_macro_f1"])
    with whole_folder(weights / arguments.variant, marker=RECIPE_FILE) as folder:
        shutil.copytree(weights / "seeds" / f"{arguments.variant}-{best['seed']}", folder, dirs_exist_ok=True)
    summary = {
        "variant": arguments.variant,
        "chosen_seed": best["seed"],
        "chosen_by": "validation macro F1",
        **{
            name: mean_and_deviation(runs, name) for name in ("macro_f1", "accuracy", "validation_macro_f1", "seconds")
        },
        "runs": runs,
    }
    write_json(results / "seeds" / f"{arguments.variant}.json", summary)
    print(
        f"{len(runs)} seeds, test: macro F1 {summary['macro_f1']['mean']:.4f} "
        f"(standard deviation {summary['macro_f1']['standard_deviation']:.4f}), "
        f"accuracy {summary['accuracy']['mean']:.4f}; seed {best['seed']} is best on validation -> "
        f"{weights / arguments.variant}"
    )


def recipe_of(variant: str) -> Path:
    return ROOT / "configs" / f"{variant}.yaml"


def train_and_score(seed: int, script: Path, recipe: Path, variant: str, weights: Path, results: Path) -> dict:
    """One seed: trained unless it stands already with this recipe, then scored on test in a fresh process."""
    artifact, seed_results = weights / "seeds" / f"{variant}-{seed}", results / "seeds" / str(seed)
    if is_up_to_date(artifact, recipe, seed):
        print(f"seed {seed}: {artifact} stands")
    else:
        call(script, recipe, "--seed", seed, "--output_dir", artifact, "--resume_from_checkpoint", "last")
    call(SCRIPTS / "run_evaluation.py", artifact, "--latency_runs", 0, "--results_dir", seed_results)
    made = read_recipe_of(artifact)
    path = next((seed_results / "metrics").glob(f"{variant}-*.json"))
    quality = read_json(path)["quality"]
    return {
        "seed": seed,
        "macro_f1": quality["macro_f1"],
        "accuracy": quality["accuracy"],
        "conflict_free_macro_f1": quality["conflict_free"]["macro_f1"],
        "validation_macro_f1": made["training"]["validation_macro_f1"],
        "validation_accuracy": made["training"]["validation_accuracy"],
        **{name: made["training"].get(name) for name in ("seconds", "cpu_seconds", "threads", "resumed")},
    }


def is_up_to_date(artifact: Path, recipe: Path, seed: int) -> bool:
    """Whether the artifact is what training with this recipe and seed would make, on what this machine can reach."""
    made = read_recipe_of(artifact)
    if not made:
        return False
    wanted = read_recipe(recipe)
    base = find_base_model(wanted["model_name_or_path"])
    wanted |= (wanted.pop("per_model", None) or {}).get(base.name, {}) | {"seed": seed}
    task = load_task(wanted["dataset_name"], wanted.get("dataset_config_name"))
    return comparable(made["recipe"]) == comparable(wanted) and (
        (made["made"]["base_model"], made["made"]["dataset_source"]) == (base.name, task.source)
    )


def call(script: Path, *words) -> None:
    """Runs a script in a process of its own; if it fails, it has said why, and this ends with its status."""
    done = subprocess.run([sys.executable, str(script), *map(str, words)])
    if done.returncode:
        sys.exit(done.returncode)


def mean_and_deviation(runs: list[dict], name: str) -> dict:
    """Mean and sample standard deviation over the seeds (null for a single one)."""
    values = [one[name] for one in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation}


if __name__ == "__main__":
    run(main)
