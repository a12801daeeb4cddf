"""Other ways to open an OpenVINO file than the one that answers users, timed to see what each gives."""

import threading
from pathlib import Path

from emotion.model.artifact import weights_of
from emotion.model.classifier import OpenVinoClassifier

import numpy as np

FORMAT = "openvino"
# What follows the format's name -> what the table says
FORMS = {
    "-f32": "float parts in float32",
    "-bf16": "float parts in bfloat16",
    "-one-stream": "one stream of all threads",
    "-static": "static shapes, a multiple of 8 tokens",
}
BUCKET = 8  # tokens: static lengths are multiples of it


def is_form(format: str) -> bool:
    """Whether the format is one of `FORMS` of OpenVINO's."""
    return format.removeprefix(FORMAT) in FORMS


def open_form(folder: Path, format: str, threads: int, calls: int) -> OpenVinoClassifier:
    """Opens the OpenVINO file of an artifact in another way; the arguments and errors are those of `open_artifact`."""
    weights, form = weights_of(folder, FORMAT), format.removeprefix(FORMAT)
    if form == "-static":
        return StaticShapes(folder, weights, threads)
    if form == "-one-stream":  # callers that compute side by side wait for each other
        return OpenVinoClassifier(folder, weights, threads)
    return OpenVinoClassifier(folder, weights, threads, calls, precision=form.removeprefix("-"))


class StaticShapes(OpenVinoClassifier):
    """Compiles a model for each shape of batch, so that OpenVINO prepares its kernels for one shape alone.

    Lengths are padded to multiples of `BUCKET`, or there would be too many models. One call computes at a time.
    """

    def __init__(self, folder: Path, weights: Path, threads: int):
        """Opens ``weights``, an .xml file in ``folder``."""
        import openvino

        super().__init__(folder, weights, threads)
        self._core = openvino.Core()
        self._core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
        self._weights, self._requests = weights, {}  # shape of the token ids -> a request of its own model
        self._turn = threading.Lock()

    def logits(self, token_ids: list[list[int]]) -> np.ndarray:
        """Returns float32 logits (texts, labels)."""
        arrays = self.encode.pad(token_ids)
        missing = -arrays["input_ids"].shape[1] % BUCKET
        # The mask is padded with zeros too, and hides the padding, whatever token that is.
        padded = {name: np.pad(arrays[name], ((0, 0), (0, missing))) for name in self._inputs}
        with self._turn:
            return self._request(padded["input_ids"].shape).infer(padded)["logits"].copy()

    def _request(self, shape: tuple[int, int]):
        if shape not in self._requests:
            model = self._core.read_model(self._weights)
            model.reshape({port.any_name: shape for port in model.inputs})
            self._requests[shape] = self._core.compile_model(model, "CPU").create_infer_request()
        return self._requests[shape]
