"""Trains a low-rank adapter on a base of 4 bits (QLoRA), on a GPU or on a plain CPU.

The base's linear layers are rounded to NF4 and never change; what is learnt are two thin matrices beside each of them,
and the head (Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023; Hu et al., "LoRA:
Low-Rank Adaptation of Large Language Models", ICLR 2022). The artifact, `weights/qlora`, opens without knowing this:

    model.safetensors            base and adapter in one, in 4 bits if validation allows (bitsandbytes)
    onnx/model_quantized.onnx    the same in INT8 for ONNX Runtime
    adapter/                     the adapter alone, for the base that it names

The same command grows to several GPUs and machines: accelerate_config.yaml says how.

    accelerate launch --config_file accelerate_config.yaml scripts/run_qlora.py
"""

import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from utils_cli import ROOT, UserError, parse_recipe, run

# isort: split
import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorWithPadding, Trainer, set_seed
from utils_artifact import find_formats, new_artifact, open_artifact, quantized_by
from utils_classifier import build_classifier, load_trained_classifier
from utils_hub import score_and_publish
from utils_int8 import find_layers, quantize_onnx
from utils_nf4 import nf4_options, round_to_nf4, start_from_rounding_error
from utils_onnx import export_onnx
from utils_ruler import predict, score
from utils_task import (
    BaseModel,
    Task,
    TaskArguments,
    find_base_model,
    get_split,
    load_task,
    load_training_rows,
    stratified_sample,
)
from utils_training import RecipeTrainingArguments, compute_metrics, describe_made, train

RECIPE = ROOT / "configs" / "qlora.yaml"
FORMATS = ("adapter", "nf4", "onnx")
MARGIN = 0.002  # of validation macro F1 that a smaller form of the merged model may lose
CALIBRATION_ROWS = 300  # of train, by which the merged model is rounded


@dataclass
class QloraArguments(TaskArguments):
    """The adapter; the base is always NF4 with double quantization."""

    lora_rank: int = field(default=16, metadata={"help": "Rank of the two matrices beside each layer."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter counts alpha / rank times."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of what enters the adapter."})
    target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Ends of names of the layers that get an adapter; all of the encoder's if none are given."},
    )
    trained_whole: list[str] = field(
        default_factory=list,
        metadata={"help": "Ends of names of the layers outside the encoder that are trained whole; the head if none."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Count alpha / sqrt(rank) times instead (Kalajdzievski, 2023)."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Learn length and direction of the weights apart (Liu et al., ICML 2024)."}
    )
    init_lora_weights: str = field(
        default="default", metadata={"help": "default, gaussian, or loftq (Li et al., ICLR 2024)."}
    )
    load_in_4bit: bool = field(default=True, metadata={"help": "False for LoRA on a float base, to compare with."})
    formats: list[str] = field(
        default_factory=lambda: list(FORMATS),
        metadata={"help": f"Which of {', '.join(FORMATS)} to save; the adapter is always saved."},
    )

    def __post_init__(self):
        if not set(self.formats) <= set(FORMATS):
            raise ValueError(f"--formats {' '.join(self.formats)}: it takes some of {', '.join(FORMATS)}")
        if self.init_lora_weights not in {"default", "gaussian", "loftq"}:
            raise ValueError(f"--init_lora_weights {self.init_lora_weights}: it takes default, gaussian or loftq")
        if self.init_lora_weights == "loftq" and not self.load_in_4bit:
            raise ValueError(
                "--init_lora_weights loftq makes up for rounding to 4 bits; take default for a float base"
            )


def main(argv=None) -> None:
    # 1. Parse
    arguments, training, recipe = parse_recipe((QloraArguments, RecipeTrainingArguments), RECIPE, argv)
    set_seed(training.seed)

    # 2. Load the task
    base = find_base_model(arguments.model_name_or_path)
    if base.source == "folder" and (quantizer := quantized_by(Path(base.path))):
        raise UserError(f"{base.path} is quantized already (by {quantizer}); name the float model it was made from")
    task = load_task(arguments.dataset_name, arguments.dataset_config_name)
    print(f"base model: {base.name} ({base.source})   dataset: {task.name} ({task.source})")
    rows, tokenizer, train_ids, validation_ids = load_training_rows(task, base, arguments, seed=training.seed)

    # 3. Build the variant
    model = build_qlora(base.path, task.labels, arguments, bf16=training.bf16)
    trained, total = model.get_nb_trainable_parameters()
    print(f"trained: {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)")

    # 4. Train: what is left in `model` is the best checkpoint on validation
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train_ids,
        eval_dataset=validation_ids,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
    )
    summary = train(trainer, recipe)
    summary |= {"trained_parameters": trained, "parameters": total}

    # 5. Save
    if trainer.is_world_process_zero():
        made = describe_made("qlora", recipe, base, task, rows, training=summary, seed=training.seed)
        with new_artifact(training.artifact, made) as folder:
            learnt = trainer.accelerator.unwrap_model(trainer.model)
            merged = merge(learnt, base, task.labels, folder, arguments, training)
            made["merged"] = save(merged, tokenizer, folder, task, arguments.formats, training)
        shutil.rmtree(training.output_dir)  # the checkpoints
        print(f"saved {training.artifact}: validation macro F1 {summary['validation_macro_f1']}")
        score_and_publish(training.artifact, training.hub)


