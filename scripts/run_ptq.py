"""Quantizes the fine-tuned baseline to INT8 without training (PTQ), once for each runtime that people use.

The artifact, `weights/ptq`, holds the same layers in INT8 for Transformers (`model.safetensors`, torchao), for ONNX
Runtime and transformers.js (`onnx/model_quantized.onnx`), and for OpenVINO (`openvino/`). Which layers, and how, was
chosen on validation by study_ptq.py; the test split is never looked at here, run_evaluation.py scores it.

    python scripts/run_ptq.py                                    # the recipe configs/ptq.yaml
    python scripts/run_ptq.py --baseline weights/mine --output_dir weights/mine-ptq --formats onnx
"""

from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.command import run
from emotion.common.files import ROOT
from emotion.common.flags import parse_recipe
from emotion.common.machine import git_commit, package_versions
from emotion.common.recipe import PLACES, Recipe, read_recipe_of
from emotion.model.artifact import new_artifact
from emotion.model.hub import HubArguments, score_and_publish
from emotion.model.pretrained import load_trained_classifier
from emotion.quantize.layers import explain_float, find_layers
from emotion.quantize.scheme import SchemeArguments, check, choose_all_scales, name_variant, save_formats
from emotion.task.dataset import get_split, load_task_of, stratified_sample
from emotion.task.tokens import TextEncoder

RECIPE = ROOT / "configs" / "ptq.yaml"


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


if __name__ == "__main__":
    run(main)
