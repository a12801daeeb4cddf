"""Trains the fine-tuned baseline further with rounded weights and activations (QAT), then converts it to integers.

The model folder, `weights/qat`, holds the same formats as that of run_ptq.py, quantized by the same functions. Below 8
bits it holds one packed ONNX file (emotion/quantization/lowbit.py). Where a file for ONNX Runtime is made, its ranges
are trained for, and its outlier channels stay in float (emotion/quantization/outlier_channels.py). The fake-quantized
model and the saved files are scored side by side on validation. This script never reads the test split;
run_evaluation.py scores it.

    python scripts/run_qat.py --model_name_or_path weights/baseline
    python scripts/run_qat.py configs/minilm/qat-int4.yaml --model_name_or_path weights/baseline --seed 43
"""

import emotion  # noqa: F401 (first: it sets what the libraries below read while they load)

# isort: split

from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from emotion.data.dataset import RowsArguments, Task, get_split, load_task_of
from emotion.data.tokenization import TextEncoder, load_training_rows
from emotion.hub.upload import score_and_publish
from emotion.inference.model_folder import describe_origin, new_artifact
from emotion.inference.pretrained import load_trained_classifier
from emotion.quantization.conversion import save_converted, save_float, with_float_files
from emotion.quantization.fake_quantizers import prepare, switch
from emotion.quantization.scheme import (
    CONTROL,
    SchemeArguments,
    check_scheme,
    describe_quantized,
    draw_calibration_rows,
    make_plan,
    runtime_to_train_for,
)
from emotion.training.checkpoints import find_checkpoint
from emotion.training.trainer import (
    FiniteTrainer,
    RecipeTrainingArguments,
    compute_metrics,
    finish,
    freeze,
    patched,
    summarize_training,
    training_place,
)
from emotion.utils.arguments import Range, parse_args_and_config
from emotion.utils.base_model import BaseModel
from emotion.utils.command import run
from emotion.utils.recipe import Recipe, read_recipe_of


@dataclass
class QatArguments(SchemeArguments, RowsArguments):
    """The flags of QAT, beside those of the scheme, the rows and the training."""

    model_name_or_path: str = field(
        kw_only=True, metadata={"help": "Fine-tuned model to start from: a local folder or a Hub id."}
    )
    split_outliers: bool = field(
        default=True, metadata={"help": "ONNX: outlier units of feed-forward pairs stay in floats."}
    )
    fake_quantize: bool = field(
        default=True, metadata={"help": "Round while training; false trains on in floats, to compare with."}
    )
    quantize_after: int = field(
        default=0, metadata={"help": "Steps of training in floats before rounding starts.", "choices": Range(0)}
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Parameters that are not trained, by the beginnings of their names."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset to train on; by default that of the baseline."}
    )


@dataclass
class QatTrainingArguments(RecipeTrainingArguments):
    """The training of QAT: short, since the baseline has learnt the task already."""

    output_dir: str = field(default="weights/qat", metadata={"help": "Folder in which the artifact is saved."})
    learning_rate: float = 2e-5  # for 8 bits; 2e-4 changed twice as many labels and gained nothing
    num_train_epochs: float = 0.5  # 250 steps
    # The checkpoint with the best macro F1 is scored with fake quantizers on; steps as a share of all steps
    eval_strategy: IntervalStrategy | str = "steps"
    save_strategy: SaveStrategy | str = "steps"
    eval_steps: float | None = 0.25
    save_steps: float = 0.25


ARGUMENTS = (QatArguments, QatTrainingArguments)


def main(argv=None) -> None:
    # 1. Parse
    arguments, training, recipe = parse_args_and_config(ARGUMENTS, argv)
    baseline = check_scheme(arguments)
    with training_place(training, arguments, recipe):
        train(baseline, arguments, training, recipe)


