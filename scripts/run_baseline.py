"""Fine-tunes BERT to tell the emotion of a text: the FP32 baseline that the quantized variants start from.

The artifact, `weights/baseline`, holds the checkpoint with the best macro F1 on validation, in three forms: FP32
(`model.safetensors`), BF16 (`model.bf16.safetensors`) and FP32 for ONNX Runtime (`onnx/model.onnx`). This script never
reads the test split; `run_evaluation.py` scores it.

    python scripts/run_baseline.py    # BERT-base: configs/bert-base-uncased/baseline.yaml
    python scripts/run_baseline.py configs/minilm/baseline.yaml --seed 43
    accelerate launch --config_file accelerate_config.yaml scripts/run_baseline.py --seed 43 --output_dir weights/other
"""

import emotion  # noqa: F401 (first: it sets what the libraries below read while they load)

# isort: split

import copy
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForSequenceClassification, set_seed

from emotion.data.dataset import TaskArguments, load_task
from emotion.data.tokenization import load_training_rows
from emotion.export.onnx_export import export_onnx
from emotion.hub.upload import score_and_publish
from emotion.inference.model_folder import describe_made, describe_origin, new_artifact
from emotion.inference.pretrained import build_classifier
from emotion.quantization.layers import find_stack
from emotion.training.checkpoints import find_checkpoint
from emotion.training.trainer import (
    FiniteTrainer,
    RecipeTrainingArguments,
    compute_metrics,
    finish,
    patched,
    summarize_training,
    training_place,
)
from emotion.utils.arguments import Range, parse_args_and_config
from emotion.utils.base_model import find_base_model
from emotion.utils.command import run
from emotion.utils.files import ROOT
from emotion.utils.recipe import Recipe

CONFIG = ROOT / "configs" / "bert-base-uncased" / "baseline.yaml"


@dataclass
class BaselineArguments(TaskArguments):
    """The flags of the baseline, beside those of the task and the training."""

    layerwise_lr_decay: float = field(
        default=0.85,
        metadata={
            "help": "Learning rate of a layer as a share of that of the layer above it.",
            "choices": Range(0, 1, above=True),
        },
    )


@dataclass
class BaselineTrainingArguments(RecipeTrainingArguments):
    """The training of the baseline."""

    output_dir: str = field(default="weights/baseline", metadata={"help": "Folder in which the artifact is saved."})


ARGUMENTS = (BaselineArguments, BaselineTrainingArguments)


def main(argv=None) -> None:
    # 1. Parse
    arguments, training, recipe = parse_args_and_config(ARGUMENTS, argv, CONFIG)
    with training_place(training, arguments, recipe):
        train(arguments, training, recipe)


def train(arguments: BaselineArguments, training: RecipeTrainingArguments, recipe: Recipe) -> None:
    """The other moves, while no other process may write to the same place."""
    set_seed(training.seed)

    # 2. Load the task
    base = find_base_model(arguments.model_name_or_path)
    task = load_task(arguments.dataset_name, arguments.dataset_config_name)
    print(f"base model: {base.name} ({base.source})   dataset: {task.name} ({task.source})")
    rows, tokenizer, train_ids, validation_ids = load_training_rows(task, base, arguments, seed=training.seed)

    # 3. Build the variant
    model = build_classifier(base.path, task.labels, arguments.attention_dropout)

    # 4. Train; afterwards the model has the weights of the best checkpoint on validation
    trainer = BaselineTrainer(
        layerwise_lr_decay=arguments.layerwise_lr_decay,
        model=model,
        args=training,
        train_dataset=train_ids,
        eval_dataset=validation_ids,
        processing_class=tokenizer,  # pads each batch to its longest text
        compute_metrics=compute_metrics,
    )
    checkpoint = find_checkpoint(trainer, recipe, rows)
    with patched(trainer) as clock:
        trainer.train(resume_from_checkpoint=checkpoint)
    summary = summarize_training(trainer, clock, resumed=checkpoint is not None)

    # 5. Save, once: with `accelerate launch` several processes get here
    if trainer.is_world_process_zero():
        made = describe_made("baseline", recipe, training.seed, describe_origin(base, task, rows), summary)
        with new_artifact(training.artifact, made) as folder:
            made["onnx"] = save_forms(trainer.accelerator.unwrap_model(trainer.model), tokenizer, folder)
        finish(training, summary)
        score_and_publish(training.artifact, training)


class BaselineTrainer(FiniteTrainer):
    """The `Trainer` with layer-wise learning rates.

    Each layer has ``layerwise_lr_decay`` times the learning rate of the layer above it. The lower a layer, the more
    general its knowledge from pretraining, and the less it should change (Howard and Ruder, "Universal Language Model
    Fine-tuning for Text Classification", ACL 2018).
    """

    def __init__(self, layerwise_lr_decay: float, **kwargs):
        super().__init__(**kwargs)
        self.layerwise_lr_decay = layerwise_lr_decay

    def create_optimizer(self, model=None):
        """The optimizer of the recipe, with a group of parameters for each learning rate and weight decay."""
        model = model or self.model
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        decayed = set(self.get_decay_parameter_names(model))  # all but biases and norms
        depths = count_layers_above(model)
        groups = {}
        for name, parameter in model.named_parameters():
            weight_decay = self.args.weight_decay if name in decayed else 0.0
            rate = self.args.learning_rate * self.layerwise_lr_decay ** depths[name]
            # A scheduler multiplies the rate of each group, so the ratios between layers stay.
            group = groups.setdefault((rate, weight_decay), {"params": [], "lr": rate, "weight_decay": weight_decay})
            group["params"].append(parameter)
        self.optimizer = optimizer_class(list(groups.values()), **options)
        return self.optimizer


def count_layers_above(model) -> dict[str, int]:
    """Parameter name -> how many layers it lies below the head: 0 for pooler and head, the most for the embeddings."""
    stack = find_stack(model)  # as "bert.encoder.layer"; names differ by architecture
    layers = len(model.get_submodule(stack))
    # The table of words lies in the module that holds all embeddings and their norm.
    names = {module: name for name, module in model.named_modules()}
    embeddings = names[model.get_input_embeddings()].rpartition(".")[0]
    depths = {}
    for name, _ in model.named_parameters():
        if name.startswith(f"{stack}."):
            number = int(name.removeprefix(f"{stack}.").split(".")[0])  # 0 is the layer next to the embeddings
            depths[name] = layers - number
        elif name.startswith(f"{embeddings}."):
            depths[name] = layers + 1
        else:
            depths[name] = 0
    return depths


def save_forms(model, tokenizer, folder) -> dict:
    """Writes the tokenizer and the three forms of the model into a folder; returns the result of `export_onnx`."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, variant="bf16", save_original_format=False)
    # After BF16, so that config.json is that of the FP32 model
    model.float().save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)
    # The file is made from the saved folder, so both hold the very same weights.
    saved = AutoModelForSequenceClassification.from_pretrained(folder)
    return export_onnx(saved, tokenizer, folder / "onnx" / "model.onnx")


if __name__ == "__main__":
    run(main)
