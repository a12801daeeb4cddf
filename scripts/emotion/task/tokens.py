"""Texts to token ids: for answering with `tokenizers` and NumPy alone, for training with the rows' own columns."""

import json
from pathlib import Path

from emotion.common.errors import UserError
from emotion.task.dataset import RowsArguments, Task, get_split, select_train_rows
from emotion.task.source import BaseModel

import numpy as np


class TextEncoder:
    """The tokenizer of a model folder: cuts at the folder's own length, pads to the longest text of a batch."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        folder = Path(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (folder / name).is_file():
                raise UserError(f"{folder} has no tokenizer ({name} is missing)")
        try:
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            pad_token = settings["pad_token"]
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(max_length=int(settings["model_max_length"]))
        except Exception as error:  # `tokenizers` has no class of its own for what it cannot read
            raise UserError(f"{folder}: its tokenizer cannot be used: {type(error).__name__} {error}") from error
        self.pad_id = self._tokenizer.token_to_id(pad_token["content"] if isinstance(pad_token, dict) else pad_token)
        self.texts_cut = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of each text; `texts_cut` counts those that were too long."""
        encodings = self._tokenizer.encode_batch(texts)
        self.texts_cut += sum(bool(encoding.overflowing) for encoding in encodings)
        return [encoding.ids for encoding in encodings]

    def pieces(self, token_ids: list[int]) -> list[str]:
        """The word pieces that the ids stand for."""
        return [self._tokenizer.id_to_token(one) for one in token_ids]

    def pad(self, token_ids: list[list[int]]) -> dict[str, np.ndarray]:
        """Returns int64 arrays (texts, longest) named as models take them; token types are all zero."""
        shape = (len(token_ids), max(map(len, token_ids)))
        ids = np.full(shape, self.pad_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for row, tokens in enumerate(token_ids):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros(shape, dtype=np.int64)}


def load_tokenizer(path: str, max_length: int):
    """Loads the tokenizer and gives it the length at which texts are cut, so that the saved folder cuts there too.

    The length is the least of ``max_length``, what the tokenizer allows and what the model has positions for.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer can be loaded from it: {str(error).splitlines()[0]}") from error
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    if config.model_type in {
        "roberta",
        "xlm-roberta",
        "camembert",
        "mpnet",
    }:  # their positions start after the padding
        positions -= config.pad_token_id + 1
    tokenizer.model_max_length = min(max_length, tokenizer.model_max_length, positions)
    return tokenizer


def tokenize(rows, tokenizer, split: str):
    """Adds word pieces (`input_ids` and what else the model takes) to the rows; reports how many texts were cut."""
    cut = 0

    def encode(batch):
        nonlocal cut
        encoded = tokenizer(batch["text"], truncation=True)
        cut += sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        return encoded

    # In memory: texts that were cut must be counted every time, this takes a second, and no folder is written to.
    keep = [column for column in rows.column_names if column not in {"text", "label"}]
    rows = rows.map(encode, batched=True, remove_columns=["text", *keep], keep_in_memory=True)
    if cut:
        print(f"{split}: {cut} of {len(rows)} texts are longer than {tokenizer.model_max_length} word pieces and cut")
    return rows


def load_training_rows(task: Task, base: BaseModel, arguments: RowsArguments, seed: int) -> tuple:
    """The rows to learn from, the base model's tokenizer, and the word pieces of those rows and of validation."""
    rows = select_train_rows(get_split(task, "train"), arguments, seed=seed)
    tokenizer = load_tokenizer(base.path, arguments.max_length)
    validation = get_split(task, "validation")
    return rows, tokenizer, tokenize(rows, tokenizer, "train"), tokenize(validation, tokenizer, "validation")
