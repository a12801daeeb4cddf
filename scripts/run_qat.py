"""Trains the fine-tuned baseline further with rounded weights and activations (QAT), then converts it to integers.

The artifact, `weights/qat`, holds the same formats as that of run_ptq.py, quantized by the same functions. Below 8
bits it holds one packed ONNX file (emotion/quantize/lowbit.py). Where a file for ONNX Runtime is made, its ranges are
trained for, and its outlier units stay in floats (emotion/quantize/outliers.py). The fake-quantized model that was
trained and the saved files are scored side by side on validation. This script never reads the test split;
run_evaluation.py scores it.

    python scripts/run_qat.py                                    # the recipe configs/qat.yaml: INT8
    python scripts/run_qat.py --bits 4 --output_dir weights/qat-int4
"""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from emotion.common.command import run
from emotion.common.errors import UserError
from emotion.common.files import ROOT
from emotion.common.flags import parse_recipe
from emotion.common.recipe import read_recipe_of
from emotion.model.artifact import describe_origin, find_formats, new_artifact
from emotion.model.classifier import ModelInMemory, open_artifact, predict
from emotion.model.pretrained import load_trained_classifier
from emotion.model.training import (
    RecipeTrainingArguments,
    compute_metrics,
    find_checkpoint,
    finish,
    freeze,
    patched,
    summarize_training,
)
from emotion.quantize.fake_quantizers import convert, prepare, switch, to_integers
from emotion.quantize.int8_torchao import quantize_torchao
from emotion.quantize.layers import CalibrationRows, Plan
from emotion.quantize.onnx_graph import export_onnx
from emotion.quantize.outliers import describe_outliers
from emotion.quantize.scheme import (
    SchemeArguments,
    check_scheme,
    describe_quantized,
    draw_calibration_rows,
    formats_of,
    make_plan,
    name_model_of_baseline,
    save_formats,
)
from emotion.task.dataset import RowsArguments, Task, get_split, load_task_of
from emotion.task.scores import score
from emotion.task.source import BaseModel
from emotion.task.tokens import TextEncoder, load_training_rows

import numpy as np
import torch
from torch.nn import functional
from transformers import Trainer, set_seed

RECIPE = ROOT / "configs" / "qat.yaml"
CONTROL = "-float"  # ends the name of a variant that was trained on without rounding


@dataclass
class QatArguments(SchemeArguments, RowsArguments):
    """The flags of QAT, beside those of the scheme, the rows and the training."""

    baseline: str = field(default="weights/baseline", metadata={"help": "Folder of the fine-tuned model."})
    fake_quantize: bool = field(
        default=True, metadata={"help": "Round while training; false trains on in floats, to compare with."}
    )
    quantize_after: int = field(default=0, metadata={"help": "Steps of training in floats before rounding starts."})
    distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Share of the loss for the baseline's answers; the rest is for the labels."},
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Divides the logits of model and baseline before they are compared."}
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Parameters that are not trained, by the beginnings of their names."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset to train on; by default that of the baseline."}
    )


def main(argv=None) -> None:
    # 1. Parse
    classes = (QatArguments, RecipeTrainingArguments)
    arguments, training, recipe = parse_recipe(classes, RECIPE, argv, name_model_of_baseline)
    check_scheme(arguments, training.artifact)
    set_seed(training.seed)

    # 2. Load the task
    base, task, made_by = load_origin(Path(arguments.baseline), arguments.dataset_name)
    rows, tokenizer, train_ids, validation_ids = load_training_rows(task, base, arguments, seed=training.seed)

    # 3. Build the variant: the baseline with fake quantizers in its layers
    calibration = draw_calibration_rows(task, TextEncoder(base.path), arguments.calibration_rows, training.seed)
    plan = make_plan(base.path, load_trained_classifier(base.path), arguments, calibration)
    made = describe_quantized("qat", recipe, made_by, plan, arguments)
    if arguments.fake_quantize:
        prepare(plan, runtime_of(arguments), arguments.reduce_range)
    frozen = freeze(plan.model, arguments.freeze)
    if arguments.distillation_weight:
        train_ids = add_teacher(base.path, train_ids, training)

    # 4. Train; afterwards the model has the weights of the best checkpoint on validation, scored with fake quantizers
    trainer = QatTrainer(
        arguments=arguments,
        model=plan.model,
        args=training,
        train_dataset=train_ids,
        eval_dataset=validation_ids,
        processing_class=tokenizer,  # pads each batch to its longest text
        compute_metrics=compute_metrics,
    )
    checkpoint = find_checkpoint(trainer, recipe)
    with patched(trainer) as clock:
        trainer.train(resume_from_checkpoint=checkpoint)
    summary = summarize_training(trainer, clock, resumed=checkpoint is not None) | {"frozen_parameters": frozen}

    # 5. Save, once: with `accelerate launch` several processes get here
    if trainer.is_world_process_zero():
        made |= {"seed": training.seed, "made": made["made"] | describe_origin(base, task, rows), "training": summary}
        with new_artifact(training.artifact, made) as folder:
            if arguments.fake_quantize:
                made |= save_converted(trainer, plan, folder, calibration, task)
            else:
                made["variant"] += CONTROL
                save_float(trainer, folder)
        finish(training, summary)


