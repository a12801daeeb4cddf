"""Classifies sentences from the command line, a file or standard input, and prints one line per sentence.

bert-emotion "i feel so happy that you came"
bert-emotion --file texts.txt --top_k 3
bert-emotion --model user/bert-emotion-ptq "i miss my old home"
tail -f log.txt | bert-emotion --json
"""

import argparse
import codecs
import json
import os
import sys
from pathlib import Path

from emotion import __version__
from emotion.utils.arguments import COUNT, SHARE, configure_parser, parse_plain
from emotion.utils.command import run
from emotion.utils.errors import UsageError, UserError, visible
from emotion.utils.files import RECOMMENDED
from emotion.utils.machine import THREADS

# Extensions of the files that run_batch.py reads; their bytes would be classified as texts.
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".gz", ".bz2", ".xz", ".zst")
BATCH = 32  # lines that are classified together at most; no line waits for others
CHUNK = 1 << 14  # bytes read at once: some hundred lines
READ_BYTES = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # Windows would take the byte 26 for the end of a file
# Byte order marks, and the encodings that read them
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
LINE = 1 << 20  # bytes of a line that are read: hundreds of pages


def main(argv=None) -> None:
    """Classifies all sentences that the command line names; raises `UserError` at the end if some were empty."""
    args = parse_arguments(argv)
    batches = read_batches(args)  # before the model loads, so that a missing file is named at once
    try:
        classify_all(batches, args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted") from None


def classify_all(batches, args) -> None:
    # Imported here, so that --help and a wrong flag need neither NumPy nor the tokenizer.
    from emotion import EmotionClassifier

    if args.model is None:  # beside the answers, not among them
        print(f"answered by {RECOMMENDED}; --model takes another", file=sys.stderr)
    classifier = EmotionClassifier.from_pretrained(
        args.model, args.format, args.threads, not args.skip_checksum, args.model_revision, args.long_texts
    )
    if classifier.multi_label and args.top_k is None and args.threshold is None:
        args.threshold = 0.5
    empty = sum(answer(classifier, texts, args) for texts in batches)
    if cut := classifier.texts_cut:
        how = "cut" if args.long_texts == "truncate" else "read in parts"
        print(f"{plural(cut)} longer than the model takes and {how}", file=sys.stderr)
    if empty:  # an error only now, since the other texts have their answers
        raise UserError(f"{plural(empty)} empty and got no answer")


def plural(count: int) -> str:
    return "1 text was" if count == 1 else f"{count:,} texts were"


def parse_arguments(argv=None) -> argparse.Namespace:
    """The flags of the command line; `HfArgumentParser`, which the other commands use, would load torch."""
    parser = configure_parser(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("texts", nargs="*", help="sentences; without any, standard input is read line by line")
    parser.add_argument("--model", help=f"model folder, or user/name on the Hub; {RECOMMENDED} if not given")
    parser.add_argument("--model_revision", help="branch, tag or commit of the model on the Hub")
    parser.add_argument("--format", help="format to open; ONNX if the folder has it")
    parser.add_argument("--file", help="file with one text per line")
    parser.add_argument("--top_k", type=int, choices=COUNT, help="number of classes to show; 1 if not given")
    least = "where a text may have several labels: the score of those to show; 0.5 if not given"
    parser.add_argument("--threshold", type=float, choices=SHARE, help=least)
    long = "truncate texts that are longer than the model takes, or take the mean of the scores of their parts"
    parser.add_argument("--long_texts", choices=("truncate", "mean"), default="truncate", help=long)
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--threads", type=int, choices=THREADS, help="threads to compute with; all by default")
    parser.add_argument("--skip_checksum", action="store_true", help="open files that differ from SHA256SUMS")
    parser.add_argument("--version", action="version", version=f"bert-emotion {__version__}")
    args = parse_plain(parser, argv)
    if args.texts and args.file:
        raise UsageError("give sentences or --file, not both")
    if args.top_k and args.threshold is not None:
        raise UsageError("give --top_k or --threshold, not both")
    return args


def read_batches(args):
    """An iterator over lists of texts; from a file or a stream, of the lines that are there already."""
    if args.texts:
        # Python keeps bytes that are not UTF-8 as surrogates.
        return iter([[os.fsencode(text).decode(errors="replace") for text in args.texts]])
    if not args.file:
        if not sys.stdin:
            raise UsageError("standard input is closed; give sentences or --file")
        return read_lines(sys.stdin.fileno(), prompt="> " if sys.stdin.isatty() else "")
    if args.file.lower().endswith(TABLES):
        raise UserError(
            f"--file {args.file} is a table or compressed, and this command takes plain lines; "
            f"call python scripts/run_batch.py {args.file} OUTPUT"
        )
    # A pipe is no regular file, and has lines all the same.
    if not Path(args.file).exists() or Path(args.file).is_dir():
        raise UserError(f"--file {args.file}: no such file, or a folder")
    return read_lines(os.open(args.file, READ_BYTES))  # a bare descriptor: Python's own files fill a buffer first


def read_chunks(descriptor: int, prompt: str):
    """Yields the bytes of a stream, in UTF-8 where a byte order mark names its encoding."""
    chunk = read_chunk(descriptor, prompt)
    encoding = next((name for mark, name in MARKS.items() if chunk.startswith(mark)), None)
    decoder = codecs.getincrementaldecoder(encoding)(errors="replace") if encoding else None
    while chunk:
        yield decoder.decode(chunk).encode(errors="replace") if decoder else chunk
        chunk = read_chunk(descriptor, prompt)


def read_lines(descriptor: int, prompt: str = ""):
    """Yields lists of at most `BATCH` lines, without waiting for more; cuts lines at `LINE` bytes, with a warning."""
    if prompt:
        end = "Ctrl-Z and Enter end" if os.name == "nt" else "Ctrl-D ends"
        print(f"one text per line; {end}", file=sys.stderr)
    rest = bytearray()  # of a line whose end has not been read yet; bytes, since a character may be cut in two as well
    ended = 0  # lines so far
    for chunk in read_chunks(descriptor, prompt):
        first, *lines = chunk.split(b"\n")
        if len(rest) <= LINE < len(rest) + len(first):
            print(f"line {ended + 1} is longer than {LINE:,} bytes; the rest of it is not read", file=sys.stderr)
        rest += first[: max(0, LINE + 1 - len(rest))]
        if not lines:
            continue
        lines = [bytes(rest[:LINE]), *lines]
        rest = bytearray(lines.pop())
        ended += len(lines)
        for start in range(0, len(lines), BATCH):
            yield [line.decode(errors="replace") for line in lines[start : start + BATCH]]
    if rest:  # a last line without a line end
        yield [rest[:LINE].decode(errors="replace")]


def read_chunk(descriptor: int, prompt: str) -> bytes:
    """What there is to read; empty at the end."""
    if not prompt:
        return os.read(descriptor, CHUNK)
    chunk = b""
    try:
        print(prompt, end="", file=sys.stderr, flush=True)
        chunk = os.read(descriptor, CHUNK)
    finally:
        if not chunk:  # Ctrl-D or Ctrl-C: what comes next has a line of its own
            print(file=sys.stderr)
    return chunk


def answer(classifier, texts: list[str], args) -> int:
    """Prints one line for every text, in order; returns the number of empty texts."""
    full = [text.strip() for text in texts if text.strip()]
    answers = iter(classifier.classify(full, args.top_k or 1, args.threshold))
    lines = []
    # Where the output cannot show every character, JSON has escapes of its own.
    ascii_alone = not sys.stdout.encoding.lower().startswith("utf")
    for text in texts:
        if not text.strip():
            lines.append(json.dumps({"text": text, "error": "empty text"}) if args.json else "(empty)")
            continue
        classes = next(answers)
        classes = [classes] if isinstance(classes, dict) else classes
        for label in classes:
            label["score"] = round(label["score"], 6)
        if args.json:
            found = {**classes[0], "top_k": classes} if args.threshold is None else {"labels": classes}
            lines.append(json.dumps({"text": text.strip(), **found}, ensure_ascii=ascii_alone))
        else:
            shown = "  ".join(f"{label['label']} {label['score']:.4f}" for label in classes) or "(no label)"
            # On a terminal a text of a stranger could move the cursor; a pipe gets it as it is.
            lines.append(f"{shown}\t{visible(text.strip()) if sys.stdout.isatty() else text.strip()}")
    print("\n".join(lines), flush=True)  # a pipe would hold the lines back, and their reader waits for each
    return len(texts) - len(full)


def command() -> None:
    """The console command `bert-emotion`."""
    run(main)
