"""Opens the released models with other libraries and older versions, each in an environment of its own.

Each answers 300 test texts, whose labels are compared with the published predictions. An environment is removed before
the next is made: together they would take 60 GB. Results of clients that are not named stay.

    python studies/clients_study.py
    python studies/clients_study.py "onnxruntime 1.17.3" "@huggingface/transformers 3.8.1"
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emotion.data.dataset import get_split, load_task_of
from emotion.evaluation.protocol import choose_timed
from emotion.evaluation.record import read_predictions
from emotion.inference.model_folder import SCORES_OF_OPENED, read_config
from emotion.utils.arguments import COUNT, flag, parse_args
from emotion.utils.base_model import read_recipe_of
from emotion.utils.command import Bar, run
from emotion.utils.files import RECOMMENDED, ROOT, read_json, write_json
from emotion.utils.machine import describe_run

PYTHON = """
import json, sys
import numpy as np
from tokenizers import Tokenizer
folder, texts = sys.argv[1], json.load(sys.stdin)
names = list(json.load(open(f"{folder}/config.json"))["id2label"].values())
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
def feed(text):
    ids = np.array([tokenizer.encode(text).ids])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
%s
print(json.dumps([answer(text) for text in texts]))
"""
NODE = """
import { text } from "node:stream/consumers";
import { env, pipeline } from "@huggingface/transformers";
const [, folder, name] = process.argv[2].match("(.*/)(.*)");
Object.assign(env, { localModelPath: folder, allowRemoteModels: false });
%s
const answers = [];
for (const one of JSON.parse(await text(process.stdin))) answers.push((await model(one))[0].label);
console.log(JSON.stringify(answers));
"""
PIPELINE = """
from transformers import AutoTokenizer, pipeline
classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
answer = lambda text: classify(text)[0]["label"]
"""
# Library -> the lines that open a folder, of which the page shows the last, and those that answer a text
PROGRAMS = {
    "onnxruntime": (
        'import onnxruntime\nmodel = onnxruntime.InferenceSession(f"{folder}/onnx/model_quantized.onnx")',
        'answer = lambda text: names[model.run(["logits"], feed(text))[0].argmax()]',
    ),
    "openvino": (
        'import openvino\nmodel = openvino.Core().compile_model(f"{folder}/openvino/openvino_model.xml", "CPU")',
        "inputs = [one.any_name for one in model.inputs]\n"
        "answer = lambda text: names[model({name: feed(text)[name] for name in inputs})[0].argmax()]",
    ),
    "transformers": (
        "from transformers import AutoModelForSequenceClassification\n"
        "model = AutoModelForSequenceClassification.from_pretrained(folder)",
        PIPELINE,
    ),
    "optimum-intel": (
        "from optimum.intel import OVModelForSequenceClassification\n"
        'model = OVModelForSequenceClassification.from_pretrained(folder, subfolder="openvino")',
        PIPELINE,
    ),
    "optimum-onnx": (
        "from optimum.onnxruntime import ORTModelForSequenceClassification\n"
        'model = ORTModelForSequenceClassification.from_pretrained(folder, subfolder="onnx")',
        PIPELINE,
    ),
    "sentence-transformers": (
        "from sentence_transformers import CrossEncoder\nmodel = CrossEncoder(folder)",
        "answer = lambda text: names[model.predict(text).argmax()]",
    ),
    "@huggingface/transformers": (
        'const model = await pipeline("text-classification", name, { dtype: "q8" });',
        "",
    ),
}
TORCH = "torch torchao bitsandbytes accelerate"
ONNX = {variant: f"predictions/{variant}-onnx" for variant in ("ptq", "qat", "qat-int4", "qat-int2")}
OPENVINO = {"ptq": "predictions/ptq-openvino"}
ROOTS = {variant: f"predictions/{variant}-torchao" for variant in ("ptq", "qat")}
ROOTS |= {"baseline": f"{SCORES_OF_OPENED}/predictions/baseline-pytorch", "qlora": "predictions/qlora-nf4"}
# Library and version -> what is installed beside it, and variant -> its published predictions
CLIENTS = {
    "onnxruntime 1.17.3": ("numpy<2 tokenizers", ONNX),
    **{f"onnxruntime {version}": ("tokenizers", ONNX) for version in ("1.18.1", "1.23.2", "1.32.0")},
    **{f"openvino {version}": ("tokenizers", OPENVINO) for version in ("2024.0.0", "2026.4.1")},
    **{f"transformers {version}": (TORCH, ROOTS) for version in ("4.57.6", "5.5.4", "5.24.0")},
    "optimum-intel 2.2.0": ("", OPENVINO),
    "optimum-onnx 0.1.0": ("onnxruntime", ONNX),
    "sentence-transformers 6.2.0": (TORCH, ROOTS),
    **{f"@huggingface/transformers {version}": ("", ONNX) for version in ("3.8.1", "4.3.1")},
}


@dataclass
class ClientsArguments:
    """Which clients are tried, and on how many texts."""

    clients: list[str] = flag(list(CLIENTS), "Names with versions.", CLIENTS)
    texts: int = flag(300, "Test texts.", COUNT)
    openvino: str = flag(str(ROOT / "weights/mine/ptq"), "Folder with OpenVINO's files.")
    results_dir: str = flag(str(ROOT / "results"), "Where the results are written.")


def main(argv=None) -> None:
    """Tries the clients and writes `clients.json`."""
    (arguments,) = parse_args((ClientsArguments,), positional="clients", argv=argv)
    output = Path(arguments.results_dir) / "clients.json"
    task = load_task_of(read_recipe_of(ROOT / "weights" / RECOMMENDED))
    texts = get_split(task, "test")["text"]
    rows = choose_timed(len(texts), arguments.texts)[-arguments.texts :]
    for client in Bar(arguments.clients, desc="clients"):
        with tempfile.TemporaryDirectory() as folder:
            found = {client: try_client(client, Path(folder), [texts[row] for row in rows], rows, arguments)}
        print(json.dumps(found))
        found = (read_json(output)["clients"] if output.is_file() else {}) | found
        clients = {name: found[name] for name in CLIENTS if name in found}
        write_json(output, describe_run(1) | {"texts": arguments.texts, "dataset": task.name, "clients": clients})


def try_client(client: str, folder: Path, texts: list[str], rows: np.ndarray, arguments: ClientsArguments) -> dict:
    """Returns the line that opens a model, and for each variant the number of equal labels or why it cannot open."""
    (library, version), (others, published) = client.split(), CLIENTS[client]
    opening, answering = PROGRAMS[library]
    if library.startswith("@"):
        subprocess.run(["npm", "install", "--ignore-scripts", "--prefix", folder, f"{library}@{version}"], check=True)
        command, program = ["node", folder / "program.mjs"], NODE % opening
    else:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = folder / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-qq", f"{library}=={version}", *others.split()], check=True)
        command, program = [python, folder / "program.py"], PYTHON % f"{opening}\n{answering}"
    Path(command[-1]).write_text(program, encoding="utf-8")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = {"line": opening.split("\n")[-1].split(" = ")[1], "variants": {}}
    for variant, predictions in published.items():
        model = Path(arguments.openvino) if published is OPENVINO else ROOT / "weights" / variant
        done = subprocess.run([*command, model], input=json.dumps(texts), capture_output=True, text=True, env=alone)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error" in line] or ["ended without an answer"]
            found["variants"][variant] = {"error": errors[-1].rsplit(". ", 1)[-1].strip()[:200]}
            continue
        labels = list(read_config(model)["id2label"].values())
        _, logits = read_predictions(Path(arguments.results_dir) / f"{predictions}.parquet")
        expected = [labels[row] for row in logits[rows].argmax(axis=-1)]
        answers = json.loads(done.stdout.splitlines()[-1])
        found["variants"][variant] = {"equal": sum(map(str.__eq__, answers, expected))}
    return found


if __name__ == "__main__":
    run(main)
