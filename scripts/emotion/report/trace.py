"""One sentence all the way: dataset row, word pieces, logits, one rounded weight row, INT8 logits, confusion matrix.

`measure_trace` needs the weights, and what it saw is kept in `results/trace.json`; `render_trace_page` shows that file
as `docs/follow_one_text.md`, and needs nothing else than the records.
"""

from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import relative, write_json, write_text
from emotion.common.machine import describe_run
from emotion.measure.record import read_records
from emotion.measure.schema import Record, Trace, read_study
from emotion.model.artifact import find_formats, weights_of
from emotion.model.classifier import open_artifact
from emotion.report.render import complete, render
from emotion.task.scores import softmax

import numpy as np

ARTIFACT, BASELINE = "weights/ptq", "weights/baseline"  # what is followed if no flag says otherwise
SHOWN = 8  # weights of the row that are written out


def measure_trace(text: str, folder: Path, baseline: Path, task, threads: int) -> dict:
    """All numbers of `docs/follow_one_text.md` that need the weights.

    Args:
        folder: a quantized artifact; its torchao form shows the weights, all its forms show logits.
        baseline: the FP32 folder that it was made from.
        task: the loaded dataset, where the text must stand.

    Raises:
        UserError: if the text is no row of the dataset, or there is no torchao form.
    """
    weights_of(folder, "torchao")  # says what is missing before anything is opened
    split, row = find_row(text, task)
    before = open_artifact(baseline, "pytorch", threads)  # FP32, whatever else the folder holds
    after = {name: open_artifact(folder, name, threads) for name in find_formats(folder)}
    ids = before.encode([text])  # one text; all forms take the same ids, since the artifact keeps its tokenizer
    logits = {"FP32": before.logits(ids)[0].tolist()}
    for name, classifier in after.items():
        logits[name] = classifier.logits(ids)[0].tolist()
    return describe_run(threads) | {
        "text": text,
        "dataset": task.name,
        "split": split,
        "row": row,
        "label": int(task.splits[split][row]["label"]),
        "labels": task.labels,
        "token_ids": ids[0],
        "pieces": before.encode.pieces(ids[0]),
        "baseline": relative(baseline),
        "artifact": relative(folder),
        "weights": trace_weights(before.model, after["torchao"].model),
        "logits": logits,
    }


def write_trace(trace: dict, results: Path) -> None:
    """Writes `trace.json` and the page beside the results, and prints the page."""
    write_json(results / "trace.json", trace)
    # A trace needs no record: without one the page leaves out the steps that show them.
    records = read_records(results) if any((results / "metrics").glob("*.json")) else []
    for path, text in render_trace_page(results, records, results.resolve().parent).items():
        write_text(path, text)
        print(text)


def find_row(text: str, task) -> tuple[str, int]:
    """The split and the number of the first row with this text.

    Raises:
        UserError: if no row has it.
    """
    # Test comes first, since the records count its rows; the sort keeps the order of the others.
    for split in sorted(task.splits, key=lambda name: name != "test"):
        texts = list(task.splits[split]["text"])
        if text in texts:
            return split, texts.index(text)
    raise UserError(f"'{text}': no row of {task.name} reads so; take a text of the dataset, letter by letter")


def trace_weights(before, after) -> dict:
    """The first row of the first quantized linear layer: floats, integers, their scale, and what rounding cost.

    Args:
        before: the FP32 model, of Transformers.
        after: the same model with torchao's INT8 weights.
    """
    # The embeddings come first and are plain tensors; the linear layers have torchao's.
    name = next(
        name for name, part in after.named_modules() if hasattr(getattr(part, "weight", None), "act_quant_kwargs")
    )
    # In float64, so that the errors shown are those of rounding and not those of subtracting.
    exact = before.get_submodule(name).weight[0].detach().double().numpy()  # (inputs,): the weights of one output
    rounded = after.get_submodule(name).weight
    # torchao's tensor: `qdata` int8 (outputs, inputs), `scale` one number per output.
    integers, scale = rounded.qdata[0].numpy().astype(int), float(rounded.scale[0])
    errors = integers * scale - exact
    return {
        "layer": name,
        "row_length": len(exact),
        "scale": scale,
        "exact": exact[:SHOWN].tolist(),
        "integers": integers[:SHOWN].tolist(),
        "errors": errors[:SHOWN].tolist(),
        # Of the whole row: the page shows its first weights alone.
        "largest_exact": float(np.abs(exact).max()),
        "largest_integer": int(np.abs(integers).max()),
        "largest_error": float(np.abs(errors).max()),
        "root_mean_square_error": float(np.sqrt((errors**2).mean())),
    }


@complete("the page of one text")
def render_trace_page(results: Path, records: list[Record], root: Path, cards: dict | None = None) -> dict[Path, str]:
    """`docs/follow_one_text.md` from `trace.json`, the records and the card; none where there was no trace.

    Args:
        root: the folder with docs/ and model_cards/.
        cards: path -> text of cards that are about to be written; those on disk if none are given.
    """
    if not (results / "trace.json").is_file():
        return {}
    trace = read_study(results / "trace.json")
    card = root / "model_cards" / f"{Path(trace.artifact).name}.md"
    if cards is None and card.is_file():  # a trace is measured without rendering the cards again
        cards = {card: card.read_text(encoding="utf-8")}
    text = render(
        "follow_one_text.md",
        trace=trace,
        command=_command(trace),
        gap=lambda logits: float(np.abs(np.subtract(logits, trace.logits["FP32"])).max()),
        share=lambda logits: float(softmax(np.array(logits)).max()),
        records=_followed(trace, records),
        card=card.name,
        card_table=_class_lines((cards or {}).get(card, "")),
    )
    return {root / "docs" / "follow_one_text.md": text}


def _command(trace: Trace) -> str:
    """The command that made the page; a folder that is the default needs no flag."""
    words = [f'python scripts/run_trace.py "{trace.text}"']
    for name, default in (("artifact", ARTIFACT), ("baseline", BASELINE)):
        if getattr(trace, name) != default:
            words.append(f"--{name} {getattr(trace, name)}")
    return " ".join(words)


def _followed(trace: Trace, records: list[Record]) -> list[tuple[Record, int]]:
    """The records of the forms that the text went through, and the index of the class that each answered."""
    followed = []
    for record in records:
        # The trace calls the baseline's own form FP32; it followed the text through that one alone.
        form = "FP32" if record.format == "pytorch" else record.format
        if record.artifact in {trace.baseline, trace.artifact} and form in trace.logits:
            followed.append((record, int(np.argmax(trace.logits[form]))))
    return followed


def _class_lines(card: str) -> str:
    """The card's table with the F1 of each class: the lines from its head to the first that is no table."""
    table = []
    for line in card.splitlines():
        if line.startswith("| F1") or (table and line.startswith("|")):
            table.append(line)
        elif table:
            break
    return "\n".join(table)
