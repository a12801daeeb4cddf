"""What strangers do with a published repository, each from an empty cache. Run in a process of its own.

    python hub_clients.py REPOSITORY FOLDER TEXTS.json

Prints one JSON object: for each client the largest gap between a logit of the repository and one of the folder that
was pushed, what each snippet of the card printed, and the answers of a server like that behind the Hub's widget.
"""

import contextlib
import io
import json
import re
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from huggingface_hub import ModelCard, hf_hub_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline


def transformers_logits(source: str, texts: list[str]) -> np.ndarray:
    return torch_logits(AutoModelForSequenceClassification.from_pretrained(source), source, texts)


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

    model = OVModelForSequenceClassification.from_pretrained(source, subfolder="openvino")
    return torch_logits(model, source, texts)


def peft_logits(source: str, texts: list[str]) -> np.ndarray:
    from peft import PeftModel

    base = json.loads((FOLDER / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    labels = json.loads((FOLDER / "config.json").read_text())["id2label"]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    return torch_logits(PeftModel.from_pretrained(model, source, subfolder="adapter").eval(), source, texts)


def torch_logits(model, source: str, texts: list[str]) -> np.ndarray:
    tokens = AutoTokenizer.from_pretrained(source)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**tokens).logits.float().numpy()


def run_snippets(repository: str) -> dict[str, str]:
    """Executes every Python block of the card as it stands; maps its first line to what it printed."""
    printed = {}
    for block in re.findall(r"```python\n(.*?)```", ModelCard.load(repository).text, flags=re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(block, "snippet", "exec"), {})  # noqa: S102
        printed[block] = output.getvalue()
    return printed


class Inference(BaseHTTPRequestHandler):
    """As the Hub's inference toolkit answers: a single text with its five best classes, of several the best each."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        inputs, parameters = asked["inputs"], asked.get("parameters", {})
        if isinstance(inputs, str):
            inputs, parameters = [inputs], {"top_k": 5} | parameters
        answers = self.server.pipeline(inputs, **parameters)
        body = json.dumps([one if isinstance(one, list) else [one] for one in answers]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def ask_widget(repository: str, texts: list[str]) -> dict:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Inference)
    server.pipeline = pipeline("text-classification", model=repository)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def post(inputs):
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.server_port}", data=json.dumps({"inputs": inputs}).encode()
        )
        return json.load(urllib.request.urlopen(request))

    return {"single": [post(text) for text in texts], "batched": post(texts)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    REPOSITORY, FOLDER, TEXTS = sys.argv[1], Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    clients = {"transformers": transformers_logits, "pipeline": pipeline_scores, "onnxruntime": onnx_logits}
    if (FOLDER / "openvino").is_dir():
        clients["openvino"] = openvino_logits
    if (FOLDER / "adapter").is_dir():
        clients["peft"] = peft_logits
    gaps = {
        name: float(np.abs(client(REPOSITORY, TEXTS) - client(str(FOLDER), TEXTS)).max())
        for name, client in clients.items()
    }
    card = ModelCard.load(REPOSITORY).data.to_dict()
    report = {"gaps": gaps, "card": card, "snippets": run_snippets(REPOSITORY)}
    print(json.dumps(report | {"widget": ask_widget(REPOSITORY, TEXTS[:3])}))
