"""One class per runtime, opened from a model folder, a weights file in it and a number of threads.

All have the same members:

- `labels` (`list[str]`): the names of the classes, in the order of the logits.
- `encode(texts)`: the token ids of each text, the same for every runtime.
- `logits(token_ids)`: float32 array (texts, labels).

They raise `UserError` if the file cannot be opened. A runtime is imported when one of its files is opened: ONNX
Runtime needs neither torch nor transformers.
"""

import mmap
import re
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from emotion.data.tokenization import TextEncoder
from emotion.inference.model_folder import load_trained_classifier, read_labels, weights_of
from emotion.utils.errors import UserError, one_line

# Tokens per batch of many texts, padding included: the activations of a layer stay in the processor's cache.
TOKENS = 512
# The inputs that a graph may have, int64 (texts, longest) each
INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


def check_graph(weights: Path, inputs: dict, outputs: dict) -> None:
    """Raises `UserError` unless a graph, by the types and ranks, takes what `TextEncoder.pad` gives for logits."""
    if "input_ids" not in inputs:
        raise UserError(f"{weights} does not take input_ids; it takes {', '.join(inputs) or 'nothing'}")
    for name, shape in inputs.items():
        if name not in INPUTS:
            raise UserError(f"{weights} takes an input {name}, which texts do not give; they give {', '.join(INPUTS)}")
        if shape != ("int64", 2):
            raise UserError(f"{weights}: its input {name} is {shape[0]} of {shape[1]} dimensions, not int64 of 2")
    if outputs.get("logits") != ("float32", 2):
        raise UserError(f"{weights} does not give logits, float32 of 2 dimensions; it gives {outputs or 'nothing'}")


class OnnxClassifier:
    """ONNX Runtime on the CPU; several threads may call it side by side, and ``threads`` compute each call."""

    def __init__(self, folder: Path, weights: Path, threads: int):
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)  # its errors come as exceptions too
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1  # the graph is a chain: there are no two operators to run side by side
        self._weights = weights
        with one_line(f"{weights} cannot be opened by ONNX Runtime"):
            check_is_one_file(weights)
            self._session = onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
        inputs, outputs = onnx_types(self._session.get_inputs()), self._session.get_outputs()
        check_graph(weights, inputs, onnx_types(outputs))
        self._inputs = list(inputs)  # not every encoder takes token types
        (logits,) = [value for value in outputs if value.name == "logits"]
        self.labels = read_labels(folder, weights, width=logits.shape[-1])
        self.encode = TextEncoder(folder, threads)

    def logits(self, token_ids: list[list[int]]) -> np.ndarray:
        """Returns float32 logits (texts, labels)."""
        arrays = self.encode.pad(token_ids)
        with one_line(f"{self._weights} cannot answer"):
            return self._session.run(["logits"], {name: arrays[name] for name in self._inputs})[0]


def check_is_one_file(weights: Path) -> None:
    """Raises `UserError` if an ONNX file leaves weights to other files, which nobody has compared with a checksum."""
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # The field that names the other file; before it is its length, in one byte or in a longer form.
        if any(content[found.start() - 1] in b"\x08\0" for found in re.finditer(b"location", content)):
            raise UserError(f"{weights} has its weights in another file; save it as one file")


def onnx_types(values) -> dict[str, tuple[str, int]]:
    """Name -> data type and number of dimensions, of the inputs or outputs of an ONNX session."""
    types = {"tensor(int64)": "int64", "tensor(float)": "float32"}
    return {value.name: (types.get(value.type, value.type), len(value.shape)) for value in values}


