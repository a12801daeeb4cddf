"""CTranslate2's INT8 of an FP32 model: converted and opened with its defaults.

CTranslate2 computes only the encoder, so the classification head is computed here, in floating point. This is a peer
for benchmarks, available where `make benchmark` has installed CTranslate2.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np

from emotion.data.tokenization import TextEncoder
from emotion.inference.model_folder import load_trained_classifier, read_config, read_labels
from emotion.utils.command import quiet_logging
from emotion.utils.errors import UserError

FORMAT = PACKAGE = "ctranslate2"  # also the folder of its files
HEAD_FILE = "head.safetensors"
# Kind of encoder -> the head's two layers, by their names in model.safetensors, and the function between them
HEADS = {
    "bert": ("bert.pooler.dense", "classifier", np.tanh),
    "distilbert": ("pre_classifier", "classifier", lambda values: np.maximum(values, 0)),
    "roberta": ("classifier.dense", "classifier.out_proj", np.tanh),
}
# By CTranslate2's documentation of "int8": all linear layers and embeddings of the encoder
SCHEME = {"weights": "int8 per-channel", "activations": "int8 dynamic per-token", "embeddings": "int8 per-row"}


def is_installed() -> bool:
    """Whether CTranslate2, which is not in requirements.txt, is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def convert(folder: Path, target: Path) -> None:
    """Converts the FP32 weights of a folder to INT8, in ``target``, which has copies of its config and tokenizer.

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
        model.save_pretrained(target)
        # Transformers 5 no longer writes this field, which the converter needs: all positions are absolute.
        config = read_config(target) | {"position_embedding_type": "absolute"}
        (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        TransformersConverter(str(target)).convert(str(target / FORMAT), quantization="int8")
    (target / "model.safetensors").unlink()
    # From the model: the names in a file are those of the version of Transformers that wrote it.
    state = model.state_dict()
    names = [f"{layer}.{part}" for layer in HEADS[kind][:2] for part in ("weight", "bias")]
    save_file({name: state[name] for name in names}, target / FORMAT / HEAD_FILE)


class PeerClassifier:
    """A runtime as those in inference/runtimes.py: the encoder in CTranslate2's INT8, the head in NumPy's float32."""

    def __init__(self, folder: Path, threads: int, calls: int = 1):
        """Opens the result of `convert`; ``calls`` of `logits` may run in parallel and share the threads."""
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
