"""Fine-tunes BERT on emotion classification: the FP32 baseline that the quantized variants start from.

The model folder holds the checkpoint with the best macro F1 on validation in FP32 (`model.safetensors`), in BF16
(`model.bf16.safetensors`) and in FP32 for ONNX Runtime (`onnx/model.onnx`). The test split is not read.

    python scripts/run_baseline.py configs/minilm/baseline.yaml --seed 43
    accelerate launch --config_file accelerate_config.yaml scripts/run_baseline.py
"""

import emotion  # noqa: F401 (first: it sets what the libraries below read while they load)

# isort: split

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, set_seed

from emotion.data.dataset import TaskArguments
from emotion.export.onnx_export import check_export, try_export
from emotion.hub.upload import push_to_hub
from emotion.inference import model_folder
from emotion.quantization.layers import find_stack
from emotion.training.trainer import (
    ClassificationTrainer,
    RecipeTrainingArguments,
    compute_metrics,
    load_training_data,
)
from emotion.utils.arguments import Range, flag, parse_args_and_config
from emotion.utils.command import run

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "bert-base-uncased" / "baseline.yaml"


@dataclass
class BaselineArguments(TaskArguments):
    """The flags of the baseline, besides those of the task and the training."""

    layerwise_lr_decay: float = flag(0.85, "Learning rate as a share of the layer's above.", Range(0, 1, above=True))


@dataclass
class BaselineTrainingArguments(RecipeTrainingArguments):
    """The training of the baseline."""

    output_dir: str = flag("weights/baseline", "Folder in which the model is saved.")


ARGUMENTS = (BaselineArguments, BaselineTrainingArguments)


def main(argv=None) -> None:
    arguments, training, recipe = parse_args_and_config(ARGUMENTS, argv, CONFIG)
    with model_folder.lock_output_dir(training.output_dir, arguments, recipe):
        set_seed(training.seed)

        # Load the dataset, then the encoder with a new classification head
        data = load_training_data(arguments, training.seed)
        model = model_folder.build_classifier(data.base.path, data.task.labels, arguments.attention_dropout)
        check_export(data.base.path, data.task.labels, data.tokenizer)

        # Train; afterwards the model has the weights of the best checkpoint on validation
        trainer = BaselineTrainer(
            layerwise_lr_decay=arguments.layerwise_lr_decay,
            recipe=recipe,
            data=data,
            model=model,
            args=training,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=data.tokenizer,
            compute_metrics=compute_metrics,
        )
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)

        if trainer.is_world_process_zero():
            metadata = trainer.metadata("baseline")
            with model_folder.new_artifact(training.output_dir, metadata) as folder:
                model = trainer.accelerator.unwrap_model(trainer.model)
                metadata["onnx"] = save_formats(model, data.tokenizer, folder, data.rows["text"])
            push_to_hub(training.output_dir, training)


class BaselineTrainer(ClassificationTrainer):
    """The `Trainer` with layer-wise learning rates.

    Each layer has ``layerwise_lr_decay`` times the learning rate of the layer above it. The lower a layer, the more
    general its knowledge from pretraining, and the less it should change (Howard and Ruder, "Universal Language Model
    Fine-tuning for Text Classification", ACL 2018).
    """

    def __init__(self, layerwise_lr_decay: float, **options):
        super().__init__(**options)
        self.layerwise_lr_decay = layerwise_lr_decay

    def create_optimizer(self, model=None):
        """Creates the optimizer with a group of parameters for each learning rate and weight decay."""
        model = model or self.model
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        decayed = set(self.get_decay_parameter_names(model))  # all but biases and norms
        depths = count_layers_above(model)
        groups = {}
        for name, parameter in model.named_parameters():
            weight_decay = self.args.weight_decay if name in decayed else 0.0
            rate = self.args.learning_rate * self.layerwise_lr_decay ** depths[name]
            group = groups.setdefault((rate, weight_decay), {"params": [], "lr": rate, "weight_decay": weight_decay})
            group["params"].append(parameter)
        self.optimizer = optimizer_class(list(groups.values()), **options)
        return self.optimizer


def count_layers_above(model) -> dict[str, int]:
    """Counts for each parameter how many layers it lies below the head: 0 for pooler and head, most for embeddings."""
    stack = find_stack(model)  # "bert.encoder.layer"; names differ by architecture
    layers = len(model.get_submodule(stack))
    # The word embeddings lie in the module that holds all embeddings and their norm.
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


def save_formats(model, tokenizer, folder: Path, texts) -> dict:
    """Saves the model in BF16, in FP32, and in FP32 for ONNX Runtime; returns the result of `try_export`."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, variant="bf16", save_original_format=False)
    # Second, so that config.json is that of the FP32 model
    model.float().save_pretrained(folder, save_original_format=False)
    tokenizer.save_pretrained(folder)
    saved = AutoModelForSequenceClassification.from_pretrained(folder)
    return try_export(saved, tokenizer, folder / "onnx" / "model.onnx", texts)


if __name__ == "__main__":
    run(main)
