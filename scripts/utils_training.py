"""What every training shares around the `Trainer`: precision, progress lines, checkpoints that can be trusted."""

import contextlib
import ctypes
import json
import os
import platform
import resource
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from utils_artifact import PLACES, RECIPE_FILE, choose_threads
from utils_cli import ROOT, Recipe, UserError
from utils_files import check_replaceable, write_json
from utils_hub import HubArguments
from utils_record import git_commit
from utils_ruler import package_versions, score
from utils_task import BaseModel, Task, fingerprint

RECIPE_OF_RUN = "recipe.json"  # beside the checkpoints: what they are checkpoints of


def has_bf16(use_cpu: bool) -> bool:
    """Whether the device that will train multiplies in bfloat16; where it does not, bfloat16 is emulated and slow."""
    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")
    return any(torch.cpu.get_capabilities().get(name) is True for name in names)


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


def train(trainer: Trainer, recipe: Recipe) -> dict:
    """Trains, from a checkpoint if asked to; leaves the best weights by validation in ``trainer.model``.

    Returns:
        What the artifact tells of its training: validation scores, seconds, precision, processes, peak memory.
    """
    arguments = trainer.args
    checkpoint = _find_checkpoint(arguments, recipe) if arguments.resume_from_checkpoint else None
    if trainer.is_world_process_zero() and not checkpoint:
        shutil.rmtree(arguments.output_dir, ignore_errors=True)  # never resume into another run's steps
        write_json(Path(arguments.output_dir) / RECIPE_OF_RUN, comparable(recipe.values))
    trainer.accelerator.wait_for_everyone()
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not arguments.disable_tqdm:
        trainer.add_callback(ProgressLines)
    # The Trainer loads a checkpoint back by the names of the modules, while save_pretrained writes LayerNorm's legacy
    # names by default: the best checkpoint, or the one to resume from, would lose every LayerNorm without a word.
    trainer.model.save_pretrained = partial(trainer.model.save_pretrained, save_original_format=False)
    attention = trainer.model.config._attn_implementation
    if arguments.use_cpu:  # at a few dozen tokens the backward pass of the fused attention takes a third of a step
        trainer.model.set_attn_implementation("eager")
    # The Trainer would have the model divide its loss by the labels of all processes, which BERT's does not do, and so
    # count the label loss once a process.
    trainer.model_accepts_loss_kwargs = False
    keep_freed_memory()
    reset_peak_memory()
    start, cpu_start = time.monotonic(), time.process_time()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    trainer.model.set_attn_implementation(attention)  # that of all who open the model
    best_checkpoint = trainer.state.best_model_checkpoint
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
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),  # over all threads; not stretched by what else the machine did
        "resumed": checkpoint is not None,  # then the seconds count from there on
        "precision": "bf16" if arguments.bf16 else "fp32",
        "processes": arguments.world_size,
        "threads": torch.get_num_threads(),
        "peak_memory_mb": peak_memory_mb(),
    }


def reset_peak_memory() -> None:
    """Lets `peak_memory_mb` count from here on, where the system can; elsewhere it counts from the process's start."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mb() -> int:
    """Most memory that was in use at once, in megabytes (1e6 bytes): the GPU's, or the process's on a CPU."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


def keep_freed_memory() -> None:
    """Tells glibc to reuse large buffers instead of returning them to the system after every step.

    The gradient of the word embeddings alone is 47 MB for MiniLM: fetching such pages anew cost a quarter of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)  # what loading the model has left over
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def _find_checkpoint(arguments: TrainingArguments, recipe: Recipe) -> str | None:
    """The newest checkpoint that was written whole, of a run with the same recipe; None to start afresh.

    The `Trainer` writes trainer_state.json last: a checkpoint without a readable one was cut off.
    """
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


def comparable(values: dict) -> dict:
    """What of a recipe's values decides the result; `bf16` is what the machine made of it."""
    free = PLACES | {"report_to", "disable_tqdm", "bf16"}
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
    return {key: str(value) for key, value in {**values, **numbers}.items() if key not in free}


def describe_made(variant: str, recipe: Recipe, base: BaseModel, task: Task, rows, training: dict, seed: int) -> dict:
    """What made an artifact, for its recipe.yaml and for every record of it; ``rows`` are those it learnt from."""
    return {
        "variant": variant,
        "recipe": {key: value for key, value in recipe.values.items() if key not in PLACES},
        "recipe_sha256": recipe.sha256,
        "seed": seed,
        "made": {
            "base_model": base.name,
            "base_model_source": base.source,
            "dataset": task.name,
            "dataset_source": task.source,
            "train_rows": len(rows),
            "train_fingerprint": fingerprint(rows),
            "git_commit": git_commit(),
        },
        "training": training,
        "versions": package_versions(),
    }
