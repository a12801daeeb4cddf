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
from transformers import AutoTokenizer
from utils_artifact import (
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
from utils_int8 import (
    find_layers,
    names_in_float,
    quantize_onnx,
    quantize_onnx_static,
    quantize_openvino,
    quantize_torchao,
)
from utils_onnx import export_onnx
from utils_record import git_commit
from utils_ruler import package_versions
from utils_task import get_split, load_task_of, stratified_sample

RECIPE = ROOT / "configs" / "ptq.yaml"
FORMATS = ("torchao", "onnx", "openvino")


@dataclass
class PtqArguments:
    """What is quantized, and how."""

    baseline: str = field(default="weights/baseline", metadata={"help": "The fine-tuned folder to quantize."})
    output_dir: str = field(default="weights/ptq", metadata={"help": "Where the artifact is saved."})
    formats: list[str] = field(
        default_factory=lambda: list(FORMATS), metadata={"help": f"Which of {', '.join(FORMATS)} to make."}
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
    dataset_name: str | None = field(
        default=None, metadata={"help": "Where those rows come from; the dataset that the baseline learnt by default."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of that draw."})


def main(argv=None) -> None:
    # 1. Parse
    arguments, recipe = parse_recipe((PtqArguments,), RECIPE, argv)
    check(arguments)
    baseline = Path(arguments.baseline)
    made_by = read_recipe_of(baseline)

    # 2. Load the task: all that is needed of it are the calibration rows
    task = load_task_of(made_by, arguments.dataset_name)
    rows = stratified_sample(get_split(task, "train"), arguments.calibration_rows, arguments.seed)
    print(f"{baseline}   calibration: {len(rows)} rows of {task.name} ({task.source}), train")

    # 3. Build the variant
    model = load_trained_classifier(baseline)
    layers = find_layers(model, arguments.keep_float)
    print(f"INT8: {len(layers.linear)} linear layers, {len(layers.embeddings)} embeddings")

    # 4. Calibrate: the rows, as word pieces, show what ranges the static forms need
    encoder = TextEncoder(baseline)
    token_ids = encoder(list(rows["text"]))

    # 5. Save
    made = describe_ptq(arguments, recipe, made_by, model, layers)
    with new_artifact(Path(arguments.output_dir), made) as folder:
        for format in arguments.formats:
            start = time.monotonic()
            if format == "torchao":
                quantize_torchao(baseline, folder, layers, arguments.reduce_range)
            elif format == "onnx":
                save_onnx(baseline, folder / "onnx", model, layers, encoder, token_ids, arguments)
            else:
                switches = {"reduce_range": arguments.reduce_range, "smooth_quant": arguments.smooth_quant}
                quantize_openvino(baseline, folder / "openvino", model, layers, encoder, token_ids, **switches)
            made["seconds"][format] = round(time.monotonic() - start, 1)
            print(f"{format}: {made['seconds'][format]} s")
        for name in SHARED_FILES:
            if not (folder / name).exists():  # torchao has written a config.json of its own
                shutil.copy(baseline / name, folder / name)
    print(f"saved {arguments.output_dir}")


def save_onnx(baseline: Path, folder: Path, model, layers, encoder, token_ids, arguments: PtqArguments) -> None:
    """`model_quantized.onnx`, the name that transformers.js looks for; dynamic or static."""
    path = folder / "model_quantized.onnx"
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
    kept = tuple(arguments.keep_float)
    return {
        "variant": "ptq",
        "recipe": {key: value for key, value in recipe.values.items() if key != "output_dir"}
        | {"baseline": made_by.get("recipe", {})},
        "recipe_sha256": recipe.sha256,
        "seed": made_by.get("seed"),  # of the baseline; the draw of the calibration rows has its own, in the recipe
        "made": {**made_by.get("made", {}), "git_commit": git_commit()},
        "training": made_by.get("training"),
        "kept_in_float": {
            name: "named in keep_float" if name.startswith(kept) and kept else "outside the encoder's layers"
            for name in names_in_float(model, layers)
        },
        "seconds": {},
        "versions": package_versions(),
    }


def check(arguments: PtqArguments) -> None:
    """Raises `UserError` for what can be known before anything is loaded."""
    baseline = Path(arguments.baseline)
    if not arguments.formats or not set(arguments.formats) <= set(FORMATS):
        raise UserError(f"--formats {' '.join(arguments.formats)}: it takes some of {', '.join(FORMATS)}")
    if arguments.onnx_calibration not in {"none", "minmax", "entropy"}:
        raise UserError(f"--onnx_calibration {arguments.onnx_calibration}: it takes none, minmax or entropy")
    find_formats(baseline)
    if quantizer := quantized_by(baseline):
        raise UserError(f"{baseline} is quantized already (by {quantizer}); name the folder it was made from")
    weights_of(baseline, "pytorch")
    check_replaceable(Path(arguments.output_dir), marker=RECIPE_FILE)


if __name__ == "__main__":
    run(main)
