"""The quantization scheme of PTQ and QAT: its flags and their checks, the plan of a model, and its samples."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from emotion.data.dataset import Task, get_split, load_task_of, split_texts, stratified_sample, with_validation
from emotion.data.labels import label_array
from emotion.data.tokenization import LARGEST_LIMIT, TextEncoder, load_tokenizer
from emotion.export.onnx_export import TOLERANCE, ExportError, check_size, export_onnx, largest_gap, sample_inputs
from emotion.inference.emotion_classifier import find_model
from emotion.inference.model_folder import (
    BITS,
    FLOAT_FILES,
    artifact_metadata,
    check_problem,
    head_labels,
    is_multi_label,
    load_trained_classifier,
    open_trained,
    quantized_by,
    read_config,
    weights_of,
)
from emotion.quantization.activation_ranges import RULES, measure_ranges
from emotion.quantization.int8 import cls_only_layers
from emotion.quantization.layers import CalibrationRows, Plan, find_layers, float_reasons
from emotion.quantization.lowbit import check_group_size, choose_scales
from emotion.quantization.outlier_channels import find_outliers, find_pairs, weight_without_outliers
from emotion.utils.arguments import COUNT, Range, Recipe, flag
from emotion.utils.base_model import RECIPE_FILE, BaseModel, read_recipe_of
from emotion.utils.command import Bar
from emotion.utils.errors import UserError, one_line
from emotion.utils.files import scratch_folder
from emotion.utils.hub_requests import download_model
from emotion.utils.machine import choose_threads

FORMATS = ("torchao", "onnx", "openvino")
DYNAMIC = "dynamic"  # activation ranges that ONNX Runtime measures anew for every batch
CONTROL = "-float"  # ends the name of a float fine-tuning control


@dataclass
class SchemeArguments:
    """The flags of run_ptq.py and run_qat.py on how a model is quantized."""

    model_revision: str | None = flag(None, "Branch, tag or commit of the model on the Hub.")
    # The weights
    bits: int = flag(8, "Bits of a weight: 8, 4 or 2. Activations always have 8.", BITS)
    group_size: int = flag(32, "Below 8 bits: weights of a row that share a scale.", Range(8))
    formats: list[str] | None = flag(
        None, f"Which of {', '.join(FORMATS)} to make; by default all that can hold the bits.", FORMATS
    )
    modules_to_not_convert: list[str] = flag([], "Layers that stay in float, by the beginnings of their names.")
    activation_quantization: str = flag(
        "minmax",
        "ONNX activation ranges: fixed by a rule, or dynamic, with which answers depend on the batch.",
        (*RULES, DYNAMIC),
    )
    split_outliers: bool = flag(
        False, "ONNX: keep outlier channels of feed-forward layers in float; PTQ does so if needed."
    )
    reduce_range: bool = flag(True, "ONNX, OpenVINO: 7 of the 8 bits of a weight, so that no processor overflows.")
    smooth_quant: bool = flag(True, "OpenVINO: move outliers of activations into weights (SmoothQuant, ICML 2023).")
    num_calibration_samples: int = flag(
        300, "Samples of train, drawn class by class, that calibrate static activation ranges.", COUNT
    )


def check_scheme(arguments: SchemeArguments, training: bool = False) -> tuple[BaseModel, dict]:
    """Checks the flags and the model to quantize, or with ``training`` to train, before anything is loaded.

    Returns:
        The model, whose `path` is its (downloaded) folder and whose `name` is that of its own base model; and the
        content of its recipe.yaml, empty if another program made it.

    Raises:
        UserError: for a flag that does not fit, or a model that cannot be quantized.
    """
    name, formats = arguments.model_name_or_path, arguments.formats
    if formats == []:  # a recipe can hold an empty list
        raise UserError(f"--formats: it takes some of {', '.join(FORMATS)}")
    for format in formats or ():
        if format not in formats_of(arguments.bits):
            raise UserError(f"--formats {format}: it cannot hold {arguments.bits} bits; take onnx")
    folder = find_float_model(name, arguments.model_revision)
    if (folder / "config.json").is_file() and (quantizer := quantized_by(folder)):
        raise UserError(f"{folder} is quantized already (by {quantizer}); name the float model it was made from")
    if (folder / FLOAT_FILES[0]).is_file() or not any((folder / file).is_file() for file in FLOAT_FILES):
        weights_of(folder, "pytorch")  # raises if this is no model folder, or its weights are damaged or missing
    config = read_config(folder)
    labels = [*(config.get("id2label") or {"0": "", "1": ""}).values()]
    check_problem(folder, labels, config.get("problem_type"), training)
    try:
        with one_line(f"{folder} cannot be opened"):
            check_size(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except ExportError as error:
        _leave_out(arguments, error)
    metadata = read_recipe_of(folder)
    provenance = metadata.get("provenance", {})
    name, source = (folder.name, "folder") if folder == Path(name) else (name, "hub")
    source = provenance.get("base_model_source", source)
    return BaseModel(provenance.get("base_model", name), str(folder), source), metadata


def load_task(base: BaseModel, metadata: dict, arguments, texts_alone: bool = False) -> Task:
    """Loads the dataset that ``arguments`` or recipe.yaml name, with its labels in the order of the model's head.

    With ``texts_alone`` they may be missing. Raises `UserError` if nothing names a dataset, or its labels are others.
    """
    labels, several = head_labels(base.path, fine_tuned=True), is_multi_label(base.path)
    return load_task_of(metadata, arguments, labels, texts_alone, several)


def find_float_model(name: str, revision: str | None = None) -> Path:
    """The folder of that name, or the downloaded files of a repository; raises `UserError` if there is neither."""
    try:
        # The recipe names its base model and its dataset.
        return find_model(name, "pytorch", revision=revision, optional=(RECIPE_FILE,))
    except UserError:
        if Path(name).exists():
            raise
        with contextlib.suppress(UserError):  # a repository of another program, in any form that Transformers opens
            return download_model(name, revision)
        raise


def name_variant(method: str, bits: int, ranges: str = "") -> str:
    """Returns the name of a variant in records and folders: 'ptq' for INT8, 'ptq-int4', 'ptq-dynamic'."""
    name = method if bits == 8 else f"{method}-int{bits}"
    return f"{name}-{DYNAMIC}" if ranges == DYNAMIC else name


def formats_of(bits: int) -> tuple[str, ...]:
    """Returns the formats that can hold weights of so many bits; only ONNX (lowbit.py) packs fewer than 8."""
    return FORMATS if bits == 8 else ("onnx",)


def formats_to_make(arguments: SchemeArguments) -> list[str] | tuple[str, ...]:
    """Returns the formats asked for; by default all that can hold the bits."""
    return arguments.formats or formats_of(arguments.bits)


def runtime_to_train_for(arguments: SchemeArguments) -> str:
    """Returns ONNX Runtime, which rounds coarsest, if a file is made for it; torchao otherwise."""
    return "onnx" if "onnx" in formats_to_make(arguments) else "torchao"


@dataclass(frozen=True)
class Samples:
    """Samples to score a model on.

    Attributes:
        labels: int (rows,), or with a threshold (rows, classes); None for texts alone.
        threads: to compute with.
        threshold: the score from which a label counts, of a model that gives a text several; None for others.
    """

    texts: list[str]
    labels: np.ndarray | None
    threads: int
    threshold: float | None = None

    def first(self, count: int | None) -> "Samples":
        """Returns the first ``count`` samples; all for None."""
        return replace(self, texts=self.texts[:count], labels=None if self.labels is None else self.labels[:count])


def load_samples(
    task: Task, folder: Path, count: int, seed: int, threads: int | None = None, threshold: float = 0.5
) -> tuple[CalibrationRows, Samples]:
    """Draws the calibration samples from train, stratified by class, and takes all of validation.

    Of texts without labels it draws at most half to calibrate, and takes the others.

    Args:
        folder: of the model, whose tokenizer is used.
        threads: to score with; all that may be used by default.
        threshold: of the `Samples`, where the model gives a text several labels.

    Raises:
        UserError: if train has fewer rows.
    """
    encoder, labels, several = TextEncoder(folder), None, is_multi_label(folder)
    if task.labels:
        task = with_validation(task)
        rows, validation = stratified_sample(get_split(task, "train"), count, seed), get_split(task, "validation")
        labels = label_array(validation, len(task.labels), several)
    else:
        rows, validation = split_texts(task, count, seed)
    threads = threads or choose_threads(None)
    samples = Samples(list(validation["text"]), labels, threads, threshold if several else None)
    return CalibrationRows(encoder, encoder(list(rows["text"]))), samples


@contextlib.contextmanager
def with_onnx_export(folder: str | Path, arguments: SchemeArguments, texts):
    """Yields a fine-tuned folder that has an FP32 file for ONNX Runtime, if a format needs it, or a temporary copy.

    The folder itself serves if all of it can be opened as it is, and its file gives the logits of its weights, on some
    of the ``texts``, too. If an export fails, the formats that need it are left out of ``arguments``, and a line says
    why.

    Raises:
        UserError: if Transformers cannot open the folder.
        ExportError: if no format is left.
    """
    folder, is_complete = Path(folder), _is_complete(Path(folder))
    needs_export = any(format != "torchao" for format in formats_to_make(arguments))
    tokenizer = load_tokenizer(str(folder), LARGEST_LIMIT)
    model = (load_trained_classifier if is_complete else open_trained)(folder, dtype=torch.float32).eval()
    find_layers(model)  # raises if there is nothing to quantize
    if is_complete and (not needs_export or _has_its_logits(folder, model, tokenizer, texts)):
        yield folder
        return
    with scratch_folder() as temporary:
        copy = Path(temporary) / folder.name
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(copy)
        tokenizer.save_pretrained(copy)
        if needs_export:
            print(f"{folder} has no FP32 file for ONNX Runtime that answers as its weights; one is made for this run")
            export_or_leave_out(model, tokenizer, copy, arguments, texts)
        yield copy


def _is_complete(folder: Path) -> bool:
    """Whether a folder has all that a text encoder and a classifier read; Transformers opens more forms of both."""
    try:
        encoder = TextEncoder(folder)
        limit = load_tokenizer(str(folder), LARGEST_LIMIT).model_max_length
        return (folder / FLOAT_FILES[0]).is_file() and encoder.max_length <= limit
    except UserError:
        return False


def _has_its_logits(folder: Path, model, tokenizer, texts=()) -> bool:
    """Whether the folder's FP32 file for ONNX Runtime answers as the model; no other file can serve as reference."""
    try:
        weights = weights_of(folder, "onnx")
        file = folder / "onnx" / "model.onnx"
        return weights == file and largest_gap(model, sample_inputs(model, tokenizer, texts), file) <= TOLERANCE
    except Exception:  # none, of other inputs, or of operators that this release does not know
        return False


