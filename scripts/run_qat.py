"""Trains the fine-tuned baseline on with rounded weights and activations (QAT), then converts it to real integers.

The artifact, `weights/qat`, holds the same formats as that of run_ptq.py, and is quantized by the same functions; with
fewer bits than 8 it is one packed ONNX file (utils_lowbit.py). What was trained, the fake-quantized model, and what is
shipped are scored side by side on validation; the test split is never looked at here.

    python scripts/run_qat.py                                    # the recipe configs/qat.yaml: INT8
    python scripts/run_qat.py --bits 4 --output_dir weights/qat-int4
"""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.command import run
from emotion.common.errors import UserError
from emotion.common.files import ROOT
from emotion.common.flags import parse_recipe
from emotion.common.recipe import read_recipe_of
from emotion.model.artifact import describe_made, find_formats, new_artifact
from emotion.model.classifier import ModelInMemory, open_artifact, predict
from emotion.model.hub import score_and_publish
from emotion.model.pretrained import load_trained_classifier
from emotion.model.training import RecipeTrainingArguments, compute_metrics, train
from emotion.quantize.fake_quantizers import convert, prepare, switch, to_integers
from emotion.quantize.int8_torchao import quantize_torchao
from emotion.quantize.layers import Layers, explain_float, find_layers
from emotion.quantize.onnx_graph import export_onnx
from emotion.quantize.scheme import SchemeArguments, check, choose_all_scales, name_variant, save_formats
from emotion.task.dataset import RowsArguments, get_split, load_task_of, stratified_sample
from emotion.task.scores import score
from emotion.task.source import BaseModel
from emotion.task.tokens import TextEncoder, load_training_rows

import numpy as np
import torch
from torch.nn import functional
from transformers import DataCollatorWithPadding, Trainer, set_seed

RECIPE = ROOT / "configs" / "qat.yaml"


@dataclass
class QatArguments(SchemeArguments, RowsArguments):
    """What is trained on, and how it learns to be rounded."""

    baseline: str = field(default="weights/baseline", metadata={"help": "The fine-tuned folder to start from."})
    quantize_after: int = field(default=0, metadata={"help": "Train so many steps in floats before rounding starts."})
    distillation_weight: float = field(
        default=0.0, metadata={"help": "Share of the loss that asks for the baseline's answers; the rest, the labels."}
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Divides the logits of both before they are compared."}
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Parts that are not trained: what their names begin with."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Rows to train on; the dataset that the baseline learnt by default."}
    )


def main(argv=None) -> None:
    # 1. Parse
    arguments, training, recipe = parse_recipe((QatArguments, RecipeTrainingArguments), RECIPE, argv)
    check(arguments, training.artifact)
    set_seed(training.seed)

    # 2. Load the task
    baseline = Path(arguments.baseline)
    made_by = read_recipe_of(baseline)
    task = load_task_of(made_by, arguments.dataset_name)
    origin = made_by.get("made", {})
    base = BaseModel(origin.get("base_model", baseline.name), str(baseline), origin.get("base_model_source", "folder"))
    print(f"{baseline}   dataset: {task.name} ({task.source})")
    rows, tokenizer, train_ids, validation_ids = load_training_rows(task, base, arguments, seed=training.seed)

    # 3. Build the variant
    model = load_trained_classifier(baseline)
    layers = find_layers(model, arguments.keep_float)
    kept = explain_float(model, layers, arguments)
    prepare(model, layers, choose_all_scales(model, layers, arguments), arguments.reduce_range)
    frozen = freeze(model, arguments.freeze)
    if arguments.distillation_weight:
        train_ids = train_ids.add_column("teacher_logits", ask(baseline, train_ids["input_ids"]))
        training.remove_unused_columns = False

    # 4. Train: what is left in `model` is the best checkpoint on validation, scored fake-quantized
    trainer = QatTrainer(
        arguments=arguments,
        model=model,
        args=training,
        train_dataset=train_ids,
        eval_dataset=validation_ids,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    summary = train(trainer, recipe) | {"frozen_parameters": frozen}

    # 5. Save
    if trainer.is_world_process_zero():
        variant = name_variant("qat", arguments.bits)
        made = describe_made(variant, recipe, base, task, rows, training=summary, seed=training.seed)
        made["recipe"]["baseline"] = made_by.get("recipe", {})
        made["kept_in_float"] = kept
        with new_artifact(training.artifact, made) as folder, tempfile.TemporaryDirectory() as scratch:
            calibration = stratified_sample(get_split(task, "train"), arguments.calibration_rows, training.seed)
            texts = {"calibration": calibration["text"], "validation": get_split(task, "validation")["text"]}
            made |= save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, layers, folder, Path(scratch),
                         texts, np.asarray(get_split(task, "validation")["label"]), arguments)  # fmt: skip
        shutil.rmtree(training.output_dir)  # the checkpoints
        print(f"saved {training.artifact}: validation macro F1 {summary['validation_macro_f1']}")
        score_and_publish(training.artifact, training.hub)


