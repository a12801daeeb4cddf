"""The parts around the `Trainer` that every training shares: arguments, its place, patches, and a summary."""

import contextlib
import os
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from emotion.data.metrics import four_digits, score
from emotion.inference.model_folder import inputs_of, own_place
from emotion.training.checkpoints import CHECKPOINTS, GoodCheckpoints, checkpoints_of, diverged, drop_checkpoints
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, check_replaceable
from emotion.utils.hub_requests import check_can_publish
from emotion.utils.machine import (
    count_processors,
    has_bf16,
    integer_setting,
    keep_freed_memory,
    peak_memory_mb,
    reset_peak_memory,
)
from emotion.utils.progress import Bar
from emotion.utils.recipe import Recipe


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """`TrainingArguments` that fit themselves to the machine: no GPU means CPU, no bfloat16 means FP32.

    Checkpoints go to ``checkpoints/`` beside the artifact, so that the artifact holds only the files that answering
    needs.

    Attributes:
        artifact: the folder to save into; `output_dir` is that of the checkpoints.
    """

    # The recipe that all trainings share. Optimization:
    per_device_train_batch_size: int = 32
    learning_rate: float = 5e-5
    num_train_epochs: float = 3.0
    lr_scheduler_type: SchedulerType | str = "cosine"
    warmup_steps: float = 0.06  # as a share of all steps
    weight_decay: float = 0.01
    seed: int = 42
    # Speed:
    bf16: bool = True  # FP32 if the processor has no bfloat16
    optim: OptimizerNames | str = "adamw_torch_fused"
    train_sampling_strategy: str = "group_by_length"  # less padding
    per_device_eval_batch_size: int = 64
    dataloader_pin_memory: bool = False  # helps transfers to a GPU only
    # The checkpoint with the best macro F1 on validation is kept:
    eval_strategy: IntervalStrategy | str = "epoch"
    save_strategy: SaveStrategy | str = "epoch"
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "macro_f1"
    greater_is_better: bool | None = True
    save_total_limit: int | None = 2
    logging_strategy: IntervalStrategy | str = "epoch"
    disable_tqdm: bool | None = False  # a bar is shown
    # Every trained parameter gets a gradient here. To look for others in each step would only take time.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Several processes look for parameters that got no gradient."}
    )

    results_dir: str = field(
        default=str(ROOT / "results"), metadata={"help": "With --push_to_hub: where the scores are written."}
    )

    def __post_init__(self):
        if self.hub_token:
            raise ValueError("--hub_token: others can read a command line; run `hf auth login`, or set HF_TOKEN")
        if self.push_to_hub:
            try:
                check_can_publish(self.hub_model_id)
            except UserError as error:  # now, not after an hour of training
                raise ValueError(f"--push_to_hub: {error}") from error
        # The Trainer would push checkpoints, and a card without these scores.
        self.publish, self.push_to_hub = self.push_to_hub, False
        if not self.output_dir:
            raise ValueError("name the folder to save into, with --output_dir or in the config")
        self.artifact = Path(self.output_dir)
        self.output_dir = str(checkpoints_of(self.artifact))
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.bf16 = self.bf16 and has_bf16(self.use_cpu)
        # `accelerate launch` gives each process one thread, and leaves the machine's other processors idle.
        if self.use_cpu and "ACCELERATE_MIXED_PRECISION" in os.environ:
            torch.set_num_threads(max(1, count_processors() // (integer_setting("LOCAL_WORLD_SIZE") or 1)))
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path("runs") / self.artifact.name))
        super().__post_init__()


@contextlib.contextmanager
def training_place(training: RecipeTrainingArguments, arguments, recipe: Recipe):
    """As `own_place`, for a training: its checkpoints must be its own too.

    Args:
        arguments: the other flags of the command.
    """
    with own_place(training.artifact, arguments, recipe):
        check_replaceable(training.output_dir, CHECKPOINTS, inputs_of(arguments, recipe))
        yield


class FiniteTrainer(Trainer):
    """The `Trainer` that ends at the step in which the loss is no longer finite, and takes no step after the last."""

    def _run_epoch(self, *words, **options) -> None:
        # Resumed at its last step, as after a kill while the artifact was written, the Trainer counts its steps only
        # after it has taken one more. Where training ends inside an epoch, that one would change the weights.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*words, **options)

    def training_step(self, model, inputs, *words, **options):
        """One step; raises `UserError`, naming the last good checkpoint, if its loss is not finite."""
        loss = super().training_step(model, inputs, *words, **options)
        # A loss of NaN would train on to the end, and every later checkpoint would be worthless.
        if not torch.isfinite(loss):
            raise diverged(f"the loss is {loss}", self.args, self.state.global_step + 1)
        return loss


def compute_metrics(prediction) -> dict:
    """Scores of the evaluation split, for the `Trainer`, which puts ``eval_`` before each name.

    Args:
        prediction: the Trainer's `EvalPrediction`; ``predictions`` are float logits (rows, classes).
    """
    scores = score(prediction.predictions, prediction.label_ids)
    predicted = len(set(prediction.predictions.argmax(axis=-1)))
    return {
        "macro_f1": scores["macro_f1"],
        "accuracy": scores["accuracy"],
        "predicted_classes": predicted,  # 1 tells a training that has collapsed, whatever its accuracy
        "rows": len(prediction.label_ids),  # of all processes together
    }


