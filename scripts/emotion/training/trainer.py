"""The `Trainer`, its arguments and its data, as every training of this project uses them."""

import os
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from emotion.data.dataset import Task, fingerprint, get_split, load_task_of, select_train_rows, with_validation
from emotion.data.metrics import four_digits, score
from emotion.data.tokenization import load_tokenizer, tokenize
from emotion.inference.model_folder import (
    ROWS_FIELD,
    artifact_metadata,
    check_problem,
    data_provenance,
    head_labels,
    quantized_by,
)
from emotion.training.checkpoints import CheckpointCallback, diverged, find_checkpoint
from emotion.utils import machine
from emotion.utils.arguments import Recipe, comparable, flag
from emotion.utils.base_model import BaseModel, find_base_model
from emotion.utils.command import Bar
from emotion.utils.errors import UsageError, UserError, one_line
from emotion.utils.files import ROOT
from emotion.utils.hub_requests import check_can_publish


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of this project, which fit themselves to the machine."""

    # Optimization
    per_device_train_batch_size: int = 32
    learning_rate: float = 5e-5
    num_train_epochs: float = 3.0
    lr_scheduler_type: SchedulerType | str = "cosine"
    warmup_steps: float = 0.06  # as a share of all steps
    weight_decay: float = 0.01
    class_weights: str | None = flag(None, "balanced: all classes weigh the same in the loss.", ("balanced",))
    seed: int = 42
    # Speed
    bf16: bool = True  # float32 where the device has no bfloat16
    optim: OptimizerNames | str = "adamw_torch_fused"
    train_sampling_strategy: str = "group_by_length"  # less padding
    per_device_eval_batch_size: int = 64
    dataloader_pin_memory: bool = False
    # The checkpoint with the best macro F1 on validation is kept
    eval_strategy: IntervalStrategy | str = "epoch"
    save_strategy: SaveStrategy | str = "epoch"
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "macro_f1"
    greater_is_better: bool | None = True
    save_total_limit: int | None = 2
    logging_strategy: IntervalStrategy | str = "epoch"
    disable_tqdm: bool | None = False
    ddp_find_unused_parameters: bool | None = flag(False, "Several processes look for parameters without a gradient.")

    results_dir: str = flag(str(ROOT / "results"), "With --push_to_hub: where the scores are written.")

    def __post_init__(self):
        if self.hub_token:
            raise UsageError("--hub_token: others can read a command line; run `hf auth login`, or set HF_TOKEN")
        if self.push_to_hub:
            check_can_publish(self.hub_model_id)  # now, not after an hour of training
        resume = str(self.resume_from_checkpoint)
        if resume.lower() not in ("none", "true", "false") and not Path(resume).is_dir():
            raise UsageError(f"--resume_from_checkpoint: no folder {resume}; name a checkpoint, or true for the last")
        if not self.output_dir:
            raise UsageError("name the folder to save into, with --output_dir or in the config")
        self.publish, self.push_to_hub = self.push_to_hub, False  # the Trainer would push checkpoints
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.bf16 = self.bf16 and machine.has_bf16(self.use_cpu)
        self._tell_of_missing_processes()
        # `accelerate launch` gives each process one thread, and leaves the machine's other processors idle.
        if self.use_cpu and "ACCELERATE_MIXED_PRECISION" in os.environ:
            processes = machine.integer_setting("LOCAL_WORLD_SIZE") or 1
            torch.set_num_threads(max(1, machine.count_processors() // processes))
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path("runs") / Path(self.output_dir).name))
        super().__post_init__()

    @staticmethod
    def _tell_of_missing_processes() -> None:
        """Says if `accelerate launch` was asked for several processes and starts one, as without --multi_gpu."""
        parent = psutil.Process().parent() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        asked = re.search(r"--num[_-]processes[ =](\d+)", " ".join(parent.cmdline()) if parent else "")
        if asked and int(asked[1]) > (machine.integer_setting("WORLD_SIZE") or 1):
            print(
                f"accelerate launch --num_processes {asked[1]} has started one process; add --multi_gpu, on CPUs too"
            )


@dataclass(frozen=True)
class TrainingData:
    """What a training reads."""

    base: BaseModel
    task: Task
    rows: Dataset  # of train to learn from, with `text` and `label`
    tokenizer: PreTrainedTokenizerBase
    train: Dataset  # the same rows as `input_ids` and `label`
    validation: Dataset  # in this form

    @property
    def provenance(self) -> dict:
        """The source of base model and data."""
        return data_provenance(self.base, self.task, self.rows)


def load_training_data(arguments, seed: int, base: BaseModel | None = None, task: Task | None = None) -> TrainingData:
    """Finds the base model, and loads and tokenizes the dataset; ``seed`` is that of the draw of `max_train_samples`.

    Args:
        arguments: `TaskArguments`; `RowsArguments` suffice where base and task are given.

    Raises:
        UserError: if one of them cannot be loaded, the base model is quantized, or it is fine-tuned on other labels.
    """
    base = base or find_base_model(arguments.model_name_or_path, arguments.model_revision)
    if base.source == "folder" and (quantizer := quantized_by(Path(base.path))):
        raise UserError(f"{base.path} is quantized already (by {quantizer}); name the float model it was made from")
    with one_line(f"{base.path} cannot be opened"):
        config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    check_problem(base.path, [*config.id2label.values()], config.problem_type, training=True)
    task = with_validation(task or load_task_of({}, arguments, head_labels(base.path)))
    print(f"base model: {base.name} ({base.source})   dataset: {task.name} ({task.source})")
    rows = select_train_rows(get_split(task, "train"), arguments, seed=seed)
    tokenizer, validation = load_tokenizer(base.path, arguments.max_seq_length), get_split(task, "validation")
    tokenized = tokenize(rows, tokenizer, "train"), tokenize(validation, tokenizer, "validation")
    return TrainingData(base, task, rows, tokenizer, *tokenized)


class ClassificationTrainer(Trainer):
    """The `Trainer` that resumes only from a complete checkpoint, stops when it diverges, and is fast on a CPU."""

    def __init__(self, recipe: Recipe, data: TrainingData, callbacks: list | tuple = (), **options):
        self.checkpoints = CheckpointCallback()
        if getattr(options["args"], "class_weights", None):
            options["compute_loss_func"] = balanced_loss(data, options["args"].label_smoothing_factor)
        super().__init__(callbacks=[ProgressLines, self.checkpoints, *callbacks], **options)
        self.recipe, self.data = recipe, data
        self.seconds, self.cpu_seconds = 0.0, 0.0  # of `train`; the latter is summed over all threads
        for callback in (ProgressCallback, PrinterCallback):  # `ProgressLines` takes their place
            self.remove_callback(callback)
        # BERT takes any keyword, so the Trainer believes that it divides its loss by the labels of all processes, and
        # multiplies the loss by the number of processes in return. BERT does not divide.
        self.model_accepts_loss_kwargs = False
        # The Trainer loads a checkpoint by the names of the modules, while save_pretrained writes legacy names of
        # LayerNorm by default: the best checkpoint would lose every LayerNorm without an error.
        self.model.save_pretrained = partial(self.model.save_pretrained, save_original_format=False)

    def train(self, resume_from_checkpoint: str | bool | None = None, **options):
        """Trains as `Trainer.train` does; afterwards the model has the weights of the best checkpoint.

        Args:
            resume_from_checkpoint: path of a checkpoint, or true for the last complete one.

        Raises:
            UserError: if that checkpoint belongs to another recipe or to other rows, or the training diverges.
        """
        run = comparable(self.recipe.values)
        run |= {ROWS_FIELD: fingerprint(self.data.rows), "processes": str(self.args.world_size)}
        checkpoint = self.checkpoints.resumed_from = find_checkpoint(self, resume_from_checkpoint, run)
        attention = self.model.config._attn_implementation
        if self.args.use_cpu:  # for a few dozen tokens, the backward pass of fused attention takes a third of a step
            self.model.set_attn_implementation("eager")
        machine.keep_freed_memory()
        machine.reset_peak_memory()
        start, cpu_start = time.monotonic(), time.process_time()
        output = super().train(resume_from_checkpoint=checkpoint, **options)
        self.seconds, self.cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
        self.model.set_attn_implementation(attention)  # the saved config.json names the default
        return output

    def training_step(self, model, inputs, *args, **options):
        """Takes one step; raises `UserError`, naming the last complete checkpoint, if its loss is not finite."""
        loss = super().training_step(model, inputs, *args, **options)
        if not torch.isfinite(loss):
            raise diverged(f"the loss is {loss}", self.args, self.state.global_step + 1)
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Gets the batches of one step; none after the last step."""
        # Resumed at its last step inside an epoch, the Trainer would take one more before it counts.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def summarize(self) -> dict:
        """Returns the entry of recipe.yaml on the training: validation scores of the saved weights, time, memory.

        Raises:
            UserError: if the best checkpoint is gone, whose weights the model should have.
        """
        best_checkpoint = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and not (best_checkpoint and Path(best_checkpoint).is_dir()):
            raise UserError(f"the best checkpoint, {best_checkpoint}, is gone; train again without resuming")
        step = self.state.best_global_step if self.args.load_best_model_at_end else self.state.global_step
        logs = [log for log in self.state.log_history if "eval_macro_f1" in log and log["step"] == step]
        saved = logs[-1] if logs else {}
        if saved.get("eval_predicted_classes") == 1:
            print("WARNING: the model predicts a single class on validation; lower --learning_rate", file=sys.stderr)
        print(f"validation macro F1 of the saved weights: {four_digits(saved.get('eval_macro_f1'))}")
        return {
            **{f"validation_{name}": saved.get(f"eval_{name}") for name in ("macro_f1", "accuracy", "loss", "rows")},
            "predicted_classes": saved.get("eval_predicted_classes"),
            "best_epoch": saved.get("epoch"),
            "steps": self.state.global_step,
            "seconds": round(self.seconds, 1),  # from the checkpoint on, if it was resumed
            "cpu_seconds": round(self.cpu_seconds, 1),
            "resumed": self.checkpoints.resumed_from is not None,
            "precision": "bf16" if self.args.bf16 else "fp32",
            "processes": self.args.world_size,
            "threads": torch.get_num_threads(),
            "peak_memory_mb": machine.peak_memory_mb(),
        }

    def metadata(self, variant: str, **more) -> dict:
        """Returns the content of recipe.yaml; ``more`` fields are added to the training's."""
        training = self.summarize() | more
        return artifact_metadata(variant, self.recipe, self.args.seed, self.data.provenance, training)