def runtime_of(arguments: QatArguments) -> str:
    """The runtime whose rounding is trained for: ONNX Runtime, if a file is made for it, since it rounds coarsest."""
    return "onnx" if "onnx" in (arguments.formats or formats_of(arguments.bits)) else "torchao"


def load_origin(baseline: Path, dataset_name: str | None) -> tuple[BaseModel, Task, dict]:
    """The model to start from, the dataset, and the baseline's recipe.yaml; prints where they come from.

    Args:
        dataset_name: None for the dataset of the baseline.
    """
    made_by = read_recipe_of(baseline)
    # The weights are the baseline's, and the name is that of the base model which the baseline was made from.
    origin = made_by.get("made", {})
    # Without a recipe the folder was made by another program, and its own name is all that is known.
    name, source = origin.get("base_model", baseline.name), origin.get("base_model_source", "folder")
    task = load_task_of(made_by, dataset_name)
    print(f"{baseline}   dataset: {task.name} ({task.source})")
    return BaseModel(name, str(baseline), source), task, made_by


class QatTrainer(Trainer):
    """The `Trainer` with fake quantizers that start after some steps, and the baseline's answers as a second target.

    Distillation: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """

    def __init__(self, arguments: QatArguments, **kwargs):
        super().__init__(**kwargs)
        self.arguments = arguments

    def training_step(self, model, inputs, *words, **options):
        """One step, in floats for the first ``quantize_after``; raises `UserError` if the loss is no longer finite."""
        # Rounding may start late, when the training no longer changes much (Jacob et al., "Quantization and Training
        # of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018).
        switch(model, enabled=self.state.global_step >= self.arguments.quantize_after)
        loss = super().training_step(model, inputs, *words, **options)
        # A loss of NaN would train on to the end, and every later checkpoint would be worthless.
        if not torch.isfinite(loss):
            checkpoints = Path(self.args.output_dir).glob("checkpoint-*")
            last = max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
            good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise UserError(f"the loss is {loss} in step {self.state.global_step + 1}; {good}; lower --learning_rate")
        return loss

    def evaluation_loop(self, *words, **options):
        """Scores the model with its fake quantizers on, so that the best checkpoint is that of the rounded model."""
        switch(self.model, enabled=True)
        return super().evaluation_loop(*words, **options)

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        """The loss of the labels, mixed with the divergence from the baseline's answers where there are any."""
        teacher = inputs.pop("teacher_logits", None)  # (texts, classes); rows of validation have none
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if teacher is not None:
            # A higher temperature makes small differences between unlikely classes count more.
            share, temperature = self.arguments.distillation_weight, self.arguments.distillation_temperature
            wanted = functional.softmax(teacher / temperature, dim=-1)
            found = functional.log_softmax(outputs["logits"].float() / temperature, dim=-1)
            # Dividing by the temperature makes the gradients smaller by its square (Hinton et al., section 2).
            gap = functional.kl_div(found, wanted, reduction="batchmean") * temperature**2
            loss = (1 - share) * loss + share * gap
        return (loss, outputs) if return_outputs else loss


