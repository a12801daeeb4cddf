"""The scheme of a quantization, which PTQ and QAT share: its arguments, their check, the plan, the files it makes."""

import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from emotion.data.dataset import Task, get_split, stratified_sample
from emotion.data.tokenization import TextEncoder
from emotion.inference.emotion_classifier import fetch, find_model
from emotion.inference.model_folder import SHARED_FILES, describe_made, find_formats, quantized_by, weights_of
from emotion.quantization.int8_onnx import layers_of_first_token, quantize_onnx, quantize_onnx_static
from emotion.quantization.int8_openvino import quantize_openvino
from emotion.quantization.int8_torchao import quantize_torchao
from emotion.quantization.layers import CalibrationRows, Plan, explain_float, find_layers
from emotion.quantization.lowbit import check_group_size, choose_scales, write_lowbit_onnx
from emotion.quantization.outlier_channels import find_outliers, weight_without_outliers
from emotion.utils.arguments import COUNT, Range
from emotion.utils.errors import UserError
from emotion.utils.levels import BITS
from emotion.utils.progress import Bar
from emotion.utils.recipe import RECIPE_FILE, Recipe

FORMATS = ("torchao", "onnx", "openvino")


@dataclass
class SchemeArguments:
    """How a model is quantized: the flags of run_ptq.py and run_qat.py alike."""

    # The weights
    bits: int = field(
        default=8, metadata={"help": "Bits of a weight: 8, 4 or 2. Activations always have 8.", "choices": BITS}
    )
    group_size: int = field(
        default=32,
        metadata={"help": "Below 8 bits: how many weights of a row share a multiplier.", "choices": Range(8)},
    )
    formats: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Formats to make, of {', '.join(FORMATS)}; all that can hold the bits if not given.",
            "choices": FORMATS,
        },
    )
    modules_to_not_convert: list[str] = field(
        default_factory=list, metadata={"help": "Layers that stay in float, by the beginnings of their names."}
    )
    # Each runtime's own choices: how activations are rounded, and what keeps the sums right
    onnx_calibration: str = field(
        default="none",
        metadata={
            "help": "ONNX activation ranges: 'none' (dynamic), or static by 'minmax' or 'entropy'.",
            "choices": ("none", "minmax", "entropy"),
        },
    )
    split_outliers: bool = field(
        default=False,
        metadata={"help": "ONNX: outlier units of feed-forward pairs stay in floats; PTQ does so itself if needed."},
    )
    reduce_range: bool = field(
        default=True,
        metadata={"help": "ONNX, OpenVINO: 7 of the 8 bits of a weight, for right sums on every processor."},
    )
    smooth_quant: bool = field(
        default=True,
        metadata={"help": "OpenVINO: move outliers of activations into the weights (SmoothQuant, ICML 2023)."},
    )
    num_calibration_samples: int = field(
        default=300,
        metadata={
            "help": "Rows of train, drawn class by class, that calibrate static activation ranges.",
            "choices": COUNT,
        },
    )


def check_scheme(arguments: SchemeArguments) -> Path:
    """The folder of the model to quantize; of a Hub id, that of its downloaded files.

    Nothing is loaded for that, so a command fails at once and not after minutes.

    Raises:
        UserError: for a wrong argument, or a model that cannot be quantized.
    """
    formats = arguments.formats
    # None stands for all that can hold the bits. An empty list, in a recipe, would make an artifact without weights.
    if formats == []:
        raise UserError(f"--formats: it takes some of {', '.join(FORMATS)}")
    for format in formats or ():
        if format not in formats_of(arguments.bits):
            raise UserError(f"--formats {format}: it cannot hold {arguments.bits} bits; take onnx")
    # The packed file has dynamic activation ranges alone.
    if arguments.bits < 8 and arguments.onnx_calibration != "none":
        raise UserError(f"--onnx_calibration {arguments.onnx_calibration}: with {arguments.bits} bits it takes none")
    baseline = find_model(arguments.model_name_or_path, "pytorch")
    if baseline != Path(arguments.model_name_or_path):  # of the Hub: what made it tells its base model and its dataset
        fetch(arguments.model_name_or_path, ["pytorch"], optional=(RECIPE_FILE,))
    find_formats(baseline)  # raises if this is no model folder
    # Quantizing integers again would round twice; what makes an artifact small starts from the float weights.
    if quantizer := quantized_by(baseline):
        raise UserError(f"{baseline} is quantized already (by {quantizer}); name the folder it was made from")
    weights_of(baseline, "pytorch")  # raises if the folder has none
    return baseline


# Ends the name of a variant that was trained on without rounding, to compare QAT with; measure/seeds.py reads it back.
CONTROL = "-float"


def name_variant(method: str, bits: int) -> str:
    """The name of a variant in records and folders: 'ptq' for INT8, 'ptq-int4' with fewer bits."""
    return method if bits == 8 else f"{method}-int{bits}"


def formats_of(bits: int) -> tuple[str, ...]:
    """The formats that can hold weights of so many bits."""
    # Below 8 bits only the file of lowbit.py packs the weights; the other formats would give each a byte of its own.
    return FORMATS if bits == 8 else ("onnx",)


def formats_to_make(arguments: SchemeArguments) -> list[str] | tuple[str, ...]:
    """The formats asked for; all that can hold the bits if none was named."""
    return arguments.formats or formats_of(arguments.bits)


