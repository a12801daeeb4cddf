"""Trains a low-rank adapter on a base of 4 bits (QLoRA), on a GPU or on a plain CPU.

The base's linear layers are rounded to NF4 and never change. The training learns two thin matrices beside each of
them, and the head (Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023; Hu et al., "LoRA:
Low-Rank Adaptation of Large Language Models", ICLR 2022). The artifact, `weights/qlora`, can be opened without PEFT:

    model.safetensors            base and adapter as one model, in 4 bits if validation allows (bitsandbytes)
    onnx/model_quantized.onnx    the same in INT8 for ONNX Runtime
    adapter/                     the adapter alone, for the base that it names

The same command trains on several GPUs and machines: accelerate_config.yaml says how.

    python scripts/run_qlora.py    # BERT-base: configs/bert-base-uncased/qlora.yaml
    python scripts/run_qlora.py configs/minilm/qlora.yaml --seed 43
    accelerate launch --config_file accelerate_config.yaml scripts/run_qlora.py
"""

import emotion  # noqa: F401 (first: it sets what the libraries below read while they load)

# isort: split

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import set_seed

from emotion.data.dataset import Task, get_split, load_task
from emotion.data.metrics import score
from emotion.data.tokenization import TextEncoder, load_training_rows
from emotion.export.onnx_export import export_onnx
from emotion.hub.upload import score_and_publish
from emotion.inference.model_folder import describe_made, describe_origin, new_artifact, quantized_by
from emotion.inference.pretrained import load_trained_classifier, save_compact
from emotion.inference.runtimes import ModelInMemory, predict
from emotion.quantization.accuracy_aware import WatchedArguments, save_watched
from emotion.quantization.layers import CalibrationRows
from emotion.quantization.nf4 import nf4_options, open_in_float32, round_to_nf4
from emotion.quantization.scheme import draw_calibration_rows, make_plan
from emotion.quantization.sensitivity import Rows, validation_rows
from emotion.training.checkpoints import find_checkpoint
from emotion.training.qlora import QloraArguments, build_qlora, merge
from emotion.training.trainer import (
    FiniteTrainer,
    RecipeTrainingArguments,
    compute_metrics,
    finish,
    patched,
    summarize_training,
    training_place,
)
from emotion.utils.arguments import parse_args_and_config
from emotion.utils.base_model import BaseModel, find_base_model
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, scratch_folder
from emotion.utils.recipe import Recipe

CONFIG = ROOT / "configs" / "bert-base-uncased" / "qlora.yaml"
CALIBRATION_ROWS = 300  # rows of train, on which rounding the merged model should change its answers least


@dataclass
class QloraTrainingArguments(RecipeTrainingArguments):
    """The training of an adapter."""

    output_dir: str = field(default="weights/qlora", metadata={"help": "Folder in which the artifact is saved."})
    learning_rate: float = 1e-3  # chosen on validation: results/qlora_sweep.md
    warmup_steps: float = 0.1


ARGUMENTS = (QloraArguments, QloraTrainingArguments)


def main(argv=None) -> None:
    # 1. Parse
    arguments, training, recipe = parse_args_and_config(ARGUMENTS, argv, CONFIG)
    with training_place(training, arguments, recipe):
        train(arguments, training, recipe)


def train(arguments: QloraArguments, training: RecipeTrainingArguments, recipe: Recipe) -> None:
    """The other moves, while no other process may write to the same place."""
    set_seed(training.seed)

    # 2. Load the task
    base = find_base_model(arguments.model_name_or_path)
    check_is_float(base)
    task = load_task(arguments.dataset_name, arguments.dataset_config_name)
    print(f"base model: {base.name} ({base.source})   dataset: {task.name} ({task.source})")
    rows, tokenizer, train_ids, validation_ids = load_training_rows(task, base, arguments, seed=training.seed)

    # 3. Build the variant: the base in NF4, and an adapter beside each of its layers
    model = build_qlora(base.path, task.labels, arguments, bf16=training.bf16)
    parameters = count_parameters(model)

    # 4. Train; afterwards the model has the weights of the best checkpoint on validation
    trainer = FiniteTrainer(
        model=model,
        args=training,
        train_dataset=train_ids,
        eval_dataset=validation_ids,
        processing_class=tokenizer,  # pads each batch to its longest text
        compute_metrics=compute_metrics,
    )
    checkpoint = find_checkpoint(trainer, recipe, rows)
    with patched(trainer) as clock:
        trainer.train(resume_from_checkpoint=checkpoint)
    summary = summarize_training(trainer, clock, resumed=checkpoint is not None) | parameters

    # 5. Save, once: with `accelerate launch` several processes get here
    if trainer.is_world_process_zero():
        made = describe_made("qlora", recipe, training.seed, describe_origin(base, task, rows), summary)
        with new_artifact(training.artifact, made) as folder:
            learnt = trainer.accelerator.unwrap_model(trainer.model)
            merged = merge(learnt, base, task.labels, folder, arguments, training)
            made |= save_merged(merged, tokenizer, folder, task, arguments.formats, training)
        finish(training, summary)
        score_and_publish(training.artifact, training)


