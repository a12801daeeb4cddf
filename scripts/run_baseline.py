"""Fine-tunes BERT to tell the emotion of a text: the FP32 baseline that the quantized variants start from.

The artifact, `weights/baseline`, holds the best checkpoint by validation macro F1 in three forms: FP32
(`model.safetensors`), BF16 (`model.bf16.safetensors`) and FP32 for ONNX Runtime (`onnx/model.onnx`). The test split is
never looked at here; `run_evaluation.py` scores it.

    python scripts/run_baseline.py    # the recipe configs/baseline.yaml
    accelerate launch --config_file accelerate_config.yaml scripts/run_baseline.py --seed 43 --output_dir weights/other
"""

import copy
import shutil
from dataclasses import dataclass, field

from emotion.common.command import run
from emotion.common.files import ROOT
from emotion.common.flags import parse_recipe
from emotion.model.artifact import describe_made, new_artifact
from emotion.model.hub import score_and_publish
from emotion.model.pretrained import build_classifier
from emotion.model.training import RecipeTrainingArguments, compute_metrics, train
from emotion.quantize.layers import find_stack
from emotion.quantize.onnx_graph import export_onnx
from emotion.task.dataset import TaskArguments, load_task
from emotion.task.source import find_base_model
from emotion.task.tokens import load_training_rows

import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, set_seed

RECIPE = ROOT / "configs" / "baseline.yaml"


@dataclass
class BaselineArguments(TaskArguments):
    """What is particular to the baseline."""

    layer_decay: float = field(
        default=1.0, metadata={"help": "How much slower each layer learns than the one above it; 1 for no difference."}
    )


def main(argv=None) -> None:
    # 1. Parse
    arguments, training, recipe = parse_recipe((BaselineArguments, RecipeTrainingArguments), RECIPE, argv)
    set_seed(training.seed)

    # 2. Load the task
    base = find_base_model(arguments.model_name_or_path)
    task = load_task(arguments.dataset_name, arguments.dataset_config_name)
    print(f"base model: {base.name} ({base.source})   dataset: {task.name} ({task.source})")
    rows, tokenizer, train_ids, validation_ids = load_training_rows(task, base, arguments, seed=training.seed)

    # 3. Build the variant
    model = build_classifier(base.path, task.labels, arguments.attention_dropout)

    # 4. Train: what is left in `model` is the best checkpoint on validation
    trainer = BaselineTrainer(
        layer_decay=arguments.layer_decay,
        model=model,
        args=training,
        train_dataset=train_ids,
        eval_dataset=validation_ids,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    summary = train(trainer, recipe)

    # 5. Save
    if trainer.is_world_process_zero():
        made = describe_made("baseline", recipe, base, task, rows, training=summary, seed=training.seed)
        with new_artifact(training.artifact, made) as folder:
            made["onnx"] = save(trainer.accelerator.unwrap_model(trainer.model), tokenizer, folder)
        shutil.rmtree(training.output_dir)  # the checkpoints
        print(f"saved {training.artifact}: validation macro F1 {summary['validation_macro_f1']}")
        score_and_publish(training.artifact, training.hub)


class BaselineTrainer(Trainer):
    """The `Trainer` with layer-wise learning rates.

    Each layer learns ``layer_decay`` times as fast as the one above it, since the lower ones hold what the pretraining
    knows (Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018).
    """

    def __init__(self, layer_decay: float, **kwargs):
        super().__init__(**kwargs)
        self.layer_decay = layer_decay

    def create_optimizer(self, model=None):
        model = model or self.model
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        decayed, depths = set(self.get_decay_parameter_names(model)), count_layers_above(model)
        groups = {}
        for name, parameter in model.named_parameters():
            weight_decay = self.args.weight_decay if name in decayed else 0.0
            rate = self.args.learning_rate * self.layer_decay ** depths[name]
            group = groups.setdefault((rate, weight_decay), {"params": [], "lr": rate, "weight_decay": weight_decay})
            group["params"].append(parameter)
        self.optimizer = optimizer_class(list(groups.values()), **options)
        return self.optimizer


def count_layers_above(model) -> dict[str, int]:
    """How many layers each parameter lies below the head: most for the embeddings, 0 for all outside the layers."""
    stack = find_stack(model)
    names = {module: name for name, module in model.named_modules()}
    embeddings = names[model.get_input_embeddings()].rpartition(".")[0]
    layers, depths = len(model.get_submodule(stack)), {}
    for name, _ in model.named_parameters():
        if name.startswith(f"{stack}."):
            depths[name] = layers - int(name.removeprefix(f"{stack}.").split(".")[0])
        else:
            depths[name] = layers + 1 if name.startswith(f"{embeddings}.") else 0
    return depths


def save(model, tokenizer, folder) -> dict:
    """Writes the tokenizer and the three forms of the model; returns what the ONNX export found."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder, variant="bf16")
    model.float().save_pretrained(folder)  # after BF16, so that config.json is that of the FP32 model
    tokenizer.save_pretrained(folder)
    saved = AutoModelForSequenceClassification.from_pretrained(folder)  # without what the Trainer wrapped around it
    return export_onnx(saved, tokenizer, folder / "onnx" / "model.onnx")


if __name__ == "__main__":
    run(main)
