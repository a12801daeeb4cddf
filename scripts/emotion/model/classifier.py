"""What answers: one class a runtime, all with `labels`, `encode(texts)` and `logits(token_ids)`.

Token ids are made with `tokenizers` and NumPy alone, the same for every runtime, and each runtime is imported when it
is opened: with ONNX Runtime neither torch nor transformers is loaded, and the first answer comes at once.
"""

from pathlib import Path

from emotion.common.errors import UserError
from emotion.model.artifact import read_labels, weights_of
from emotion.model.pretrained import load_trained_classifier
from emotion.task.tokens import TextEncoder

import numpy as np


class OnnxClassifier:
    """Token ids to logits with ONNX Runtime on the CPU."""

    def __init__(self, folder: Path, weights: Path, threads: int):
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)  # errors only
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no public class for it
            raise UserError(f"{weights} cannot be opened by ONNX Runtime: {str(error).splitlines()[0]}") from error
        self._inputs = [value.name for value in self._session.get_inputs()]
        self.labels = read_labels(folder, weights, width=self._session.get_outputs()[0].shape[-1])
        self.encode = TextEncoder(folder)

    def logits(self, token_ids: list[list[int]]) -> np.ndarray:
        """Returns float32 logits (texts, labels)."""
        arrays = self.encode.pad(token_ids)
        return self._session.run(["logits"], {name: arrays[name] for name in self._inputs})[0]


class OpenVinoClassifier:
    """Token ids to logits with OpenVINO on the CPU, tuned for latency as its users are told to."""

    def __init__(self, folder: Path, weights: Path, threads: int):
        import openvino

        core = openvino.Core()
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
        try:
            model = core.compile_model(core.read_model(weights), "CPU")
        except RuntimeError as error:
            raise UserError(f"{weights} cannot be opened by OpenVINO: {str(error).splitlines()[0]}") from error
        self.float_precision = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()  # f32, or bf16
        self._request = model.create_infer_request()
        self._inputs = [port.any_name for port in model.inputs]
        self.labels = read_labels(folder, weights, width=model.output(0).get_partial_shape()[1].get_length())
        self.encode = TextEncoder(folder)

    def logits(self, token_ids: list[list[int]]) -> np.ndarray:
        """Returns float32 logits (texts, labels)."""
        arrays = self.encode.pad(token_ids)
        return self._request.infer({name: arrays[name] for name in self._inputs})["logits"].copy()


class TorchClassifier:
    """Token ids to logits with PyTorch, eager, opened as any user would: with `from_pretrained`."""

    def __init__(self, folder: Path, weights: Path, threads: int, dtype: str = "auto"):
        import torch

        torch.set_num_threads(threads)
        variant = "bf16" if ".bf16." in weights.name else None
        self.model = load_trained_classifier(folder, variant=variant, dtype=dtype).eval()
        self.labels = read_labels(folder, weights, width=self.model.config.num_labels)
        self.encode = TextEncoder(folder)

    def compile(self) -> None:
        """From now on the model's forward pass is compiled code, for any number and length of texts."""
        import torch
        import torch._inductor.config

        torch._inductor.config.freezing = True  # the weights become constants, packed once
        self.model.forward = torch.compile(self.model.forward, dynamic=True)

    def logits(self, token_ids: list[list[int]]) -> np.ndarray:
        """Returns float32 logits (texts, labels)."""
        import torch

        arrays = self.encode.pad(token_ids)
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(arrays[name]) for name in ("input_ids", "attention_mask")}
            return self.model(**inputs).logits.float().numpy()


class ModelInMemory(TorchClassifier):
    """A model that lies in no folder yet, as something that answers."""

    def __init__(self, model, encoder: TextEncoder):
        self.model, self.encode, self.labels = model.eval(), encoder, list(model.config.id2label.values())


def open_artifact(folder: Path, format: str, threads: int):
    """Opens one format of a folder as a classifier."""
    from emotion.model.classifier import OnnxClassifier, OpenVinoClassifier, TorchClassifier

    weights = weights_of(folder, format)
    if format == "onnx":
        return OnnxClassifier(folder, weights, threads=threads)
    if format == "openvino":
        return OpenVinoClassifier(folder, weights, threads=threads)
    dtype = {"pytorch": "float32", "bf16": "bfloat16"}.get(format, "auto")  # quantized weights come with their own
    return TorchClassifier(folder, weights, threads=threads, dtype=dtype)


def predict(classifier, token_ids: list[list[int]], batch_size: int = 32) -> np.ndarray:
    """Logits of all texts, float32 (texts, labels) in their order; batches are sorted by length to save padding."""
    logits = np.empty((len(token_ids), len(classifier.labels)), dtype=np.float32)
    for batch in _batches_by_length(token_ids, batch_size):
        logits[batch] = classifier.logits([token_ids[row] for row in batch])
    return logits


def _batches_by_length(token_ids: list[list[int]], batch_size: int) -> list[np.ndarray]:
    order = np.argsort([len(ids) for ids in token_ids], kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