def export_or_leave_out(model, tokenizer, folder: Path, arguments: SchemeArguments, texts) -> None:
    """Exports the model; if that fails, leaves the formats that need it out of ``arguments``, with a line on why."""
    try:
        export_onnx(model, tokenizer, folder / "onnx" / "model.onnx", texts=texts)
    except ExportError as error:
        (folder / "onnx" / "model.onnx").unlink(missing_ok=True)
        _leave_out(arguments, error)


def _leave_out(arguments: SchemeArguments, error: ExportError) -> None:
    """Leaves the formats that need an export out of ``arguments``, with a line; raises the error if none is left."""
    asked = formats_to_make(arguments)
    arguments.formats = [format for format in asked if format == "torchao"]
    if not arguments.formats or not getattr(arguments, "fake_quantize", True):  # a control is an ONNX file
        raise error
    print(f"left out: {', '.join(format for format in asked if format != 'torchao')}; {error}")


def save_float_onnx(model, folder: Path, tokenizer, formats=FORMATS) -> None:
    """Saves a model in FP32 for ONNX Runtime, if ``formats`` need that, with its tokenizer and configuration."""
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)
    if any(format != "torchao" for format in formats):
        export_onnx(model, tokenizer, folder / "onnx" / "model.onnx")


def make_plan(folder: Path, model, arguments: SchemeArguments, rows: CalibrationRows | None = None) -> Plan:
    """Chooses the layers of a fine-tuned model to quantize, and below 8 bits their scales.

    Args:
        folder: of the model, with its FP32 file for ONNX Runtime.
        model: the same model in PyTorch.
        rows: calibration samples, for the ranges of activations and to find outlier channels.

    Raises:
        UserError: if `modules_to_not_convert` fits no layer, or the group size does not divide the width of a layer.
    """
    plan = Plan(Path(folder), model, find_layers(model, arguments.modules_to_not_convert))
    if not plan.layers.linear:
        raise UserError(f"--modules_to_not_convert names all linear layers of {type(model).__name__}")
    if "onnx" in formats_to_make(arguments):
        plan = replace(plan, cls_only=cls_only_layers(plan))
        if arguments.split_outliers:
            plan = replace(plan, outliers=find_outliers(plan, rows))
        if arguments.activation_quantization != DYNAMIC:
            plan = replace(plan, ranges=measure_ranges(plan, rows, arguments.activation_quantization))
    return update_plan(plan, arguments)


