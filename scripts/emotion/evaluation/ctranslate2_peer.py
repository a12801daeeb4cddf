"""CTranslate2's INT8 of an FP32 artifact: converted with its defaults, opened, and described from its own file.

CTranslate2 computes encoders alone, so that the head of the classifier is computed here, in floats. It is a peer to
compare with and no format of an artifact: only a benchmark opens it, and only where `make benchmark` has installed it.
"""

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np

from emotion.data.tokenization import TextEncoder
from emotion.evaluation.inspection import Matrix
from emotion.inference.model_folder import read_config, read_labels
from emotion.inference.pretrained import load_trained_classifier
from emotion.utils.command import quiet_logging
from emotion.utils.errors import UserError

FORMAT = PACKAGE = "ctranslate2"  # also the folder of its files
MODEL_FILE, HEAD_FILE = "model.bin", "head.safetensors"
# Kind of encoder -> the head's two layers, by their names in model.safetensors, and the function between them
HEADS = {
    "bert": ("bert.pooler.dense", "classifier", np.tanh),
    "distilbert": ("pre_classifier", "classifier", lambda values: np.maximum(values, 0)),
    "roberta": ("classifier.dense", "classifier.out_proj", np.tanh),
}
DTYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")  # by their numbers in a file


def is_installed() -> bool:
    """Whether this Python has CTranslate2, which requirements.txt leaves out."""
    return importlib.util.find_spec(PACKAGE) is not None


def convert(folder: Path, made: Path) -> None:
    """Converts the FP32 weights of a folder to INT8.

    Args:
        made: where the files are written; it holds a copy of the folder's config.json and tokenizer already.

    Raises:
        UserError: if CTranslate2 cannot compute this kind of encoder.
    """
    kind = read_config(folder)["model_type"]
    if kind not in HEADS:
        raise UserError(f"{folder}: CTranslate2 cannot convert '{kind}', only {', '.join(HEADS)}; leave it out")
    from ctranslate2.converters import TransformersConverter
    from safetensors.torch import save_file

    # Opened and saved again, not linked: the file may hold bfloat16, which NumPy and so the converter do not know.
    model = load_trained_classifier(folder, dtype="float32")
    with quiet_logging():
        model.save_pretrained(made)
        # Transformers 5 knows absolute positions alone and no longer writes this word, which the converter asks for.
        config = read_config(made) | {"position_embedding_type": "absolute"}
        (made / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        TransformersConverter(str(made)).convert(str(made / FORMAT), quantization="int8")
    (made / "model.safetensors").unlink()
    # From the model: the names in a file are those of the version of Transformers that wrote it.
    state = model.state_dict()
    names = [f"{layer}.{part}" for layer in HEADS[kind][:2] for part in ("weight", "bias")]
    save_file({name: state[name] for name in names}, made / FORMAT / HEAD_FILE)


class PeerClassifier:
    """Token ids to logits: the encoder with CTranslate2 in INT8, the head with NumPy in float32.

    It has the three members of the classes in model/classifier.py.
    """

    def __init__(self, folder: Path, threads: int, calls: int = 1):
        """Opens what `convert` made; ``calls`` of `logits` may run side by side, and divide the threads among them."""
        import ctranslate2
        from safetensors.numpy import load_file

        self._encoder = ctranslate2.Encoder(
            str(folder / FORMAT), compute_type="int8", inter_threads=calls, intra_threads=threads // calls
        )
        first, last, self._between = HEADS[read_config(folder)["model_type"]]
        head = load_file(folder / FORMAT / HEAD_FILE)
        self._first = head[f"{first}.weight"].T, head[f"{first}.bias"]
        self._last = head[f"{last}.weight"].T, head[f"{last}.bias"]
        self.labels = read_labels(folder, folder / FORMAT / HEAD_FILE, width=len(head[f"{last}.bias"]))
        self.encode = TextEncoder(folder)

    def logits(self, token_ids: list[list[int]]) -> np.ndarray:
        """Returns float32 logits (texts, labels)."""
        hidden = self._encoder.forward_batch(token_ids).last_hidden_state  # it pads by itself
        first_tokens = np.asarray(hidden)[:, 0]
        (weight, bias), (last_weight, last_bias) = self._first, self._last
        return self._between(first_tokens @ weight + bias) @ last_weight + last_bias


def list_matrices(folder: Path) -> tuple[list[Matrix], list[Matrix]]:
    """The linear layers and the embeddings of a converted folder, counted in its file."""
    first, last, _ = HEADS[read_config(folder)["model_type"]]
    linear, embeddings = [Matrix(first, "float32"), Matrix(last, "float32")], []
    for name, dtype, array in _read_variables(folder / FORMAT / MODEL_FILE):
        # The pooler stands in BERT's file too. Here the head computes it.
        if array.ndim != 2 or not name.endswith(("/weight", "/encodings")) or name.startswith("pooler"):
            continue
        largest = int(np.abs(array.astype(int)).max()) if dtype == "int8" else None
        if "/embeddings" in name or name.endswith("/encodings"):  # of words and token types, and of positions
            embeddings.append(Matrix(name, dtype, "per-row", largest=largest))
            continue
        # The first product of an attention layer holds query, key and value, side by side.
        layers = 3 if name.endswith("attention/linear_0/weight") else 1
        linear += [Matrix(name, dtype, "per-channel", "int8 dynamic per-token", largest)] * layers
    return linear, embeddings


def _read_variables(path: Path):
    """Yields name, type and array of each variable in a file of CTranslate2, as its `ModelSpec.save` writes them."""
    content, position = path.read_bytes(), 0

    def take(form: str):
        nonlocal position
        (value,) = struct.unpack_from(form, content, position)
        position += struct.calcsize(form)
        return value

    def take_string() -> str:
        length = take("<H")  # with a zero at its end
        return take(f"<{length}s")[:-1].decode()

    take("<I"), take_string(), take("<I")  # versions of the file and of its kind of model
    for _ in range(take("<I")):
        name = take_string()
        shape = [take("<I") for _ in range(take("<B"))]
        dtype = DTYPES[take("<B")]
        size = take("<I")
        stored = "uint16" if dtype == "bfloat16" else dtype  # NumPy has no bfloat16
        yield name, dtype, np.frombuffer(content, stored, size // np.dtype(stored).itemsize, position).reshape(shape)
        position += size
