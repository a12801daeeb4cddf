"""Markdown from the comparison: the README's one table with its caption, and the page with all the others."""

from pathlib import Path

from emotion.measure.record import record_name


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown whose columns line up in plain text too; all but the first are right-aligned."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells):
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *rest])} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([line(head), rule, *map(line, rows)]) + "\n"


def render_table(comparison: dict) -> str:
    """One line an artifact; the best value of a column is bold, a value that was not measured is a dash."""
    rows = comparison["rows"]
    ours = [row for row in rows if row["kind"] != "shape"]  # another shape's size and speed win and lose nothing here
    columns = {
        "macro F1 % [95 %]": (_f1, "macro_f1", max),
        "accuracy %": (lambda row: number(row["accuracy"], 100, ".2f"), "accuracy", max),
        "MB": (lambda row: f"{row['megabytes']:.1f}{_times(row['times_smaller'])}", "megabytes", min),
        "p50 ms": (lambda row: _speed(row, "p50_ms", ".2f", "times_faster_at_batch_1"), "p50_ms", min),
        "p95 ms": (lambda row: number(row["p95_ms"], 1, ".2f"), "p95_ms", min),
        "texts/s": (lambda row: _speed(row, "texts_per_s", ".0f", "times_faster_at_batch_32"), "texts_per_s", max),
    }
    best = {key: pick((row[key] for row in ours if row[key] is not None), default=None)
            for _, key, pick in columns.values()}  # fmt: skip
    lines = []
    for row in rows:
        cells = [f"{row['variant']}{'*' if row['kind'] == 'shape' else ''}", row["format"]]
        for show, key, _ in columns.values():
            bold = row["kind"] != "shape" and row[key] is not None and row[key] == best[key]
            cells.append(f"**{show(row)}**" if bold else show(row))
        lines.append([*cells, _verdict(row, comparison)])
    return markdown_table(["variant", "format", *columns, "against FP32"], lines)


def render_caption(comparison: dict) -> str:
    """What the figures of the table are, and on what they were measured."""
    about, tests = comparison["about"], comparison["tests"]
    kinds = {row["kind"] for row in comparison["rows"]}
    parts = [
        f"{about['dataset']}, test split, {about['examples']} texts; base model {', '.join(about['base_models'])}; "
        f"{'; '.join(about['machines'])} ({', '.join(about['instruction_sets'])}); {' and '.join(about['dates'])}.",
        "Interval: bootstrap over the test rows. p50 and p95: one text at its own length, token ids to logits; "
        "texts/s: "
        "batches of 32; MB: all files that an answer needs. Bold: best of its column.",
    ]
    if about["compared_with"]:
        parts.append(
            f"In brackets: times smaller and faster than `{about['compared_with']}`, the fastest FP32; all in one "
            f"interleaved run of {about['rounds']} rounds."
        )
    parts.append(
        f"Against FP32: paired tests on the same rows, corrected for {tests['comparisons']} comparisons. *No loss*: "
        f"macro F1 differs by less than {100 * tests['margin']:.1f} points from {tests['reference']}; *not worse*: it "
        "may be higher by more; *undecided*: so many rows cannot tell."
    )
    if "alternative" in kinds:
        parts.append("Lines without a score are what the libraries make of the same weights by themselves.")
    if "shape" in kinds:
        parts.append("\\* a BERT-base with random weights: size and speed only, against its own fastest FP32.")
    return " ".join(parts) + "\n"


def render_page(comparison: dict, records: list[dict], benchmarks: dict[str, dict], pictures: list[Path]) -> str:
    """`results/comparison.md`; ``pictures`` are shown by their file names, in this order."""
    sections = {
        "The table": render_table(comparison) + "\n" + render_caption(comparison),
        "Differences to FP32, row by row": render_tests(comparison),
        "Over several seeds": render_seeds(comparison["seeds"]) if comparison["seeds"] else None,
        "F1 of each class": render_classes(records),
        "Pictures": "\n".join(
            f"![{path.stem.replace('_', ' ')}]({path.parent.name}/{path.name})\n" for path in pictures
        ),
        "Interleaved runs": "\n".join(render_benchmark(*one) for one in benchmarks.items()) if benchmarks else None,
    }
    return "# Comparison\n" + "".join(f"\n## {title}\n\n{text}" for title, text in sections.items() if text)


