"""Quantizes the fine-tuned baseline to INT8 without training (PTQ), once for each runtime that people use.

The artifact, `weights/ptq`, holds the same layers in INT8 for Transformers (`model.safetensors`, torchao), for ONNX
Runtime and transformers.js (`onnx/model_quantized.onnx`), and for OpenVINO (`openvino/`). Which layers, and how, was
chosen on validation by run_ptq_study.py; the test split is never looked at here, run_evaluation.py scores it.

    python scripts/run_ptq.py                                    # the recipe configs/ptq.yaml
    python scripts/run_ptq.py --baseline weights/mine --output_dir weights/mine-ptq --formats onnx
"""

import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from utils_cli import ROOT, Recipe, UserError, parse_recipe, run

# isort: split
from tqdm import tqdm
from transformers import AutoTokenizer
from utils_artifact import (
    PLACES,
    RECIPE_FILE,
    SHARED_FILES,
    find_formats,
    new_artifact,
    quantized_by,
    read_recipe_of,
    weights_of,
)
from utils_classifier import TextEncoder, load_trained_classifier
from utils_files import check_replaceable
from utils_hub import HubArguments, score_and_publish
from utils_int8 import (
    Layers,
    find_layers,
    names_in_float,
    quantize_onnx,
    quantize_onnx_static,
    quantize_openvino,
    quantize_torchao,
)
from utils_lowbit import Scales, check_group_size, choose_scales, write_lowbit_onnx
from utils_onnx import export_onnx
from utils_record import git_commit
from utils_ruler import package_versions
from utils_scheme import LEVELS
from utils_task import get_split, load_task_of, stratified_sample

RECIPE = ROOT / "configs" / "ptq.yaml"
FORMATS = ("torchao", "onnx", "openvino")


@dataclass
class SchemeArguments:
    """How a model is quantized, trained for it or not."""

    bits: int = field(default=8, metadata={"help": "Bits of a weight: 8, 4, 3 or 2; activations have 8."})
    embedding_bits: int | None = field(
        default=None, metadata={"help": "Bits of the embeddings' weights if they are others: 4, 3 or 2."}
    )
    group_size: int = field(
        default=32, metadata={"help": "Below 8 bits: so many weights of a row share a multiplier."}
    )
    formats: list[str] | None = field(
        default=None,
        metadata={"help": f"Which of {', '.join(FORMATS)} to make; all that can hold so few bits if none."},
    )
    keep_float: list[str] = field(
        default_factory=list, metadata={"help": "Layers that stay in float: what their names begin with."}
    )
    onnx_calibration: str = field(
        default="none",
        metadata={"help": "ONNX activations: 'none' (dynamic), or static ranges by 'minmax' or 'entropy'."},
    )
    reduce_range: bool = field(
        default=True,
        metadata={"help": "Weights of 7 bits, which no processor adds up wrongly; see utils_int8.py."},
    )
    smooth_quant: bool = field(
        default=False,
        metadata={"help": "OpenVINO: move outliers of the activations into the weights (Xiao et al., ICML 2023)."},
    )
    calibration_rows: int = field(
        default=300, metadata={"help": "Rows of train, drawn class by class, that fix what is static."}
    )


@dataclass
class PtqArguments(SchemeArguments):
    """What is quantized, and where the result goes."""

    baseline: str = field(default="weights/baseline", metadata={"help": "The fine-tuned folder to quantize."})
    output_dir: str = field(default="weights/ptq", metadata={"help": "Where the artifact is saved."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Where those rows come from; the dataset that the baseline learnt by default."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of that draw."})


def main(argv=None) -> None:
    # 1. Parse
    arguments, hub, recipe = parse_recipe((PtqArguments, HubArguments), RECIPE, argv)
    check(arguments, arguments.output_dir)
    baseline = Path(arguments.baseline)
    made_by = read_recipe_of(baseline)

    # 2. Load the task: all that is needed of it are the calibration rows
    task = load_task_of(made_by, arguments.dataset_name)
    rows = stratified_sample(get_split(task, "train"), arguments.calibration_rows, arguments.seed)
    print(f"{baseline}   calibration: {len(rows)} rows of {task.name} ({task.source}), train")

    # 3. Build the variant
    model = load_trained_classifier(baseline)
    layers = find_layers(model, arguments.keep_float)
    scales = choose_all_scales(model, layers, arguments)
    print(f"INT{arguments.bits}: {len(layers.linear)} linear layers, {len(layers.embeddings)} embeddings")

    # 4. Calibrate: the rows, as word pieces, show what ranges the static forms need
    encoder = TextEncoder(baseline)
    token_ids = encoder(list(rows["text"]))

    # 5. Save
    made = describe_ptq(arguments, recipe, made_by, model, layers)
    with new_artifact(Path(arguments.output_dir), made) as folder:
        made["seconds"] = save_formats(baseline, folder, model, layers, scales, encoder, token_ids, arguments)
    print(f"saved {arguments.output_dir}")
    score_and_publish(Path(arguments.output_dir), hub)


def choose_all_scales(model, layers: Layers, arguments: SchemeArguments) -> dict[str, Scales]:
    """Below 8 bits, the scales of each layer that is quantized; none at 8, where each runtime chooses its own."""
    if arguments.bits == 8:
        return {}
    bits = dict.fromkeys(layers.linear, arguments.bits)
    bits |= dict.fromkeys(layers.embeddings, arguments.embedding_bits or arguments.bits)
    for name in bits:
        check_group_size(name, model.get_submodule(name).weight.shape[1], arguments.group_size)
    return {
        name: choose_scales(model.get_submodule(name).weight, bits[name], arguments.group_size) for name in tqdm(bits)
    }


