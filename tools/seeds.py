"""Makes and scores one variant with several seeds, and summarizes the scores."""

import importlib
import re
import statistics
from pathlib import Path

from emotion.data.dataset import source_of
from emotion.evaluation.record import read_logits
from emotion.inference.model_folder import find_formats
from emotion.utils.arguments import resolve_config
from emotion.utils.base_model import find_base_model
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, read_json
from emotion.utils.machine import SCRIPTS, run_script
from emotion.utils.recipe import RECIPE_FILE, comparable, read_recipe_of

# What a run keeps of an artifact's training; null for a method that does not train.
TRAINING_COSTS = ("seconds", "cpu_seconds", "threads", "resumed")
# What is summarized of runs that have no formats: the baseline's.
BASELINE_SCORES = ("macro_f1", "accuracy", "validation_macro_f1", "seconds")


def check_seeds(seeds: list[int], flag: str = "--seeds") -> None:
    """Raises `UserError` if there is no seed, or one stands there twice: it would count twice in the mean."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{flag} {' '.join(map(str, seeds))}: it takes one seed at least, and each once")


CONFIGS = ROOT / "configs" / "minilm"


def split_variant(variant: str) -> tuple[str, str, dict]:
    """'qat-int4' -> the method 'qat', its config 'qat-int4', and no change to that.

    'qat-int4-float' is the same training without rounding: {'fake_quantize': False}.
    """
    config = variant.removesuffix("-float")
    return re.sub(r"-int\d$", "", config), config, {} if config == variant else {"fake_quantize": False}


def make_and_score(seed: int, variant: str, weights: Path, results: Path, configs: Path = CONFIGS) -> dict:
    """Makes the artifact of one seed, unless it stands already, and scores each of its formats on test.

    Args:
        weights: the artifact becomes `seeds/<variant>-<seed>` in this folder.
        results: the records go to `seeds/<seed>` in this folder.
        configs: the folder of an encoder's configs.

    Returns:
        The seed, the scores on validation and the costs of the training; and the scores on test, per format in
        `formats`, or for the baseline beside the rest.
    """
    artifact, seed_results = weights / "seeds" / f"{variant}-{seed}", results / "seeds" / str(seed)
    training = make(artifact, variant, seed, weights, configs)["training"]
    run = {
        "seed": seed,
        "validation_macro_f1": training["validation_macro_f1"],
        "validation_accuracy": training["validation_accuracy"],
    }
    for name in TRAINING_COSTS:
        run[name] = training.get(name)
    # The baseline's formats hold the same floats and answer alike, so that one is enough.
    if variant == "baseline":
        return run | score_format(artifact, "pytorch", seed_results, variant)
    formats = {name: score_format(artifact, name, seed_results, variant) for name in find_formats(artifact)}
    return run | {"formats": formats}


def make(artifact: Path, variant: str, seed: int, weights: Path, configs: Path) -> dict:
    """Runs a method's script with a config and a seed, unless the artifact stands; returns its recipe.yaml.

    Raises:
        UserError: if the method has no script.
        SystemExit: if the script fails; it has said why.
    """
    method, config, changes = split_variant(variant)
    script = SCRIPTS / f"run_{method}.py"
    # The method is part of a word that the user gave: it may name no script.
    if not script.is_file():
        raise UserError(f"variant {variant}: no {script.name}")
    classes = importlib.import_module(script.stem).ARGUMENTS
    # A quantized variant starts from the baseline of the same seed, so that the two can be compared row by row.
    baseline = weights / "seeds" / f"baseline-{seed}" if method in {"ptq", "qat"} else None
    words = [configs / f"{config}.yaml"]
    if baseline:
        words += ["--model_name_or_path", baseline]
    for name, value in changes.items():
        words += [f"--{name}", value]
    # A method without training draws its calibration rows alike for all baselines, by the seed of its config.
    trained = method != "ptq"
    if trained:
        words += ["--seed", seed]
    if is_up_to_date(artifact, resolve_config(classes, words).values, baseline):
        print(f"seed {seed}: {artifact} stands")
    else:
        # A training that was interrupted goes on where it stopped.
        resume = ["--resume_from_checkpoint", "true"] if trained else []
        run_script(script.name, *words, *resume, "--output_dir", artifact, check=True)
    return read_recipe_of(artifact)


def score_format(artifact: Path, format: str, results: Path, variant: str) -> dict:
    """Scores one format on test, in a fresh process, unless its record is newer than the artifact.

    Returns:
        `macro_f1`, `accuracy` and `conflict_free_macro_f1`; and for a variant other than the baseline `change` (of
        macro F1) and `flips` (rows with another label) against the baseline of the same seed.
    """
    path = results / "metrics" / f"{variant}-{format}.json"
    # Latency is not measured here: a seed changes no speed, and several artifacts are timed by run_benchmark.py alone.
    if not path.is_file() or path.stat().st_mtime < (artifact / RECIPE_FILE).stat().st_mtime:
        words = ["--format", format, "--latency_runs", 0, "--results_dir", results]
        run_script("run_evaluation.py", artifact, *words, check=True)
    quality = read_json(path)["quality"]
    scores = {
        "macro_f1": quality["macro_f1"],
        "accuracy": quality["accuracy"],
        "conflict_free_macro_f1": quality["conflict_free"]["macro_f1"],
    }
    if variant == "baseline":
        return scores
    before = read_json(results / "metrics" / "baseline-pytorch.json")["quality"]["macro_f1"]
    labels = read_logits(results / "predictions" / f"{variant}-{format}.parquet").argmax(axis=-1)
    labels_before = read_logits(results / "predictions" / "baseline-pytorch.parquet").argmax(axis=-1)
    return scores | {"change": quality["macro_f1"] - before, "flips": int((labels != labels_before).sum())}


def summarize(runs: list[dict]) -> dict:
    """Mean and deviation over the seeds: of the baseline's scores, or per format in `formats`."""
    if "formats" not in runs[0]:
        return summarize_scores(runs, BASELINE_SCORES)
    # QLoRA's merged model is NF4, or floats where 4 bits cost too much: the seeds may differ in their formats.
    scores_of = {}
    for one in runs:
        for format, scores in one["formats"].items():
            scores_of.setdefault(format, []).append(scores)
    formats = {}
    for format, scores in scores_of.items():
        formats[format] = summarize_scores(scores, scores[0])  # all that a seed's scores name
    return {"formats": formats}


