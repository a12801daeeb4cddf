"""Makes one variant with several seeds, scores each, and keeps the seed that is best on validation.

One seed's score says little: the spread over seeds is part of the result. The chosen artifact becomes
`weights/<variant>`, the summary `results/seeds/<variant>.json`. A seed that is trained already is not trained again
unless the recipe has changed, or the baseline it started from; one that was interrupted goes on where it stopped. A
variant that starts from the baseline starts from that of the same seed, and is compared with it row by row.

    python scripts/run_seeds.py baseline --seeds 42 43 44 45 46
    python scripts/run_seeds.py ptq
    python scripts/run_seeds.py qat-int4        # run_qat.py with configs/qat.yaml and --bits 4
"""

import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from utils_cli import ROOT, UserError, parse_flags, read_recipe, run

# isort: split
from utils_artifact import RECIPE_FILE, find_formats, read_recipe_of
from utils_files import whole_folder, write_json
from utils_record import read_json, read_logits
from utils_task import find_base_model, load_task
from utils_training import comparable

SCRIPTS = ROOT / "scripts"


@dataclass
class SeedsArguments:
    """Which variant, which seeds."""

    variant: str = field(
        metadata={
            "help": "baseline, ptq, qat, ...: run_<variant>.py with configs/<variant>.yaml; -int4 adds --bits 4."
        }
    )
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44, 45, 46], metadata={"help": "Seeds to use."})
    weights_dir: str = field(default=str(ROOT / "weights"), metadata={"help": "Where the artifacts are saved."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    (arguments,) = parse_flags((SeedsArguments,), positional="variant", argv=argv)
    weights, results = Path(arguments.weights_dir), Path(arguments.results_dir)
    runs = [make_and_score(seed, arguments.variant, weights, results) for seed in arguments.seeds]
    chosen, chosen_by = choose_seed(arguments.variant, runs, results)
    with whole_folder(weights / arguments.variant, marker=RECIPE_FILE) as folder:
        shutil.copytree(weights / "seeds" / f"{arguments.variant}-{chosen}", folder, dirs_exist_ok=True)
    summary = {
        "variant": arguments.variant,
        "chosen_seed": chosen,
        "chosen_by": chosen_by,
        **summarize(runs),
        "runs": runs,
    }
    write_json(results / "seeds" / f"{arguments.variant}.json", summary)
    print(f"{len(runs)} seeds, test; seed {chosen}, chosen by {chosen_by} -> {weights / arguments.variant}")
    for name, one in summary.get("formats", {"pytorch": summary}).items():
        deviation = one["macro_f1"]["standard_deviation"] or 0
        change = f"   change {100 * one['change']['mean']:+.2f} points" if "change" in one else ""
        print(f"  {name:10} macro F1 {one['macro_f1']['mean']:.4f} (standard deviation {deviation:.4f}){change}")


def choose_seed(variant: str, runs: list[dict], results: Path) -> tuple[int, str]:
    """The seed that is shown, and what chose it: the baseline's, so that variants are compared in pairs."""
    path = results / "seeds" / "baseline.json"
    seeds = [one["seed"] for one in runs]
    if variant != "baseline" and path.is_file() and (seed := read_json(path)["chosen_seed"]) in seeds:
        return seed, "validation macro F1 of the baseline"
    return max(runs, key=lambda one: one["validation_macro_f1"])["seed"], "validation macro F1"


def recipe_of(method: str) -> Path:
    return ROOT / "configs" / f"{method}.yaml"


def split_variant(variant: str) -> tuple[str, dict]:
    """'qat-int4' -> 'qat' and what it changes in that recipe."""
    method, bits = re.fullmatch(r"(.*?)(?:-int(\d))?", variant).groups()
    return method, {"bits": int(bits)} if bits else {}


def make_and_score(seed: int, variant: str, weights: Path, results: Path) -> dict:
    """One seed: made unless it stands already with this recipe, then scored on test in a fresh process a format."""
    method, changes = split_variant(variant)
    artifact, seed_results = weights / "seeds" / f"{variant}-{seed}", results / "seeds" / str(seed)
    made = make(artifact, method, changes, seed, weights)
    run = {
        "seed": seed,
        "validation_macro_f1": made["training"]["validation_macro_f1"],
        "validation_accuracy": made["training"]["validation_accuracy"],
        **{name: made["training"].get(name) for name in ("seconds", "cpu_seconds", "threads", "resumed")},
    }
    if variant == "baseline":  # its forms answer alike
        return run | score_format(artifact, "pytorch", seed_results, variant)
    formats = {name: score_format(artifact, name, seed_results, variant) for name in find_formats(artifact)}
    return run | {"formats": formats}


def make(artifact: Path, method: str, changes: dict, seed: int, weights: Path) -> dict:
    """Runs a method's script with changes to its recipe, unless the artifact stands; returns its recipe.yaml."""
    script, recipe = SCRIPTS / f"run_{method}.py", recipe_of(method)
    if not script.is_file():
        raise UserError(f"variant {method}: no {script.name}")
    values = read_recipe(recipe)
    trained, starts_from_baseline = "num_train_epochs" in values, "baseline" in values
    baseline = weights / "seeds" / f"baseline-{seed}" if starts_from_baseline else None
    changes = changes | ({"seed": seed} if trained else {})
    per_bits = values.pop("per_bits", None) or {}
    values |= per_bits.get(changes.get("bits", values.get("bits")), {})
    if is_up_to_date(artifact, values | changes, baseline):
        print(f"seed {seed}: {artifact} stands")
    else:
        words = [word for name, value in changes.items() for word in (f"--{name}", value)]
        words += ["--baseline", baseline] if baseline else []
        words += ["--resume_from_checkpoint", "last"] if trained else []
        call(script, recipe, *words, "--output_dir", artifact)
    return read_recipe_of(artifact)


def score_format(artifact: Path, format: str, results: Path, variant: str) -> dict:
    """Scores one format on test; against the baseline of the same seed where that is another variant."""
    path = results / "metrics" / f"{variant}-{format}.json"
    if not path.is_file() or path.stat().st_mtime < (artifact / RECIPE_FILE).stat().st_mtime:
        call(
            SCRIPTS / "run_evaluation.py", artifact, "--format", format, "--latency_runs", 0, "--results_dir", results
        )
    quality = read_json(path)["quality"]
    scores = {"macro_f1": quality["macro_f1"], "accuracy": quality["accuracy"],
              "conflict_free_macro_f1": quality["conflict_free"]["macro_f1"]}  # fmt: skip
    if variant == "baseline":
        return scores
    before = read_json(results / "metrics" / "baseline-pytorch.json")["quality"]["macro_f1"]
    labels = [
        read_logits(results / "predictions" / f"{name}.parquet").argmax(axis=-1)
        for name in ("baseline-pytorch", f"{variant}-{format}")
    ]
    return scores | {"change": quality["macro_f1"] - before, "flips": int((labels[0] != labels[1]).sum())}


def summarize(runs: list[dict]) -> dict:
    """Mean and deviation over the seeds, format by format where there are several."""
    if "formats" not in runs[0]:
        names = ("macro_f1", "accuracy", "validation_macro_f1", "seconds")
        return {name: mean_and_deviation(runs, name) for name in names}
    formats = {}
    for format in dict.fromkeys(format for one in runs for format in one["formats"]):
        # a root that 4 bits cost too much has another format than those of other seeds
        scores = [one["formats"][format] for one in runs if format in one["formats"]]
        formats[format] = {name: mean_and_deviation(scores, name) for name in scores[0]}
    return {"formats": formats}


def is_up_to_date(artifact: Path, wanted: dict, baseline: Path | None) -> bool:
    """Whether the artifact is what this recipe would make, from the baseline that stands or on what can be reached."""
    made = read_recipe_of(artifact)
    if not made:
        return False
    wanted, recipe = dict(wanted), dict(made["recipe"])
    if baseline:
        made_after = (artifact / RECIPE_FILE).stat().st_mtime > (baseline / RECIPE_FILE).stat().st_mtime
        for values in (wanted, recipe):  # there a folder, here what made that folder
            values.pop("baseline")
        return made_after and comparable(recipe) == comparable(wanted)
    base = find_base_model(wanted["model_name_or_path"])
    wanted |= (wanted.pop("per_model", None) or {}).get(base.name, {})
    source = source_of(wanted["dataset_name"], wanted.get("dataset_config_name"))
    origin = made["made"]["base_model"], made["made"]["dataset_source"]
    return comparable(recipe) == comparable(wanted) and origin == (base.name, source)


@cache
def source_of(dataset_name: str, config_name: str | None) -> str:
    """Where the dataset comes from; loaded once, however many seeds ask."""
    return load_task(dataset_name, config_name).source


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
