"""A tiny Llama with random weights, to try the command without a Hub; no record of it enters `results/`."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from emotion.utils.base_model import RANDOM, BaseModel

NAME = "tiny-llama-with-random-weights"
VOCABULARY = 2000
END, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # of Qwen's template


def build_tiny_llama(texts: list[str], folder: Path) -> BaseModel:
    """Saves the model in ``folder``, with a tokenizer that is trained on the texts."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts)
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
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return BaseModel(name=NAME, path=str(folder), source=RANDOM)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=END)
