"""Accuracy-aware quantization: each format is scored on validation, and keeps more in float only if it loses too much.

NNCF has this as `nncf.quantize_with_accuracy_control`, Intel Neural Compressor as accuracy-aware tuning. Here a format
takes the first of these steps that keeps its macro F1:

    plain              as the flags say
    channel splitting  ONNX Runtime: outlier channels of feed-forward layers in float (outlier_channels.py)
    ranges by RULE     ONNX Runtime: ranges of activations by another rule (activation_ranges.py)
    GPTQ               below 8 bits: weights rounded so that the outputs of their layers change least (lowbit.py)
    float              the 1, 2, 4, then 8 most sensitive layers in float

The drop against FP32 on the same texts is an estimate. Its one-sided 95 % bound comes from a paired bootstrap, and
decides between *within* `max_f1_drop` and *cannot tell*; a drop that exceeds the limit itself is *beyond* it.

For texts without labels, the share that gets another label than in FP32 takes the place of the drop, with its exact
binomial bound (Clopper and Pearson, 1934), and `min_agreement` that of the limit.
"""

import math
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import beta

from emotion.data.metrics import decide, probabilities, resampled_macro_f1, score
from emotion.inference.model_folder import SHARED_FILES, files_to_serve, load_trained_classifier
from emotion.inference.runtimes import OnnxClassifier, open_artifact, predict
from emotion.quantization.activation_ranges import RULES, measure_ranges
from emotion.quantization.int8 import quantize_onnx, quantize_openvino, quantize_torchao
from emotion.quantization.layers import CalibrationRows, Layers, Plan, find_layers, float_reasons, names_in_float
from emotion.quantization.lowbit import apply_gptq, write_lowbit_onnx
from emotion.quantization.outlier_channels import find_outliers, outlier_metadata
from emotion.quantization.scheme import Samples, SchemeArguments, formats_to_make, update_plan
from emotion.utils.arguments import SHARE, Range, flag
from emotion.utils.command import Bar
from emotion.utils.errors import UserError

FLOAT_COUNTS = (1, 2, 4, 8)  # of the most sensitive layers
SENSITIVITY_TEXTS = 300  # the mean shift of the logits needs no more
MOST_TEXTS = 10**7  # that are asked for
RESAMPLES = 2000  # of the paired bootstrap
WITHIN, BEYOND, UNDECIDED = "within", "beyond", "cannot tell"


@dataclass
class AccuracyAwareArguments(SchemeArguments):
    """The flags on how a model is quantized, and how much it may lose."""

    max_f1_drop: float = flag(
        0.5,
        "Points of validation macro F1 that a format may lose without a fallback; below 0 it must gain.",
        Range(-100, 100),
    )
    min_agreement: float = flag(99.0, "Texts alone: the percentage that must get FP32's label.", Range(0, 100))
    threshold: float = flag(0.5, "Models with several labels a text: the least score of one.", SHARE)
    allow_drop: bool = flag(False, "Save a format even if no fallback keeps its score.")
    strict: bool = flag(False, "Refuse a format, too, where the texts are too few to tell what it loses.")


