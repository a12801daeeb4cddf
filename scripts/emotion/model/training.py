"""What every training shares around the `Trainer`: its arguments, patches, checkpoints to resume from, its summary."""

import contextlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import ROOT, check_replaceable, write_json
from emotion.common.machine import choose_threads, has_bf16, keep_freed_memory, peak_memory_mb, reset_peak_memory
from emotion.common.recipe import RECIPE_FILE, Recipe, comparable
from emotion.model.hub import HubArguments
from emotion.task.scores import score

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

RECIPE_OF_RUN = "recipe.json"  # beside the checkpoints: what they are checkpoints of


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """`TrainingArguments` that fit themselves to the machine: no GPU means CPU, no bfloat16 means FP32.

    Checkpoints go to ``checkpoints/`` beside the artifact, so that the artifact holds nothing but what it needs to
    answer. An output folder that cannot be written is an error now, not after the training.
    """

    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether several processes look for parameters that got no gradient."}
    )

    results_dir: str = field(
        default=str(ROOT / "results"), metadata={"help": "With --push_to_hub: where the scores are written."}
    )

    def __post_init__(self):
        if self.hub_token:
            raise ValueError("--hub_token: others can read a command line; run `hf auth login`, or set HF_TOKEN")
        self.hub = HubArguments(self.push_to_hub, self.hub_model_id, self.hub_private_repo, self.results_dir)
        self.push_to_hub = False  # the Trainer would push checkpoints, and a card without these scores
        if not self.output_dir:
            raise ValueError("name the folder to save into, with --output_dir or in the recipe")
        self.artifact = Path(self.output_dir)
        check_replaceable(self.artifact, marker=RECIPE_FILE)
        self.output_dir = str(self.artifact.parent / "checkpoints" / self.artifact.name)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.bf16 = self.bf16 and has_bf16(self.use_cpu)
        if self.use_cpu and "ACCELERATE_MIXED_PRECISION" in os.environ:  # the launcher gives each process one thread
            torch.set_num_threads(max(1, choose_threads(None) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path("runs") / self.artifact.name))
        super().__post_init__()


def compute_metrics(prediction) -> dict:
    """Scores of the evaluation split, for the `Trainer`."""
    scores = score(prediction.predictions, prediction.label_ids)
    predicted = len(set(prediction.predictions.argmax(axis=-1)))
    return {
        "macro_f1": scores["macro_f1"],
        "accuracy": scores["accuracy"],
        "predicted_classes": predicted,
        "rows": len(prediction.label_ids),  # of all processes together
    }


class ProgressLines(ProgressCallback):
    """The progress bar, with one short line per evaluation instead of dictionaries."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "eval_macro_f1" in logs and self.training_bar is not None:
            self.training_bar.write(
                f"epoch {logs['epoch']:.2f}  validation macro F1 {logs['eval_macro_f1']:.4f}  "
                f"accuracy {logs['eval_accuracy']:.4f}  loss {logs['eval_loss']:.4f}"
            )


def find_checkpoint(trainer: Trainer, recipe: Recipe) -> str | None:
    """The checkpoint to resume from, if asked to; otherwise clears the folder, so that no other run's steps remain.

    The `Trainer` writes trainer_state.json last: a checkpoint without a readable one was cut off and is passed over.

    Raises:
        UserError: if the checkpoints are those of another recipe.
    """
    folder = Path(trainer.args.output_dir)
    checkpoint = _newest_checkpoint(trainer.args, recipe) if trainer.args.resume_from_checkpoint else None
    if trainer.is_world_process_zero() and not checkpoint:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / RECIPE_OF_RUN, comparable(recipe.values))
    trainer.accelerator.wait_for_everyone()
    return checkpoint


@dataclass
class Clock:
    """Seconds that a training took: by the wall, and of the processor over all threads."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextlib.contextmanager
