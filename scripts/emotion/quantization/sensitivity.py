"""The effect of quantizing on the answers of a model: of a whole file, and of each layer on its own."""

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from emotion.data.dataset import Task, get_split
from emotion.data.metrics import score
from emotion.inference.pretrained import load_trained_classifier
from emotion.inference.runtimes import OnnxClassifier, open_artifact, predict
from emotion.quantization.int8_onnx import quantize_onnx
from emotion.quantization.layers import Layers, Plan, find_layers
from emotion.utils.progress import Bar


@dataclass(frozen=True)
class Rows:
    """The texts to answer, with their labels and the number of threads to answer with.

    Attributes:
        labels: int (rows,).
    """

    texts: list[str]
    labels: np.ndarray
    threads: int

    def first(self, count: int | None) -> "Rows":
        """The first ``count`` rows; all for None."""
        return replace(self, texts=self.texts[:count], labels=self.labels[:count])


def validation_rows(task: Task, threads: int) -> Rows:
    """The rows of validation."""
    validation = get_split(task, "validation")
    return Rows(list(validation["text"]), np.asarray(validation["label"]), threads)


def logits_of(folder: Path, format: str, rows: Rows) -> np.ndarray:
    """The logits of a saved model, (rows, classes)."""
    classifier = open_artifact(folder, format, threads=rows.threads)
    return predict(classifier, classifier.encode(rows.texts))


def compare(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict:
    """The effect of quantizing: mean shift of a logit, rows whose predicted label changes, and change of macro F1.

    Args:
        before: logits (rows, classes) in FP32.
        after: the same, quantized.
        labels: int (rows,).
    """
    change = score(after, labels)["macro_f1"] - score(before, labels)["macro_f1"]
    return {
        "mean_logit_shift": float(np.abs(after - before).mean()),
        "flips": int((after.argmax(axis=-1) != before.argmax(axis=-1)).sum()),
        "macro_f1_change": change,
    }


def measure_layers(baseline: Path, rows: Rows, kinds: bool = True) -> list[dict]:
    """Quantizes one layer at a time, then one kind of layer at a time, and scores the effect of that alone.

    Args:
        kinds: whether whole kinds of layers are quantized too.

    Returns:
        An entry for each: `kind`, `layer` (null for a whole kind), `names`, and the result of `compare`.
    """
    model = load_trained_classifier(baseline)
    everything = find_layers(model)
    units = {key: names for key, names in group_layers(everything).items() if kinds or key[1] is not None}
    before = logits_of(baseline, "onnx", rows)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        # In ONNX Runtime, the quickest to write and to run: this is about layers, not about runtimes.
        path = Path(folder) / "model.onnx"
        for (kind, layer), names in Bar(units.items(), desc="layer by layer"):
            part = Layers(
                linear=[name for name in names if name in everything.linear],
                embeddings=[name for name in names if name in everything.embeddings],
            )
            quantize_onnx(Plan(baseline, model, part), path)
            classifier = OnnxClassifier(baseline, path, threads=rows.threads)
            after = predict(classifier, classifier.encode(rows.texts))
            found.append({"kind": kind, "layer": layer, "names": names} | compare(before, after, rows.labels))
    return found


def group_layers(layers: Layers) -> dict[tuple[str, str | None], list[str]]:
    """(Kind, layer) -> names of the modules to quantize at once; the layer is None for all layers of a kind.

    The layer of an embedding is 'embeddings', and of others the number of the encoder's layer.
    """
    units = {}
    for name in layers.embeddings:
        units[name.rpartition(".")[2], "embeddings"] = [name]
    kinds = {}
    for name in layers.linear:
        # "bert.encoder.layer.3.attention.self.query" -> "3" and "attention.self.query"
        number, part = re.search(r"\.(\d+)\.(.*)", name).groups()
        # Query, key and value are one product in the file, so they are one unit: "attention.self". A part without a
        # dot is a kind of its own.
        kind = part.rpartition(".")[0] or part
        units.setdefault((kind, number), []).append(name)
        kinds.setdefault(kind, [])
    for (kind, _), names in units.items():
        if kind in kinds:
            kinds[kind] += names
    for kind, names in kinds.items():
        units[kind, None] = names
    return units
