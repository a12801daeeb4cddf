"""From a model that was trained with fake quantizers to its files, with the scores of each form side by side."""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from emotion.data.metrics import score
from emotion.export.onnx_export import export_onnx
from emotion.inference.model_folder import find_formats
from emotion.inference.pretrained import load_trained_classifier
from emotion.inference.runtimes import ModelInMemory, open_artifact, predict
from emotion.quantization.fake_quantizers import convert, switch, to_integers
from emotion.quantization.int8_torchao import quantize_torchao
from emotion.quantization.layers import CalibrationRows, Plan
from emotion.quantization.outlier_channels import describe_outliers
from emotion.quantization.scheme import SchemeArguments, runtime_to_train_for, save_formats
from emotion.utils.files import scratch_folder


def save_converted(
    plan: Plan, folder: Path, tokenizer, calibration: CalibrationRows, validation, arguments: SchemeArguments
) -> dict:
    """Converts the trained model, writes all formats, and scores them beside the fake-quantized model.

    The functions that write the files are those of run_ptq.py.

    Args:
        plan: its model has fake quantizers, and loses them here.
        validation: the rows of that split.

    Returns:
        For recipe.yaml: `seconds` per format; `forms`, of `score_forms`; and `outliers`, where units stay in floats.
    """
    encoder, runtime = calibration.encoder, runtime_to_train_for(arguments)
    token_ids, labels = encoder(list(validation["text"])), np.asarray(validation["label"])
    switch(plan.model, enabled=True)
    logits = {"fake": predict(ModelInMemory(plan.model, encoder), token_ids)}
    # The integers as a model in memory: a gap to "fake" is then the conversion's fault, and a gap of a reopened file
    # to these is the fault of saving, or of the runtime.
    if runtime == "onnx":
        logits["converted"] = predict(ModelInMemory(to_integers(plan.model), encoder), token_ids)
    with scratch_folder() as scratch:
        plan = convert_to_float(plan, tokenizer, Path(scratch))
        seconds = save_formats(plan, folder, calibration, arguments)
        if runtime == "torchao":
            converted = quantize_torchao(plan, plan.folder / "int8")
            logits["converted"] = predict(ModelInMemory(converted, encoder), token_ids)
    # As a user opens them: saving and reopening has its own mistakes to make.
    for format in find_formats(folder):
        reopened = open_artifact(folder, format, threads=torch.get_num_threads())
        logits[f"{format}, reopened"] = predict(reopened, token_ids)
    return {"seconds": seconds, "forms": score_forms(logits, labels)} | describe_outliers(plan.outliers)


def convert_to_float(plan: Plan, tokenizer, folder: Path) -> Plan:
    """Saves the trained float weights in plain layers, in PyTorch and ONNX; returns a plan to quantize that folder."""
    scales, ranges = convert(plan.model)  # those in the checkpoint, which a resumed training has brought along
    plan.model.save_pretrained(folder)
    plain = load_trained_classifier(folder).eval()  # opened anew, without the Trainer's wrappers
    save_float(plain, folder, tokenizer)
    return replace(plan, folder=folder, model=plain, scales=scales, ranges=ranges)


@contextlib.contextmanager
def with_float_files(folder: Path):
    """Yields a fine-tuned folder, or a temporary copy with the FP32 file for ONNX Runtime that the folder lacks.

    A folder that another program trained has none, and the released baseline has its weights in bfloat16 alone.
    """
    if "onnx" in find_formats(folder):
        yield Path(folder)
        return
    print(f"{folder} has no FP32 file for ONNX Runtime; one is made for this run")
    with scratch_folder() as temporary:
        copy = Path(temporary) / Path(folder).name
        model = load_trained_classifier(folder, dtype=torch.float32)
        model.save_pretrained(copy)
        save_float(model, copy, AutoTokenizer.from_pretrained(folder))
        yield copy


def save_float(model, folder: Path, tokenizer) -> None:
    """Writes a float model for ONNX Runtime, in FP32, with the tokenizer and the configuration."""
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    export_onnx(model, tokenizer, folder / "onnx" / "model.onnx")


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
        print(f"  {form:20} macro F1 {macro_f1:.4f}   logits differ by {gap:.4f}")
    return forms