class QatTrainer(Trainer):
    """The `Trainer` with fake quantizers that start when told, and the baseline's answers as a second target.

    Distillation: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """

    def __init__(self, arguments: QatArguments, **kwargs):
        super().__init__(**kwargs)
        self.arguments = arguments

    def training_step(self, model, inputs, *words, **options):
        switch(model, enabled=self.state.global_step >= self.arguments.quantize_after)
        loss = super().training_step(model, inputs, *words, **options)
        if not torch.isfinite(loss):
            checkpoints = Path(self.args.output_dir).glob("checkpoint-*")
            last = max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)
            good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise UserError(f"the loss is {loss} in step {self.state.global_step + 1}; {good}; lower --learning_rate")
        return loss

    def evaluation_loop(self, *words, **options):
        switch(self.model, enabled=True)  # the best checkpoint is that of the rounded model
        return super().evaluation_loop(*words, **options)

    def compute_loss(self, model, inputs, return_outputs=False, **options):
        teacher = inputs.pop("teacher_logits", None)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if teacher is not None:
            share, temperature = self.arguments.distillation_weight, self.arguments.distillation_temperature
            wanted = functional.softmax(teacher / temperature, dim=-1)
            found = functional.log_softmax(outputs["logits"].float() / temperature, dim=-1)
            gap = functional.kl_div(found, wanted, reduction="batchmean") * temperature**2
            loss = (1 - share) * loss + share * gap
        return (loss, outputs) if return_outputs else loss


def ask(baseline: Path, token_ids) -> list[list[float]]:
    """The baseline's logits of all rows, once: a step then costs nothing more."""
    classifier = open_artifact(baseline, "onnx", threads=torch.get_num_threads())
    return predict(classifier, list(token_ids)).tolist()


def freeze(model, beginnings: list[str]) -> int:
    """Keeps the parameters whose names begin so from being trained; returns how many numbers that are."""
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name, _ in model.named_parameters()):
            names = sorted({".".join(name.split(".")[:2]) for name, _ in model.named_parameters()})
            raise UserError(f"--freeze {beginning}: no parameter's name begins so; they begin with {', '.join(names)}")
    frozen = [part for name, part in model.named_parameters() if beginnings and name.startswith(tuple(beginnings))]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in frozen)


def save(model, tokenizer, layers: Layers, folder: Path, scratch: Path, texts, labels, arguments) -> dict:
    """Converts the fake-quantized model and writes all formats, by the functions of run_ptq.py.

    Args:
        scratch: an empty folder for the float model in between.
        texts: of `calibration` and `validation`; ``labels`` belong to the latter.

    Returns:
        `seconds` a format, and `forms`: validation macro F1 of what was trained, of the integers that it was
        converted to, and of each file, reopened; with the mean gap of their logits to the first.
    """
    encoder = TextEncoder(arguments.baseline)
    token_ids = {split: encoder(list(rows)) for split, rows in texts.items()}
    model.cpu().float()
    vars(model).pop("forward", None)  # the Trainer's own, which computes in bfloat16
    switch(model, enabled=True)
    logits = {"fake": predict(ModelInMemory(model, encoder), token_ids["validation"])}
    scales = convert(model)
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    plain = load_trained_classifier(scratch).eval()  # without what the Trainer wrapped around it
    export_onnx(plain, tokenizer, scratch / "onnx" / "model.onnx")
    seconds = save_formats(scratch, folder, plain, layers, scales, encoder, token_ids["calibration"], arguments)
    converted = (
        to_integers(plain, layers, scales)
        if scales
        else quantize_torchao(scratch, scratch / "int8", layers, arguments.reduce_range)
    )
    logits["converted"] = predict(ModelInMemory(converted, encoder), token_ids["validation"])
    for format in find_formats(folder):
        reopened = open_artifact(folder, format, threads=torch.get_num_threads())
        logits[f"{format}, reopened"] = predict(reopened, token_ids["validation"])
    forms = {
        form: {"validation_macro_f1": score(found, labels)["macro_f1"],
               "mean_logit_gap": float(np.abs(found - logits["fake"]).mean())}
        for form, found in logits.items()
    }  # fmt: skip
    for form, one in forms.items():
        print(f"  {form:20} macro F1 {one['validation_macro_f1']:.4f}   logits differ by {one['mean_logit_gap']:.5f}")
    return {"seconds": seconds, "forms": forms}


if __name__ == "__main__":
    run(main)