def patched(trainer: Trainer):
    """Trains faster, and loads checkpoints back whole; yields a `Clock` that tells afterwards how long it took.

    Every change to the `Trainer`, the model or the C library that training needs stands here with its reason.
    """
    model, on_cpu = trainer.model, trainer.args.use_cpu
    # The Trainer's own bar prints a dictionary for each evaluation; ProgressLines prints one short line.
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressLines)
    # The Trainer loads a checkpoint back by the names of the modules, while save_pretrained writes LayerNorm's legacy
    # names by default: the best checkpoint, or the one to resume from, would lose every LayerNorm without a word.
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    # The Trainer would have the model divide its loss by the labels of all processes, which BERT's does not do, and so
    # count the label loss once a process.
    trainer.model_accepts_loss_kwargs = False
    # At a few dozen tokens the backward pass of the fused attention takes a third of a step on a CPU.
    attention = model.config._attn_implementation
    if on_cpu:
        model.set_attn_implementation("eager")
    # glibc would give the large gradients' pages back to the system after every step, and fetch them anew.
    keep_freed_memory()
    reset_peak_memory()
    clock, start, cpu_start = Clock(), time.monotonic(), time.process_time()
    yield clock
    clock.seconds, clock.cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    model.set_attn_implementation(attention)  # that of all who open the model


def summarize_training(trainer: Trainer, clock: Clock, resumed: bool) -> dict:
    """What the artifact tells of its training: validation scores, seconds, precision, processes, peak memory.

    Raises:
        UserError: if the best checkpoint, whose weights `trainer.model` should hold by now, is gone.
    """
    arguments, best_checkpoint = trainer.args, trainer.state.best_model_checkpoint
    if arguments.load_best_model_at_end and not (best_checkpoint and Path(best_checkpoint).is_dir()):
        raise UserError(f"the best checkpoint, {best_checkpoint}, is gone; train afresh without resuming")
    logs = [log for log in trainer.state.log_history if "eval_macro_f1" in log]
    best = max(logs, key=lambda log: log["eval_macro_f1"], default={})
    if best.get("eval_predicted_classes") == 1:
        print(
            "WARNING: this model gives every validation text the same class; lower the learning rate", file=sys.stderr
        )
    return {
        "validation_macro_f1": best.get("eval_macro_f1"),
        "validation_accuracy": best.get("eval_accuracy"),
        "validation_loss": best.get("eval_loss"),
        "validation_rows": best.get("eval_rows"),
        "predicted_classes": best.get("eval_predicted_classes"),
        "best_epoch": best.get("epoch"),
        "steps": trainer.state.global_step,
        "seconds": round(clock.seconds, 1),
        "cpu_seconds": round(clock.cpu_seconds, 1),  # not stretched by what else the machine did
        "resumed": resumed,  # then the seconds count from there on
        "precision": "bf16" if arguments.bf16 else "fp32",
        "processes": arguments.world_size,
        "threads": torch.get_num_threads(),
        "peak_memory_mb": peak_memory_mb(),
    }


def _newest_checkpoint(arguments: TrainingArguments, recipe: Recipe) -> str | None:
    """The newest checkpoint that was written whole, of a run with the same recipe; None to start afresh."""
    if arguments.resume_from_checkpoint != "last":
        raise UserError(f"--resume_from_checkpoint {arguments.resume_from_checkpoint}: it takes 'last'")
    folder = Path(arguments.output_dir)
    if not (folder / RECIPE_OF_RUN).is_file():
        print(f"nothing to resume in {folder}; starting from the beginning")
        return None
    before, now = json.loads((folder / RECIPE_OF_RUN).read_text(encoding="utf-8")), comparable(recipe.values)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        raise UserError(
            f"cannot resume {folder}: {', '.join(changed)} changed since it started; set back what changed, or delete "
            "that folder to start afresh"
        )
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in checkpoints:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            print(f"{checkpoint} was cut off while it was written and is not used")
            continue
        print(f"resuming from {checkpoint}")
        return str(checkpoint)
    return None