def quantize_with_accuracy_control(
    plan: Plan, folder: Path, rows: CalibrationRows, validation: Samples, arguments: AccuracyAwareArguments
) -> dict:
    """Writes each format into ``folder``, with the first fallback that keeps its macro F1 on validation.

    Args:
        rows: calibration samples, for static ranges and to find outlier channels.

    Returns:
        For recipe.yaml: `seconds` and `fallbacks` of each format, of which one was `kept`; `kept_in_float`; and
        `outlier_channels`, where a format keeps channels in float.

    Raises:
        UserError: if no fallback suffices and `allow_drop` is false.
    """
    copy_shared_files(plan.folder, folder)
    # The FP32 file answers as the weights do, and faster; a model without an export has none.
    reference = logits_of(plan.folder, "onnx" if has_export(plan) else "pytorch", validation)
    few = replace(validation.first(SENSITIVITY_TEXTS), labels=None)  # layers are ranked by their logits alone
    sensitivity = cache(lambda: measure_layers(plan.folder, few, kinds=False))  # takes minutes, and serves all formats
    kept_in_float = float_reasons(plan.model, plan.layers, arguments.modules_to_not_convert)
    metadata = {"seconds": {}, "fallbacks": {}, "kept_in_float": kept_in_float}
    for format in formats_to_make(arguments):
        attempts, plans = [], []
        for fallback, changed in _fallbacks(plan, format, rows, sensitivity, arguments):
            seconds = save_format(changed, folder, format, rows, arguments)
            effect = compare(reference, logits_of(folder, format, validation), validation.labels, validation.threshold)
            attempts.append(_report(folder, format, fallback, effect, seconds, arguments))
            plans.append(changed)
            if is_good_enough(attempts[-1], arguments):
                break
        kept = _choose(format, attempts, arguments)
        if kept < len(plans) - 1:  # the file of the last attempt is there now
            save_format(plans[kept], folder, format, rows, arguments)
        metadata["fallbacks"][format], metadata["seconds"][format] = attempts, attempts[kept]["seconds"]
        for name in names_in_float(plan.model, plans[kept].layers):
            kept_in_float.setdefault(name, f"most sensitive in {format}")
        metadata |= outlier_metadata(plans[kept].outliers)
    return metadata


def _fallbacks(plan: Plan, format: str, rows: CalibrationRows, sensitivity, arguments: AccuracyAwareArguments):
    """Yields the name of each step and its plan, from the cheapest on; what a step needs is measured in its turn."""
    yield "plain", plan
    if format == "onnx" and (outliers := find_outliers(plan, rows)):
        changed = update_plan(replace(plan, outliers=outliers), arguments)
        plan = _measure_again(changed, plan, rows, arguments.activation_quantization)
        yield f"channel splitting, {sum(map(len, outliers.values()))} channels", plan
    if format == "onnx" and plan.ranges:
        for rule in RULES:
            if rule != arguments.activation_quantization:
                yield f"ranges by {rule}", replace(plan, ranges=measure_ranges(plan, rows, rule))
    if arguments.bits < 8:
        yield "GPTQ", apply_gptq(plan, rows)
    # With `allow_drop` the result is saved in any case, and measuring every layer takes minutes.
    if arguments.allow_drop or not has_export(plan):
        return
    ranked = sorted(sensitivity(), key=lambda row: -row["mean_logit_shift"])
    for count in FLOAT_COUNTS:
        names = [name for row in ranked[:count] for name in row["names"]]
        kept = replace(arguments, modules_to_not_convert=[*arguments.modules_to_not_convert, *names])
        changed = update_plan(plan, kept)
        if not changed.layers.linear:  # of a small model
            return
        yield f"float, {count} layers", _measure_again(changed, plan, rows, arguments.activation_quantization)


def _measure_again(plan: Plan, before: Plan, rows: CalibrationRows, rule: str) -> Plan:
    """The plan with the ranges of its layers, which depend on their outlier channels alone; ``before`` has the old."""
    if not plan.ranges or plan.outliers == before.outliers:
        return plan
    return replace(plan, ranges=measure_ranges(plan, rows, rule))


def has_export(plan: Plan) -> bool:
    """Whether there is an FP32 file for ONNX Runtime, by which layers are measured."""
    return (plan.folder / "onnx" / "model.onnx").is_file()


def _loss(effect: dict) -> tuple[float, float]:
    """What a format loses and its 95 % bound: points of macro F1, or without labels the percentage that changes."""
    if "macro_f1_change" in effect:
        return -100 * effect["macro_f1_change"], -100 * effect["macro_f1_change_bound"]
    return 100 * effect["flips"] / effect["rows"], 100 * effect["flips_bound"]


