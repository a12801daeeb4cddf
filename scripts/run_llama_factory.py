"""Fine-tunes a small generative model with QLoRA by LLaMA Factory, to compare with the encoders.

LLaMA Factory has an environment of its own, which `make .venv-llama-factory/.ready` sets up. This script writes the
dataset, runs `llamafactory-cli train`, and saves the model folder, `weights/llama-qlora`:

    model.safetensors            the base model with its linear layers in NF4 (bitsandbytes)
    adapter/                     the adapter, for PEFT
    chat_template.jinja          the template of the prompt; config.json holds the instruction

All flags that this script does not have are LLaMA Factory's. run_evaluation.py takes the likeliest class name as the
label of a text.

    python scripts/run_llama_factory.py
    python scripts/run_llama_factory.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --template smollm2 \
        --default_system "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""

import emotion  # noqa: F401 (first: it sets what the libraries below read while they load)

# isort: split

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from emotion.data.dataset import (
    DEFAULT_DATASET,
    DrawArguments,
    Task,
    get_split,
    load_task,
    select_train_rows,
    with_validation,
)
from emotion.data.metrics import four_digits
from emotion.inference.likelihood import PromptEncoder, has_chat_template
from emotion.inference.model_folder import ARTIFACT, artifact_metadata, data_provenance, new_artifact, open_model
from emotion.training.llama_factory import CLI, build_tiny_llama, check_tokens, train, trained_with, write_dataset
from emotion.utils.arguments import Recipe, flag, parse_with_other_flags
from emotion.utils.base_model import BaseModel, find_base_model, hub_is_reachable
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, check_replaceable, output_lock, read_json, relative, write_json
from emotion.utils.machine import has_bf16

RECIPE = ROOT / "configs" / "llama_factory.yaml"
WORK = ROOT / "build" / "llama_factory"  # the dataset, the rows as LLaMA Factory tokenises them, its checkpoints
# The recipe may not change these: the base is saved in NF4 with double quantization, and no remote code runs.
REQUIRED = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "quantization_method": "bnb",
    "quantization_bit": 4,
    "quantization_type": "nf4",
    "double_quantization": True,
    "trust_remote_code": False,
}
SECRETS = ("token", "api_key")  # ends of the names of flags that hold one
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass
class LlamaFactoryArguments(DrawArguments):
    """The flags of this script; all others are LLaMA Factory's."""

    dataset_name: str = flag(DEFAULT_DATASET, "Dataset: a Hub id or a local folder.")
    dataset_config_name: str | None = flag(None, "Configuration of that dataset.")
    instruction: str = flag(
        "Which emotion does this text express? Answer with one of these words: {labels}.",
        "First line of each prompt; {labels} stands for the class names.",
    )
    use_tiny_model: bool = flag(False, "Where the Hub cannot be reached, train a tiny Llama of random weights.")
    output_dir: str = flag("weights/llama-qlora", "Folder in which the model is saved.")


def main(argv=None) -> None:
    arguments, recipe, own_flags = parse_with_other_flags((LlamaFactoryArguments,), RECIPE, argv)
    folder = Path(arguments.output_dir)
    check(recipe, folder)
    use_cpu = recipe.values.get("use_cpu", not torch.cuda.is_available())
    device = {"use_cpu": use_cpu, "bf16": recipe.values.get("bf16", has_bf16(use_cpu))}
    recipe = replace(recipe, values=recipe.values | device)
    work, tiny = work_of(folder), arguments.use_tiny_model and not hub_is_reachable()
    # The rows of a second run would replace those that LLaMA Factory trains on.
    with output_lock(folder), output_lock(work):
        # Load the dataset, then the base model
        task = with_validation(load_task(arguments.dataset_name, arguments.dataset_config_name))
        rows = select_train_rows(get_split(task, "train"), arguments, seed=recipe.values["seed"])
        if tiny:
            base = build_tiny_llama(rows["text"], work / "base")
        else:
            base = find_base_model(recipe.values["model_name_or_path"], recipe.values.get("model_revision"))
        print(f"base model: {base.name} ({base.source})   dataset: {task.name} ({task.source})")

        # Train
        instruction = arguments.instruction.replace("{labels}", ", ".join(task.labels))
        train_rows(task, rows, base, instruction, recipe, work)

        # Save
        recipe = replace(recipe, values=recipe.values | own_flags | {"model_name_or_path": base.name})
        variant, seed = "tiny-llama-qlora" if tiny else "llama-qlora", recipe.values["seed"]
        summary, provenance = summarize(work / "training", recipe), data_provenance(base, task, rows)
        metadata = artifact_metadata(variant, recipe, seed, provenance, summary)
        save(base, task.labels, instruction, work / "training", folder, metadata)
        print(f"{base.name}: validation loss {four_digits(summary['validation_loss'])}")


