"""Times transformers.js in Node.js end to end, with one text at a time, as in the README's snippet.

It needs Node.js, and the JavaScript libraries that `make test GROUP=web` installs.

    python studies/javascript_study.py
    python studies/javascript_study.py weights/ptq --threads 1 --results_dir build/results
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emotion.data.dataset import get_split, load_task_of
from emotion.evaluation.protocol import WARMUP_RUNS, choose_timed, summarize_latency
from emotion.inference.model_folder import files_to_serve
from emotion.utils.arguments import COUNT, flag, parse_args
from emotion.utils.base_model import read_recipe_of
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import RECOMMENDED, ROOT, relative, write_json
from emotion.utils.machine import THREADS, choose_threads, describe_run

WEB = ROOT / "tests" / "web"  # with the JavaScript libraries


@dataclass
class JavaScriptArguments:
    """Which model is timed, and how long."""

    artifact: str = flag(str(ROOT / "weights" / RECOMMENDED), "Folder with a quantized ONNX file.")
    runs: int = flag(500, "Timed texts.", COUNT)
    threads: int | None = flag(None, "Threads; all by default.", THREADS)
    results_dir: str = flag(str(ROOT / "results"), "Where the results are written.")


def main(argv=None) -> None:
    """Times the model and writes `javascript.json`."""
    (arguments,) = parse_args((JavaScriptArguments,), positional="artifact", argv=argv)
    artifact, threads = Path(arguments.artifact), choose_threads(arguments.threads)
    served, task = files_to_serve(artifact, "onnx"), load_task_of(read_recipe_of(artifact))
    texts = get_split(task, "test")["text"]
    answer = ask_node(artifact, [texts[row] for row in choose_timed(len(texts), arguments.runs)], threads)
    latency = summarize_latency(np.array(answer["times"][WARMUP_RUNS:]))
    study = describe_run(threads) | {
        "artifact": relative(artifact),
        "dataset": task.name,
        "bytes_to_serve": sum(served.values()),
        "latency_ms": latency,
        "node": answer["node"],
        "transformers_js": answer["transformers"],
    }
    write_json(Path(arguments.results_dir) / "javascript.json", study)
    print(f"{study['artifact']} in Node.js: {latency['p50']:.2f} ms a text, p95 {latency['p95']:.2f} ms")


def ask_node(artifact: Path, texts: list[str], threads: int) -> dict:
    """Returns the times of all texts, in milliseconds, and the versions of Node.js and transformers.js.

    Raises:
        UserError: if Node.js or the libraries are missing, or the model cannot be opened.
    """
    folder = artifact.resolve()
    command = ["node", "latency.mjs", f"{folder.parent}/", folder.name, str(threads)]
    try:
        done = subprocess.run(command, cwd=WEB, input=json.dumps(texts), capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("no node on the path; install Node.js 20 or newer") from error
    if done.returncode:
        if not (WEB / "node_modules" / "@huggingface" / "transformers").is_dir():
            raise UserError(f"no transformers.js in {WEB}; 'make test GROUP=web' installs it")
        errors = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
        raise UserError(f"{relative(artifact)} does not open in transformers.js: {' '.join(errors[:1])}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    run(main)