def check_is_float(base: BaseModel) -> None:
    """Raises `UserError` if the base is a quantized folder: its weights would be rounded twice."""
    if base.source == "folder" and (quantizer := quantized_by(Path(base.path))):
        raise UserError(f"{base.path} is quantized already (by {quantizer}); name the float model it was made from")


def count_parameters(model) -> dict[str, int]:
    """The numbers of `trained_parameters` and of all `parameters`; prints them too."""
    trained, total = model.get_nb_trainable_parameters()  # PEFT's, which counts two 4-bit weights per byte
    print(f"trained: {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)")
    return {"trained_parameters": trained, "parameters": total}


def save_merged(merged, tokenizer, folder: Path, task: Task, formats: list[str], training) -> dict:
    """Writes the merged model into ``folder``: `model.safetensors` for Transformers, and INT8 for ONNX Runtime.

    Args:
        merged: base and adapter as one float model.
        formats: 'nf4' for `model.safetensors`, 'onnx' for the ONNX file.
        training: `TrainingArguments`.

    Returns:
        For recipe.yaml: what `save_watched` tells of the ONNX file, and `merged`, the result of `save_smallest`.
    """
    # The adapter alone was asked for, and it is saved already.
    if not {"nf4", "onnx"} & set(formats):
        return {}
    tokenizer.save_pretrained(folder)
    merged.config.save_pretrained(folder)
    watched = WatchedArguments(formats=["onnx"], allow_drop=True)
    made, validation = {}, validation_rows(task, threads=torch.get_num_threads())
    count = min(CALIBRATION_ROWS, len(get_split(task, "train")))
    rows = draw_calibration_rows(task, TextEncoder(folder), count, training.seed)
    with scratch_folder() as temporary:
        # Both forms are made from a float folder, as they would be from a baseline.
        whole = Path(temporary) / "merged"
        merged.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        if "onnx" in formats:
            export_onnx(merged, tokenizer, whole / "onnx" / "model.onnx")
            # As run_ptq.py: with outlier units in floats, if rounding everything would lose too much.
            made |= save_watched(make_plan(whole, merged, watched, rows), folder, rows, validation, watched)
        if "nf4" in formats:
            options = nf4_options(str(whole), task.labels, bf16=False)
            made["merged"] = save_smallest(whole, folder, options, rows, validation, watched.max_f1_drop / 100)
        return made


def save_smallest(
    whole: Path, folder: Path, options: dict, rows: CalibrationRows, validation: Rows, max_loss: float
) -> dict:
    """Writes `model.safetensors` in the smallest form that loses little on validation against the float model.

    Args:
        whole: folder of the merged float model.
        options: those of `nf4_options`.
        rows: they show the inputs of the layers, on which rounding should change the answers least.
        max_loss: of macro F1, as a share; the same as for a format of PTQ.

    Returns:
        Validation macro F1 of each form that was tried, FP32 first; the last one was kept.
    """
    token_ids = rows.encoder(validation.texts)

    def macro_f1(saved: Path) -> float:
        # All in float32, so that the choice does not turn on the processor.
        logits = predict(ModelInMemory(open_in_float32(saved), rows.encoder), token_ids)
        return score(logits, validation.labels)["macro_f1"]

    tried = {"fp32": macro_f1(whole)}
    # The adapter has made up for rounding to NF4, but its sum with the base must be rounded again. On some encoders
    # this costs too much: then BF16 has half the bytes of FP32, and FP32 is what is left.
    for form in ("nf4", "bf16", "fp32 kept"):
        if form == "nf4":
            smaller = round_to_nf4(whole, rows, options)
            # The table of words alone: of a file in 4 bits, newer releases of Transformers leave all weights in the
            # type of the file. A sum with the positions in float32 is float32; norms and head must be so too.
            smaller.get_input_embeddings().to(torch.bfloat16)
        else:
            smaller = load_trained_classifier(whole, dtype=torch.bfloat16 if form == "bf16" else torch.float32)
        save_compact(smaller, folder)  # over the form before it
        tried[form] = macro_f1(folder)
        if tried[form] >= tried["fp32"] - max_loss:
            break
    return tried


if __name__ == "__main__":
    run(main)
