"""What answers: one class a runtime, all with `labels`, `encode(texts)` and `logits(token_ids)`.

Token ids are made with `tokenizers` and NumPy alone, the same for every runtime, and each runtime is imported when it
is opened: with ONNX Runtime neither torch nor transformers is loaded, and the first answer comes at once.
"""

import json
from pathlib import Path

import numpy as np
from utils_artifact import read_config
from utils_cli import UserError


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


def open_classifier(folder, **options):
    """`AutoModelForSequenceClassification.from_pretrained`, from safetensors and without remote code.

    Returns:
        The model and the loading report, which names the weights that were missing or did not fit.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    options |= {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    try:
        return AutoModelForSequenceClassification.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be opened: {str(error).strip().splitlines()[0]}") from error


def build_config(path: str, labels: list[str], attention_dropout: float | None):
    """The configuration of a base model as a classifier of these labels."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    trained = any("SequenceClassification" in name for name in config.architectures or [])
    if trained and config.num_labels != len(labels):
        raise UserError(f"{path} is a classifier of {config.num_labels} classes and the dataset has {len(labels)}")
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    if attention_dropout is not None:
        for name in {"attention_probs_dropout_prob", "attention_dropout"} & vars(
            config
        ).keys():  # BERT's, DistilBERT's
            setattr(config, name, attention_dropout)
    return config


def build_classifier(path: str, labels: list[str], attention_dropout: float | None, **options):
    """The encoder with a fresh classification head, or with its own where it was trained for as many classes."""
    config = build_config(path, labels, attention_dropout)
    model, report = open_classifier(path, config=config, dtype="float32", **options)
    encoder = f"{model.base_model_prefix}."
    absent = sorted(key for key in report["missing_keys"] if key.startswith(encoder) and "pooler" not in key)
    if absent:
        raise UserError(f"{path} holds no pretrained weights for {absent[0]} and {len(absent) - 1} more")
    return model


def load_trained_classifier(folder: Path, **options):
    """Opens a classifier and refuses a folder without a trained head.

    Raises:
        UserError: if weights are missing, do not fit the configuration, or cannot be read.
    """
    model, report = open_classifier(folder, ignore_mismatched_sizes=True, **options)  # what does not fit is named here
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise UserError(f"{folder}: {name} is {list(found)} in the weights and {list(expected)} by config.json")
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"{folder} is not a trained classifier: it has no weights for {missing}; fine-tune it first")
    return model


def read_labels(folder: Path, weights: Path, width: int) -> list[str]:
    """The label names of a model folder, in the order of its logits; ``width`` is how many of those there are."""
    names = read_config(folder).get("id2label") or {}
    if width != len(names):
        raise UserError(f"{weights} gives {width} logits and config.json names {len(names)} labels")
    return [names[key] for key in sorted(names, key=int)]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
