"""One variant with several seeds: made, scored, summed up."""

import re
import statistics
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import ROOT, read_json
from emotion.common.machine import SCRIPTS, run_script
from emotion.common.recipe import RECIPE_FILE, comparable, read_recipe, read_recipe_of, resolve
from emotion.measure.record import read_logits
from emotion.model.artifact import find_formats
from emotion.task.dataset import source_of
from emotion.task.source import find_base_model


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
    model = None if starts_from_baseline else find_base_model(values["model_name_or_path"]).name
    values = resolve(values, model, changes.get("bits", values.get("bits")))
    if is_up_to_date(artifact, values | changes, baseline):
        print(f"seed {seed}: {artifact} stands")
    else:
        words = [word for name, value in changes.items() for word in (f"--{name}", value)]
        words += ["--baseline", baseline] if baseline else []
        words += ["--resume_from_checkpoint", "last"] if trained else []
        run_script(script.name, recipe, *words, "--output_dir", artifact, check=True)
    return read_recipe_of(artifact)


def score_format(artifact: Path, format: str, results: Path, variant: str) -> dict:
    """Scores one format on test; against the baseline of the same seed where that is another variant."""
    path = results / "metrics" / f"{variant}-{format}.json"
    if not path.is_file() or path.stat().st_mtime < (artifact / RECIPE_FILE).stat().st_mtime:
        words = ["--format", format, "--latency_runs", 0, "--results_dir", results]
        run_script("run_evaluation.py", artifact, *words, check=True)
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
    source = source_of(wanted["dataset_name"], wanted.get("dataset_config_name"))
    origin = made["made"]["base_model"], made["made"]["dataset_source"]
    return comparable(recipe) == comparable(wanted) and origin == (base.name, source)


def mean_and_deviation(runs: list[dict], name: str) -> dict:
    """Mean and sample standard deviation over the seeds (null for a single one)."""
    values = [one[name] for one in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation}


def choose_seed(variant: str, runs: list[dict], results: Path) -> tuple[int, str]:
    """The seed that is shown, and what chose it: the baseline's, so that variants are compared in pairs."""
    path = results / "seeds" / "baseline.json"
    seeds = [one["seed"] for one in runs]
    if variant != "baseline" and path.is_file() and (seed := read_json(path)["chosen_seed"]) in seeds:
        return seed, "validation macro F1 of the baseline"
    return max(runs, key=lambda one: one["validation_macro_f1"])["seed"], "validation macro F1"