class OpenVinoClassifier:
    """OpenVINO on the CPU: ``calls`` of `logits` run side by side and divide the threads; others wait.

    ``precision``, of the operators that are not quantized, is `f32` or `bf16`; OpenVINO's choice if None.
    """

    def __init__(self, folder: Path, weights: Path, threads: int, calls: int = 1, precision: str | None = None):
        import openvino

        core = openvino.Core()
        # LATENCY gives all threads to one call. A stream is a share of the threads, and computes one call.
        share: dict[str, str | int] = {"PERFORMANCE_HINT": "LATENCY"} if calls == 1 else {"NUM_STREAMS": calls}
        if precision:
            share["INFERENCE_PRECISION_HINT"] = precision
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads, **share})
        self._weights = weights
        with one_line(f"{weights} cannot be opened by OpenVINO"):
            with weights.open("rb") as file:
                if b"<net" not in file.read(1000):  # it would try the formats of other libraries
                    raise ValueError("it is no graph in XML")
            graph = core.read_model(weights)
            inputs = openvino_types(graph.inputs)
            check_graph(weights, inputs, openvino_types(graph.outputs))
            width = graph.output("logits").get_partial_shape()[1].to_string()  # "?" where it is not fixed
            model = core.compile_model(graph, "CPU")
        # OpenVINO's choice depends on the processor, and is recorded.
        self.float_precision = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self._idle: SimpleQueue = SimpleQueue()  # of requests: each serves one caller at a time
        for _ in range(calls):
            self._idle.put(model.create_infer_request())
        self._inputs = list(inputs)
        self.labels = read_labels(folder, weights, width=int(width) if width.isdigit() else width)
        self.encode = TextEncoder(folder, threads)

    def logits(self, token_ids: list[list[int]]) -> np.ndarray:
        """Returns float32 logits (texts, labels)."""
        arrays = self.encode.pad(token_ids)
        request = self._idle.get()
        try:
            # A copy, since the request's next call writes into the same memory.
            with one_line(f"{self._weights} cannot answer"):
                return request.infer({name: arrays[name] for name in self._inputs})["logits"].copy()
        finally:
            self._idle.put(request)


def openvino_types(ports) -> dict[str, tuple[str, int]]:
    """Name -> data type and number of dimensions, of the inputs or outputs of an OpenVINO graph."""
    described = {}
    for port in ports:
        rank = port.get_partial_shape().rank
        dimensions = rank.get_length() if rank.is_static else 0
        # A port may have more names than the one that is asked for.
        name = next(iter(port.names & (INPUTS | {"logits"})), port.any_name)
        described[name] = (port.get_element_type().to_dtype().name, dimensions)
    return described


class TorchClassifier:
    """PyTorch, eager: a `model` of `from_pretrained`, of its ``dtype``. The threads are set for the whole process."""

    def __init__(self, folder: Path, weights: Path, threads: int, dtype: str = "auto"):
        import torch

        torch.set_num_threads(threads)
        self._weights = weights
        variant = "bf16" if ".bf16." in weights.name else None  # Transformers' term
        # `open_artifact` has compared the files with their checksums.
        self.model = load_trained_classifier(folder, verify=False, variant=variant, dtype=dtype).eval()
        self.encode = TextEncoder(folder, threads)
        # Asked of the model itself: Transformers lets a head of another width pass where weights are quantized.
        # Of a few tokens, since Funnel cannot pool a single one.
        width = self.logits([[self.encode.pad_id] * min(8, self.encode.max_length)]).shape[-1]
        self.labels = read_labels(folder, weights, width)

    def compile(self) -> None:
        """Compiles the model's forward pass, for any number and length of texts; the first call is slow."""
        import torch
        import torch._inductor.config

        torch._inductor.config.freezing = True  # the weights become constants, packed once
        # Without `dynamic` each new length would be compiled anew, in the middle of a measurement.
        self.model.forward = torch.compile(self.model.forward, dynamic=True)

    def logits(self, token_ids: list[list[int]]) -> np.ndarray:
        """Returns float32 logits (texts, labels)."""
        import torch

        arrays = self.encode.pad(token_ids)
        with torch.inference_mode(), one_line(f"{self._weights} cannot answer"):
            inputs = {name: torch.from_numpy(array) for name, array in arrays.items() if self.encode.takes(name)}
            return self.model(**inputs).logits.float().numpy()  # NumPy has no bfloat16