def summarize_scores(runs: list[dict], names) -> dict[str, dict]:
    """Name of a score -> its `mean` and sample `standard_deviation` over the runs; the latter is null for one run."""
    summary = {}
    for name in names:
        values = [one[name] for one in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": statistics.fmean(values), "standard_deviation": deviation}
    return summary


def is_up_to_date(artifact: Path, wanted: dict, baseline: Path | None) -> bool:
    """Whether making the artifact anew would give the same.

    Args:
        wanted: the values of the recipe that it would be made by.
        baseline: the folder that it would start from; None if it starts from a base model, whose name and whose
            dataset's source are then compared too.
    """
    made = read_recipe_of(artifact)
    if not made:  # no folder yet, or one that another program wrote
        return False
    wanted, recipe = dict(wanted), dict(made["recipe"])
    if baseline:
        # By the time of the file: a baseline that was made again is another one, whatever its recipe says.
        made_after = (artifact / RECIPE_FILE).stat().st_mtime > (baseline / RECIPE_FILE).stat().st_mtime
        wanted.pop("model_name_or_path")  # the name of a folder,
        recipe.pop("baseline")  # and the recipe of that folder
        return made_after and comparable(recipe) == comparable(wanted)
    # The same recipe gives another model where the Hub cannot be reached and a substitute stands in.
    base = find_base_model(wanted["model_name_or_path"])
    source = source_of(wanted["dataset_name"], wanted.get("dataset_config_name"))
    origin = made["provenance"]["base_model"], made["provenance"]["dataset_source"]
    return comparable(recipe) == comparable(wanted) and origin == (base.name, source)


def choose_seed(variant: str, runs: list[dict], results: Path) -> tuple[int, str]:
    """The seed that is published, and the score that chose it.

    It is the baseline's seed wherever a variant has it, so that variants are compared in pairs.
    """
    path = results / "seeds" / "baseline.json"
    seeds = [one["seed"] for one in runs]
    if variant != "baseline" and path.is_file() and (seed := read_json(path)["chosen_seed"]) in seeds:
        return seed, "validation macro F1 of the baseline"
    # On validation, never on test: the best of five on test would be a score that no new text gets.
    return max(runs, key=lambda one: one["validation_macro_f1"])["seed"], "validation macro F1"
