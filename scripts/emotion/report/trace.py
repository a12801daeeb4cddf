"""One sentence all the way: dataset row, word pieces, logits, one rounded weight row, INT8 logits, confusion matrix.

`measure_trace` needs the weights, and what it saw is kept in `results/trace.json`; `render_trace_page` shows that file
as `docs/follow_one_text.md`, and needs nothing else than the records.
"""

import itertools
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import read_json, relative, write_json, write_text
from emotion.measure.record import read_records, record_name
from emotion.model.artifact import find_formats, weights_of
from emotion.model.classifier import open_artifact
from emotion.report.tables import markdown_table
from emotion.task.scores import softmax

import numpy as np

SHOWN = 8  # weights of the row that are written out


def measure_trace(text: str, folder: Path, baseline: Path, task, threads: int) -> dict:
    """What `docs/follow_one_text.md` tells of one text.

    Args:
        folder: a quantized artifact; its torchao form shows the weights, all its forms show logits.
        baseline: the FP32 folder that it was made from.
        task: the loaded dataset, where the text must stand.

    Raises:
        UserError: if the text is no row of the dataset, or there is no torchao form.
    """
    split, row = find_row(text, task)
    weights_of(folder, "torchao")
    before = open_artifact(baseline, "pytorch", threads)
    after = {name: open_artifact(folder, name, threads) for name in find_formats(folder)}
    ids = before.encode([text])
    return {
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
        "logits": {"FP32": before.logits(ids)[0].tolist()}
        | {name: classifier.logits(ids)[0].tolist() for name, classifier in after.items()},
    }


def write_trace(trace: dict, results: Path) -> None:
    """Writes `trace.json` and the page beside the results, and prints the page."""
    write_json(results / "trace.json", trace)
    records = read_records(results) if any((results / "metrics").glob("*.json")) else []
    for path, text in render_trace_page(results, records, results.resolve().parent).items():
        write_text(path, text)
        print(text)


def find_row(text: str, task) -> tuple[str, int]:
    """Where the text stands first, looking through test before the other splits."""
    for split in sorted(task.splits, key=lambda name: name != "test"):
        texts = list(task.splits[split]["text"])
        if text in texts:
            return split, texts.index(text)
    raise UserError(f"--trace '{text}': no row of {task.name} reads so; take a text of the dataset, letter by letter")


def trace_weights(before, after) -> dict:
    """The first row of the first quantized linear layer: floats, integers, their scale, and what rounding cost."""
    name = next(
        name for name, part in after.named_modules() if hasattr(getattr(part, "weight", None), "act_quant_kwargs")
    )
    exact = before.get_submodule(name).weight[0].detach().double().numpy()
    rounded = after.get_submodule(name).weight
    integers, scale = rounded.qdata[0].numpy().astype(int), float(rounded.scale[0])
    errors = integers * scale - exact
    return {
        "layer": name,
        "row_length": len(exact),
        "scale": scale,
        "exact": exact[:SHOWN].tolist(),
        "integers": integers[:SHOWN].tolist(),
        "errors": errors[:SHOWN].tolist(),
        "largest_exact": float(np.abs(exact).max()),
        "largest_integer": int(np.abs(integers).max()),
        "largest_error": float(np.abs(errors).max()),
        "root_mean_square_error": float(np.sqrt((errors**2).mean())),
    }


def render_trace_page(results: Path, records: list[dict], root: Path, cards: dict | None = None) -> dict[Path, str]:
    """`docs/follow_one_text.md` from `trace.json`, the records and the card; none where there was no trace.

    Args:
        cards: path -> text of cards that are about to be written; those on disk if none are given.
    """
    if not (results / "trace.json").is_file():
        return {}
    trace = read_json(results / "trace.json")
    parts = [_row(trace), _pieces(trace), _weights(trace), _logits(trace), _cells(trace, records)]
    parts.append(_card(trace, root, cards))
    title = (
        f'# Follow one text: "{trace["text"]}"\n\nFrom the row of a file to a number in a table, each step as it was '
        f'measured. Made by `python scripts/run_evaluation.py {trace["artifact"]} --trace "{trace["text"]}"`.\n'
    )
    return {root / "docs" / "follow_one_text.md": "\n".join([title, *filter(None, parts)])}


def _row(trace: dict) -> str:
    name = trace["labels"][trace["label"]]
    unseen = "" if trace["split"] == "test" else (
        f" It is a row of {trace['split']}, not of test: no score counts it, but every step is the same."
    )  # fmt: skip
    return (
        f"## 1. The row\n\n{trace['dataset']}, split `{trace['split']}`, row {trace['row']}: label {trace['label']}, "
        f"which the dataset's `ClassLabel` calls **{name}**.{unseen}\n"
    )


