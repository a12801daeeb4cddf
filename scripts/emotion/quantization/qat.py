"""Quantization-aware training: the callback that switches fake quantizers, and the conversion of the trained model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from emotion.data.metrics import score
from emotion.inference.model_folder import find_formats, load_trained_classifier
from emotion.inference.runtimes import ModelInMemory, open_artifact, predict
from emotion.quantization.accuracy_aware import copy_shared_files, save_format
from emotion.quantization.fake_quantizers import convert, follow_ranges, switch, to_integers
from emotion.quantization.int8 import quantize_torchao
from emotion.quantization.layers import CalibrationRows, Plan
from emotion.quantization.outlier_channels import outlier_metadata
from emotion.quantization.scheme import (
    Samples,
    SchemeArguments,
    formats_to_make,
    runtime_to_train_for,
    save_float_onnx,
)
from emotion.utils.errors import UserError
from emotion.utils.files import scratch_folder


class FakeQuantizeCallback(TrainerCallback):
    """Turns the fake quantizers on after some steps, and for every evaluation; ranges stay from half of the steps on.

    A late start lets the training settle first (Jacob et al., "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference", CVPR 2018).

    Args:
        quantize_after: steps of training in float.
    """

    def __init__(self, quantize_after: int):
        self.quantize_after = quantize_after

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        """Switches them for the step."""
        switch(model, enabled=state.global_step >= self.quantize_after)
        # In the second half the weights adapt to ranges that stay.
        follow_ranges(model, state.global_step < state.max_steps // 2)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Turns them on: the best checkpoint is that of the quantized model."""
        switch(model, enabled=True)


def freeze(model, prefixes: list[str]) -> int:
    """Freezes the parameters whose names begin with one of ``prefixes``, in place.

    Returns:
        How many numbers these parameters hold.

    Raises:
        UserError: if a prefix fits no parameter.
    """
    parameters = dict(model.named_parameters())
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in parameters):
            names = sorted({".".join(name.split(".")[:2]) for name in parameters})
            raise UserError(f"--freeze {prefix}: no parameter's name begins so; they begin with {', '.join(names)}")
    frozen = [parameter for name, parameter in parameters.items() if name.startswith(tuple(prefixes))]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in frozen)


def save_converted(
    plan: Plan, folder: Path, tokenizer, calibration: CalibrationRows, validation: Samples, arguments: SchemeArguments
) -> dict:
    """Converts the trained model, writes all formats, and scores them beside the fake-quantized model.

    The formats are quantized by the functions of run_ptq.py.

    Args:
        plan: of the trained model, which loses its fake quantizers.

    Returns:
        For recipe.yaml: `seconds` per format; `forms`, of `score_stages`; and `outlier_channels`, where channels stay
        in float.
    """
    encoder, runtime = calibration.encoder, runtime_to_train_for(arguments)
    token_ids, seconds = encoder(validation.texts), {}
    switch(plan.model, enabled=True)
    logits = {"fake": predict(ModelInMemory(plan.model, encoder), token_ids)}
    # The integers in memory: a gap to "fake" is a fault of the conversion, and a gap between these and a reopened
    # file is one of saving or of the runtime.
    if runtime == "onnx":
        logits["converted"] = predict(ModelInMemory(to_integers(plan.model), encoder), token_ids)
    with scratch_folder() as scratch:
        plan = convert_to_float(plan, tokenizer, Path(scratch), formats_to_make(arguments))
        copy_shared_files(plan.folder, folder)
        for format in formats_to_make(arguments):
            seconds[format] = save_format(plan, folder, format, calibration, arguments)
        if runtime == "torchao":
            converted = quantize_torchao(plan, plan.folder / "int8")
            logits["converted"] = predict(ModelInMemory(converted, encoder), token_ids)
    for format in find_formats(folder):
        reopened = open_artifact(folder, format, threads=torch.get_num_threads())
        logits[f"{format}, reopened"] = predict(reopened, token_ids)
    return {"seconds": seconds, "forms": score_stages(logits, validation.labels)} | outlier_metadata(plan.outliers)


def convert_to_float(plan: Plan, tokenizer, folder: Path, formats) -> Plan:
    """Saves the trained float weights in plain layers, in PyTorch and ONNX; returns a plan for that folder."""
    scales, ranges = convert(plan.model)  # those of the checkpoint, if the training was resumed
    plan.model.save_pretrained(folder)
    model = load_trained_classifier(folder).eval()  # without the Trainer's wrappers
    save_float_onnx(model, folder, tokenizer, formats)
    return replace(plan, folder=folder, model=model, scales=scales, ranges=ranges)


def score_stages(logits: dict[str, np.ndarray], labels: np.ndarray) -> dict:
    """Scores the trained model, its integers, and each reopened file on the same rows.

    Args:
        logits: name -> float32 (rows, classes); the first is the trained model.
        labels: int (rows,).

    Returns:
        Name -> `validation_macro_f1`, and `mean_logit_gap`, the mean absolute difference to the first.
    """
    scores, first = {}, next(iter(logits.values()))
    for name, values in logits.items():
        macro_f1, gap = score(values, labels)["macro_f1"], float(np.abs(values - first).mean())
        scores[name] = {"validation_macro_f1": macro_f1, "mean_logit_gap": gap}
        print(f"  {name:20} macro F1 {macro_f1:.4f}   logits differ by {gap:.4f}")
    return scores
