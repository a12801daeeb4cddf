"""Trains and scores a variant with several seeds, and summarizes the scores."""

import importlib
import re
from pathlib import Path

from emotion.data.dataset import source_of
from emotion.evaluation.record import scores_of_seed
from emotion.evaluation.schema import Mean, Record
from emotion.inference.model_folder import find_formats
from emotion.utils.arguments import resolve_config
from emotion.utils.base_model import find_base_model
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, read_json
from emotion.utils.machine import SCRIPTS, run_script
from emotion.utils.recipe import RECIPE_FILE, comparable, read_recipe_of

CONFIGS = ROOT / "configs" / "minilm"
TRAINING_COSTS = ("seconds", "cpu_seconds", "threads", "resumed")  # null for a method that does not train
BASELINE_SCORES = ("macro_f1", "accuracy", "validation_macro_f1", "seconds")  # what is summarized of the baseline


def check_seeds(seeds: list[int], flag: str = "--seeds") -> None:
    """Raises `UserError` if there is no seed, or one is repeated: it would count twice in the mean."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{flag} {' '.join(map(str, seeds))}: it takes one seed at least, and each once")


def make_and_score(seed: int, variant: str, weights: Path, results: Path, configs: Path = CONFIGS) -> dict:
    """Makes `weights`/seeds/<variant>-<seed>, unless it is up to date, and scores each of its formats on test.

    Args:
        variant: the name of a config; with `-float` at its end, QAT without fake quantization (the float fine-tuning
            control).
        results: the records become `seeds/<seed>/metrics` in this folder.

    Returns:
        The seed, the scores on validation and the costs of the training; and the scores on test, by format in
        `formats`, or for the baseline beside the rest.
    """
    artifact, seed_results = weights / "seeds" / f"{variant}-{seed}", results / "seeds" / str(seed)
    training = make(artifact, variant, seed, weights, configs)["training"]
    run = {"seed": seed}
    run |= {name: training[name] for name in ("validation_macro_f1", "validation_accuracy")}
    run |= {name: training.get(name) for name in TRAINING_COSTS}
    # The baseline's formats have the same weights and answer alike, so that one is enough.
    if variant == "baseline":
        return run | score_format(artifact, "pytorch", seed_results, variant)
    formats = {name: score_format(artifact, name, seed_results, variant) for name in find_formats(artifact)}
    return run | {"formats": formats}


def make(artifact: Path, variant: str, seed: int, weights: Path, configs: Path) -> dict:
    """Runs a method's script with a config and a seed, unless the model is up to date; returns its recipe.yaml.

    Raises:
        UserError: if the method has no script.
        SystemExit: if the script fails.
    """
    config = variant.removesuffix("-float")  # the float fine-tuning control has the config of its variant
    method = re.sub(r"-int\d$", "", config)
    script = SCRIPTS / f"run_{method}.py"
    if not script.is_file():
        raise UserError(f"variant {variant}: no {script.name}")
    arguments = [configs / f"{config}.yaml"]
    # A quantized variant starts from the baseline of the same seed, so that the two can be compared row by row.
    baseline = weights / "seeds" / f"baseline-{seed}" if method in {"ptq", "qat"} else None
    if baseline:
        arguments += ["--model_name_or_path", baseline]
    if config != variant:
        arguments += ["--fake_quantize", False]
    trained = method != "ptq"  # which draws its calibration samples by the seed of its config
    if trained:
        arguments += ["--seed", seed]
    classes = importlib.import_module(script.stem).ARGUMENTS
    if is_up_to_date(artifact, resolve_config(classes, arguments).values, baseline):
        print(f"seed {seed}: {artifact} is up to date")
    else:
        # A training that was interrupted is resumed.
        resume = ["--resume_from_checkpoint", "true"] if trained else []
        run_script(script.name, *arguments, *resume, "--output_dir", artifact, check=True)
    return read_recipe_of(artifact)


def score_format(artifact: Path, format: str, results: Path, variant: str) -> dict:
    """Scores one format on test, in a fresh process, unless its record is newer than the model.

    Returns:
        The result of `scores_of_seed`.
    """
    path = results / "metrics" / f"{variant}-{format}.json"
    # Latency is not measured here: a seed changes no speed, and only run_benchmark.py times several models.
    if not path.is_file() or path.stat().st_mtime < (artifact / RECIPE_FILE).stat().st_mtime:
        flags = ["--format", format, "--latency_runs", 0, "--results_dir", results]
        run_script("run_evaluation.py", artifact, *flags, check=True)
    scores = scores_of_seed(Record.read(path), results)
    if variant != "baseline" and "change" not in scores:
        raise UserError(f"no predictions of the baseline in {results}; run python tools/train_seeds.py baseline")
    return scores


def summarize(runs: list[dict]) -> dict:
    """Summarizes the scores over the seeds: the baseline's, or by format in `formats`."""
    if "formats" not in runs[0]:
        return summarize_scores(runs, BASELINE_SCORES)
    # QLoRA's merged model is NF4, or BF16 if 4 bits cost too much: the seeds may differ in their formats.
    scores_of = {}
    for run in runs:
        for format, scores in run["formats"].items():
            scores_of.setdefault(format, []).append(scores)
    return {"formats": {format: summarize_scores(scores, scores[0]) for format, scores in scores_of.items()}}


def summarize_scores(runs: list[dict], names) -> dict[str, dict]:
    """Name of a score -> its `mean` and sample `standard_deviation` over the runs; the latter is null for one run."""
    return {name: Mean.of([run[name] for run in runs]).model_dump() for name in names}


def is_up_to_date(artifact: Path, wanted: dict, baseline: Path | None) -> bool:
    """Whether making the model again, by the recipe ``wanted``, would give the same.

    Args:
        baseline: the folder that it would start from; None if it starts from a base model, whose name and whose
            dataset's source are then compared too.
    """
    made = read_recipe_of(artifact)
    if not made:  # no folder yet, or one that another program wrote
        return False
    wanted, recipe = dict(wanted), dict(made["recipe"])
    if baseline:
        # By the time of the file: a baseline that was trained again is another one, whatever its recipe says.
        made_after = (artifact / RECIPE_FILE).stat().st_mtime > (baseline / RECIPE_FILE).stat().st_mtime
        wanted.pop("model_name_or_path")  # the name of a folder,
        recipe.pop("baseline")  # and the recipe of that folder
        return made_after and comparable(recipe) == comparable(wanted)
    # The same recipe gives another model if the Hub cannot be reached and a substitute is used.
    base = find_base_model(wanted["model_name_or_path"])
    source = source_of(wanted["dataset_name"], wanted.get("dataset_config_name"))
    provenance = made["provenance"]["base_model"], made["provenance"]["dataset_source"]
    return comparable(recipe) == comparable(wanted) and provenance == (base.name, source)


def choose_seed(variant: str, runs: list[dict], results: Path) -> tuple[int, str]:
    """Returns the seed that is published, and the score that chose it.

    It is the baseline's seed if the variant has it, so that variants are compared in pairs.
    """
    path = results / "seeds" / "baseline.json"
    seeds = [run["seed"] for run in runs]
    if variant != "baseline" and path.is_file() and (seed := read_json(path)["chosen_seed"]) in seeds:
        return seed, "validation macro F1 of the baseline"
    # On validation, never on test: the best of five on test would be a score that no new text gets.
    return max(runs, key=lambda run: run["validation_macro_f1"])["seed"], "validation macro F1"