def update_plan(plan: Plan, arguments: SchemeArguments) -> Plan:
    """Chooses layers and scales for a plan whose outlier channels have changed, or for other arguments."""
    layers = find_layers(plan.model, arguments.modules_to_not_convert)
    pairs = find_pairs(plan.model, layers.linear)  # a pair with a layer in float is not split
    outliers = {name: channels for name, channels in plan.outliers.items() if name in pairs}
    plan = replace(plan, layers=layers, scales={}, compensated={}, outliers=outliers)
    if arguments.bits == 8:  # the libraries choose the scales
        return plan
    names, scales = [*layers.linear, *layers.embeddings], {}
    for name in names:  # before the slow loop below
        check_group_size(name, plan.model.get_submodule(name).weight.shape[1], arguments.group_size)
    for name in Bar(names, desc="scales"):
        scales[name] = choose_scales(weight_without_outliers(plan, name), arguments.bits, arguments.group_size)
    return replace(plan, scales=scales)


def quantized_metadata(method: str, recipe: Recipe, baseline: dict, plan: Plan, arguments: SchemeArguments) -> dict:
    """Returns the content of recipe.yaml of a quantized model, which includes the recipe of its baseline.

    Args:
        method: 'ptq' or 'qat'.
        baseline: recipe.yaml of the model that is quantized; empty if another program trained it.
    """
    # The baseline's seed: comparisons over seeds pair a model with its baseline by it.
    variant, seed = name_variant(method, arguments.bits, arguments.activation_quantization), baseline.get("seed")
    metadata = artifact_metadata(variant, recipe, seed, baseline.get("provenance", {}), baseline.get("training"))
    # A Hub id stays; a local path means nothing on another machine.
    if Path(metadata["recipe"].get("model_name_or_path", ".")).exists():
        metadata["recipe"].pop("model_name_or_path", None)
    metadata["recipe"]["baseline"] = baseline.get("recipe", {})
    kept_in_float = float_reasons(plan.model, plan.layers, arguments.modules_to_not_convert)
    return metadata | {"kept_in_float": kept_in_float}