def train_rows(task: Task, rows, base: BaseModel, instruction: str, recipe: Recipe, work: Path) -> None:
    """Writes the dataset, runs LLaMA Factory, and checks that it trained on the tokens of the evaluation."""
    splits = {"train": rows, "validation": get_split(task, "validation")}
    write_dataset(splits, task.labels, instruction, work / "data")

    def check_rows(tokenizer: Path | str) -> None:
        check_tokens(splits, task.labels, PromptEncoder(tokenizer, instruction), recipe, work / "tokens")

    # A wrong template is found at the first loss, not after hours; a base without a template gets one in training.
    train(recipe, base, work, partial(check_rows, base.path) if has_chat_template(base.path) else None)
    check_rows(work / "training")


def save(base: BaseModel, labels: list[str], instruction: str, training: Path, folder: Path, metadata: dict) -> None:
    """Saves the model folder, and removes the checkpoints of the training."""
    metadata |= {"instruction": instruction, "trained_with": trained_with()}
    with new_artifact(folder, metadata) as output:
        metadata["kept_in_float"] = save_base(base, labels, instruction, metadata["recipe"]["bf16"], output)
        save_trained(training, base, output)
    shutil.rmtree(training)


def work_of(folder: Path) -> Path:
    """Returns the folder of dataset and checkpoints: build/llama_factory/llama-qlora for weights/llama-qlora."""
    folder = folder.resolve()
    if folder.is_relative_to(ROOT / "weights"):
        return WORK / folder.relative_to(ROOT / "weights")
    return WORK / "-".join(folder.parts[1:])  # the whole path, so that no two folders share one


def check(recipe: Recipe, folder: Path) -> None:
    """Raises `UserError` if the environment is missing, or recipe or folder do not fit."""
    if not CLI.is_file():
        raise UserError(f"no {relative(CLI)}; run make .venv-llama-factory/.ready once, which sets it up (8 GB)")
    for key, value in REQUIRED.items():
        if recipe.values.get(key) != value:
            raise UserError(f"{recipe.path}: {key} must be {value}, as in {relative(RECIPE)}")
    for key in ("model_name_or_path", "seed"):
        if key not in recipe.values:
            raise UserError(f"{recipe.path}: no {key}")
    for key, value in recipe.values.items():
        if key.endswith(SECRETS) and value:
            raise UserError(f"{key}: others can read a command line or a recipe; run `hf auth login`, or set HF_TOKEN")
    if recipe.values.get("push_to_hub"):
        raise UserError("push_to_hub: LLaMA Factory would publish the adapter alone; leave it out")
    check_replaceable(folder, ARTIFACT)


def summarize(training: Path, recipe: Recipe) -> dict:
    """Returns the entry of recipe.yaml on the training."""
    results, state = read_json(training / "all_results.json"), read_json(training / "trainer_state.json")
    return {
        "validation_macro_f1": None,  # LLaMA Factory measures the loss only
        "validation_loss": state["best_metric"],  # per token of the answers
        "train_loss": results["train_loss"],
        "steps": state["global_step"],
        "seconds": round(results["train_runtime"], 1),
        "precision": "bf16" if recipe.values["bf16"] else "fp32",
    }


def save_base(base: BaseModel, labels: list[str], instruction: str, bf16: bool, folder: Path) -> dict[str, str]:
    """Saves the base model in NF4, as it was during training; its config.json holds labels and instruction.

    Returns:
        For recipe.yaml: linear layers and embeddings that stay in float -> the reason.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model, _ = open_model("AutoModelForCausalLM", base.path, device_map="cpu", dtype=dtype, quantization_config=config)
    label2id = {label: index for index, label in enumerate(labels)}
    model.config.update({"id2label": dict(enumerate(labels)), "label2id": label2id, "instruction": instruction})
    model.save_pretrained(folder)
    floats = {torch.nn.Linear, torch.nn.Embedding}  # without the subclasses of bitsandbytes
    kept = [name for name, module in model.named_modules() if type(module) in floats]
    return dict.fromkeys(kept, "bitsandbytes rounds neither embeddings nor the output layer")


def save_trained(training: Path, base: BaseModel, folder: Path) -> None:
    """Copies adapter, tokenizer and chat template from the output of LLaMA Factory."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(training / name, folder / name)
    adapter = folder / "adapter"
    adapter.mkdir()
    shutil.copyfile(training / "adapter_model.safetensors", adapter / "adapter_model.safetensors")
    settings = read_json(training / "adapter_config.json")
    settings["base_model_name_or_path"] = base.name  # the Hub id, not a path of this machine
    write_json(adapter / "adapter_config.json", settings)


if __name__ == "__main__":
    run(main)