def render_tests(comparison: dict) -> str:
    """The paired tests with all their figures."""
    lines, about = [], comparison["tests"]
    for row in comparison["rows"]:
        if not (one := row["tests"]):
            continue
        low, high = (100 * bound for bound in one["change_ci95"])
        lines.append([
            f"{row['name']}", f"{100 * one['change']:+.2f} [{low:+.2f}, {high:+.2f}]", _p(one["p_macro_f1_holm"]),
            _p(one["p_margin_holm"]), _p(one["p_loss_holm"]), f"{100 * one['minimal_difference']:.2f}",
            str(one["flips"]), f"{one['lost']} / {one['won']}", _p(one["p_mcnemar_holm"]),
            number(row["expected_calibration_error"], 100, ".2f"), _verdict(row, comparison),
        ])  # fmt: skip
    head = ["artifact", "change of macro F1, points [95 %]", "p", "p no loss", "p not worse", "smallest seen", "flips",
            "lost / won", "p McNemar", "calibration error %", "verdict"]  # fmt: skip
    text = (
        f"{markdown_table(head, lines)}\nAgainst {about['reference']} on the same {comparison['about']['examples']} "
        "rows "
        f"({about['resamples']} paired bootstrap resamples); all p corrected by Holm for {about['comparisons']} "
        "comparisons. *p*: of no difference in macro F1. *p no loss*: of a difference of "
        f"{100 * about['margin']:.1f} points or more, either way; *p not worse*: of a loss of as much. The margin is "
        "half "
        "of how far the score of a single model on these rows is uncertain. *Smallest seen*: the change that these "
        "rows "
        f"would show with {100 * about['power']:.0f} % probability at a level of {100 * about['level']:.0f} %, before "
        "the "
        "correction. *Flips*: rows with another label; *lost / won*: right before and wrong after, and the reverse; "
        "*McNemar*: whether accuracy differs.\n"
    )
    if about["minimal_difference"]:
        low, high = (100 * bound for bound in about["minimal_difference"])
        text += (
            f"\nSo {comparison['about']['examples']} rows show a change of {low:.2f} to {high:.2f} points at least, "
            "the "
            "more flips the larger; what is smaller they cannot tell from none.\n"
        )
    return text


def render_seeds(seeds: list[dict]) -> str:
    """Means and standard deviations over independently trained baselines."""
    lines = []
    for one in seeds:
        change = "-"
        if one["change"]:
            bounds = " [{:+.2f}, {:+.2f}]".format(*(100 * x for x in one["change_ci95"])) if one["change_ci95"] else ""
            change = f"{_mean(one['change'], 100, '+.2f')}{bounds}"
        lines.append([one["variant"], one["format"], str(len(one["seeds"])), _mean(one["macro_f1"], 100, ".2f"),
                      _mean(one["accuracy"], 100, ".2f"), f"{100 * one['conflict_free_macro_f1']:.2f}", change,
                      _mean(one["flips"], 1, ".1f") if one["flips"] else "-"])  # fmt: skip
    head = ["variant", "format", "seeds", "macro F1 % (sd)", "accuracy % (sd)", "macro F1 %, agreed rows",
            "change, points (sd) [95 %]", "flips (sd)"]  # fmt: skip
    shown = sorted({one["chosen_seed"] for one in seeds})
    return (
        f"{markdown_table(head, lines)}\nsd: standard deviation over the seeds. Change: against the FP32 baseline of "
        "the "
        "same seed; its interval is Student's, of the mean over the seeds. Agreed rows: those whose text stands "
        "nowhere "
        f"in the dataset with another label. The table above shows seed {' and '.join(map(str, shown))}, chosen on "
        "validation.\n"
    )


