"""Quantizing that watches its own loss: each format is scored on validation, and gets a remedy if it loses too much.

A format goes up a ladder of remedies, the cheapest first, and keeps the first that holds:

    plain    as the recipe says
    split    ONNX Runtime: outlier units of the feed-forward pairs in floats (quantize/outliers.py)
    rounded  below 8 bits: weights rounded so that the outputs of their layers change least (quantize/gptq.py)
    float    the layers that harm most in floats as well, 1, 2, 4, then 8 of them, measured one at a time

Neural Compressor and NNCF call this accuracy-aware tuning.
"""

import time
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from emotion.inference.model_folder import files_to_serve
from emotion.quantization.layers import CalibrationRows, Plan, explain_float, names_in_float
from emotion.quantization.lowbit import round_by_outputs
from emotion.quantization.outlier_channels import describe_outliers, find_outliers
from emotion.quantization.scheme import SchemeArguments, copy_shared_files, formats_to_make, plan_again, save_format
from emotion.quantization.sensitivity import Rows, compare, logits_of, measure_layers
from emotion.utils.arguments import Range
from emotion.utils.errors import UserError

FLOAT_UNITS = (1, 2, 4, 8)  # how many of the most harmful units stay in float
# Texts that show how harmful a unit is, by the shift of the logits: few suffice, and a base-size encoder has 50 units.
RANKING_TEXTS = 300


@dataclass
class WatchedArguments(SchemeArguments):
    """How a model is quantized, and how much it may lose."""

    max_f1_drop: float = field(
        default=0.5,
        metadata={
            "help": "Points of validation macro F1 that a format may lose without a remedy; below 0 it must gain.",
            "choices": Range(-100, 100),
        },
    )
    allow_drop: bool = field(default=False, metadata={"help": "Save a format even if no remedy keeps its loss small."})


def save_watched(
    plan: Plan, folder: Path, rows: CalibrationRows, validation: Rows, arguments: WatchedArguments
) -> dict:
    """Writes each format into ``folder`` with the cheapest remedy that keeps macro F1 on validation.

    Args:
        rows: calibrate static ranges, and show the activations in which outliers are found.

    Returns:
        For recipe.yaml: `seconds` per format; `remedies`, all attempts per format, of which one was `kept`; and
        `outliers`, where a format keeps units in floats: the rule, and the units of each layer.

    Raises:
        UserError: if no remedy of a format holds and `allow_drop` is false.
    """
    copy_shared_files(plan.folder, folder)
    reference = logits_of(plan.folder, "onnx", validation)
    few = validation.first(RANKING_TEXTS)
    measured = cache(lambda: measure_layers(plan.folder, few, kinds=False))  # takes minutes, and serves all formats
    told = {"seconds": {}, "fallbacks": {}}
    told["kept_in_float"] = explain_float(plan.model, plan.layers, arguments.modules_to_not_convert)
    for format in formats_to_make(arguments):
        attempts, plans = [], []
        for remedy, changed in _ladder(plan, format, rows, measured, arguments):
            start = time.monotonic()
            save_format(changed, folder, format, rows, arguments)
            seconds = round(time.monotonic() - start, 1)
            effect = compare(reference, logits_of(folder, format, validation), validation.labels)
            size = sum(files_to_serve(folder, format).values())
            attempts.append({"fallback": remedy, **effect, "bytes_to_serve": size, "seconds": seconds})
            plans.append(changed)
            _tell(format, attempts[-1])
            if -100 * effect["macro_f1_change"] <= arguments.max_f1_drop:
                break
        kept = _choose(format, attempts, arguments)
        if kept < len(plans) - 1:  # an earlier attempt was better than the last, whose file lies there now
            save_format(plans[kept], folder, format, rows, arguments)
        attempts[kept]["kept"] = True
        told["fallbacks"][format], told["seconds"][format] = attempts, attempts[kept]["seconds"]
        _explain_remedy(told, format, plans[kept])
    return told


def _explain_remedy(told: dict, format: str, plan: Plan) -> None:
    """Adds to what recipe.yaml tells which layers and units the plan that was kept leaves in float, and why."""
    for name in names_in_float(plan.model, plan.layers):
        told["kept_in_float"].setdefault(name, f"harmed {format} most when it was rounded")
    told |= describe_outliers(plan.outliers)


def _tell(format: str, attempt: dict) -> None:
    """Prints one line per attempt."""
    print(
        f"{format}, {attempt['fallback']}: validation macro F1 {100 * attempt['macro_f1_change']:+.2f} points, "
        f"{attempt['flips']} labels differ, {attempt['bytes_to_serve'] / 1e6:.1f} MB, {attempt['seconds']} s"
    )


def _ladder(plan: Plan, format: str, rows: CalibrationRows, measured, arguments):
    """Yields the name of each remedy and the plan that has it; what a remedy needs is measured when its turn comes."""
    yield "plain", plan
    if format == "onnx" and (outliers := find_outliers(plan, rows)):
        plan = plan_again(replace(plan, outliers=outliers), arguments)
        yield f"split, {sum(map(len, outliers.values()))} units", plan
    if arguments.bits < 8:
        yield "rounded by outputs", round_by_outputs(plan, rows)
    if arguments.allow_drop:  # measuring every layer takes minutes, and the result would be saved in any case
        return
    # A unit is what one product holds: query, key and value together.
    units = sorted(measured(), key=lambda one: -one["mean_logit_shift"])
    for count in FLOAT_UNITS:
        names = [name for one in units[:count] for name in one["names"]]
        kept = replace(arguments, modules_to_not_convert=[*arguments.modules_to_not_convert, *names])
        yield f"float, {count} units", plan_again(plan, kept)


def _choose(format: str, attempts: list[dict], arguments) -> int:
    """The number of the attempt to keep: the last if it holds, else the best one, if the user wants it all the same.

    Raises:
        UserError: if none holds and `allow_drop` is false.
    """
    if -100 * attempts[-1]["macro_f1_change"] <= arguments.max_f1_drop:
        return len(attempts) - 1
    # Where macro F1 does not tell two attempts apart, the logits do.
    best = max(attempts, key=lambda one: (one["macro_f1_change"], -one["mean_logit_shift"]))
    loss = -100 * best["macro_f1_change"]
    message = f"{format} at {arguments.bits} bits loses {loss:.2f} points of validation macro F1 at best"
    if not arguments.allow_drop:
        raise UserError(
            f"{message}, more than --max_f1_drop {arguments.max_f1_drop:g}; nothing was saved. Train for it with "
            "run_qat.py, allow more with --max_f1_drop, or save it all the same with --allow_drop true"
        )
    print(f"{message}; saved all the same, as --allow_drop asks")
    return attempts.index(best)