def train(baseline: Path, arguments: QatArguments, training: RecipeTrainingArguments, recipe: Recipe) -> None:
    """The other moves, while no other process may write to the same place."""
    set_seed(training.seed)

    # 2. Load the task
    base, task, made_by = load_origin(baseline, arguments)
    rows, tokenizer, train_ids, validation_ids = load_training_rows(task, base, arguments, seed=training.seed)

    # 3. Build the variant: the baseline with fake quantizers in its layers
    calibration = draw_calibration_rows(task, TextEncoder(base.path), arguments.num_calibration_samples, training.seed)
    with with_float_files(base.path) as floats:
        plan = make_plan(floats, load_trained_classifier(floats), arguments, calibration)
    made = describe_quantized("qat", recipe, made_by, plan, arguments)
    if arguments.fake_quantize:
        prepare(plan, runtime_to_train_for(arguments), arguments.reduce_range)
    frozen = freeze(plan.model, arguments.freeze)

    # 4. Train; afterwards the model has the weights of the best checkpoint on validation, scored with fake quantizers
    trainer = QatTrainer(
        quantize_after=arguments.quantize_after,
        model=plan.model,
        args=training,
        train_dataset=train_ids,
        eval_dataset=validation_ids,
        processing_class=tokenizer,  # pads each batch to its longest text
        compute_metrics=compute_metrics,
    )
    checkpoint = find_checkpoint(trainer, recipe, rows)
    with patched(trainer) as clock:
        trainer.train(resume_from_checkpoint=checkpoint)
    summary = summarize_training(trainer, clock, resumed=checkpoint is not None) | {"frozen_parameters": frozen}

    # 5. Save, once: with `accelerate launch` several processes get here
    if trainer.is_world_process_zero():
        made |= {
            "seed": training.seed,
            "provenance": made["provenance"] | describe_origin(base, task, rows),
            "training": summary,
        }
        with new_artifact(training.artifact, made) as folder:
            plan = replace(plan, model=take_back(trainer))
            if arguments.fake_quantize:
                made |= save_converted(plan, folder, tokenizer, calibration, get_split(task, "validation"), arguments)
            else:
                made["variant"] += CONTROL
                save_float(plan.model, folder, tokenizer)
        finish(training, summary)
        score_and_publish(training.artifact, training)


def load_origin(baseline: Path, arguments: QatArguments) -> tuple[BaseModel, Task, dict]:
    """The model to start from, the dataset, and the baseline's recipe.yaml; prints where they come from."""
    made_by = read_recipe_of(baseline)
    # The weights are the baseline's, and the name is that of the base model which the baseline was made from.
    origin = made_by.get("provenance", {})
    # Without a recipe the folder was made by another program, and its own name is all that is known.
    named = arguments.model_name_or_path
    is_folder = Path(named).exists()
    name = origin.get("base_model", baseline.name if is_folder else named)
    source = origin.get("base_model_source", "folder" if is_folder else "hub")
    task = load_task_of(made_by, arguments.dataset_name)
    print(f"{named}   dataset: {task.name} ({task.source})")
    return BaseModel(name, str(baseline), source), task, made_by


class QatTrainer(FiniteTrainer):
    """The `Trainer` with fake quantizers that start after some steps, and are on when the model is scored."""

    def __init__(self, quantize_after: int, **kwargs):
        super().__init__(**kwargs)
        self.quantize_after = quantize_after

    def training_step(self, model, inputs, *words, **options):
        """One step, in floats for the first `quantize_after`."""
        # Rounding may start late, when the training no longer changes much (Jacob et al., "Quantization and Training
        # of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018).
        switch(model, enabled=self.state.global_step >= self.quantize_after)
        return super().training_step(model, inputs, *words, **options)

    def evaluation_loop(self, *words, **options):
        """Scores the model with its fake quantizers on, so that the best checkpoint is that of the rounded model."""
        switch(self.model, enabled=True)
        return super().evaluation_loop(*words, **options)


def take_back(trainer: QatTrainer):
    """The trained model in the form in which the files answer: on the processor, in FP32."""
    model = trainer.accelerator.unwrap_model(trainer.model).cpu().float()
    vars(model).pop("forward", None)  # the Trainer's own, which computes in bfloat16
    return model


if __name__ == "__main__":
    run(main)