def balanced_loss(data: TrainingData, label_smoothing: float):
    """Returns a `compute_loss_func` of the Trainer: cross-entropy in which each class of train weighs the same."""
    counts = torch.bincount(torch.tensor(data.rows["label"]), minlength=len(data.task.labels))
    weights = len(data.rows) / (len(counts) * counts.clamp(min=1))

    def compute_loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"].float()
        options = {"label_smoothing": label_smoothing, "reduction": "sum"}
        loss = cross_entropy(logits, labels.view(-1), weights.to(logits.device), **options)
        return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return compute_loss


def compute_metrics(prediction) -> dict:
    """Scores an `EvalPrediction`, whose ``predictions`` are float logits of shape (rows, classes)."""
    scores = score(prediction.predictions, prediction.label_ids)
    return {
        "macro_f1": scores["macro_f1"],
        "accuracy": scores["accuracy"],
        "predicted_classes": len(set(prediction.predictions.argmax(axis=-1))),  # 1 if the training has collapsed
        "rows": len(prediction.label_ids),
    }


class ProgressLines(TrainerCallback):
    """Shows a progress bar for the training, and prints a line per evaluation."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Shows the bar, in the main process and unless `disable_tqdm` is set."""
        look = {"desc": "training", "unit": " steps", "disable": args.disable_tqdm or not state.is_world_process_zero}
        self.bar = Bar(total=state.max_steps, initial=state.global_step, **look)

    def on_step_end(self, args, state, control, **kwargs):
        """Advances the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Prints the scores of an evaluation above the bar."""
        if state.is_world_process_zero and "eval_macro_f1" in logs:
            Bar.write(
                f"epoch {logs['epoch']:.2f}  validation macro F1 {logs['eval_macro_f1']:.4f}  "
                f"accuracy {logs['eval_accuracy']:.4f}  loss {logs['eval_loss']:.4f}"
            )

    def on_train_end(self, args, state, control, **kwargs):
        """Removes the bar."""
        self.bar.close()
