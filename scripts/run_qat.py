"""Trains a fine-tuned classifier with fake-quantized weights and activations (QAT), then converts it to integers.

The model folder holds the formats of run_ptq.py, quantized by the same functions; below 8 bits it holds one packed
ONNX file (emotion/quantization/lowbit.py). Where a file for ONNX Runtime is made, its activation ranges are trained
for, and its outlier channels stay in float (outlier_channels.py). The test split is not read.

    python scripts/run_qat.py --model_name_or_path weights/baseline
    python scripts/run_qat.py configs/minilm/qat-int4.yaml --model_name_or_path weights/baseline --seed 43
"""

import emotion  # noqa: F401 (first: it sets what the libraries below read while they load)

# isort: split

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from emotion.data.dataset import DatasetArguments, RowsArguments
from emotion.hub.upload import push_to_hub
from emotion.inference import model_folder
from emotion.quantization import qat, scheme
from emotion.quantization.fake_quantizers import prepare
from emotion.training.trainer import (
    ClassificationTrainer,
    RecipeTrainingArguments,
    compute_metrics,
    load_training_data,
)
from emotion.utils.arguments import Range, flag, parse_args_and_config
from emotion.utils.command import run


@dataclass
class QatArguments(scheme.SchemeArguments, RowsArguments, DatasetArguments):
    """The flags of QAT, besides those of the scheme, the rows and the training."""

    model_name_or_path: str = flag(help="Fine-tuned model to start from: a local folder or a Hub id.", kw_only=True)
    split_outliers: bool = flag(True, "ONNX: keep outlier channels of feed-forward layers in float.")
    fake_quantize: bool = flag(True, "False trains in float, as a control to compare with.")
    quantize_after: int = flag(0, "Steps in float before fake quantization starts.", Range(0))
    freeze: list[str] = flag([], "Parameters that are not trained, by the beginnings of their names.")


@dataclass
class QatTrainingArguments(RecipeTrainingArguments):
    """The training of QAT: short, since the model has learned the task already."""

    output_dir: str = flag("weights/qat", "Folder in which the model is saved.")
    learning_rate: float = 2e-5  # for 8 bits; 2e-4 changed twice as many labels and gained nothing
    num_train_epochs: float = 0.5  # 250 steps
    eval_strategy: IntervalStrategy | str = "steps"
    save_strategy: SaveStrategy | str = "steps"
    eval_steps: float | None = 0.25  # as a share of all steps
    save_steps: float = 0.25


ARGUMENTS = (QatArguments, QatTrainingArguments)


def main(argv=None) -> None:
    arguments, training, recipe = parse_args_and_config(ARGUMENTS, argv)
    base, base_metadata = scheme.check_scheme(arguments, training=True)
    with model_folder.lock_output_dir(training.output_dir, arguments, recipe):
        set_seed(training.seed)

        # Load the dataset
        task = scheme.load_task(base, base_metadata, arguments)
        data = load_training_data(arguments, training.seed, base, task)

        # Load the model and insert fake quantizers
        with scheme.with_onnx_export(base.path, arguments, data.rows["text"]) as folder:
            samples = scheme.load_samples(data.task, folder, arguments.num_calibration_samples, training.seed)
            plan = scheme.make_plan(folder, model_folder.load_trained_classifier(folder), arguments, samples[0])
        metadata = scheme.quantized_metadata("qat", recipe, base_metadata, plan, arguments)
        if arguments.fake_quantize:
            prepare(plan, scheme.runtime_to_train_for(arguments), arguments.reduce_range)
        frozen = qat.freeze(plan.model, arguments.freeze)

        # Train; afterwards the model has the weights of the best checkpoint on validation
        trainer = ClassificationTrainer(
            recipe=recipe,
            data=data,
            callbacks=[qat.FakeQuantizeCallback(arguments.quantize_after)],
            model=plan.model,
            args=training,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=data.tokenizer,
            compute_metrics=compute_metrics,
        )
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)

        if trainer.is_world_process_zero():
            metadata |= {"seed": training.seed, "provenance": metadata["provenance"] | data.provenance}
            metadata["training"] = trainer.summarize() | {"frozen_parameters": frozen}
            plan = replace(plan, model=trainer.accelerator.unwrap_model(trainer.model))
            with model_folder.new_artifact(training.output_dir, metadata) as folder:
                metadata |= save(plan, folder, data.tokenizer, *samples, arguments)
            push_to_hub(training.output_dir, training)


def save(plan: scheme.Plan, folder: Path, tokenizer, calibration, validation, arguments: QatArguments) -> dict:
    """Saves the trained model in FP32, or quantized in each format; returns the fields for recipe.yaml."""
    model = plan.model.cpu().float()
    vars(model).pop("forward", None)  # the Trainer's, which computes in bfloat16
    if arguments.fake_quantize:
        return qat.save_converted(plan, folder, tokenizer, calibration, validation, arguments)
    scheme.save_float_onnx(model, folder, tokenizer)
    return {"variant": scheme.name_variant("qat", arguments.bits) + scheme.CONTROL}


if __name__ == "__main__":
    run(main)
