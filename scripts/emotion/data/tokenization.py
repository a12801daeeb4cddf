"""Tokenization: with `tokenizers` and NumPy alone for inference, with Transformers for training."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np

from emotion.utils.errors import UserError, one_line
from emotion.utils.files import check_file, read_fields

# How many characters of a text are read for each token that the model takes. The first number is three times what
# English has. The last one is a bound: an endless word, or a megabyte of spaces, never gives enough tokens.
LETTERS = (16, 128, 1024)
POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "camembert", "mpnet"}  # RoBERTa, and its descendants
LONGEST_TEXT = 512  # tokens, where neither the tokenizer nor the model has a limit
LARGEST_LIMIT = 10**9  # what a tokenizer without a limit says is far above it
MOST_WINDOWS = 64  # that a long text is divided into
SHARE = 16  # texts per thread at least: to hand over fewer would take as long
MAX_TOKENIZER_BYTES = 60_000_000  # XLM-RoBERTa's, with 250,000 tokens, has 17 million
# What is read of tokenizer_config.json
TOKEN = (str, dict)
SETTINGS: dict[str, type | tuple[type, ...]]
SETTINGS = {"model_max_length": (int, float), "pad_token": TOKEN, "cls_token?": (*TOKEN, type(None))}
SETTINGS |= {"padding_side?": str, "pad_token_type_id?": int}
SETTINGS["sep_token?"] = SETTINGS["cls_token?"]


class TextEncoder:
    """The tokenizer of a model folder, without Transformers, whose import takes longer than an answer.

    Texts are truncated at the `model_max_length` of the folder's tokenizer_config.json; ``threads`` tokenize many.

    Attributes:
        max_length: the number of tokens at which texts are truncated.
        pad_id: the id of the padding token.
        texts_cut: the number of texts that were truncated so far.

    Raises:
        UserError: if a file of the tokenizer is missing or does not fit the model.
    """

    def __init__(self, folder: Path, threads: int = 1):
        from tokenizers import Tokenizer

        self._threads = threads
        self._pool = ThreadPoolExecutor(max_workers=threads)  # which starts a thread when there is work for it
        self._file = Path(folder) / "tokenizer.json"
        settings = read_fields(self._file.with_name("tokenizer_config.json"), json.loads, SETTINGS)
        model = read_fields(self._file.with_name("config.json"), json.loads, {"vocab_size?": int})
        with one_line(f"{self._file} cannot be used"):
            check_file(self._file, folder, MAX_TOKENIZER_BYTES)
            self._tokenizer = Tokenizer.from_file(str(self._file))
            # tokenizer.json may hold the padding and the length of its last use. Texts are padded per batch, by `pad`,
            # and truncated as in training.
            self._tokenizer.no_padding()
            self.max_length = min(int(settings["model_max_length"]), LARGEST_LIMIT)
            self._tokenizer.enable_truncation(max_length=self.max_length)
            frame = self._tokenizer.encode("").ids
            self.token_types = TokenTypes(self._tokenizer)
        self._pads_left = settings.get("padding_side") == "left"
        self._rows = model.get("vocab_size")
        if self._rows is not None and not 0 < self._rows < MAX_TOKENIZER_BYTES:
            raise UserError(f"{self._file.with_name('config.json')}: 'vocab_size' cannot be {self._rows!r:.40}")
        self.pad_id = self._id_of(settings["pad_token"])
        for name in ("cls_token", "sep_token"):  # by which many encoders read a text
            if settings.get(name) and self._id_of(settings[name]) not in frame:
                raise UserError(f"{self._file} does not add the token {settings[name]} to a text")
        # The ids have no gaps, so that one look finds a tokenizer of a larger model.
        if self._rows and self._tokenizer.id_to_token(self._rows) is not None:
            raise UserError(f"{self._file} has more tokens than config.json names ({self._rows}); is it this model's?")
        self.texts_cut = 0

    def _id_of(self, token: str | dict) -> int:
        """The id of a token, which tokenizer_config.json gives as a string, or as a mapping that holds it."""
        content = token.get("content") if isinstance(token, dict) else token  # Transformers has written both
        token_id = self._tokenizer.token_to_id(str(content))
        if token_id is None:
            raise UserError(f"{self._file} has no token {content}, which tokenizer_config.json names")
        return token_id

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of each text, special tokens included, and adds to `texts_cut`."""
        return [encoding.ids for encoding in self._encode_beginnings(texts, self.max_length)]

    def windows(self, texts: list[str]) -> list[list[list[int]]]:
        """As a call, with the token ids of each part of a text: `MOST_WINDOWS` at most, of the model's length."""
        encodings = self._encode_beginnings(texts, MOST_WINDOWS * self.max_length)
        return [[part.ids for part in [first, *first.overflowing][:MOST_WINDOWS]] for first in encodings]

    def _encode_beginnings(self, texts: list[str], tokens: int) -> list:
        """The encodings of the first ``tokens`` of each text at least; those after `max_length` overflow."""
        beginnings = [shorten(text, self._tokenizer, tokens) for text in texts]
        with one_line(f"{self._file} cannot be used"):
            encodings = self._encode(beginnings)
        self.texts_cut += count_cut(encodings, texts, beginnings)
        return encodings

    def _encode(self, texts: list[str]) -> list:
        """The encoding of each text, in equal shares per thread."""
        encode = self._tokenizer.encode_batch_fast  # fast: without the offsets of the tokens
        threads = min(self._threads, len(texts) // SHARE)
        if threads < 2:
            return encode(texts)
        size = -(-len(texts) // threads)
        shares = [texts[start : start + size] for start in range(0, len(texts), size)]
        return list(chain.from_iterable(self._pool.map(encode, shares)))

    def takes(self, name: str) -> bool:
        """Whether a model in PyTorch needs this input: it sets token types to zeros by itself."""
        return name != "token_type_ids" or self.token_types.used

    def pieces(self, token_ids: list[int]) -> list[str]:
        """The tokens of these ids."""
        return [self._tokenizer.id_to_token(token_id) for token_id in token_ids]

    def pad(self, token_ids: list[list[int]]) -> dict[str, np.ndarray]:
        """Pads texts to one batch.

        Returns:
            `input_ids`, `attention_mask` and `token_type_ids`: int64 arrays (texts, longest).
        """
        shape = (len(token_ids), max(map(len, token_ids)))
        ids = np.full(shape, self.pad_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        types = np.zeros(shape, dtype=np.int64)
        for row, tokens in enumerate(token_ids):
            place = slice(shape[1] - len(tokens), None) if self._pads_left else slice(len(tokens))
            ids[row, place] = tokens
            mask[row, place] = 1
            if self.token_types.used:
                types[row, place] = self.token_types(len(tokens))
        # OpenVINO would take zeros for rows that the embedding table does not have.
        if self._rows and ids.max() >= self._rows:
            raise UserError(f"{self._file} gives the id {ids.max()}, and config.json names {self._rows} tokens")
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


class TokenTypes:
    """The token types of a text, from the `tokenizers.Tokenizer`: those of its special tokens may differ (XLNet).

    Attributes:
        used: whether any type is not 0.
    """

    def __init__(self, tokenizer):
        # Of one word, whatever it is: its tokens stand between the special ones.
        encoding = tokenizer.encode("a")
        inner = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
        first, last = (inner[0], inner[-1] + 1) if inner else (0, 0)
        self._before, self._after = encoding.type_ids[:first], encoding.type_ids[last:]
        self._inner = encoding.type_ids[first] if inner else 0
        self.used = any(encoding.type_ids)

    def __call__(self, length: int) -> list[int]:
        """Returns the types of a text of so many tokens, special ones included."""
        inner = length - len(self._before) - len(self._after)
        return ([*self._before, *[self._inner] * inner, *self._after])[-length:]


def shorten(text: str, tokenizer, max_length: int) -> str:
    """The beginning of a text that gives the same first tokens as the whole: a long one would take minutes.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        max_length: the number of tokens that are kept, special ones included.
    """
    # Longer and longer beginnings, until the tokens that are kept end before the last word: only that word may be
    # tokenized otherwise than in the whole text. Most texts are shorter than the first of them.
    for letters in LETTERS:
        length = letters * max_length
        if len(text) <= length:
            return text
        encoding = tokenizer.encode(text[:length])
        words = [encoding.word_ids, *(rest.word_ids for rest in encoding.overflowing)]
        words = [word for part in words for word in part if word is not None]
        if len(words) > max_length and words[max_length] < words[-1]:
            break
    return text[:length]


def count_cut(encodings: list, texts: list[str], beginnings: list[str]) -> int:
    """The number of texts that were truncated, as tokens or by `shorten`."""
    rows = zip(encodings, texts, beginnings, strict=True)
    return sum(bool(encoding.overflowing) or len(beginning) < len(text) for encoding, text, beginning in rows)


def load_tokenizer(path: str, max_length: int):
    """Loads the tokenizer of a folder or Hub id and sets its `model_max_length`, which is saved with it.

    A tokenizer without a padding token gets the one of config.json, or the token that ends a text.

    Args:
        max_length: in tokens; the tokenizer's own limit and the number of the model's positions may be smaller.

    Raises:
        UserError: if ``path`` has no tokenizer, or none of the library `tokenizers`.
    """
    from transformers import AutoConfig, AutoTokenizer

    with one_line(f"{path}: no tokenizer can be loaded from it"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(f"{path}: it has no tokenizer.json, and AutoTokenizer makes none; add one")
    if tokenizer.pad_token is None:
        own = None if config.pad_token_id is None else tokenizer.convert_ids_to_tokens(config.pad_token_id)
        tokenizer.pad_token = own or tokenizer.eos_token or tokenizer.sep_token or tokenizer.unk_token
    tokenizer.model_max_length = min(max_length, longest_text(tokenizer, config))
    return tokenizer


def longest_text(tokenizer, config) -> int:
    """The number of tokens that tokenizer and model both take; `LONGEST_TEXT` if neither has a limit."""
    # A model with relative positions has no number of them, or says -1 (XLNet).
    positions = getattr(config, "max_position_embeddings", None) or -1
    # RoBERTa numbers positions from the padding's id + 1 on, so the first rows of its table never hold a token.
    if config.model_type in POSITIONS_AFTER_PADDING:
        positions -= config.pad_token_id + 1
    limits = [limit for limit in (tokenizer.model_max_length, positions) if 0 < limit < LARGEST_LIMIT]
    return min(limits, default=LONGEST_TEXT)


def tokenize(rows, tokenizer, split: str):
    """Tokenizes the texts of a split with a tokenizer of Transformers, and prints how many were truncated.

    Returns:
        Rows with `label`, `input_ids` and the other inputs of the model: lists of int, not padded.
    """
    cut = 0

    def encode(batch):
        nonlocal cut
        texts, backend = batch["text"], tokenizer.backend_tokenizer
        beginnings = [shorten(text, backend, tokenizer.model_max_length) for text in texts]
        encoded = tokenizer(beginnings, truncation=True)  # not padded: the collator does that batch by batch
        cut += count_cut(encoded.encodings, texts, beginnings)
        return encoded

    # In memory, not through the library's cache: a result from there would skip `encode`, which counts.
    unused = [column for column in rows.column_names if column != "label"]  # the collator can pad numbers alone
    rows = rows.map(encode, batched=True, remove_columns=unused, keep_in_memory=True)
    if cut:
        print(f"{split}: {cut} of {len(rows)} texts are longer than {tokenizer.model_max_length} tokens and truncated")
    return rows