def _pieces(trace: dict) -> str:
    table = markdown_table(["piece", *trace["pieces"]], [["id", *map(str, trace["token_ids"])]])
    return (
        "## 2. Word pieces\n\nThe tokenizer lower-cases the text, cuts what its vocabulary does not hold into pieces "
        f"(`##` continues a word), and adds a mark at each end:\n\n{table}\nAn id is the number of a row in the table "
        "of "
        "embeddings: here the text becomes numbers.\n"
    )


def _weights(trace: dict) -> str:
    one = trace["weights"]
    rows = [
        ["FP32", *(f"{value:+.5f}" for value in one["exact"])],
        ["divided by the scale", *(f"{value / one['scale']:+.2f}" for value in one["exact"])],
        ["INT8", *(f"{value:+d}" for value in one["integers"])],
        ["times the scale", *(f"{value * one['scale']:+.5f}" for value in one["integers"])],
        ["error", *(f"{value:+.5f}" for value in one["errors"])],
    ]
    return (
        f"## 3. One row of weights, rounded\n\nThe first row of `{one['layer']}` has {one['row_length']} weights; the "
        f"largest is {one['largest_exact']:.5f} (without its sign). The row's scale is {one['scale']:.6f}, so its "
        "largest "
        f"integer is {one['largest_integer']}. The first {len(one['exact'])} weights:\n\n"
        f"{markdown_table(['weight', *map(str, range(len(one['exact'])))], rows)}\n"
        f"Rounding moves a weight by half a scale at most: {one['scale'] / 2:.6f}. In this row the largest error is "
        f"{one['largest_error']:.6f}, the root mean square {one['root_mean_square_error']:.6f}. A weight took four "
        "bytes and takes one; the scale is one number for the whole row.\n"
    )


def _logits(trace: dict) -> str:
    exact = np.array(trace["logits"]["FP32"])
    rows = []
    for name, logits in trace["logits"].items():
        gap = float(np.abs(np.array(logits) - exact).max())
        best = int(np.argmax(logits))
        share = float(softmax(np.array(logits))[best])
        rows.append([name, *(f"{value:+.3f}" for value in logits), "-" if name == "FP32" else f"{gap:.3f}",
                     f"{trace['labels'][best]} ({100 * share:.2f} %)"])  # fmt: skip
    return (
        f"## 4. Logits\n\n`{trace['baseline']}` in FP32, and each form of `{trace['artifact']}`. The gap is the "
        "largest "
        "over the classes; the answer is the class with the largest logit, its share comes from softmax.\n\n"
        + markdown_table(["form", *trace["labels"], "gap", "answer"], rows)
    )


def _cells(trace: dict, records: list[dict]) -> str:
    """The cell of each record's matrix to which the text belongs, by its label and that form's answer."""
    rows, truth = [], trace["label"]
    for record in records:
        form = "FP32" if record["format"] == "pytorch" else record["format"]
        if record["artifact"] not in {trace["baseline"], trace["artifact"]} or form not in trace["logits"]:
            continue
        answer = int(np.argmax(trace["logits"][form]))
        quality = record["quality"]
        rows.append([record_name(record), trace["labels"][truth], trace["labels"][answer],
                     str(quality["confusion_matrix"][truth][answer]), str(sum(quality["confusion_matrix"][truth])),
                     f"{100 * quality['per_class_f1'][trace['labels'][truth]]:.2f}"])  # fmt: skip
    if not rows:
        return ""
    counted = "is one of" if trace["split"] == "test" else "would be one more of"
    name = trace["labels"][truth]
    head = ["record", "true", "answer", "texts in that cell", f"of all {name}", f"F1 of {name} %"]
    return (
        f"## 5. Its cell in the confusion matrix\n\nThe text {counted} the texts in the cell of its label and its "
        f"answer. Rows and columns of that matrix give the F1 of the class, and the mean over the classes is macro "
        f"F1.\n\n{markdown_table(head, rows)}"
    )


def _card(trace: dict, root: Path, cards: dict | None) -> str:
    """The line of the variant's model card that holds the F1 of the class."""
    card = root / "model_cards" / f"{Path(trace['artifact']).name}.md"
    text = cards.get(card) if cards else card.read_text(encoding="utf-8") if card.is_file() else None
    lines = (text or "").splitlines()
    below = itertools.dropwhile(lambda line: not line.startswith("| F1"), lines)
    table = "\n".join(itertools.takewhile(lambda line: line.startswith("|"), below))
    if not table:
        return ""
    return f"## 6. Its line in the card\n\n[{card.name}](../model_cards/{card.name}) says so:\n\n{table}\n"
