"""Quantizes a fine-tuned classifier to INT8 without training (PTQ), once for each runtime.

The model folder holds the same layers in 8 bits for Transformers (`model.safetensors`, torchao), for ONNX Runtime and
transformers.js (`onnx/model_quantized.onnx`), and for OpenVINO (`openvino/`, NNCF): made by `quantize_torchao`,
`quantize_onnx` and `quantize_openvino` in emotion/quantization/int8.py. The test split is not read. Where
there are texts alone, the labels of the quantized model are compared with those in FP32.

    python scripts/run_ptq.py --model_name_or_path weights/baseline
    python scripts/run_ptq.py configs/minilm/ptq-int4.yaml --model_name_or_path weights/baseline --formats onnx
    python scripts/run_ptq.py --model_name_or_path user/classifier --dataset_name texts.txt
"""

import emotion  # noqa: F401 (first: it sets what the libraries below read while they load)

# isort: split

from dataclasses import dataclass

from emotion.data.dataset import DatasetArguments
from emotion.hub.upload import HubArguments, push_to_hub
from emotion.inference.model_folder import load_trained_classifier, lock_output_dir, new_artifact
from emotion.quantization import scheme
from emotion.quantization.accuracy_aware import AccuracyAwareArguments, quantize_with_accuracy_control
from emotion.utils.arguments import flag, parse_args_and_config
from emotion.utils.command import run


@dataclass
class PtqArguments(AccuracyAwareArguments, DatasetArguments):
    """The flags of PTQ, besides those of the scheme and of the accuracy that is kept."""

    model_name_or_path: str = flag(help="Fine-tuned model to quantize: a local folder or a Hub id.", kw_only=True)
    output_dir: str = flag("weights/ptq", "Folder in which the model is saved.")
    dataset_name: str | None = flag(
        None, "Dataset as a Hub id, folder or file, or texts alone (texts.txt); by default the model's."
    )
    seed: int = flag(42, "Seed by which the calibration samples are drawn.")


ARGUMENTS = (PtqArguments, HubArguments)


def main(argv=None) -> None:
    arguments, hub, recipe = parse_args_and_config(ARGUMENTS, argv)
    base, base_metadata = scheme.check_scheme(arguments)
    with lock_output_dir(arguments.output_dir, arguments, recipe):
        # Load the dataset: samples of train for calibration, and validation to measure the loss
        task = scheme.load_task(base, base_metadata, arguments, texts_alone=True)

        texts = next(iter(task.splits.values()))["text"]
        with scheme.with_onnx_export(base.path, arguments, texts) as folder:
            count, threshold = arguments.num_calibration_samples, arguments.threshold
            samples = scheme.load_samples(task, folder, count, arguments.seed, threshold=threshold)
            calibration, validation = samples
            count, compared = len(calibration.token_ids), len(validation.texts)
            print(f"{base.path}   {task.name} ({task.source}): {count} rows calibrate, {compared} others are compared")

            # Load the model and choose its layers, and below 8 bits their scales
            model = load_trained_classifier(folder)
            plan = scheme.make_plan(folder, model, arguments, calibration)
            layers = plan.layers
            print(f"INT{arguments.bits}: {len(layers.linear)} linear layers, {len(layers.embeddings)} embeddings")

            # Quantize and save each format
            metadata = scheme.quantized_metadata("ptq", recipe, base_metadata, plan, arguments)
            metadata["provenance"] |= {"calibration_dataset": task.name, "calibration_dataset_source": task.source}
            with new_artifact(arguments.output_dir, metadata) as output:
                metadata |= quantize_with_accuracy_control(plan, output, calibration, validation, arguments)
        push_to_hub(arguments.output_dir, hub)


if __name__ == "__main__":
    run(main)
