"""Chooses the recipe of QLoRA: rank, learning rate, layers and initialization of the adapter, one change at a time.

Candidates are scored on validation, as means over the seeds. Of those whose macro F1 lies within 0.2 points of the
best, the one with the lowest validation loss wins, since the loss is less noisy. A candidate that predicts a single
class with any seed never wins. Finished trainings are not repeated.

    python studies/qlora_study.py --seed 42 43 44
"""

from dataclasses import dataclass
from pathlib import Path

import run_qlora
from emotion.data.metrics import VALIDATION_NOISE
from emotion.evaluation.statistics import check_seeds, summarize_scores
from emotion.inference.model_folder import adapter_bytes
from emotion.utils.arguments import POSITIVE, SEED, comparable, flag, parse_args, resolve_config
from emotion.utils.base_model import read_recipe_of
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, write_json
from emotion.utils.machine import choose_threads, describe_run, run_script

CONFIG = ROOT / "configs" / "minilm" / "qlora.yaml"
# All flags that candidates change, so that the study does not depend on the recipe
CENTRE = {
    "lora_r": 16,
    "lora_alpha": 32,
    "learning_rate": 1e-3,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": "default",
}
CANDIDATES = {
    "centre": {},
    "rate 5e-4": {"learning_rate": 5e-4},
    "rank 8": {"lora_r": 8, "lora_alpha": 16},  # alpha / rank stays
    "query and value only": {"target_modules": ["query", "value"]},  # as in Hu et al., "LoRA", ICLR 2022
    "LoftQ": {"init_lora_weights": "loftq"},
}
SUMMARIZED_OF_TRAINING = ("validation_macro_f1", "validation_accuracy", "validation_loss")  # over seeds
KEPT_OF_TRAINING = [*SUMMARIZED_OF_TRAINING, "predicted_classes", "seconds", "cpu_seconds", "threads"]
KEPT_OF_TRAINING += ["trained_parameters", "parameters"]


@dataclass
class SweepArguments:
    """Which candidates are trained, and where the results go."""

    candidates: list[str] = flag(list(CANDIDATES), "Candidates.", CANDIDATES)
    config: str = flag(str(CONFIG), "The config that the candidates change.")
    epochs: float = flag(3.0, "Epochs of each training.", POSITIVE)
    seed: list[int] = flag([42], "Seeds.", SEED)
    work_dir: str = flag(str(ROOT / "build" / "qlora_sweep"), "Where adapters are saved.")
    results_dir: str = flag(str(ROOT / "results"), "Where the results are written.")


def main(argv=None) -> None:
    (arguments,) = parse_args((SweepArguments,), positional="candidates", argv=argv)
    check_seeds(arguments.seed, "--seed")
    trained = {}
    for name in arguments.candidates:
        trained[name] = [train(name, seed, arguments) for seed in arguments.seed]
    provenance = next(iter(trained.values()))[0]["provenance"]  # all have the same base model and dataset
    sweep = describe_run(choose_threads(None)) | {
        "base_model": provenance["base_model"],
        "dataset": provenance["dataset"],
        "dataset_source": provenance["dataset_source"],
        "epochs": arguments.epochs,
        "seeds": arguments.seed,
        "centre": CENTRE,
        "candidates": {name: summarize(name, runs, arguments) for name, runs in trained.items()},
    }
    sweep["chosen"] = choose(sweep["candidates"])
    sweep["recipe"] = find_recipe(resolve_config(run_qlora.ARGUMENTS, [arguments.config]).values, arguments.candidates)
    write_json(Path(arguments.results_dir) / "qlora_sweep.json", sweep)
    print(f"wrote the study to {arguments.results_dir}; make report renders it")


def train(name: str, seed: int, arguments: SweepArguments) -> dict:
    """Trains a candidate, unless it has been trained with these flags; returns its recipe.yaml."""
    folder = folder_of(name, seed, arguments)
    changes = CENTRE | CANDIDATES[name] | {"num_train_epochs": arguments.epochs, "seed": seed}
    metadata = read_recipe_of(folder)  # empty if it was never trained
    if not metadata or not comparable(metadata["recipe"]).items() >= comparable(changes).items():
        flags = ["--formats", "adapter", "--resume_from_checkpoint", "true", "--output_dir", folder]
        for key, value in changes.items():
            flags += [f"--{key}", *(value if isinstance(value, list) else [value])]
        run_script("run_qlora.py", arguments.config, *flags, check=True)
    return read_recipe_of(folder)


def folder_of(name: str, seed: int, arguments: SweepArguments) -> Path:
    """Returns the folder of a training, named after candidate and seed."""
    return Path(arguments.work_dir) / "".join(letter if letter.isalnum() else "-" for letter in f"{name}-{seed}")


def summarize(name: str, metadata: list[dict], arguments: SweepArguments) -> dict:
    """Returns the changes of a candidate, and its scores and costs as means and of each seed."""
    runs = []
    for seed, recipe in zip(arguments.seed, metadata, strict=True):
        kept = {key: recipe["training"][key] for key in KEPT_OF_TRAINING}
        runs.append({"seed": seed, "git_commit": recipe["provenance"]["git_commit"], **kept})
    return {
        "changes": CANDIDATES[name],
        **summarize_scores(runs, SUMMARIZED_OF_TRAINING),
        **{key: runs[0][key] for key in ("trained_parameters", "parameters")},
        "adapter_bytes": adapter_bytes(folder_of(name, arguments.seed[0], arguments)),
        "runs": runs,
    }


def choose(candidates: dict) -> str:
    """Returns the name of the winner; raises `UserError` if every good candidate predicts one class."""
    best = max(candidate["validation_macro_f1"]["mean"] for candidate in candidates.values())
    losses = {}
    for name, candidate in candidates.items():
        classes = min(run["predicted_classes"] for run in candidate["runs"])
        if candidate["validation_macro_f1"]["mean"] >= best - VALIDATION_NOISE and classes > 1:
            losses[name] = candidate["validation_loss"]["mean"]
    if not losses:
        raise UserError("every candidate predicts a single class; lower the learning rates")
    return min(losses, key=losses.get)


def find_recipe(values: dict, candidates: list[str]) -> str | None:
    """Returns the candidate whose flags a recipe has; None if there is none."""
    # Candidates with target_modules first: the others leave that flag to the recipe.
    for name in sorted(candidates, key=lambda name: "target_modules" not in CANDIDATES[name]):
        if comparable(CENTRE | CANDIDATES[name]).items() <= comparable(values).items():
            return name
    return None


if __name__ == "__main__":
    run(main)