def build_qlora(base: str, labels: list[str], arguments: QloraArguments, bf16: bool) -> PeftModel:
    """The base in NF4, an adapter on each of its layers, and the head to be trained whole."""
    options = nf4_options(base, labels, bf16) if arguments.load_in_4bit else {}
    model = build_classifier(base, labels, arguments.attention_dropout, **options)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # evaluating would repack its weights, which ends the training
            if bf16:  # it answers in its input's FP32, and what follows would keep that for the way back
                layer.register_forward_hook(lambda layer, inputs, output: output.to(torch.bfloat16))
    encoder, head = model.base_model_prefix, [name for name, part in model.named_children() if list(part.parameters())]
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    inside = [name for name in linear if name.startswith(f"{encoder}.")]
    targets = named(arguments.target_modules, inside, "--target_modules") or inside
    whole = named(arguments.trained_whole, [name for name in linear if name not in targets], "--trained_whole")
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        modules_to_save=[name for name in head if name != encoder] + whole,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        init_lora_weights="gaussian" if arguments.init_lora_weights == "gaussian" else True,
    )
    model = get_peft_model(model, config)
    if arguments.init_lora_weights == "loftq":
        start_from_rounding_error(model, build_classifier(base, labels, None))
    return model


def named(endings: list[str], layers: list[str], flag: str) -> list[str]:
    """The layers whose names end so; an ending that fits none is an error that names what there is."""
    for ending in endings:
        if not any(f".{name}".endswith(f".{ending}") for name in layers):
            kinds = sorted({re.sub(r".*\.\d+\.", "", name) for name in layers})
            raise UserError(f"{flag} {ending}: no layer's name ends so; there are {', '.join(kinds)}")
    return [name for name in layers if any(f".{name}".endswith(f".{ending}") for ending in endings)]


def merge(model: PeftModel, base: BaseModel, labels: list[str], folder: Path, arguments, training):
    """Saves the adapter, and returns base and adapter in one, in FP32.

    The adapter learnt beside the rounded weights: it is added to those, not to the base as it was before.
    """
    model.peft_config["default"].base_model_name_or_path = base.name  # the Hub's name, not a path of this machine
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's, with gaps to fill in
    options = nf4_options(base.path, labels, training.bf16) if arguments.load_in_4bit else {}
    rounded = build_classifier(base.path, labels, None, **options)
    rounded = rounded.dequantize() if options else rounded
    return PeftModel.from_pretrained(rounded, folder / "adapter").merge_and_unload().float()


def save(merged, tokenizer, folder: Path, task: Task, formats: list[str], training) -> dict:
    """Writes the merged model for Transformers, in the smallest form that keeps its score, and for ONNX Runtime.

    Returns:
        Validation macro F1 of each form of `model.safetensors` that was tried, FP32 first; the last one was kept.
    """
    tried = {}
    if not {"nf4", "onnx"} & set(formats):
        return tried
    tokenizer.save_pretrained(folder)
    merged.config.save_pretrained(folder)
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "merged"
        merged.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        if "onnx" in formats:
            float_graph = whole / "onnx" / "model.onnx"
            export_onnx(merged, tokenizer, float_graph)
            quantize_onnx(merged, float_graph, folder / "onnx" / "model_quantized.onnx", find_layers(merged))
        if "nf4" not in formats:
            return tried
        train_rows, validation = get_split(task, "train"), get_split(task, "validation")
        calibration = stratified_sample(train_rows, min(CALIBRATION_ROWS, len(train_rows)), training.seed)
        tried["fp32"] = validation_macro_f1(whole, "pytorch", validation)
        for form, dtype in (("nf4", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32 kept", torch.float32)):
            if form == "nf4":
                options = nf4_options(str(whole), task.labels, training.bf16)
                smaller = round_to_nf4(whole, tokenizer, list(calibration["text"]), dtype, options)
            else:
                smaller = load_trained_classifier(whole, dtype=dtype)
            smaller.save_pretrained(folder)
            tried[form] = validation_macro_f1(folder, next(iter(find_formats(folder))), validation)
            if tried[form] >= tried["fp32"] - MARGIN:
                break
    return tried


def validation_macro_f1(folder: Path, format: str, validation) -> float:
    classifier = open_artifact(folder, format, threads=torch.get_num_threads())
    logits = predict(classifier, classifier.encode(list(validation["text"])))
    return score(logits, np.asarray(validation["label"]))["macro_f1"]


if __name__ == "__main__":
    run(main)
