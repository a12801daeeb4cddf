"""Chooses the recipe of QLoRA: rank, learning rate, layers and start of the adapter, one change at a time.

Each candidate trains with the whole recipe, since half an epoch does not tell candidates apart yet. It is scored on
validation, and the test split is not touched. Scores are means over the seeds. The rule: of the candidates whose macro
F1 lies within 0.2 points of the best, the one with the lowest validation loss wins, since the loss is less noisy. A
candidate that predicts a single class with any seed never wins. A training that stands already is not repeated.

    python studies/qlora_study.py --seed 42 43 44
    python studies/qlora_study.py --candidates centre "rank 8"
"""

from dataclasses import dataclass, field
from pathlib import Path

import run_qlora
from emotion.data.metrics import VALIDATION_NOISE
from emotion.evaluation.schema import SUMMARIZED_OF_TRAINING
from emotion.inference.model_folder import adapter_bytes
from emotion.utils.arguments import POSITIVE, SEED, parse_args, resolve_config
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, write_json
from emotion.utils.machine import choose_threads, describe_run, run_script
from emotion.utils.recipe import comparable, read_recipe_of
from seeds import check_seeds, summarize_scores

CONFIG = ROOT / "configs" / "minilm" / "qlora.yaml"
# All that the candidates may change is named here, so that a change of the recipe does not move the study's centre.
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
    "rank 8": {"lora_r": 8, "lora_alpha": 16},  # alpha goes along: the adapter is scaled by alpha / rank
    "query and value only": {"target_modules": ["query", "value"]},  # as in Hu et al., "LoRA", ICLR 2022
    "LoftQ": {"init_lora_weights": "loftq"},  # Li et al., ICLR 2024: the adapter starts from NF4's rounding error
}
# The fields of a candidate's training that the sweep keeps of each seed.
KEPT_OF_TRAINING = (
    *SUMMARIZED_OF_TRAINING,
    "predicted_classes",
    "seconds",
    "cpu_seconds",
    "threads",
    "trained_parameters",
    "parameters",
)


