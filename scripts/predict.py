"""Tells the emotion of sentences: from the command line, a file or standard input (a line each, as they come).

On a folder with an ONNX file neither torch nor transformers is imported, so that the first answer comes at once.

    python scripts/predict.py "i didnt feel humiliated"
    python scripts/predict.py --file texts.txt --top_k 3
    python scripts/predict.py --model user/bert-emotion-ptq "i miss my old home"
    tail -f log.txt | python scripts/predict.py --json
"""

import argparse
import json
import os
import sys
from pathlib import Path

from emotion.common.command import run
from emotion.common.errors import UserError
from emotion.common.files import ROOT

BATCH = 32  # lines that are there already are answered together; no line waits for others


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="sentences; standard input, a line each, if there are none")
    parser.add_argument(
        "--model", default=str(ROOT / "weights" / "baseline"), help="model folder, or user/name on the Hub"
    )
    parser.add_argument("--format", help="format to open; ONNX if the folder has it")
    parser.add_argument("--file", help="file with a text a line")
    parser.add_argument("--top_k", type=int, default=1, help="how many classes to show, most probable first")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--threads", type=int, help="threads to compute with; all if not given")
    arguments = parser.parse_args(argv)
    if arguments.top_k < 1:
        raise UserError(f"--top_k {arguments.top_k}: it takes 1 or more")
    if arguments.texts and arguments.file:
        raise UserError("give sentences or --file, not both")
    batches = read_batches(arguments)  # a file that is not there is said before the model loads

    from emotion.common.machine import choose_threads
    from emotion.model.artifact import find_formats
    from emotion.model.classifier import open_artifact

    threads = choose_threads(arguments.threads)
    folder = find_model(arguments.model, arguments.format)
    formats = find_formats(folder)
    format = arguments.format or ("onnx" if "onnx" in formats else next(iter(formats)))
    classifier = open_artifact(folder, format, threads=threads)
    empty = 0
    for texts in batches:
        empty += answer(classifier, texts, arguments)
    if classifier.encode.texts_cut:
        print(f"{classifier.encode.texts_cut} texts were longer than the model takes and were cut", file=sys.stderr)
    if empty:
        raise UserError(f"{empty} of the texts were empty and got no answer")


def find_model(name: str, format: str | None) -> Path:
    """The folder of that name, or what it takes of the Hub's repository of that name."""
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return Path(name)
    from emotion.model.artifact import WEIGHT_FILES
    from emotion.model.hub import fetch

    if format not in {None, *WEIGHT_FILES}:
        raise UserError(f"--format {format}: it takes one of {', '.join(WEIGHT_FILES)}")
    try:
        return fetch(name, [format] if format else ["onnx", "pytorch"])
    except UserError as error:
        raise UserError(f"--model {name}: no such folder; {error}") from error


def read_batches(arguments):
    """Yields lists of texts; from a file or standard input a list holds the lines that could be read at once."""
    if arguments.texts:
        return iter([arguments.texts])
    if arguments.file and not Path(arguments.file).is_file():
        raise UserError(f"--file {arguments.file}: no such file")
    descriptor = os.open(arguments.file, os.O_RDONLY) if arguments.file else sys.stdin.fileno()
    return read_lines(descriptor)


def read_lines(descriptor: int):
    """Reads what is there, without waiting for more; memory stays flat however long the input is."""
    rest = b""
    while chunk := os.read(descriptor, 1 << 14):
        *lines, rest = (rest + chunk).split(b"\n")
        for start in range(0, len(lines), BATCH):
            yield [line.decode("utf-8", errors="replace") for line in lines[start : start + BATCH]]
    if rest:
        yield [rest.decode("utf-8", errors="replace")]


def answer(classifier, texts: list[str], arguments) -> int:
    """Prints a line for every text, in their order; returns how many were empty (their line says so)."""
    from emotion.task.scores import softmax

    full = [text.strip() for text in texts if text.strip()]
    answers = iter(softmax(classifier.logits(classifier.encode(full))) if full else [])
    lines = []
    for text in texts:
        if not text.strip():
            lines.append(json.dumps({"text": text, "error": "empty text"}) if arguments.json else "(empty)")
            continue
        probabilities = next(answers)
        best = probabilities.argsort()[::-1][: arguments.top_k]
        classes = [
            {"label": classifier.labels[index], "score": round(float(probabilities[index]), 6)} for index in best
        ]
        if arguments.json:
            lines.append(json.dumps({"text": text.strip(), **classes[0], "top_k": classes}, ensure_ascii=False))
        else:
            shown = "  ".join(f"{one['label']} {one['score']:.3f}" for one in classes)
            lines.append(f"{shown}\t{text.strip()}")
    print("\n".join(lines), flush=True)
    return len(texts) - len(full)


if __name__ == "__main__":
    run(main)