def freeze(model, beginnings: list[str]) -> int:
    """Keeps the parameters whose names begin with one of ``beginnings`` from being trained, in place.

    Returns:
        How many numbers these parameters hold.

    Raises:
        UserError: if a beginning fits no parameter.
    """
    parameters = dict(model.named_parameters())
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in parameters):
            names = sorted({".".join(name.split(".")[:2]) for name in parameters})  # two levels say enough
            raise UserError(f"--freeze {beginning}: no parameter's name begins so; they begin with {', '.join(names)}")
    frozen = 0
    for name, parameter in parameters.items():
        if name.startswith(tuple(beginnings)):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    return frozen


class ProgressLines(TrainerCallback):
    """One bar for the whole training, and one short line per evaluation; the Trainer's own prints dictionaries."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Shows the bar, unless the recipe wants none; of several processes the first one does."""
        hidden = args.disable_tqdm or not state.is_world_process_zero
        self.bar = Bar(
            total=state.max_steps, initial=state.global_step, desc="training", unit=" steps", disable=hidden
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Moves the bar on."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Writes the scores above the bar; losses between evaluations go to the log alone."""
        if state.is_world_process_zero and "eval_macro_f1" in logs:
            Bar.write(
                f"epoch {logs['epoch']:.2f}  validation macro F1 {logs['eval_macro_f1']:.4f}  "
                f"accuracy {logs['eval_accuracy']:.4f}  loss {logs['eval_loss']:.4f}"
            )

    def on_train_end(self, args, state, control, **kwargs):
        """Takes the bar away."""
        self.bar.close()


@dataclass
class Clock:
    """The time that a training took, both in seconds."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the processor, summed over all threads


@contextlib.contextmanager
def patched(trainer: Trainer):
    """Makes the changes to `Trainer`, model and C library that training needs, each with its reason; times the block.

    With them training is faster, and checkpoints are loaded back whole.

    Yields:
        A `Clock` that holds the time after the block.
    """
    model, on_cpu = trainer.model, trainer.args.use_cpu
    for callback in (ProgressCallback, PrinterCallback):  # the one with a bar, and the one without
        trainer.remove_callback(callback)
    for callback in (ProgressLines, GoodCheckpoints):
        trainer.add_callback(callback)
    # The Trainer loads a checkpoint back by the names of the modules, while save_pretrained writes LayerNorm's legacy
    # names by default: the best checkpoint, or the one to resume from, would lose every LayerNorm without a word.
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    # BERT takes any keyword, so the Trainer believes that it divides its loss by the labels of all processes, and
    # multiplies the loss by the number of processes in return. BERT does not divide.
    trainer.model_accepts_loss_kwargs = False
    # At a few dozen tokens the backward pass of the fused attention takes a third of a step on a CPU.
    attention = model.config._attn_implementation
    if on_cpu:
        model.set_attn_implementation("eager")
    # glibc would give the large gradients' pages back to the system after every step, and fetch them anew.
    keep_freed_memory()
    reset_peak_memory()
    # The clock starts after all preparation, and stops before the model is put back as it was.
    clock, start, cpu_start = Clock(), time.monotonic(), time.process_time()
    yield clock
    clock.seconds, clock.cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    model.set_attn_implementation(attention)  # the saved config.json names none but the usual one


def summarize_training(trainer: Trainer, clock: Clock, resumed: bool) -> dict:
    """The part of the artifact's recipe.yaml on its training: validation scores of the saved weights, time, memory.

    Args:
        resumed: whether the training went on from a checkpoint; then the seconds count from there on.

    Raises:
        UserError: if the best checkpoint, whose weights `trainer.model` should hold by now, is gone.
    """
    arguments, best_checkpoint = trainer.args, trainer.state.best_model_checkpoint
    if arguments.load_best_model_at_end and not (best_checkpoint and Path(best_checkpoint).is_dir()):
        raise UserError(f"the best checkpoint, {best_checkpoint}, is gone; train afresh without resuming")
    # Of the weights that are saved: those of the best evaluation, or of the last step if it was evaluated.
    step = trainer.state.best_global_step if arguments.load_best_model_at_end else trainer.state.global_step
    logs = [log for log in trainer.state.log_history if "eval_macro_f1" in log and log["step"] == step]
    saved = logs[-1] if logs else {}
    if saved.get("eval_predicted_classes") == 1:
        print(
            "WARNING: this model gives every validation text the same class; lower the learning rate", file=sys.stderr
        )
    return {
        "validation_macro_f1": saved.get("eval_macro_f1"),
        "validation_accuracy": saved.get("eval_accuracy"),
        "validation_loss": saved.get("eval_loss"),
        "validation_rows": saved.get("eval_rows"),
        "predicted_classes": saved.get("eval_predicted_classes"),
        "best_epoch": saved.get("epoch"),
        "steps": trainer.state.global_step,
        "seconds": round(clock.seconds, 1),
        "cpu_seconds": round(clock.cpu_seconds, 1),  # not stretched by what else the machine did
        "resumed": resumed,
        "precision": "bf16" if arguments.bf16 else "fp32",
        "processes": arguments.world_size,
        "threads": torch.get_num_threads(),
        "peak_memory_mb": peak_memory_mb(),
    }


def finish(training: RecipeTrainingArguments, summary: dict) -> None:
    """Ends a run whose artifact is saved: removes its checkpoints, and prints its score."""
    drop_checkpoints(training)
    print(f"saved {training.artifact}: validation macro F1 {four_digits(summary['validation_macro_f1'])}")
