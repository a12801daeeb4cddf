"""Times transformers.js in Node.js: one text from the string to its label, as the README's snippet answers it.

It needs Node.js, and the JavaScript libraries that `make demo` installs.

    python studies/javascript_study.py
    python studies/javascript_study.py weights/ptq --threads 1 --results_dir build/results
"""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emotion.data.dataset import get_split, load_task_of
from emotion.evaluation.protocol import WARMUP_RUNS, choose_timed, summarize_latency
from emotion.inference.model_folder import files_to_serve
from emotion.inference.released import RECOMMENDED
from emotion.utils.arguments import COUNT, parse_args
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, relative, write_json
from emotion.utils.machine import THREADS, choose_threads, describe_run
from emotion.utils.recipe import read_recipe_of
from javascript import WEB, check_libraries


@dataclass
class JavaScriptArguments:
    """The artifact to open, and how long it is timed."""

    artifact: str = field(
        default=str(ROOT / "weights" / RECOMMENDED), metadata={"help": "Folder with an ONNX file of few bits."}
    )
    runs: int = field(default=500, metadata={"help": "Timed texts.", "choices": COUNT})
    threads: int | None = field(
        default=None, metadata={"help": "Threads to compute with; all if not given.", "choices": THREADS}
    )
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    """Times the artifact and writes `javascript.json`; ``argv``: the flags, those of the command line if not given."""
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
    """The times of all texts, in their order, and the versions of what answered them.

    Raises:
        UserError: if Node.js or the libraries are missing, or the artifact does not open there.
    """
    place = artifact.resolve()
    words = ["node", "latency.mjs", f"{place.parent}/", place.name, str(threads)]
    try:
        done = subprocess.run(words, cwd=WEB, input=json.dumps(texts), capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("no node on the path; install Node.js 20 or newer") from error
    if done.returncode:
        check_libraries(WEB / "node_modules")
        said = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
        raise UserError(f"{relative(artifact)} does not open in transformers.js: {' '.join(said[:1])}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    run(main)
