"""Trains a low-rank adapter on a 4-bit base model (QLoRA), on a GPU or on a CPU.

The linear layers of the base are quantized to NF4 and frozen; an adapter beside each of them and the head are trained
(Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023). The model folder opens without PEFT:

    model.safetensors            base and adapter as one model, in 4 bits if validation allows (bitsandbytes)
    onnx/model_quantized.onnx    the same in INT8 for ONNX Runtime
    adapter/                     the adapter alone, for PEFT

    python scripts/run_qlora.py configs/minilm/qlora.yaml --seed 43
    accelerate launch --config_file accelerate_config.yaml scripts/run_qlora.py
"""

import emotion  # noqa: F401 (first: it sets what the libraries below read while they load)

# isort: split

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, set_seed

from emotion.data.dataset import TaskArguments
from emotion.export.onnx_export import check_export
from emotion.hub.upload import push_to_hub
from emotion.inference import model_folder
from emotion.quantization import nf4
from emotion.training import qlora
from emotion.training.trainer import (
    ClassificationTrainer,
    RecipeTrainingArguments,
    compute_metrics,
    load_training_data,
)
from emotion.utils.arguments import Range, flag, parse_args_and_config
from emotion.utils.command import run

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "bert-base-uncased" / "qlora.yaml"
FORMATS = ("adapter", "nf4", "onnx")


@dataclass
class QloraArguments(TaskArguments):
    """The flags of the adapter, with the names of PEFT's `LoraConfig`."""

    lora_r: int = flag(16, "Rank of the two matrices beside each layer.", Range(1, 1024))
    lora_alpha: int = flag(32, "The adapter is multiplied by alpha / rank.", Range(1))
    lora_dropout: float = flag(0.0, "Dropout of the adapter's inputs.", Range(0, 1, below=True))
    target_modules: list[str] = flag(
        [], "Layers that get an adapter, by the ends of their names; all of the encoder's by default."
    )
    modules_to_save: list[str] = flag([], "Layers to train in full besides the head, by the ends of their names.")
    use_rslora: bool = flag(False, "Multiply by alpha / sqrt(rank) instead (Kalajdzievski, 2023).")
    use_dora: bool = flag(False, "Train magnitude and direction of the weights separately (Liu et al., ICML 2024).")
    init_lora_weights: str = flag(
        "loftq",
        "Initialization of the adapter: default, gaussian, or loftq (Li et al., ICLR 2024).",
        ("default", "gaussian", "loftq"),
    )
    load_in_4bit: bool = flag(True, "False for LoRA on a float base, to compare with.")
    formats: list[str] = flag(
        list(FORMATS), f"Which of {', '.join(FORMATS)} to save; the adapter is always saved.", FORMATS
    )

    def __post_init__(self):
        if self.init_lora_weights == "loftq" and not self.load_in_4bit:
            raise ValueError(
                "--init_lora_weights loftq makes up for rounding to 4 bits; take default for a float base"
            )


@dataclass
class QloraTrainingArguments(RecipeTrainingArguments):
    """The training of an adapter."""

    output_dir: str = flag("weights/qlora", "Folder in which the model is saved.")
    learning_rate: float = 1e-3  # chosen on validation: results/qlora.md
    warmup_steps: float = 0.1


ARGUMENTS = (QloraArguments, QloraTrainingArguments)


def main(argv=None) -> None:
    arguments, training, recipe = parse_args_and_config(ARGUMENTS, argv, CONFIG)
    with model_folder.lock_output_dir(training.output_dir, arguments, recipe):
        set_seed(training.seed)

        # Load the dataset, then the base model in NF4 with an adapter beside each of its layers
        data = load_training_data(arguments, training.seed)
        base, labels = data.base.path, data.task.labels
        model = build_model(base, labels, arguments, training.bf16)
        if "onnx" in arguments.formats and not check_export(base, labels, data.tokenizer):
            arguments.formats = [format for format in arguments.formats if format != "onnx"]
        trained, total = model.get_nb_trainable_parameters()
        print(f"trained: {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)")

        # Train; afterwards the model has the weights of the best checkpoint on validation
        trainer = ClassificationTrainer(
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

        # Save the adapter, and base and adapter as one model
        if trainer.is_world_process_zero():
            metadata = trainer.metadata("qlora", trained_parameters=trained, parameters=total)
            with model_folder.new_artifact(training.output_dir, metadata) as folder:
                model = trainer.accelerator.unwrap_model(trainer.model)
                config = nf4_config(base, labels, training.bf16) if arguments.load_in_4bit else None
                merged = qlora.merge(model, data, folder, config)
                config = nf4_config(base, labels, bf16=False)
                metadata |= qlora.save_merged(merged, data, folder, arguments.formats, training.seed, config)
            push_to_hub(training.output_dir, training)


def nf4_config(base: str, labels: list[str], bf16: bool) -> BitsAndBytesConfig:
    """Returns the configuration that loads the encoder's linear layers in NF4 with double quantization."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        llm_int8_skip_modules=nf4.find_float_modules(base, labels),  # for layers of 4 bits too, whatever its name says
    )


def build_model(base: str, labels: list[str], arguments: QloraArguments, bf16: bool):
    """Loads the base, a Hub id or folder, in NF4; returns it as a `PeftModel`, whose adapter and head are trainable.

    Raises:
        UserError: if the base cannot be opened, or a flag names a layer that it does not have.
    """
    config = nf4_config(base, labels, bf16) if arguments.load_in_4bit else None
    model = model_folder.build_classifier(base, labels, arguments.attention_dropout, quantization_config=config)
    if arguments.load_in_4bit:
        qlora.prepare_4bit_layers(model, bf16)
    targets, modules_to_save = qlora.select_layers(model, arguments.target_modules, arguments.modules_to_save)
    lora_config = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        modules_to_save=modules_to_save,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        # True is PEFT's default: A random and B zero. LoftQ is done below.
        init_lora_weights="gaussian" if arguments.init_lora_weights == "gaussian" else True,
    )
    model = get_peft_model(model, lora_config)
    if arguments.init_lora_weights == "loftq":
        nf4.initialize_loftq(model, model_folder.build_classifier(base, labels, None))
    return model


if __name__ == "__main__":
    run(main)