def _report(folder: Path, format: str, fallback: str, effect: dict, seconds: float, arguments) -> dict:
    """Prints an attempt and returns it for recipe.yaml."""
    size, has_labels = sum(files_to_serve(folder, format).values()), "macro_f1_change" in effect
    loss, bound = _loss(effect)
    limit = arguments.max_f1_drop if has_labels else 100 - arguments.min_agreement
    verdict = judge(loss, bound, limit)
    if has_labels:
        unit, measured = "points", f"validation macro F1 {-loss:+.2f} points (95 % bound {-bound:+.2f})"
    else:
        unit, measured = "% of the labels", f"{100 - loss:.2f} % agree with FP32 (95 % bound {100 - bound:.2f})"
        measured += f", probabilities differ by {effect['mean_probability_change']:.4f}"
    differing = f"{effect['flips']} of {effect['rows']} labels differ"
    print(f"{format}, {fallback}: {measured}, {differing}, {size / 1e6:.1f} MB, {seconds} s")
    if verdict == UNDECIDED:
        if has_labels:  # the gap to the bound shrinks with the square root of the number of texts
            needed = math.ceil(effect["rows"] * ((bound - loss) / max(limit - loss, 0.01)) ** 2)
        else:
            needed = effect["rows"]
            while needed < MOST_TEXTS and 100 * _flips_bound(loss / 100 * needed, needed) > limit:
                needed = math.ceil(1.1 * needed)
        enough = f"about {needed:,} texts" if needed < MOST_TEXTS else "no number of texts"  # at the limit itself
        print(
            f"{format}: {effect['rows']} texts cannot tell whether it loses more than {limit:g} {unit}: it may "
            f"lose {bound:.2f}; {enough} would tell"
        )
    return {"fallback": fallback, **effect, "verdict": verdict, "bytes_to_serve": size, "seconds": seconds}


def judge(drop: float, bound: float, max_drop: float) -> str:
    """Whether a drop of macro F1, in points, is `WITHIN` or `BEYOND` the limit, or its bound leaves it `UNDECIDED`."""
    if drop > max_drop:
        return BEYOND
    return WITHIN if bound <= max_drop else UNDECIDED


def is_good_enough(attempt: dict, arguments: AccuracyAwareArguments) -> bool:
    """Whether an attempt is kept without trying the next fallback."""
    return attempt["verdict"] == WITHIN or (attempt["verdict"] == UNDECIDED and not arguments.strict)


def _choose(format: str, attempts: list[dict], arguments: AccuracyAwareArguments) -> int:
    """Marks the last attempt as kept if it suffices, else the best one if `allow_drop` is set; returns its index.

    Raises:
        UserError: if none suffices and `allow_drop` is false.
    """
    best = attempts[-1]
    if not is_good_enough(best, arguments):
        best = min(attempts, key=lambda attempt: (_loss(attempt)[0], attempt["mean_logit_shift"]))
        loss, bound = _loss(best)
        if "macro_f1_change" in best:
            message = f"{format} at {arguments.bits} bits loses {loss:.2f} points of validation macro F1 at best"
            flag = f"--max_f1_drop {arguments.max_f1_drop:g}"
        else:
            message = f"{format} at {arguments.bits} bits changes {loss:.2f} % of the labels at best"
            flag = f"--min_agreement {arguments.min_agreement:g} allows"
        if best["verdict"] == UNDECIDED:
            message += f", and may lose {bound:.2f}"
        if not arguments.allow_drop:
            raise UserError(
                f"{message}, more than {flag}; nothing was saved. Train for it with run_qat.py, change "
                f"{flag.split()[0]}, or set --allow_drop true"
            )
        print(f"{message}, more than {flag}; saved all the same")
    best["kept"] = True
    return attempts.index(best)


def copy_shared_files(source: Path, folder: Path) -> None:
    """Copies the files that all formats need; torchao replaces config.json by its own."""
    for name in SHARED_FILES:
        shutil.copy(source / name, folder / name)


def save_format(plan: Plan, folder: Path, format: str, rows: CalibrationRows, arguments: SchemeArguments) -> float:
    """Quantizes the model of the plan and writes it into ``folder`` in one format.

    Returns:
        The seconds that it took.
    """
    start = time.monotonic()
    onnx_file = folder / "onnx" / "model_quantized.onnx"  # the name that transformers.js looks for
    if format == "torchao":
        quantize_torchao(plan, folder)
    elif format == "openvino":
        quantize_openvino(plan, folder / "openvino", rows, arguments.reduce_range, arguments.smooth_quant)
    elif plan.scales:
        write_lowbit_onnx(plan, onnx_file)
    else:
        quantize_onnx(plan, onnx_file, arguments.reduce_range)
    return round(time.monotonic() - start, 1)


