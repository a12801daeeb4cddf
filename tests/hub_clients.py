"""What strangers do with a published repository, each from an empty cache. Run in a process of its own.

    python hub_clients.py REPOSITORY FOLDER TEXTS.json

Prints one JSON object: for each client the largest gap between a logit of the repository and one of the folder that
was pushed, what each snippet of the card printed, and the answers that the Hub's widget shows.
"""

import contextlib
import io
import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline


def pipeline_scores(source: str, texts: list[str]) -> np.ndarray:
    answers = pipeline("text-classification", model=source)(texts, top_k=None)
    return np.array([[one["score"] for one in sorted(answer, key=lambda one: one["label"])] for answer in answers])


def onnx_logits(source: str, texts: list[str]) -> np.ndarray:
    local = Path(source).is_dir()
    names = ("onnx/model_quantized.onnx", "onnx/model.onnx")
    name = next(name for name in names if (FOLDER / name).is_file())
    path = Path(source) / name if local else hf_hub_download(source, name)
    session = onnxruntime.InferenceSession(path)
    tokens = AutoTokenizer.from_pretrained(source)(texts, padding=True, return_tensors="np")
    return session.run(["logits"], {one.name: tokens[one.name] for one in session.get_inputs()})[0]


def openvino_logits(source: str, texts: list[str]) -> np.ndarray:
    from optimum.intel import OVModelForSequenceClassification

    return torch_logits(source, texts, OVModelForSequenceClassification.from_pretrained(source, subfolder="openvino"))


def peft_logits(source: str, texts: list[str]) -> np.ndarray:
    from peft import PeftModel

    base = json.loads((FOLDER / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    labels = json.loads((FOLDER / "config.json").read_text())["id2label"]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    return torch_logits(source, texts, PeftModel.from_pretrained(model, source, subfolder="adapter").eval())


def torch_logits(source: str, texts: list[str], model=None) -> np.ndarray:
    model = model or AutoModelForSequenceClassification.from_pretrained(source)
    tokens = AutoTokenizer.from_pretrained(source)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens).logits.float().numpy()


def run_snippets(repository: str) -> dict[str, str]:
    """Executes every Python block of the card as it stands; maps its first line to what it printed."""
    printed = {}
    for block in re.findall(r"```python\n(.*?)```", ModelCard.load(repository).text, flags=re.DOTALL):
        if "optimum" in block and not find_spec("optimum"):  # it needs an older Transformers
            continue
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(block, "snippet", "exec"), {})  # noqa: S102
        printed[block] = output.getvalue()
    return printed


def ask_widget(repository: str, texts: list[str]) -> dict:
    """As the Hub's inference toolkit answers: a single text with its five best classes, of several the best each."""
    classify = pipeline("text-classification", model=repository)
    return {"single": [classify([text], top_k=5) for text in texts], "batched": [[one] for one in classify(texts)]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    REPOSITORY, FOLDER, TEXTS = sys.argv[1], Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    clients = {"transformers": torch_logits, "pipeline": pipeline_scores, "onnxruntime": onnx_logits}
    if (FOLDER / "openvino").is_dir() and find_spec("optimum"):
        clients["openvino"] = openvino_logits
    if (FOLDER / "adapter").is_dir():
        clients["peft"] = peft_logits
    gaps = {}
    for name, client in clients.items():
        gaps[name] = float(np.abs(client(REPOSITORY, TEXTS) - client(str(FOLDER), TEXTS)).max())
    report = {"gaps": gaps, "card": ModelCard.load(REPOSITORY).data.to_dict(), "snippets": run_snippets(REPOSITORY)}
    print(json.dumps(report | {"widget": ask_widget(REPOSITORY, TEXTS[:3])}))