def render_classes(records: list[dict]) -> str:
    labels = records[0]["quality"]["labels"]
    lines = [[record_name(one), *(f"{100 * one['quality']['per_class_f1'][label]:.1f}" for label in labels)]
             for one in records]  # fmt: skip
    return markdown_table(["artifact", *labels], lines)


def render_benchmark(name: str, benchmark: dict) -> str:
    """One interleaved run: the only place where speeds are divided by each other."""
    shares, lines = "peaks" in benchmark, []
    for artifact, one in benchmark["artifacts"].items():
        cold, roofline = one.get("cold_start_ms"), one.get("roofline")
        lines.append([
            artifact, f"{one['bytes_to_serve'] / 1e6:.1f}", number(cold and cold["median"], 1e-3, ".2f"),
            f"{one['latency_ms']['p50']:.2f}", _spread(one["times_faster_at_batch_1"]),
            f"{one['throughput_per_s']['median']:.0f}", _spread(one["times_faster_at_batch_32"]),
            number(one.get("equal_labels"), 100, ".1f"),
            *([f"{100 * roofline[f'batch_{size}']['share']:.0f} ({roofline[f'batch_{size}']['bound_by']})"
               for size in (1, 32)] if shares else []),
        ])  # fmt: skip
    head = ["artifact", "MB", "cold start s", "p50 ms", "times faster", "texts/s", "times faster, batches of 32",
            "equal labels %", *(["% of peak, batch 1", "batch 32"] if shares else [])]  # fmt: skip
    environment = benchmark["environment"]
    text = (
        f"### {name}\n\n{markdown_table(head, lines)}\n{benchmark['rounds']} rounds; compared with "
        f"`{benchmark['compared_with']}`, in brackets the least and the most of a round; {environment['cpu']}, "
        f"{environment['threads']} {'thread' if environment['threads'] == 1 else 'threads'}; {benchmark['date']}. "
        "Cold "
        "start: from the start of a process to its first answer. Equal labels: with the one compared with.\n"
    )
    if shares:
        peaks = benchmark["peaks"]
        text += (
            "% of peak: the least time that the processor's peak (compute) or its memory would allow, of the measured "
            f"time (roofline). Measured peaks: FP32 {peaks['float32_gop_per_s']:.0f}, BF16 "
            f"{peaks['bfloat16_gop_per_s']:.0f}, INT8 {peaks['int8_gop_per_s']:.0f} billion operations a second, "
            "memory "
            f"{peaks['memory_gb_per_s']:.0f} GB/s.\n"
        )
    return text


def number(value: float | None, factor: float, form: str) -> str:
    return "-" if value is None else format(factor * value, form)


def _f1(row: dict) -> str:
    if row["macro_f1"] is None:
        return "-"
    low, high = (100 * bound for bound in row["macro_f1_ci95"])
    return f"{100 * row['macro_f1']:.2f} [{low:.1f}, {high:.1f}]"


def _speed(row: dict, key: str, form: str, ratio: str) -> str:
    return number(row[key], 1, form) + _times(row[ratio] and row[ratio]["median"])


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f" ({ratio:.1f}x)" if ratio >= 0.95 else f" ({ratio:.2f}x)"


def _verdict(row: dict, comparison: dict) -> str:
    if row["name"] == comparison["tests"]["reference"]:
        return "reference"
    return row["tests"]["verdict"] if row["tests"] else "-"


def _mean(one: dict, factor: float, form: str) -> str:
    deviation = one["standard_deviation"]
    return format(factor * one["mean"], form) + ("" if deviation is None else f" ({factor * deviation:.2f})")


def _spread(values: dict) -> str:
    return f"{values['median']:.2f} [{values['min']:.2f}, {values['max']:.2f}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