def logits_of(folder: Path, format: str, samples: Samples) -> np.ndarray:
    """Returns the logits of a saved model, float32 (rows, classes)."""
    classifier = open_artifact(folder, format, threads=samples.threads)
    return predict(classifier, classifier.encode(samples.texts))


def compare(before: np.ndarray, after: np.ndarray, labels: np.ndarray | None, threshold: float | None = None) -> dict:
    """Compares quantized with float logits on the same rows.

    Args:
        before: logits (rows, classes) in FP32.
        after: the same, quantized.
        labels, threshold: as of `Samples`.

    Returns:
        `mean_logit_shift`; `flips`, the texts with another predicted label, or other ones, of `rows`. With labels also
        `macro_f1_change`, and `macro_f1_change_bound`, below which the change lies with a probability of 5 %; without
        them `mean_probability_change`, and `flips_bound`, above which the share of flips lies with that probability.
    """
    predictions, rows = [decide(logits, threshold) for logits in (before, after)], len(before)
    flips = int((predictions[0] != predictions[1]).reshape(rows, -1).any(axis=-1).sum())
    effect = {"mean_logit_shift": float(np.abs(after - before).mean()), "flips": flips, "rows": rows}
    if labels is None:
        scores = [probabilities(logits, threshold is not None) for logits in (before, after)]
        change = float(np.abs(scores[1] - scores[0]).mean())
        return effect | {"mean_probability_change": change, "flips_bound": _flips_bound(flips, rows)}
    drawn = resampled_macro_f1(labels, *predictions, classes=before.shape[1], resamples=RESAMPLES)
    change = score(after, labels, threshold)["macro_f1"] - score(before, labels, threshold)["macro_f1"]
    bound = float(np.percentile(drawn[1] - drawn[0], 5))
    return effect | {"macro_f1_change": change, "macro_f1_change_bound": bound}


def _flips_bound(flips: float, rows: int) -> float:
    """The share of flips that is exceeded with a probability of 5 %, where so many are seen."""
    return float(beta.ppf(0.95, flips + 1, rows - flips)) if flips < rows else 1.0


def measure_layers(baseline: Path, samples: Samples, kinds: bool = True) -> list[dict]:
    """Measures the sensitivity of each layer, and of each kind of layer, by quantizing it alone in ONNX Runtime.

    Args:
        kinds: whether whole kinds of layers are measured too.

    Returns:
        A row for each: `kind`, `layer` (None for a whole kind), `names` of the modules, and the result of `compare`.
    """
    model = load_trained_classifier(baseline)
    layers = find_layers(model)
    before, rows = logits_of(baseline, "onnx", samples), []
    groups = {key: names for key, names in group_layers(layers).items() if kinds or key[1] is not None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for (kind, layer), names in Bar(groups.items(), desc="layer by layer"):
            part = Layers([n for n in names if n in layers.linear], [n for n in names if n in layers.embeddings])
            quantize_onnx(Plan(baseline, model, part), path)  # dynamic ranges: the layer alone is measured
            classifier = OnnxClassifier(baseline, path, threads=samples.threads)
            after = predict(classifier, classifier.encode(samples.texts))
            effect = compare(before, after, samples.labels, samples.threshold)
            rows.append({"kind": kind, "layer": layer, "names": names} | effect)
    return rows


def group_layers(layers: Layers) -> dict[tuple[str, str | None], list[str]]:
    """Groups modules that are quantized together.

    Returns:
        (Kind, layer) -> names of modules. The layer is the number of the encoder's layer, 'embeddings', or None for
        all layers of a kind; these come last.
    """
    groups = {(name.rpartition(".")[2], "embeddings"): [name] for name in layers.embeddings}
    for name in layers.linear:
        # "bert.encoder.layer.3.attention.self.query" -> "3" and "attention.self.query"
        number, part = re.search(r"\.(\d+)\.(.*)", name).groups()
        # Query, key and value are one product in the file: "attention.self". Other architectures have parts without
        # a dot.
        kind = part.rpartition(".")[0] or part
        for layer in (number, None):
            groups.setdefault((kind, layer), []).append(name)
    return dict(sorted(groups.items(), key=lambda group: group[0][1] is None))
