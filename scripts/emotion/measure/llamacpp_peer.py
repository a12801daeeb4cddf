"""llama.cpp's Q8_0 of an FP32 BERT: written as a GGUF file, quantized with its defaults, opened, and described.

It is a peer to compare with and no format of an artifact: only a benchmark opens it, and only where
`make peers-llamacpp` has built it.
"""

import ctypes
import importlib.util
import logging
from pathlib import Path
from queue import SimpleQueue

from emotion.common.errors import UserError
from emotion.measure.inspection import Matrix
from emotion.model.artifact import read_config, read_labels, weights_of
from emotion.model.classifier import TOKENS, batches_by_tokens
from emotion.task.tokens import TextEncoder

import numpy as np

FORMAT = "llamacpp"  # also the folder of its file
PACKAGE, MAKE_TARGET = "llama-cpp-python", "peers-llamacpp"  # whose source is built, and what builds it
MODEL_FILE = "model-q8_0.gguf"
EMBEDDINGS = {"token_embd.weight", "token_types.weight", "position_embd.weight"}
# The file is written here since llama.cpp's own converter drops BERT's pooler, and the labels with it. llama.cpp can
# compute it: its head has two layers, which the package gguf knows by the names that they have in RoBERTa.
HEAD = {"bert.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"}


def is_installed() -> bool:
    """Whether this Python has llama.cpp and the writer of its files, which requirements.txt leaves out."""
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def _load_library():
    """llama.cpp, without the hundreds of lines that it prints about each file."""
    import llama_cpp

    # Above errors, for which this binding takes llama.cpp's warnings
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
    return llama_cpp


def convert(folder: Path, made: Path) -> None:
    """Converts the FP32 weights of a folder to Q8_0.

    Args:
        made: where the file is written.

    Raises:
        UserError: if the encoder is no BERT.
    """
    if (kind := read_config(folder)["model_type"]) != "bert":
        raise UserError(f"{folder}: '{kind}' is not converted for llama.cpp, only bert; leave it out")
    llama_cpp = _load_library()
    floats, target = made / "floats.gguf", made / FORMAT / MODEL_FILE
    target.parent.mkdir()
    _write_floats(folder, floats)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    if llama_cpp.llama_model_quantize(str(floats).encode(), str(target).encode(), options):
        raise UserError(f"{folder}: llama.cpp cannot quantize it; leave it out")
    floats.unlink()


def _write_floats(folder: Path, path: Path) -> None:
    """Writes the FP32 weights of a BERT, under the names that llama.cpp knows."""
    import gguf
    from safetensors.numpy import load_file

    config, weights = read_config(folder), weights_of(folder, "pytorch")
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")  # it gets token ids, and never a text
    writer.add_pooling_type(gguf.PoolingType.RANK)  # the first token, then the head
    writer.add_classifier_output_labels(list(config["id2label"].values()))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, values in load_file(weights).items():
        layer, _, part = name.rpartition(".")
        known = names.get_name(HEAD.get(layer, layer.removeprefix("bert.")))
        writer.add_tensor(f"{known}.{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class PeerClassifier:
    """Token ids to logits with llama.cpp, the head included.

    It has the three members of the classes in model/classifier.py. What it opens is freed with the process.
    """

    def __init__(self, folder: Path, threads: int, calls: int = 1):
        """Opens what `convert` made; ``calls`` of `logits` may run side by side, and divide the threads among them."""
        llama_cpp, path = _load_library(), folder / FORMAT / MODEL_FILE
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self._library, options = llama_cpp, llama_cpp.llama_context_default_params()
        options.embeddings = True  # what the pooling gives, here the logits
        options.n_batch = options.n_ubatch = TOKENS  # BERT takes no longer text
        options.n_seq_max = TOKENS // 2  # texts of one call: the shortest has two tokens
        options.n_threads = options.n_threads_batch = threads // calls
        self._idle = SimpleQueue()  # contexts that compute nothing now: a context serves one caller at a time
        for _ in range(calls):
            self._idle.put(llama_cpp.llama_init_from_model(model, options))
        self.labels = read_labels(folder, path, width=llama_cpp.llama_model_n_cls_out(model))
        self.encode = TextEncoder(folder)

    def logits(self, token_ids: list[list[int]]) -> np.ndarray:
        """Returns float32 logits (texts, labels)."""
        logits = np.empty((len(token_ids), len(self.labels)), dtype=np.float32)
        context = self._idle.get()
        try:
            # Larger batches would cost more: attention takes all tokens of a call, and masks those of other texts.
            for rows in batches_by_tokens(token_ids):
                logits[rows] = self._compute(context, [token_ids[row] for row in rows])
            return logits
        finally:
            self._idle.put(context)

    def _compute(self, context, token_ids: list[list[int]]) -> np.ndarray:
        """Float32 logits (texts, labels) of texts of together at most `TOKENS` tokens, none of them padding."""
        count = len(token_ids)
        tokens = np.concatenate(token_ids).astype(np.int32)
        texts, one_each = np.arange(count, dtype=np.int32), np.ones(len(tokens), dtype=np.int32)
        wanted = np.ones(len(tokens), dtype=np.int8)
        # Each token has a pointer to the number of its text. llama.cpp counts the positions in each text by itself.
        pointers = np.repeat(texts.ctypes.data + texts.itemsize * np.arange(count), [len(ids) for ids in token_ids])
        batch = self._library.llama_batch(
            n_tokens=len(tokens),
            token=_pointer(tokens, ctypes.c_int32),
            n_seq_id=_pointer(one_each, ctypes.c_int32),
            seq_id=_pointer(pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(wanted, ctypes.c_int8),
        )
        self._library.llama_encode(context, batch)
        answers = [self._library.llama_get_embeddings_seq(context, text) for text in range(count)]
        return np.stack([np.ctypeslib.as_array(answer, (len(self.labels),)) for answer in answers])


def _pointer(array: np.ndarray, kind):
    """The address of an array, as C's pointer to ``kind``; the caller keeps the array."""
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def list_matrices(folder: Path) -> tuple[list[Matrix], list[Matrix]]:
    """The linear layers and the embeddings of a converted folder, counted in its file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

    linear, embeddings = [], []
    for tensor in GGUFReader(folder / FORMAT / MODEL_FILE).tensors:
        if len(tensor.shape) != 2:
            continue
        if tensor.tensor_type == GGMLQuantizationType.Q8_0:
            values, size = GGML_QUANT_SIZES[tensor.tensor_type]  # a block: its scale in 2 bytes, then the integers
            integers = tensor.data.reshape(-1, size)[:, size - values :].view(np.int8)
            blocks, largest = f"in blocks of {values}", int(np.abs(integers.astype(int)).max())
            matrix = Matrix(tensor.name, "int8", blocks, f"int8 dynamic {blocks}", largest)
        else:
            matrix = Matrix(tensor.name, tensor.data.dtype.name)
        (embeddings if tensor.name in EMBEDDINGS else linear).append(matrix)
    return linear, embeddings
