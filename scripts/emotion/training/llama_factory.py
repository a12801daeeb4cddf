"""LLaMA Factory, which trains language models, from this side: its dataset, its process, its tokens, its versions.

It pins older libraries than this project, so it runs in an environment of its own and nothing of it is imported.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from datasets import load_from_disk
from transformers.trainer_utils import get_last_checkpoint

from emotion.inference.likelihood import PromptEncoder
from emotion.utils.base_model import BaseModel, hub_is_reachable
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, read_json, relative, sha256, write_json, write_text
from emotion.utils.recipe import Recipe

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

    Raises:
        UserError: if the training that it shall resume was another one, or something has killed LLaMA Factory.
    """
    places = {
        "model_name_or_path": base.path if base.source == "hub" else str(Path(base.path).resolve()),
        "dataset_dir": str(work / "data"),
        "tokenized_path": str(work / "tokens"),
        "output_dir": str(work / "training"),
    }
    values = recipe.values | places
    values["resume_from_checkpoint"] = prepare_training(values, work)
    # With the flags in it: as words of a command line, LLaMA Factory would take `no` for false.
    write_text(work / "train.yaml", yaml.safe_dump(values, sort_keys=False))
    # Unbuffered: into a pipe, its lines would come many at once, and the first loss long after it was reached.
    # Verbosity: every file that it reads would get a line.
    environment = {"LLAMAFACTORY_VERBOSITY": "WARN", **os.environ, "PYTHONUNBUFFERED": "1"}
    if not hub_is_reachable():
        environment["HF_HUB_OFFLINE"] = "1"  # it would try for minutes
    process = subprocess.Popen(
        [CLI, "train", work / "train.yaml"],
        cwd=ROOT,  # what the recipe's paths start from
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",  # a byte that is no text shall not end hours of training
    )
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if on_first_loss and "'loss'" in line:
                on_first_loss()
                on_first_loss = None
    except BaseException:  # of the check, or Ctrl+C: nobody waits for the training any more
        process.terminate()
        process.wait()  # the caller lets go of the folder, in which it may still be writing
        raise
    if process.wait() < 0:
        raise UserError(f"LLaMA Factory was ended by signal {-process.returncode}; is the memory enough?")
    if process.returncode:  # it has said why
        sys.exit(process.returncode)


def prepare_training(values: dict, work: Path) -> str | None:
    """Removes what an earlier training has left, or finds the checkpoint that this one goes on from.

    Args:
        values: what LLaMA Factory will read; `resume_from_checkpoint` may be `last`, as in the other scripts.

    Returns:
        The folder of the last checkpoint; None to start at the beginning.

    Raises:
        UserError: if the earlier training had another recipe or other rows.
    """
    shutil.rmtree(work / "tokens", ignore_errors=True)  # it would train on these and not on the dataset
    wanted = values.pop("resume_from_checkpoint", None)
    if wanted not in (None, False, "last"):
        raise UserError(f"--resume_from_checkpoint {wanted}: it takes 'last'")
    training, started = work / "training", work / "started.json"
    rows = {path.name: sha256(path) for path in sorted((work / "data").iterdir())}
    now = {"values": values, "sha256_of_rows": rows}
    checkpoint = get_last_checkpoint(training) if wanted and training.is_dir() else None
    if checkpoint and read_json(started) != now:
        raise UserError(
            f"{relative(training)} is of another recipe or of other rows; repeat that command, or leave out "
            "--resume_from_checkpoint to begin anew"
        )
    if wanted and not checkpoint:
        print(f"nothing to resume in {relative(training)}; starting from the beginning")
    if not checkpoint:
        shutil.rmtree(training, ignore_errors=True)  # LLaMA Factory would go on from its checkpoint by itself
        write_json(started, now)
    return checkpoint


def check_tokens(splits: dict, labels: list[str], encoder: PromptEncoder, recipe: Recipe, tokens: Path) -> None:
    """Compares every row as LLaMA Factory has tokenised it with what the scorer will make of the same row.

    Raises:
        UserError: naming the split with other rows, or the first row that differs in its tokens or in those that the
            loss counts.
    """
    trained, answers = load_from_disk(str(tokens)), [encoder.answer(label, whole=True) for label in labels]
    for split, rows in splits.items():
        if split not in trained or len(trained[split]) != len(rows):
            found = len(trained[split]) if split in trained else 0
            raise UserError(
                f"{split}: LLaMA Factory took {found} rows of {len(rows)}; leave out max_samples and packing, "
                "and name both parts of the dataset as configs/llama_factory.yaml does"
            )
        cut, prompts = 0, encoder(rows["text"])
        columns = (trained[split]["input_ids"], trained[split]["labels"])
        for row, (prompt, label, ids, counted) in enumerate(zip(prompts, rows["label"], *columns, strict=True)):
            whole = prompt + answers[label]
            if len(whole) > recipe.values.get("cutoff_len", CUTOFF):
                cut += 1
            elif ids != whole:
                raise UserError(
                    f"{split} row {row}: LLaMA Factory's template does not write what the tokenizer's chat template "
                    "writes; name the model's own with --template, and its system message with --default_system. What "
                    f"is trained stays in {relative(tokens.parent)}"
                )
            elif counted != [IGNORED] * len(prompt) + answers[label]:
                raise UserError(
                    f"{split} row {row}: the loss counts other tokens than those of the answer; leave out "
                    "train_on_prompt and mask_history"
                )
        if cut:
            print(f"{split}: {cut} of {len(rows)} prompts are longer than cutoff_len and were cut")


def trained_with() -> dict[str, str]:
    """Name -> version of the packages that decide the training, as they are installed in its environment."""
    folders = map(str, ENVIRONMENT.glob("lib/python*/site-packages"))
    found = {one.name: one.version for one in importlib.metadata.distributions(path=list(folders))}
    return {name: found[name] for name in PACKAGES}
