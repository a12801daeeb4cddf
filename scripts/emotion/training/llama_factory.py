"""LLaMA Factory as a process: the dataset that it reads, its training, and a check of its tokens.

It pins older libraries than this project, so that it runs in an environment of its own. A tiny Llama with random
weights is there to try the command without a Hub; no record of it enters `results/`.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from datasets import load_from_disk
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import get_last_checkpoint

from emotion.inference.likelihood import PromptEncoder
from emotion.utils.arguments import Recipe
from emotion.utils.base_model import RANDOM, BaseModel, hub_is_reachable
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, read_json, relative, sha256, write_json, write_text

ENVIRONMENT = ROOT / ".venv-llama-factory"
CLI = ENVIRONMENT / "bin" / "llamafactory-cli"
PACKAGES = ("llamafactory", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes")
IGNORED = -100  # label of a token that the loss ignores
CUTOFF = 2048  # tokens of a row, where a recipe names no cutoff_len
END, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # of Qwen's template


def build_tiny_llama(texts: list[str], folder: Path) -> BaseModel:
    """Saves a tiny Llama in ``folder``, with a byte-level BPE tokenizer that is trained on the texts."""
    torch.manual_seed(0)
    bpe = ByteLevelBPETokenizer()
    special = [END, TURN, END_OF_TURN]
    bpe.train_from_iterator(texts, vocab_size=2000, min_frequency=0, show_progress=False, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()), eos_token=END_OF_TURN, pad_token=END
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,  # a multiple of the 64 weights that share a scale in NF4
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped-query attention
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return BaseModel(name="tiny-llama-with-random-weights", path=str(folder), source=RANDOM)


def write_dataset(splits: dict, labels: list[str], instruction: str, folder: Path) -> None:
    """Writes the rows of each split in the alpaca format, and `dataset_info.json`, which names their files."""
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run's rows
    files = {}
    for split, rows in splits.items():
        pairs = zip(rows["text"], rows["label"], strict=True)
        lines = [{"instruction": instruction, "input": text, "output": labels[label]} for text, label in pairs]
        write_json(folder / f"{split}.json", lines)
        files[f"emotion_{split}"] = {"file_name": f"{split}.json"}
    write_json(folder / "dataset_info.json", files)


def train(recipe: Recipe, base: BaseModel, work: Path, on_first_loss=None) -> None:
    """Runs `llamafactory-cli train` and prints its output; if it fails, ends this process with the same status.

    Args:
        work: folder of dataset, tokens and checkpoints.
        on_first_loss: called at the first loss, when all rows are tokenized; its error ends the training.

    Raises:
        UserError: if the checkpoint belongs to another training, or LLaMA Factory was killed.
    """
    values = recipe.values | {
        "model_name_or_path": base.path if base.source == "hub" else str(Path(base.path).resolve()),
        "dataset_dir": str(work / "data"),
        "tokenized_path": str(work / "tokens"),
        "output_dir": str(work / "training"),
    }
    values["resume_from_checkpoint"] = prepare_training(values, work)
    # A file, since LLaMA Factory takes the word `no` of a command line for false.
    write_text(work / "train.yaml", yaml.safe_dump(values, sort_keys=False))
    # Unbuffered: into a pipe, lines would come many at once, and the first loss late.
    environment = {"LLAMAFACTORY_VERBOSITY": "WARN", **os.environ, "PYTHONUNBUFFERED": "1"}
    if not hub_is_reachable():
        environment["HF_HUB_OFFLINE"] = "1"  # it would try for minutes
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    # From the root, to which the recipe's paths are relative
    process = subprocess.Popen([CLI, "train", work / "train.yaml"], cwd=ROOT, env=environment, **options)
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if on_first_loss and "'loss'" in line:
                on_first_loss()
                on_first_loss = None
    except BaseException:  # of the check, or Ctrl+C
        process.terminate()
        process.wait()  # before the caller releases the output lock
        raise
    if process.wait() < 0:
        raise UserError(f"LLaMA Factory was ended by signal {-process.returncode}; is the memory enough?")
    if process.returncode:
        sys.exit(process.returncode)


def prepare_training(values: dict, work: Path) -> str | None:
    """Finds the checkpoint to resume from; without one, returns None and removes what an earlier training has left.

    Args:
        values: the flags of LLaMA Factory; `resume_from_checkpoint` is a path, or True for the last checkpoint.

    Raises:
        UserError: if the checkpoint belongs to another recipe or to other rows.
    """
    shutil.rmtree(work / "tokens", ignore_errors=True)  # it would train on these and not on the dataset
    resume, training, run_file = values.pop("resume_from_checkpoint", None), work / "training", work / "started.json"
    rows = {path.name: sha256(path) for path in sorted((work / "data").iterdir())}
    run = {"values": values, "sha256_of_rows": rows}
    if resume and resume is not True and Path(resume).resolve().parent != training.resolve():
        raise UserError(f"--resume_from_checkpoint {resume}: name one in {relative(training)}, or true for the last")
    checkpoint = get_last_checkpoint(training) if resume and training.is_dir() else None
    checkpoint = resume if checkpoint and resume is not True else checkpoint
    if checkpoint and read_json(run_file) != run:
        what = f"{relative(training)} belongs to another recipe or to other rows"
        raise UserError(f"{what}; repeat that command, or leave out --resume_from_checkpoint")
    if resume and not checkpoint:
        print(f"nothing to resume in {relative(training)}; starting from the beginning")
    if not checkpoint:
        shutil.rmtree(training, ignore_errors=True)  # LLaMA Factory would resume from it by itself
        write_json(run_file, run)
    return checkpoint


def check_tokens(splits: dict, labels: list[str], encoder: PromptEncoder, recipe: Recipe, tokens: Path) -> None:
    """Checks that LLaMA Factory trains on the very tokens that the evaluation will see.

    Raises:
        UserError: naming the split with other rows, or the first row that differs in its tokens or labels.
    """
    trained = load_from_disk(str(tokens))
    answers = [encoder.answer(label, whole=True) for label in labels]
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
                what = f"{split} row {row}: the loss counts other tokens than those of the answer"
                raise UserError(f"{what}; leave out train_on_prompt and mask_history")
        if cut:
            print(f"{split}: {cut} of {len(rows)} prompts are longer than cutoff_len and were cut")


def trained_with() -> dict[str, str]:
    """Returns the versions of the packages in LLaMA Factory's environment."""
    folders = map(str, ENVIRONMENT.glob("lib/python*/site-packages"))
    versions = {package.name: package.version for package in importlib.metadata.distributions(path=list(folders))}
    return {name: versions[name] for name in PACKAGES}
