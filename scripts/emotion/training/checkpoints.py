"""Checkpoints: what makes one complete, and which one a training may resume from.

Each checkpoint gets a file of checksums after it is written. One without that file was interrupted, and one that
differs from it is damaged: neither is resumed.
"""

import math
import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainingArguments

from emotion.inference.model_folder import ARTIFACT, ROWS_FIELD, RUN_FILE
from emotion.utils.base_model import RECIPE_FILE
from emotion.utils.errors import UserError
from emotion.utils.files import atomic_folder, check_replaceable, read_json, sha256, write_json

CHECKSUMS = "checksums.json"  # in each checkpoint: file -> SHA-256, written last


def find_checkpoint(trainer: Trainer, resume: str | bool | None, run: dict) -> str | None:
    """Finds the checkpoint to resume from. If there is none, removes those of earlier trainings from `output_dir`.

    Args:
        resume: path of a checkpoint, or true for the last one in `output_dir`; None starts from the beginning.
        run: recipe, rows and number of processes, which must be those of the checkpoint.

    Raises:
        UserError: if the checkpoint belongs to another recipe or to other rows, or the one named is not complete.
    """
    folder, checkpoint = Path(trainer.args.output_dir), choose_checkpoint(trainer.args, resume, run)
    trainer.accelerator.wait_for_everyone()  # all have looked before one of them removes anything
    if trainer.is_world_process_zero() and (not checkpoint or checkpoint.parent.resolve() != folder.resolve()):
        _start_run(folder, run)
    trainer.accelerator.wait_for_everyone()
    return str(checkpoint) if checkpoint else None


def choose_checkpoint(arguments: TrainingArguments, resume: str | bool | None, run: dict) -> Path | None:
    """Returns the checkpoint named, or the last complete one, or None; raises as `find_checkpoint` does."""
    if str(resume).lower() in ("none", "false"):
        return None
    if str(resume).lower() != "true":
        checkpoint = Path(resume)
        _check_same_run(checkpoint.parent, run)
        if fault := _find_fault(checkpoint, arguments):
            raise UserError(f"--resume_from_checkpoint: {checkpoint} {fault}; name another one, or true for the last")
        return checkpoint
    folder = Path(arguments.output_dir)
    if not (folder / RUN_FILE).is_file():
        print(f"nothing to resume in {folder}; starting from the beginning")
        return None
    _check_same_run(folder, run)
    for checkpoint in _newest_first(folder):
        fault = _find_fault(checkpoint, arguments)
        print(f"{checkpoint} {fault}: it is not used" if fault else f"resuming from {checkpoint}")
        if not fault:
            return checkpoint
    print(f"no complete checkpoint in {folder}; starting from the beginning")
    return None


def _check_same_run(folder: Path, run: dict) -> None:
    """Raises `UserError` if the checkpoints in a folder belong to another recipe or to other rows."""
    if not (folder / RUN_FILE).is_file():
        raise UserError(f"--resume_from_checkpoint: {folder} holds no checkpoints of this project (no {RUN_FILE})")
    before = read_json(folder / RUN_FILE)
    changed = sorted(key for key in before.keys() | run.keys() if before.get(key) != run.get(key))
    if changed:
        names = ", ".join(changed).replace(ROWS_FIELD, "the rows of train")
        what = f"cannot resume {folder}: {names} changed since it started"
        raise UserError(f"{what}; undo that, or leave out --resume_from_checkpoint to start from the beginning")


def _start_run(folder: Path, run: dict) -> None:
    """Removes the checkpoints of other trainings: the best of them could be taken for one of this training."""
    if not (folder / RECIPE_FILE).is_file():  # no finished model to keep
        with atomic_folder(folder, ARTIFACT) as partial:
            write_json(partial / RUN_FILE, run)
        return
    check_replaceable(folder, ARTIFACT)
    # In this order: a process that is killed in between leaves no checkpoint under the name of a new run.
    for checkpoint in _newest_first(folder):
        shutil.rmtree(checkpoint)
    write_json(folder / RUN_FILE, run)


class CheckpointCallback(TrainerCallback):
    """Writes the checksums of each checkpoint, and ends a training whose weights or loss are no longer finite."""

    resumed_from: str | None = None  # the checkpoint that the training goes on from; None for the beginning

    def on_train_begin(self, args, state, control, **kwargs):
        """Finds the best checkpoint beside the one that is resumed: Transformers 5.24 forgets one that was moved."""
        if self.resumed_from and state.best_global_step:
            best = Path(self.resumed_from).with_name(f"checkpoint-{state.best_global_step}")
            state.best_model_checkpoint = str(best)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Checks the weights before they are saved, and before the training ends."""
        if control.should_save or control.should_training_stop:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not torch.isfinite(parameter).all():
                    raise diverged(f"{name} is no longer finite", args, state.global_step)

    on_epoch_end = on_step_end  # where `save_strategy` is epoch

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Checks the validation loss: finite weights can be too large to give finite logits."""
        if not math.isfinite(metrics["eval_loss"]):
            raise diverged(f"the loss on validation is {metrics['eval_loss']}", args, state.global_step)

    def on_save(self, args, state, control, **kwargs):
        """Writes the checksums after every process has written its part of the checkpoint."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (checkpoint / CHECKSUMS).unlink(missing_ok=True)  # of a damaged checkpoint that is written again
            files = [path for path in sorted(checkpoint.iterdir()) if CHECKSUMS not in path.name]
            write_json(checkpoint / CHECKSUMS, {path.name: sha256(path) for path in files})


def diverged(what: str, arguments: TrainingArguments, step: int) -> UserError:
    """Returns the error for a training that diverged at a step; it names the last complete checkpoint."""
    complete = [path for path in _newest_first(Path(arguments.output_dir)) if (path / CHECKSUMS).is_file()]
    good = f"the last good checkpoint is {complete[0]}" if complete else "there is no checkpoint yet"
    return UserError(f"{what} in step {step}; {good}; lower --learning_rate")


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _find_fault(checkpoint: Path, arguments: TrainingArguments) -> str | None:
    """Returns why a training cannot go on from a checkpoint with the same result; None if it can."""
    if fault := _find_damage(checkpoint):
        return fault
    # Without these files the Trainer goes on with a fresh optimizer or other random numbers, and does not say so.
    random_state = "rng_state.pth" if arguments.world_size == 1 else f"rng_state_{arguments.process_index}.pth"
    for name in ("optimizer.pt", "scheduler.pt", random_state):
        if not (checkpoint / name).is_file():
            return f"has no {name}"
    # The best one so far is loaded at the end.
    best = read_json(checkpoint / "trainer_state.json")["best_model_checkpoint"]
    if arguments.load_best_model_at_end and best:
        best = checkpoint.with_name(Path(best).name)
        if best != checkpoint and (fault := _find_damage(best)):
            return f"needs the best one, {best}, which {fault}"
    return None


def _find_damage(checkpoint: Path) -> str | None:
    try:
        checksums = read_json(checkpoint / CHECKSUMS)
    except UserError:
        return "was cut off while it was written"
    for name, expected in checksums.items():
        if not (checkpoint / name).is_file() or sha256(checkpoint / name) != expected:
            return f"is damaged ({name})"
    return None
