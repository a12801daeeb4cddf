"""`handler.py` of a published repository: the Hub's Inference Endpoints call it, and it answers from the ONNX file.

It stands alone: an endpoint has the repository and the packages of its requirements.txt, and not this project.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class EndpointHandler:
    """Opens the model once; each call is a request."""

    def __init__(self, path=""):
        folder = Path(path)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        limit = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"]
        self.labels = [config["id2label"][str(index)] for index in range(len(config["id2label"]))]
        self.has_several = config.get("problem_type") == "multi_label_classification"
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(min(int(limit), config.get("max_position_embeddings", int(limit))))
        names = ("model_quantized.onnx", "model.onnx")
        weights = next(folder / "onnx" / name for name in names if (folder / "onnx" / name).is_file())
        self.session = onnxruntime.InferenceSession(weights)

    def __call__(self, data: dict) -> list[list[dict]]:
        """Answers `{"inputs": text or list of texts, "parameters": {"top_k": ...}}`.

        Returns:
            For each text its classes with their scores, the most probable first, as the Hub's widget shows them.
        """
        inputs, top_k = data["inputs"], (data.get("parameters") or {}).get("top_k")
        return [self.rank(text)[:top_k] for text in ([inputs] if isinstance(inputs, str) else inputs)]

    def rank(self, text: str) -> list[dict]:
        """The classes of a text, the most probable first."""
        encoding = self.tokenizer.encode(text)
        tokens = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask}
        tokens["token_type_ids"] = encoding.type_ids
        asked = {one.name: np.array([tokens[one.name]], dtype=np.int64) for one in self.session.get_inputs()}
        logits = self.session.run(["logits"], asked)[0][0].astype(np.float64)
        scores = 1 / (1 + np.exp(-logits)) if self.has_several else np.exp(logits - logits.max())
        scores = scores if self.has_several else scores / scores.sum()
        ranking = [{"label": label, "score": float(score)} for label, score in zip(self.labels, scores, strict=True)]
        return sorted(ranking, key=lambda one: -one["score"])