def save_formats(
    baseline: Path,
    folder: Path,
    model,
    layers: Layers,
    scales: dict[str, Scales],
    encoder: TextEncoder,
    token_ids: list[list[int]],
    arguments: SchemeArguments,
) -> dict[str, float]:
    """Writes the float model of the folder ``baseline`` in each format; returns the seconds that each took."""
    seconds = {}
    for format in arguments.formats or formats_of(arguments.bits):
        start = time.monotonic()
        if format == "torchao":
            quantize_torchao(baseline, folder, layers, arguments.reduce_range)
        elif format == "onnx":
            save_onnx(baseline, folder / "onnx", model, layers, scales, encoder, token_ids, arguments)
        else:
            switches = {"reduce_range": arguments.reduce_range, "smooth_quant": arguments.smooth_quant}
            quantize_openvino(baseline, folder / "openvino", model, layers, encoder, token_ids, **switches)
        seconds[format] = round(time.monotonic() - start, 1)
        print(f"{format}: {seconds[format]} s")
    for name in SHARED_FILES:
        if not (folder / name).exists():  # torchao has written a config.json of its own
            shutil.copy(baseline / name, folder / name)
    return seconds


def save_onnx(baseline: Path, folder: Path, model, layers, scales, encoder, token_ids, arguments) -> None:
    """`model_quantized.onnx`, the name that transformers.js looks for; dynamic or static, INT8 or packed."""
    path = folder / "model_quantized.onnx"
    if scales:
        write_lowbit_onnx(model, weights_of(baseline, "onnx"), path, layers, scales)
        return
    if arguments.onnx_calibration == "none":
        quantize_onnx(model, weights_of(baseline, "onnx"), path, layers, arguments.reduce_range)
        return
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = Path(temporary) / "model.onnx"
        export_onnx(model, AutoTokenizer.from_pretrained(baseline), unpacked, pack=False)
        method = arguments.onnx_calibration
        quantize_onnx_static(model, unpacked, path, layers, encoder, token_ids, method, arguments.reduce_range)


def describe_ptq(arguments: PtqArguments, recipe: Recipe, made_by: dict, model, layers) -> dict:
    """What made the artifact, for its recipe.yaml and every record of it."""
    return {
        "variant": name_variant("ptq", arguments.bits),
        "recipe": {key: value for key, value in recipe.values.items() if key not in PLACES}
        | {"baseline": made_by.get("recipe", {})},
        "recipe_sha256": recipe.sha256,
        "seed": made_by.get("seed"),  # of the baseline; the draw of the calibration rows has its own, in the recipe
        "made": {**made_by.get("made", {}), "git_commit": git_commit()},
        "training": made_by.get("training"),
        "kept_in_float": explain_float(model, layers, arguments),
        "seconds": {},
        "versions": package_versions(),
    }


def explain_float(model, layers: Layers, arguments: SchemeArguments) -> dict[str, str]:
    """Each layer that stays in float, and why."""
    kept = tuple(arguments.keep_float)
    return {
        name: "named in keep_float" if name.startswith(kept) and kept else "outside the encoder's layers"
        for name in names_in_float(model, layers)
    }


def name_variant(method: str, bits: int) -> str:
    return method if bits == 8 else f"{method}-int{bits}"


def formats_of(bits: int) -> tuple[str, ...]:
    """The formats that can hold weights of so many bits, truly packed."""
    return FORMATS if bits == 8 else ("onnx",)


def check(arguments: SchemeArguments, output_dir: str) -> None:
    """Raises `UserError` for what can be known before anything is loaded."""
    baseline, formats = Path(arguments.baseline), arguments.formats
    if arguments.bits not in {8, *LEVELS}:
        raise UserError(f"--bits {arguments.bits}: it takes 8, 4, 3 or 2")
    if arguments.embedding_bits not in {None, *LEVELS} or (arguments.embedding_bits and arguments.bits == 8):
        raise UserError(f"--embedding_bits {arguments.embedding_bits}: it takes 4, 3 or 2, where --bits is below 8")
    if formats is not None and (not formats or not set(formats) <= set(FORMATS)):
        raise UserError(f"--formats {' '.join(formats)}: it takes some of {', '.join(FORMATS)}")
    for format in formats or ():
        if format not in formats_of(arguments.bits):
            raise UserError(f"--formats {format}: it cannot hold {arguments.bits} bits; take onnx")
    if arguments.onnx_calibration not in {"none", "minmax", "entropy"}:
        raise UserError(f"--onnx_calibration {arguments.onnx_calibration}: it takes none, minmax or entropy")
    if arguments.bits < 8 and arguments.onnx_calibration != "none":
        raise UserError(f"--onnx_calibration {arguments.onnx_calibration}: with {arguments.bits} bits it takes none")
    find_formats(baseline)
    if quantizer := quantized_by(baseline):
        raise UserError(f"{baseline} is quantized already (by {quantizer}); name the folder it was made from")
    weights_of(baseline, "pytorch")
    check_replaceable(Path(output_dir), marker=RECIPE_FILE)


if __name__ == "__main__":
    run(main)