def add_teacher(baseline: str, rows, training: RecipeTrainingArguments):
    """Adds the baseline's answers to the rows, as a column `teacher_logits`; makes ``training`` keep that column.

    The answers are computed once, so that no step has to run a second model.
    """
    classifier = open_artifact(baseline, "onnx", threads=torch.get_num_threads())
    logits = predict(classifier, list(rows["input_ids"]))
    training.remove_unused_columns = False  # the Trainer would drop the column, since no model takes it
    return rows.add_column("teacher_logits", logits.tolist())


def save_float(trainer: QatTrainer, folder: Path) -> None:
    """Writes the model that was trained on in floats, for ONNX Runtime, in FP32."""
    model = trainer.accelerator.unwrap_model(trainer.model).cpu().float()
    vars(model).pop("forward", None)  # the Trainer's own, which computes in bfloat16
    trainer.processing_class.save_pretrained(folder)
    model.config.save_pretrained(folder)
    export_onnx(model, trainer.processing_class, folder / "onnx" / "model.onnx")


def save_converted(trainer: QatTrainer, plan: Plan, folder: Path, calibration: CalibrationRows, task: Task) -> dict:
    """Converts the trained model, writes all formats, and scores them beside the fake-quantized model on validation.

    The functions that write the files are those of run_ptq.py.

    Args:
        trainer: its model has fake quantizers, and loses them here.

    Returns:
        `seconds` per format, and `forms`, of `score_forms`.
    """
    arguments = trainer.arguments
    plan = replace(plan, model=trainer.accelerator.unwrap_model(trainer.model))
    encoder, validation = calibration.encoder, get_split(task, "validation")
    token_ids, labels = encoder(list(validation["text"])), np.asarray(validation["label"])
    # Back to the form in which the files answer: on the processor, in FP32.
    plan.model.cpu().float()
    vars(plan.model).pop("forward", None)  # the Trainer's own, which computes in bfloat16
    switch(plan.model, enabled=True)
    logits = {"fake": predict(ModelInMemory(plan.model, encoder), token_ids)}
    # The integers as a model in memory: a gap to "fake" is then the conversion's fault, and a gap of a reopened file
    # to these is the fault of saving, or of the runtime.
    if runtime_of(arguments) == "onnx":
        logits["converted"] = predict(ModelInMemory(to_integers(plan.model), encoder), token_ids)
    with tempfile.TemporaryDirectory() as scratch:
        plan = convert_to_float(plan, trainer.processing_class, Path(scratch))
        seconds = save_formats(plan, folder, calibration, arguments)
        if runtime_of(arguments) == "torchao":
            converted = quantize_torchao(plan, plan.folder / "int8", arguments.reduce_range)
            logits["converted"] = predict(ModelInMemory(converted, encoder), token_ids)
    # As a user opens them: saving and reopening has its own mistakes to make.
    for format in find_formats(folder):
        reopened = open_artifact(folder, format, threads=torch.get_num_threads())
        logits[f"{format}, reopened"] = predict(reopened, token_ids)
    return {"seconds": seconds, "forms": score_forms(logits, labels)} | describe_outliers(plan.outliers)


def convert_to_float(plan: Plan, tokenizer, folder: Path) -> Plan:
    """Saves the trained float weights in plain layers, in PyTorch and ONNX; returns a plan to quantize that folder."""
    scales = convert(plan.model)  # those in the checkpoint, which a resumed training has brought along
    plan.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plain = load_trained_classifier(folder).eval()  # opened anew, without the Trainer's wrappers
    export_onnx(plain, tokenizer, folder / "onnx" / "model.onnx")
    return replace(plan, folder=folder, model=plain, scales=scales)


def score_forms(logits: dict[str, np.ndarray], labels: np.ndarray) -> dict:
    """Scores the trained model, its integers, and each reopened file on the same rows.

    Args:
        logits: form -> float32 (rows, classes); the first form is the trained model.
        labels: int (rows,).

    Returns:
        Form -> `validation_macro_f1`, and `mean_logit_gap`, the mean absolute difference to the first form.
    """
    forms, first = {}, next(iter(logits.values()))
    for form, found in logits.items():
        macro_f1, gap = score(found, labels)["macro_f1"], float(np.abs(found - first).mean())
        forms[form] = {"validation_macro_f1": macro_f1, "mean_logit_gap": gap}
        print(f"  {form:20} macro F1 {macro_f1:.4f}   logits differ by {gap:.5f}")
    return forms


if __name__ == "__main__":
    run(main)
