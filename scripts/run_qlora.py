"""Trains a low-rank adapter on a base of 4 bits (QLoRA), on a GPU or on a plain CPU.

The base's linear layers are rounded to NF4 and never change; what is learnt are two thin matrices beside each of them,
and the head (Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023; Hu et al., "LoRA:
Low-Rank Adaptation of Large Language Models", ICLR 2022). The artifact, `weights/qlora`, opens without knowing this:

    model.safetensors            base and adapter in one, in 4 bits if validation allows (bitsandbytes)
    onnx/model_quantized.onnx    the same in INT8 for ONNX Runtime
    adapter/                     the adapter alone, for the base that it names

The same command grows to several GPUs and machines: accelerate_config.yaml says how.

    accelerate launch --config_file accelerate_config.yaml scripts/run_qlora.py
"""

import shutil
import tempfile
from pathlib import Path

from emotion.common.command import run
from emotion.common.errors import UserError
from emotion.common.files import ROOT
from emotion.common.flags import parse_recipe
from emotion.model.artifact import describe_made, find_formats, new_artifact, quantized_by
from emotion.model.classifier import open_artifact, predict
from emotion.model.hub import score_and_publish
from emotion.model.pretrained import load_trained_classifier
from emotion.model.training import RecipeTrainingArguments, compute_metrics, train
from emotion.quantize.adapter import QloraArguments, build_qlora, merge
from emotion.quantize.int8_onnx import quantize_onnx
from emotion.quantize.layers import find_layers
from emotion.quantize.nf4 import nf4_options, round_to_nf4
from emotion.quantize.onnx_graph import export_onnx
from emotion.task.dataset import Task, get_split, load_task, stratified_sample
from emotion.task.scores import score
from emotion.task.source import find_base_model
from emotion.task.tokens import load_training_rows

import numpy as np
import torch
from transformers import DataCollatorWithPadding, Trainer, set_seed

RECIPE = ROOT / "configs" / "qlora.yaml"
MARGIN = 0.002  # of validation macro F1 that a smaller form of the merged model may lose
CALIBRATION_ROWS = 300  # of train, by which the merged model is rounded


def main(argv=None) -> None:
    # 1. Parse
    arguments, training, recipe = parse_recipe((QloraArguments, RecipeTrainingArguments), RECIPE, argv)
    set_seed(training.seed)

    # 2. Load the task
    base = find_base_model(arguments.model_name_or_path)
    if base.source == "folder" and (quantizer := quantized_by(Path(base.path))):
        raise UserError(f"{base.path} is quantized already (by {quantizer}); name the float model it was made from")
    task = load_task(arguments.dataset_name, arguments.dataset_config_name)
    print(f"base model: {base.name} ({base.source})   dataset: {task.name} ({task.source})")
    rows, tokenizer, train_ids, validation_ids = load_training_rows(task, base, arguments, seed=training.seed)

    # 3. Build the variant
    model = build_qlora(base.path, task.labels, arguments, bf16=training.bf16)
    trained, total = model.get_nb_trainable_parameters()
    print(f"trained: {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)")

    # 4. Train: what is left in `model` is the best checkpoint on validation
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train_ids,
        eval_dataset=validation_ids,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    summary = train(trainer, recipe)
    summary |= {"trained_parameters": trained, "parameters": total}

    # 5. Save
    if trainer.is_world_process_zero():
        made = describe_made("qlora", recipe, base, task, rows, training=summary, seed=training.seed)
        with new_artifact(training.artifact, made) as folder:
            learnt = trainer.accelerator.unwrap_model(trainer.model)
            merged = merge(learnt, base, task.labels, folder, arguments, training)
            made["merged"] = save(merged, tokenizer, folder, task, arguments.formats, training)
        shutil.rmtree(training.output_dir)  # the checkpoints
        print(f"saved {training.artifact}: validation macro F1 {summary['validation_macro_f1']}")
        score_and_publish(training.artifact, training.hub)


def save(merged, tokenizer, folder: Path, task: Task, formats: list[str], training) -> dict:
    """Writes the merged model for Transformers, in the smallest form that keeps its score, and for ONNX Runtime.

    Returns:
        Validation macro F1 of each form of `model.safetensors` that was tried, FP32 first; the last one was kept.
    """
    tried = {}
    if not {"nf4", "onnx"} & set(formats):
        return tried
    tokenizer.save_pretrained(folder)
    merged.config.save_pretrained(folder)
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "merged"
        merged.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        if "onnx" in formats:
            float_graph = whole / "onnx" / "model.onnx"
            export_onnx(merged, tokenizer, float_graph)
            quantize_onnx(merged, float_graph, folder / "onnx" / "model_quantized.onnx", find_layers(merged))
        if "nf4" not in formats:
            return tried
        train_rows, validation = get_split(task, "train"), get_split(task, "validation")
        calibration = stratified_sample(train_rows, min(CALIBRATION_ROWS, len(train_rows)), training.seed)
        tried["fp32"] = validation_macro_f1(whole, "pytorch", validation)
        for form, dtype in (("nf4", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32 kept", torch.float32)):
            if form == "nf4":
                options = nf4_options(str(whole), task.labels, training.bf16)
                smaller = round_to_nf4(whole, tokenizer, list(calibration["text"]), dtype, options)
            else:
                smaller = load_trained_classifier(whole, dtype=dtype)
            smaller.save_pretrained(folder)
            tried[form] = validation_macro_f1(folder, next(iter(find_formats(folder))), validation)
            if tried[form] >= tried["fp32"] - MARGIN:
                break
    return tried


def validation_macro_f1(folder: Path, format: str, validation) -> float:
    classifier = open_artifact(folder, format, threads=torch.get_num_threads())
    logits = predict(classifier, classifier.encode(list(validation["text"])))
    return score(logits, np.asarray(validation["label"]))["macro_f1"]


if __name__ == "__main__":
    run(main)
