"""Checkpoints: where a training keeps them, what makes one whole, and which one a training may go on from.

Each checkpoint gets a list of checksums once it is written. One without that list was cut off, and one that differs
from it is damaged: neither is resumed.
"""

import math
import re
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainingArguments

from emotion.data.dataset import fingerprint
from emotion.utils.errors import UserError
from emotion.utils.files import FolderKind, atomic_folder, check_replaceable, discard, read_json, sha256, write_json
from emotion.utils.recipe import Recipe, comparable

RECIPE_OF_RUN = "recipe.json"  # beside the checkpoints: only a run with the same recipe may resume from them
ROWS = "train_fingerprint"  # its field for the rows of train: the dataset's path may lead to other rows by now
CHECKSUMS = "checksums.json"  # in each checkpoint: file -> SHA-256, written last
# What the Trainer and PEFT write into a checkpoint
FILES = r"""
config\.json (adapter_)?model\.safetensors adapter_config\.json README\.md tokenizer\.json tokenizer_config\.json
special_tokens_map\.json added_tokens\.json vocab\.(json|txt) merges\.txt training_args\.bin optimizer\.pt
scheduler\.pt scaler\.pt rng_state(_\d+)?\.pth trainer_state\.json
""".split()


def _is_ours(folder: Path) -> bool:
    try:
        started = read_json(folder / RECIPE_OF_RUN)
    except UserError:
        return False
    return ROWS in started


CHECKPOINTS = FolderKind(
    "a folder of checkpoints",
    _is_ours,
    re.compile(rf"{re.escape(RECIPE_OF_RUN)}|checkpoint-\d+(/({'|'.join(FILES)}|\.?{CHECKSUMS}(\.lock|\.partial)?))?"),
)


def checkpoints_of(artifact: Path) -> Path:
    """The folder of an artifact's checkpoints: beside it, on the disk that it lies on."""
    place = artifact.resolve() if artifact.is_symlink() else artifact
    return place.parent / "checkpoints" / place.name


def find_checkpoint(trainer: Trainer, recipe: Recipe, rows) -> str | None:
    """The checkpoint to resume from, if asked to; None to start afresh, in an empty folder of checkpoints.

    Args:
        rows: the rows of train.

    Raises:
        UserError: if the checkpoints are those of another recipe, or of other rows.
    """
    started = comparable(recipe.values) | {ROWS: fingerprint(rows), "processes": str(trainer.args.world_size)}
    checkpoint = newest_checkpoint(trainer.args, started) if trainer.args.resume_from_checkpoint else None
    trainer.accelerator.wait_for_everyone()  # all have looked before one of them removes anything
    # Another run's checkpoints must go: the best one of them could be taken for this run's.
    if trainer.is_world_process_zero() and not checkpoint:
        with atomic_folder(trainer.args.output_dir, CHECKPOINTS) as folder:
            write_json(folder / RECIPE_OF_RUN, started)
    trainer.accelerator.wait_for_everyone()
    return checkpoint


def newest_checkpoint(arguments: TrainingArguments, started: dict) -> str | None:
    """The newest checkpoint that is whole; None to start afresh. A line tells why each newer one is not used.

    Raises:
        UserError: if the checkpoints were started otherwise.
    """
    if arguments.resume_from_checkpoint != "last":
        raise UserError(f"--resume_from_checkpoint {arguments.resume_from_checkpoint}: it takes 'last'")
    folder = Path(arguments.output_dir)
    if not (folder / RECIPE_OF_RUN).is_file():
        print(f"nothing to resume in {folder}; starting from the beginning")
        return None
    before = read_json(folder / RECIPE_OF_RUN)
    changed = sorted(key for key in before.keys() | started.keys() if before.get(key) != started.get(key))
    if changed:
        names = ", ".join(changed).replace(ROWS, "the rows of train")
        raise UserError(
            f"cannot resume {folder}: {names} changed since it started; set back what changed, or delete that folder "
            "to start afresh"
        )
    for checkpoint in _newest_first(folder):
        if fault := _fault_of(checkpoint, arguments):
            print(f"{checkpoint} {fault}: it is not used")
            continue
        print(f"resuming from {checkpoint}")
        return str(checkpoint)
    print(f"no whole checkpoint in {folder}; starting from the beginning")
    return None


def drop_checkpoints(arguments: TrainingArguments) -> None:
    """Removes the checkpoints of a training whose artifact is saved."""
    check_replaceable(arguments.output_dir, CHECKPOINTS)
    discard(arguments.output_dir)


class GoodCheckpoints(TrainerCallback):
    """Ends a training whose weights or validation loss are no longer finite; seals the checkpoints of any other."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Looks at the weights before they are saved, and before the training ends with them."""
        if control.should_save or control.should_training_stop:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not torch.isfinite(parameter).all():
                    raise diverged(f"{name} is no longer finite", args, state.global_step)

    on_epoch_end = on_step_end  # where `save_strategy` is epoch

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Looks at the loss on validation: finite weights can be too large to answer."""
        if not math.isfinite(metrics["eval_loss"]):
            raise diverged(f"the loss on validation is {metrics['eval_loss']}", args, state.global_step)

    def on_save(self, args, state, control, **kwargs):
        """Writes the checksums of a checkpoint, after every process has written its part of it."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (checkpoint / CHECKSUMS).unlink(missing_ok=True)  # of a damaged one that is written again
            files = [path for path in sorted(checkpoint.iterdir()) if CHECKSUMS not in path.name]
            write_json(checkpoint / CHECKSUMS, {path.name: sha256(path) for path in files})


def diverged(what: str, arguments: TrainingArguments, step: int) -> UserError:
    """The error that ends a training at a step: what is not finite, and the checkpoint before that happened."""
    sealed = [path for path in _newest_first(Path(arguments.output_dir)) if (path / CHECKSUMS).is_file()]
    good = f"the last good checkpoint is {sealed[0]}" if sealed else "there is no checkpoint yet"
    return UserError(f"{what} in step {step}; {good}; lower --learning_rate")


def _newest_first(folder: Path) -> list[Path]:
    # By the number of their steps: as words, checkpoint-900 would come after checkpoint-1000.
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _fault_of(checkpoint: Path, arguments: TrainingArguments) -> str | None:
    """What keeps a training from going on from a checkpoint as if nothing had happened; None if nothing does."""
    if fault := _damage_of(checkpoint):
        return fault
    # Without these the Trainer goes on all the same, with a fresh optimizer or other random numbers.
    random_state = "rng_state.pth" if arguments.world_size == 1 else f"rng_state_{arguments.process_index}.pth"
    for name in ("optimizer.pt", "scheduler.pt", random_state):
        if not (checkpoint / name).is_file():
            return f"has no {name}"
    # The best one so far is loaded at the end.
    best = read_json(checkpoint / "trainer_state.json")["best_model_checkpoint"]
    if arguments.load_best_model_at_end and best:
        best = checkpoint.with_name(Path(best).name)
        if best != checkpoint and (fault := _damage_of(best)):
            return f"needs the best one, {best}, which {fault}"
    return None


def _damage_of(checkpoint: Path) -> str | None:
    try:
        checksums = read_json(checkpoint / CHECKSUMS)
    except UserError:
        return "was cut off while it was written"
    for name, was in checksums.items():
        if not (checkpoint / name).is_file() or sha256(checkpoint / name) != was:
            return f"is damaged ({name})"
    return None