class GenerativeClassifier(TorchClassifier):
    """A language model with an adapter, ``weights``: the logits are the log-likelihoods of the class names."""

    def __init__(self, folder: Path, weights: Path, threads: int):
        import torch

        from emotion.inference.likelihood import AnswerTree, PromptEncoder, open_adapted

        torch.set_num_threads(threads)
        self.model = open_adapted(folder, weights.parent)
        self.labels = read_labels(folder, weights, width=self.model.config.num_labels)
        prompts = PromptEncoder(folder)
        self._answers = AnswerTree([prompts.answer(label) for label in self.labels])
        self.encode = prompts  # type: ignore[assignment]  # it pads nothing: `AnswerTree` arranges the tokens

    def logits(self, token_ids: list[list[int]]) -> np.ndarray:
        """Returns float32 log-likelihoods (texts, labels)."""
        return self._answers.log_likelihoods(self.model, token_ids)


class ModelInMemory(TorchClassifier):
    """A model that is not saved yet, with the threads that the process has."""

    def __init__(self, model, encoder: TextEncoder):
        self.model, self.encode, self.labels = model.eval(), encoder, list(model.config.id2label.values())
        self._weights = Path("the model in memory")


def open_artifact(folder: Path, format: str, threads: int, calls: int = 1, verify: bool = True):
    """Opens one format of a model folder; raises `UserError` if it or its runtime is missing, or a file is damaged.

    ``calls`` of `logits` run side by side and share the threads; PyTorch runs one. ``verify`` compares the files with
    SHA256SUMS.
    """
    weights = weights_of(folder, format, verify)
    try:
        if format == "onnx":
            return OnnxClassifier(folder, weights, threads=threads // calls)  # these threads serve one call
        if format == "openvino":
            return OpenVinoClassifier(folder, weights, threads=threads, calls=calls)
        if format == "adapter":
            return GenerativeClassifier(folder, weights, threads=threads)
        dtype = {"pytorch": "float32", "bf16": "bfloat16"}.get(format, "auto")  # quantized weights have their own
        return TorchClassifier(folder, weights, threads=threads, dtype=dtype)
    except ModuleNotFoundError as error:  # requirements-inference.txt has ONNX Runtime alone
        raise UserError(f"{weights} needs {error.name}; pip install -r requirements.txt installs it") from error


def predict(classifier, token_ids: list[list[int]], batch_size: int = 32) -> np.ndarray:
    """Logits of all texts, in batches: float32 (texts, labels), in the order of the texts."""
    logits = np.empty((len(token_ids), len(classifier.labels)), dtype=np.float32)
    for batch in batches_by_length(token_ids, batch_size):
        logits[batch] = classifier.logits([token_ids[row] for row in batch])
    return logits


def batches_by_length(token_ids: list[list[int]], batch_size: int) -> list[np.ndarray]:
    """The indices of the texts in batches of similar length, for little padding: int64 arrays (batch_size,)."""
    order = np.argsort(list(map(len, token_ids)), kind="stable")  # stable: the same batches on every machine
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batches_by_tokens(token_ids: list[list[int]]) -> list[np.ndarray]:
    """The indices of the texts in batches of nearly the same length and at most `TOKENS` tokens, int64 arrays.

    They depend on the texts alone: dynamic INT8 takes the range of its activations over the whole batch.
    """
    lengths = [len(ids) for ids in token_ids]
    batches: list[list[int]] = []
    for row in np.argsort(lengths, kind="stable"):
        shortest = lengths[batches[-1][0]] if batches else 0
        # A batch takes one more text if that stays within the tokens, and pads the others by an eighth at most.
        if not batches or lengths[row] * (len(batches[-1]) + 1) > TOKENS or lengths[row] > shortest + shortest // 8:
            batches.append([])
        batches[-1].append(row)
    return [np.array(batch) for batch in batches]
