"""Chooses the recipe of QLoRA: rank, learning rate, layers and start of the adapter, one change at a time.

Each candidate trains the whole recipe, since half an epoch tells nothing apart yet, and is scored on validation; the
test split is not touched. The rule: of the candidates whose macro F1 lies within 0.2 points of the best, the one with
the lowest validation loss, which is less noisy; one that predicts a single class never wins. A candidate that stands
already is not trained again.

    python scripts/study_qlora.py                       # the winner stands in configs/qlora.yaml
    python scripts/study_qlora.py --candidates centre "rank 8"
"""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.command import run
from emotion.common.errors import UserError
from emotion.common.files import ROOT, write_json, write_text
from emotion.common.flags import parse_flags
from emotion.common.machine import choose_threads, describe_run
from emotion.common.recipe import comparable, read_recipe_of
from emotion.model.artifact import adapter_bytes
from emotion.report.pages import MARGIN, render_sweep
from emotion.report.plots import plot_sweep

RECIPE = ROOT / "configs" / "qlora.yaml"
CENTRE = {"lora_rank": 16, "lora_alpha": 32, "learning_rate": 1e-3, "lora_dropout": 0.0, "use_rslora": False,
          "use_dora": False, "init_lora_weights": "default"}  # fmt: skip
CANDIDATES = {
    "centre": {},
    "rate 5e-4": {"learning_rate": 5e-4},
    "rank 8": {"lora_rank": 8, "lora_alpha": 16},
    "query and value only": {"target_modules": ["query", "value"]},
    "LoftQ": {"init_lora_weights": "loftq"},
}


@dataclass
class SweepArguments:
    """What is trained, and where the results go."""

    candidates: list[str] = field(
        default_factory=lambda: list(CANDIDATES), metadata={"help": f"Some of {', '.join(CANDIDATES)}."}
    )
    recipe: str = field(default=str(RECIPE), metadata={"help": "The recipe that the candidates change."})
    epochs: float = field(default=3.0, metadata={"help": "Epochs that each candidate learns."})
    seed: int = field(default=42, metadata={"help": "Seed of each training."})
    work_dir: str = field(default=str(ROOT / "build" / "qlora_sweep"), metadata={"help": "Where adapters are saved."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    (arguments,) = parse_flags((SweepArguments,), positional="candidates", argv=argv)
    unknown = set(arguments.candidates) - set(CANDIDATES)
    if unknown:
        raise UserError(f"--candidates {' '.join(unknown)}: there are {', '.join(CANDIDATES)}")
    learnt = {name: learn(name, arguments) for name in arguments.candidates}
    made = next(iter(learnt.values()))["made"]
    sweep = describe_run(choose_threads(None)) | {
        **{name: made[name] for name in ("base_model", "dataset", "dataset_source")},
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "centre": CENTRE,
        "candidates": {name: summarize(name, one, arguments) for name, one in learnt.items()},
    }
    sweep["chosen"] = choose(sweep["candidates"])
    results = Path(arguments.results_dir)
    write_json(results / "qlora_sweep.json", sweep)
    write_text(results / "qlora_sweep.md", render_sweep(sweep))
    plot_sweep(sweep, results / "qlora_sweep")
    print((results / "qlora_sweep.md").read_text(encoding="utf-8"))


def learn(name: str, arguments: SweepArguments) -> dict:
    """Trains a candidate unless it stands with these flags; returns what its recipe.yaml tells."""
    folder = folder_of(name, arguments)
    changes = CENTRE | CANDIDATES[name] | {"num_train_epochs": arguments.epochs, "seed": arguments.seed}
    made = read_recipe_of(folder)
    stands = made and comparable(made["recipe"]).items() >= comparable(changes).items()
    if not stands:
        words = [sys.executable, str(ROOT / "scripts" / "run_qlora.py"), arguments.recipe, "--formats", "adapter"]
        for key, value in changes.items():
            words += [f"--{key}", *(value if isinstance(value, list) else [str(value)])]
        done = subprocess.run([*words, "--output_dir", str(folder), "--resume_from_checkpoint", "last"])
        if done.returncode:
            sys.exit(done.returncode)  # the script has said why
    return read_recipe_of(folder)


def folder_of(name: str, arguments: SweepArguments) -> Path:
    return Path(arguments.work_dir) / "".join(letter if letter.isalnum() else "-" for letter in name)


def summarize(name: str, made: dict, arguments: SweepArguments) -> dict:
    """What the candidate changes, and what came of it on validation."""
    training = made["training"]
    told = ("validation_macro_f1", "validation_accuracy", "validation_loss", "predicted_classes", "seconds",
            "cpu_seconds", "threads", "trained_parameters", "parameters")  # fmt: skip
    return {
        "changes": CANDIDATES[name],
        **{key: training[key] for key in told},
        "adapter_bytes": adapter_bytes(folder_of(name, arguments)),
    }


def choose(candidates: dict) -> str:
    """The name of the winner, by the rule above."""
    best = max(one["validation_macro_f1"] for one in candidates.values())
    close = {
        name: one["validation_loss"]
        for name, one in candidates.items()
        if one["validation_macro_f1"] >= best - MARGIN and one["predicted_classes"] > 1
    }
    if not close:
        raise UserError("every candidate predicts a single class; lower the learning rates")
    return min(close, key=close.get)


if __name__ == "__main__":
    run(main)
