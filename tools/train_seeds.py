"""Trains one variant with several seeds, scores each, and keeps the seed that is best on validation.

The chosen model becomes `weights/<variant>`, and the summary is written to `results/seeds/<variant>.json`. A seed is
trained again only if the recipe has changed, or the baseline that it started from; a training that was interrupted is
resumed. A variant that starts from a baseline takes the baseline of the same seed, and is compared with it row by row.

    python tools/train_seeds.py baseline --seeds 42 43 44 45 46
    python tools/train_seeds.py ptq
    python tools/train_seeds.py qat-int4 --config_dir configs/mpnet-base  # run_qat.py with its qat-int4.yaml
    python tools/train_seeds.py qat-int4-float  # the float fine-tuning control
"""

import importlib
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from emotion.data.dataset import load_task
from emotion.evaluation.record import scores_of_seed
from emotion.evaluation.schema import Record
from emotion.evaluation.statistics import check_seeds, summarize_scores
from emotion.inference.model_folder import ARTIFACT, find_formats
from emotion.utils.arguments import SEED, comparable, flag, parse_args, resolve_config
from emotion.utils.base_model import RECIPE_FILE, find_base_model, read_recipe_of
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, atomic_folder, check_replaceable, read_json, write_json
from emotion.utils.machine import SCRIPTS, run_script

CONFIGS = ROOT / "configs" / "minilm"
# What is copied from recipe.yaml; the costs are null for a method that does not train
COPIED = ("validation_macro_f1", "validation_accuracy", "seconds", "cpu_seconds", "threads", "resumed")
BASELINE_SCORES = ("macro_f1", "accuracy", "validation_macro_f1", "seconds")  # what is summarized of the baseline
load_once = cache(load_task)  # each load checks all rows again


@dataclass
class SeedsArguments:
    """Which variant is trained, and with which seeds."""

    variant: str = flag(help="A config, as qat-int4; with -float: without fake quantization.")
    config_dir: str = flag(str(CONFIGS), "Folder of the encoder's configs.")
    # Five seeds: the deviation of fewer says little, and the baseline of each is trained only once.
    seeds: list[int] = flag([42, 43, 44, 45, 46], "Seeds.", SEED)
    weights_dir: str = flag(str(ROOT / "weights"), "Where the models are saved.")
    results_dir: str = flag(str(ROOT / "results"), "Where the results are written.")


def main(argv=None) -> None:
    """Trains, scores and summarizes."""
    (arguments,) = parse_args((SeedsArguments,), positional="variant", argv=argv)
    check_seeds(arguments.seeds, "--seeds")
    variant, configs = arguments.variant, Path(arguments.config_dir)
    weights, results = Path(arguments.weights_dir), Path(arguments.results_dir)
    check_replaceable(weights / variant, ARTIFACT)  # now, not after hours of training
    runs = [make_and_score(seed, variant, weights, results, configs) for seed in arguments.seeds]
    chosen, chosen_by = choose_seed(variant, runs, results)
    # A copy: the variants start from the models of all seeds.
    with atomic_folder(weights / variant, ARTIFACT) as folder:
        shutil.copytree(weights / "seeds" / f"{variant}-{chosen}", folder, dirs_exist_ok=True)
    summary = {"variant": variant, "chosen_seed": chosen, "chosen_by": chosen_by, **summarize(runs), "runs": runs}
    write_json(results / "seeds" / f"{variant}.json", summary)
    print(f"{len(runs)} seeds, test; seed {chosen}, chosen by {chosen_by} -> {weights / variant}")
    # The baseline's summary has no formats: it was scored in PyTorch.
    for name, scores in summary.get("formats", {"pytorch": summary}).items():
        deviation = scores["macro_f1"]["standard_deviation"]
        spread = "one seed" if deviation is None else f"standard deviation {deviation:.4f}"
        change = f"   change {100 * scores['change']['mean']:+.2f} points" if "change" in scores else ""
        print(f"  {name:10} macro F1 {scores['macro_f1']['mean']:.4f} ({spread}){change}")


def make_and_score(seed: int, variant: str, weights: Path, results: Path, configs: Path) -> dict:
    """Makes `weights`/seeds/<variant>-<seed>, unless it is up to date, and scores each of its formats on test.

    The records become `seeds/<seed>/metrics` in ``results``.

    Returns:
        The seed, the scores on validation and the costs of the training; and the scores on test, by format in
        `formats`, or for the baseline beside the rest.
    """
    artifact, seed_results = weights / "seeds" / f"{variant}-{seed}", results / "seeds" / str(seed)
    training = make(artifact, variant, seed, weights, configs)["training"]
    made = {"seed": seed, **{name: training.get(name) for name in COPIED}}
    # The baseline's formats have the same weights and answer alike, so that one is enough.
    if variant == "baseline":
        return made | score_format(artifact, "pytorch", seed_results, variant)
    formats = {name: score_format(artifact, name, seed_results, variant) for name in find_formats(artifact)}
    return made | {"formats": formats}


def make(artifact: Path, variant: str, seed: int, weights: Path, configs: Path) -> dict:
    """Runs a method's script with a config and a seed, unless the model is up to date; returns its recipe.yaml.

    Raises:
        UserError: if the method has no script.
        SystemExit: if the script fails.
    """
    config = variant.removesuffix("-float")  # the float fine-tuning control has the config of its variant
    method = config.partition("-")[0]  # of qat-int4, ptq-dynamic
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
    """Scores one format on test, in a fresh process, unless its record is newer; returns that of `scores_of_seed`."""
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
    for one in runs:
        for format, scores in one["formats"].items():
            scores_of.setdefault(format, []).append(scores)
    return {"formats": {format: summarize_scores(scores, scores[0]) for format, scores in scores_of.items()}}


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
    base = find_base_model(wanted["model_name_or_path"], wanted.get("model_revision"))
    columns = wanted.get("text_column_name"), wanted.get("label_column_name")
    source = load_once(wanted["dataset_name"], wanted.get("dataset_config_name"), *columns).source
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


if __name__ == "__main__":
    run(main)