@dataclass
class SweepArguments:
    """Which candidates are trained, and where the results go."""

    candidates: list[str] = field(
        default_factory=lambda: list(CANDIDATES),
        metadata={"help": f"Some of {', '.join(CANDIDATES)}.", "choices": CANDIDATES},
    )
    config: str = field(default=str(CONFIG), metadata={"help": "The config that the candidates change."})
    # As many as the recipe has: the learning rate falls over all of them, so fewer would be another recipe.
    epochs: float = field(
        default=3.0, metadata={"help": "Epochs that each candidate is trained for.", "choices": POSITIVE}
    )
    # One name for one and for several, as it was before it took several
    seed: list[int] = field(
        default_factory=lambda: [42],
        metadata={"help": "Each candidate is trained once with each of these.", "choices": SEED},
    )
    work_dir: str = field(default=str(ROOT / "build" / "qlora_sweep"), metadata={"help": "Where adapters are saved."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    """Trains the candidates, chooses one and writes the page; ``argv``: the flags, the command line's if not given."""
    (arguments,) = parse_args((SweepArguments,), positional="candidates", argv=argv)
    check_seeds(arguments.seed, "--seed")
    learnt = {}
    for name in arguments.candidates:
        learnt[name] = [learn(name, seed, arguments) for seed in arguments.seed]
    provenance = next(iter(learnt.values()))[0]["provenance"]  # all have the same base model and dataset
    sweep = describe_run(choose_threads(None)) | {
        "base_model": provenance["base_model"],
        "dataset": provenance["dataset"],
        "dataset_source": provenance["dataset_source"],
        "epochs": arguments.epochs,
        "seeds": arguments.seed,
        "centre": CENTRE,
        "candidates": {name: summarize(name, runs, arguments) for name, runs in learnt.items()},
    }
    sweep["chosen"] = choose(sweep["candidates"])
    sweep["recipe"] = find_recipe(resolve_config(run_qlora.ARGUMENTS, [arguments.config]).values, arguments.candidates)
    results = Path(arguments.results_dir)
    write_json(results / "qlora_sweep.json", sweep)
    print(f"wrote the study to {results}; make report renders it")


def learn(name: str, seed: int, arguments: SweepArguments) -> dict:
    """Trains a candidate, unless it stands with these flags; returns its recipe.yaml.

    Raises:
        SystemExit: if the training fails; run_qlora.py has said why.
    """
    folder = folder_of(name, seed, arguments)
    changes = CENTRE | CANDIDATES[name] | {"num_train_epochs": arguments.epochs, "seed": seed}
    metadata = read_recipe_of(folder)  # empty if it was never trained
    # The recipe holds more flags than a candidate changes: those that are equal everywhere are not compared.
    is_trained = metadata and comparable(metadata["recipe"]).items() >= comparable(changes).items()
    if not is_trained:
        # An interrupted candidate goes on where it stopped.
        resume = ["--resume_from_checkpoint", "true"]
        words = ["--formats", "adapter"]  # the score is taken after the training; no other format is needed
        for key, value in changes.items():
            # A list is a flag with several words: --target_modules query value
            words += [f"--{key}", *(value if isinstance(value, list) else [value])]
        run_script("run_qlora.py", arguments.config, *words, "--output_dir", folder, *resume, check=True)
    return read_recipe_of(folder)


def folder_of(name: str, seed: int, arguments: SweepArguments) -> Path:
    """The folder of a candidate's training; in its name each blank and sign becomes a hyphen."""
    return Path(arguments.work_dir) / "".join(letter if letter.isalnum() else "-" for letter in f"{name}-{seed}")


def summarize(name: str, metadata: list[dict], arguments: SweepArguments) -> dict:
    """The flags that the candidate changes, its scores on validation in the mean and of each seed, and its costs."""
    runs = []
    for seed, recipe in zip(arguments.seed, metadata, strict=True):
        kept = {key: recipe["training"][key] for key in KEPT_OF_TRAINING}
        # A training that stands is not repeated: it may be of another commit than this run.
        runs.append({"seed": seed, "git_commit": recipe["provenance"]["git_commit"], **kept})
    return {
        "changes": CANDIDATES[name],
        **summarize_scores(runs, SUMMARIZED_OF_TRAINING),
        # The same with every seed
        **{key: runs[0][key] for key in ("trained_parameters", "parameters")},
        "adapter_bytes": adapter_bytes(folder_of(name, arguments.seed[0], arguments)),
        "runs": runs,
    }


def choose(candidates: dict) -> str:
    """The name of the winner, by the rule above; raises `UserError` if every good candidate predicts one class."""
    # Of all candidates: one that collapsed has a low score and cannot be the best, unless all have.
    best = max(candidate["validation_macro_f1"]["mean"] for candidate in candidates.values())
    losses = {}
    for name, candidate in candidates.items():
        # A model that always answers the same class has learnt nothing, and yet may have a low loss.
        classes = min(run["predicted_classes"] for run in candidate["runs"])
        if candidate["validation_macro_f1"]["mean"] >= best - VALIDATION_NOISE and classes > 1:
            losses[name] = candidate["validation_loss"]["mean"]
    if not losses:
        raise UserError("every candidate predicts a single class; lower the learning rates")
    return min(losses, key=losses.get)


def find_recipe(values: dict, candidates: list[str]) -> str | None:
    """The candidate whose flags a recipe has; None if it has those of none."""
    # One that changes layers names a flag that the others leave to the recipe: it is compared first.
    for name in sorted(candidates, key=lambda name: "target_modules" not in CANDIDATES[name]):
        if comparable(CENTRE | CANDIDATES[name]).items() <= comparable(values).items():
            return name
    return None


if __name__ == "__main__":
    run(main)
