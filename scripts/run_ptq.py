"""Quantizes the fine-tuned baseline to INT8 without training (PTQ), once for each runtime.

The artifact, `weights/ptq`, holds the same layers in 8 bits for Transformers (`model.safetensors`, torchao), for ONNX
Runtime and transformers.js (`onnx/model_quantized.onnx`), and for OpenVINO (`openvino/`). ptq_study.py has chosen the
layers and methods on validation. This script never reads the test split; run_evaluation.py scores it.

    python scripts/run_ptq.py --model_name_or_path weights/baseline
    python scripts/run_ptq.py configs/minilm/ptq-int4.yaml --model_name_or_path weights/baseline --formats onnx
"""

from dataclasses import dataclass, field
from pathlib import Path

from emotion.data.dataset import load_task_of
from emotion.data.tokenization import TextEncoder
from emotion.hub.upload import HubArguments, score_and_publish
from emotion.inference.model_folder import new_artifact, own_place
from emotion.inference.pretrained import load_trained_classifier
from emotion.quantization.accuracy_aware import WatchedArguments, save_watched
from emotion.quantization.conversion import with_float_files
from emotion.quantization.scheme import (
    check_scheme,
    describe_quantized,
    draw_calibration_rows,
    make_plan,
)
from emotion.quantization.sensitivity import validation_rows
from emotion.utils.arguments import SEED, parse_args_and_config
from emotion.utils.command import run
from emotion.utils.machine import choose_threads
from emotion.utils.recipe import Recipe, read_recipe_of


@dataclass
class PtqArguments(WatchedArguments):
    """The flags of PTQ, beside those of the scheme and of its loss."""

    model_name_or_path: str = field(
        kw_only=True, metadata={"help": "Fine-tuned model to quantize: a local folder or a Hub id."}
    )
    output_dir: str = field(default="weights/ptq", metadata={"help": "Folder in which the artifact is saved."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset of the calibration rows; by default that of the baseline."}
    )
    seed: int = field(default=42, metadata={"help": "Seed by which the calibration rows are drawn.", "choices": SEED})


ARGUMENTS = (PtqArguments, HubArguments)


def main(argv=None) -> None:
    # 1. Parse
    arguments, hub, recipe = parse_args_and_config(ARGUMENTS, argv)
    baseline = check_scheme(arguments)
    with own_place(Path(arguments.output_dir), arguments, recipe):
        quantize(baseline, arguments, hub, recipe)


def quantize(baseline: Path, arguments: PtqArguments, hub: HubArguments, recipe: Recipe) -> None:
    """The other moves, while no other process may write to the same place."""
    artifact = Path(arguments.output_dir)

    # 2. Load the task: rows of train that calibrate, and those of validation that show what is lost
    made_by = read_recipe_of(baseline)
    task = load_task_of(made_by, arguments.dataset_name)
    print(f"{baseline}   calibration: {arguments.num_calibration_samples} rows of {task.name} ({task.source}), train")

    rows = draw_calibration_rows(task, TextEncoder(baseline), arguments.num_calibration_samples, arguments.seed)
    scored = validation_rows(task, threads=choose_threads(None))

    with with_float_files(baseline) as floats:
        # 3. Build the variant: choose its layers, and below 8 bits the scales that round them
        plan = make_plan(floats, load_trained_classifier(floats), arguments, rows)
        print(
            f"INT{arguments.bits}: {len(plan.layers.linear)} linear layers, {len(plan.layers.embeddings)} embeddings"
        )

        # 4. Calibrate and 5. save each format, with the cheapest remedy that keeps its score
        made = describe_quantized("ptq", recipe, made_by, plan, arguments)
        with new_artifact(artifact, made) as folder:
            made |= save_watched(plan, folder, rows, scored, arguments)  # which quantizes; recipe.yaml is written last
    print(f"saved {artifact}")
    score_and_publish(artifact, hub)


if __name__ == "__main__":
    run(main)