def runtime_to_train_for(arguments: SchemeArguments) -> str:
    """ONNX Runtime, if a file is made for it, since it rounds coarsest; torchao otherwise."""
    return "onnx" if "onnx" in formats_to_make(arguments) else "torchao"


def make_plan(folder: Path, model, arguments: SchemeArguments, rows: CalibrationRows | None = None) -> Plan:
    """Chooses the layers of a fine-tuned model that are quantized, and below 8 bits the scales of each.

    Args:
        folder: where the model is saved, with its FP32 file for ONNX Runtime.
        model: the same model, opened in PyTorch.
        rows: needed with `split_outliers`: they show the outlier units.

    Raises:
        UserError: if `modules_to_not_convert` fits no layer, or the group size does not divide a layer's rows.
    """
    plan = Plan(Path(folder), model, find_layers(model, arguments.modules_to_not_convert))
    if "onnx" in formats_to_make(arguments):  # no other format needs these
        plan = replace(plan, of_first_token=layers_of_first_token(plan))
        if arguments.split_outliers:
            plan = replace(plan, outliers=find_outliers(plan, rows))
    return plan_again(plan, arguments)


def plan_again(plan: Plan, arguments: SchemeArguments) -> Plan:
    """Chooses layers and scales anew for a plan whose outliers, or the arguments, have changed."""
    layers = find_layers(plan.model, arguments.modules_to_not_convert)
    plan = replace(plan, layers=layers, scales={}, compensated={})
    if arguments.bits == 8:  # each runtime chooses its own scales
        return plan
    names = [*layers.linear, *layers.embeddings]
    for name in names:  # all of them before the first is rounded, which takes a while
        check_group_size(name, plan.model.get_submodule(name).weight.shape[1], arguments.group_size)
    scales = {}
    for name in Bar(names, desc="scales"):
        scales[name] = choose_scales(weight_without_outliers(plan, name), arguments.bits, arguments.group_size)
    return replace(plan, scales=scales)


def describe_quantized(method: str, recipe: Recipe, made_by: dict, plan: Plan, arguments: SchemeArguments) -> dict:
    """The content of a quantized artifact's recipe.yaml: its own recipe, and the recipe of its baseline.

    Args:
        method: 'ptq' or 'qat'.
        made_by: recipe.yaml of the baseline; empty if another program trained it.
    """
    # The seed is the baseline's: comparisons over seeds pair an artifact with its baseline by it. The recipe holds the
    # other seed, which draws the calibration rows.
    # The baseline's own recipe goes into the new one, so that no reader needs the baseline's folder.
    variant, origin = name_variant(method, arguments.bits), made_by.get("provenance", {})
    made = describe_made(variant, recipe, made_by.get("seed"), origin, made_by.get("training"))
    # Of a Hub id the name stays; that of a folder tells nothing on another machine.
    if Path(made["recipe"].get("model_name_or_path", ".")).exists():
        made["recipe"].pop("model_name_or_path", None)
    made["recipe"]["baseline"] = made_by.get("recipe", {})
    return made | {"kept_in_float": explain_float(plan.model, plan.layers, arguments.modules_to_not_convert)}


def draw_calibration_rows(task: Task, encoder: TextEncoder, count: int, seed: int) -> CalibrationRows:
    """A seeded sample of train, drawn class by class, as token ids.

    Raises:
        UserError: if train has fewer rows than that.
    """
    rows = stratified_sample(get_split(task, "train"), count, seed)
    return CalibrationRows(encoder, encoder(list(rows["text"])))


def save_formats(plan: Plan, folder: Path, rows: CalibrationRows, arguments: SchemeArguments) -> dict[str, float]:
    """Writes the model of the plan into ``folder``, in each format asked for, with the files that all formats share.

    Returns:
        Format -> the seconds that it took.
    """
    seconds = {}
    copy_shared_files(plan.folder, folder)
    # Each format starts from the float weights of the plan; none reads what another has written.
    for format in formats_to_make(arguments):
        start = time.monotonic()
        save_format(plan, folder, format, rows, arguments)
        seconds[format] = round(time.monotonic() - start, 1)
        Bar.write(f"{format}: {seconds[format]:.1f} s")  # the study has a bar around this
    return seconds


def copy_shared_files(source: Path, folder: Path) -> None:
    """Copies the files that all formats need; torchao then writes a config.json of its own in place of the copy."""
    for name in SHARED_FILES:
        shutil.copy(source / name, folder / name)


def save_format(plan: Plan, folder: Path, format: str, rows: CalibrationRows, arguments: SchemeArguments) -> None:
    """Writes the model of the plan into ``folder`` in one format, in the place of an earlier one of that format."""
    if format == "torchao":
        quantize_torchao(plan, folder)
    elif format == "onnx":
        # The name that transformers.js looks for.
        _save_onnx(plan, folder / "onnx" / "model_quantized.onnx", rows, arguments)
    else:
        quantize_openvino(plan, folder / "openvino", rows, arguments.reduce_range, arguments.smooth_quant)


def _save_onnx(plan: Plan, path: Path, rows: CalibrationRows, arguments: SchemeArguments) -> None:
    """Writes the ONNX file: packed below 8 bits, else in INT8 with dynamic or static activation ranges."""
    if plan.scales:
        write_lowbit_onnx(plan, path)
    elif arguments.onnx_calibration == "none":
        quantize_onnx(plan, path, arguments.reduce_range)
    else:
        quantize_onnx_static(plan, path, rows, arguments.onnx_calibration, arguments.reduce_range)
