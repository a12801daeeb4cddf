"""LLaMA Factory, which trains language models, from this side: its dataset, its process, its tokens, its versions.

It pins older libraries than this project, so it runs in an environment of its own and nothing of it is imported.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import ROOT, relative, write_json, write_text
from emotion.common.recipe import Recipe
from emotion.model.likelihood import PromptEncoder
from emotion.task.source import BaseModel, hub_is_reachable

import yaml
from datasets import load_from_disk

ENVIRONMENT = ROOT / ".venv-llama-factory"
CLI = ENVIRONMENT / "bin" / "llamafactory-cli"
PACKAGES = ("llamafactory", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes")
IGNORED = -100  # label of a token that the loss does not count
CUTOFF = 2048  # tokens of a row, where a recipe names no cutoff_len


def write_dataset(splits: dict, labels: list[str], instruction: str, folder: Path) -> None:
    """Writes the rows in LLaMA Factory's alpaca format, and `dataset_info.json`, which names their files.

    Args:
        splits: name of a split -> its rows, with `text` and `label`.
    """
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run's rows
    files = {}
    for split, rows in splits.items():
        lines = []
        for text, label in zip(rows["text"], rows["label"], strict=True):
            lines.append({"instruction": instruction, "input": text, "output": labels[label]})
        write_json(folder / f"{split}.json", lines)
        files[f"emotion_{split}"] = {"file_name": f"{split}.json"}
    write_json(folder / "dataset_info.json", files)


def train(recipe: Recipe, base: BaseModel, work: Path, on_first_loss=None) -> None:
    """Starts LLaMA Factory and prints what it says; if it fails, ends this process with the same status.

    Args:
        on_first_loss: called once, at the first loss, when all rows are tokenised; its error ends the training.
    """
    shutil.rmtree(work / "tokens", ignore_errors=True)  # it would train on these and not on the dataset
    if "resume_from_checkpoint" not in recipe.values:
        shutil.rmtree(work / "training", ignore_errors=True)  # it would go on with an older training's checkpoint
    places = {
        "model_name_or_path": base.path if base.source == "hub" else str(Path(base.path).resolve()),
        "dataset_dir": str(work / "data"),
        "tokenized_path": str(work / "tokens"),
        "output_dir": str(work / "training"),
    }
    # With the flags in it: as words of a command line, LLaMA Factory would take `no` for false.
    write_text(work / "train.yaml", yaml.safe_dump(recipe.values | places, sort_keys=False))
    environment = {"LLAMAFACTORY_VERBOSITY": "WARN", **os.environ}  # else every file that it reads gets a line
    if not hub_is_reachable():
        environment["HF_HUB_OFFLINE"] = "1"  # it would try for minutes
    process = subprocess.Popen(
        [CLI, "train", work / "train.yaml"],
        cwd=ROOT,  # what the recipe's paths start from
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if on_first_loss and "'loss'" in line:
                on_first_loss()
                on_first_loss = None
    except BaseException:  # of the check, or Ctrl+C: nobody waits for the training any more
        process.terminate()
        raise
    if process.wait():  # it has said why
        sys.exit(process.returncode)


def check_tokens(splits: dict, labels: list[str], encoder: PromptEncoder, recipe: Recipe, tokens: Path) -> None:
    """Compares every row as LLaMA Factory has tokenised it with what the scorer will make of the same row.

    Raises:
        UserError: naming the first row that differs, in its tokens or in those that the loss counts.
    """
    trained, answers = load_from_disk(str(tokens)), [encoder.answer(label, whole=True) for label in labels]
    for split, rows in splits.items():
        cut, prompts = 0, encoder(rows["text"])
        columns = (trained[split]["input_ids"], trained[split]["labels"])
        for row, (prompt, label, ids, counted) in enumerate(zip(prompts, rows["label"], *columns, strict=True)):
            whole = prompt + answers[label]
            if len(whole) > recipe.values.get("cutoff_len", CUTOFF):
                cut += 1
            elif ids != whole or counted != [IGNORED] * len(prompt) + answers[label]:
                raise UserError(
                    f"{split} row {row}: LLaMA Factory's template does not write what the tokenizer's chat template "
                    "writes; name the model's own with --template, and its system message with --default_system. What "
                    f"is trained stays in {relative(tokens.parent)}"
                )
        if cut:
            print(f"{split}: {cut} of {len(rows)} prompts are longer than cutoff_len and were cut")


def trained_with() -> dict[str, str]:
    """Name -> version of the packages that decide the training, as they are installed in its environment."""
    folders = map(str, ENVIRONMENT.glob("lib/python*/site-packages"))
    found = {one.name: one.version for one in importlib.metadata.distributions(path=list(folders))}
    return {name: found[name] for name in PACKAGES}
