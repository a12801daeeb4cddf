"""The tables of the comparison, and the page that shows all of them."""

from pathlib import Path

from emotion.common.processor import TITLES
from emotion.measure.record import record_name, steps_tried
from emotion.report.comparison import Family, processors_of
from emotion.report.render import complete, render

# Column of the table of all forms -> the field of a row that it shows
COLUMNS = {
    "macro F1 % [95 %]": "macro_f1",
    "accuracy %": "accuracy",
    "MB": "megabytes",
}
# The same for each kind of processor; in brackets the ratio of the interleaved run, where there was one
SPEEDS = {
    "p50 ms": ("p50_ms", ".2f", "times_faster_at_batch_1"),
    "p95 ms": ("p95_ms", ".2f", None),
    "texts/s": ("texts_per_s", ".0f", "times_faster_at_batch_32"),
}


def plus_minus(one: dict, form: str = ".2f", factor: float = 100) -> str:
    """A mean over seeds and its standard deviation: '89.04 ± 0.66', in points if not said; a single seed has none."""
    mean, deviation = format(factor * one["mean"], form), one["standard_deviation"]
    return mean if deviation is None else f"{mean} ± {format(factor * deviation, form.removeprefix('+'))}"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown whose columns line up in plain text too; all but the first are right-aligned.

    Args:
        head: the names of the columns.
        rows: as many cells each; there may be no row.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    # The colon on the right of a rule is Markdown's mark for a column that is aligned there.
    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    lines = [_line(head, widths), rule]
    for row in rows:
        lines.append(_line(row, widths))
    return "\n".join(lines) + "\n"


def _line(cells: list[str], widths: list[int]) -> str:
    """One line of a table, its cells padded to the widths of their columns."""
    first, *rest = cells
    # Numbers line up on the right, names on the left.
    padded = [first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]
    return f"| {' | '.join(padded)} |"


def render_table(comparison: dict) -> str:
    """One line per artifact; a value that was not measured is a dash.

    The best of a column is not marked: that of one seed says little of another's.
    """
    lines, processors = [], processors_of(comparison["rows"])
    for row in comparison["rows"]:
        cells = [_cell(row, key) for key in COLUMNS.values()]
        for processor in processors:
            cells += [_speed(row["speeds"].get(processor), *column) for column in SPEEDS.values()]
        lines.append([row["variant"], row["format"], *cells, _verdict(row, comparison)])
    speeds = [f"{name}, {TITLES[processor]}" for processor in processors for name in SPEEDS]
    return markdown_table(["variant", "format", *COLUMNS, *speeds, "against FP32"], lines)


def _cell(row: dict, key: str) -> str:
    """The value of a column, with what stands in brackets behind it."""
    if row[key] is None:
        return "-"
    if key == "macro_f1":
        low, high = row["macro_f1_ci95"]  # one digit: the interval is several points wide
        return f"{100 * row['macro_f1']:.2f} [{100 * low:.1f}, {100 * high:.1f}]"
    if key == "accuracy":
        return f"{100 * row['accuracy']:.2f}"
    return f"{row['megabytes']:.1f}{_times(row['times_smaller'])}"


def _speed(speeds: dict | None, key: str, form: str, ratio: str | None) -> str:
    """The value of a column of `SPEEDS`; a dash if it was not timed on that kind of processor."""
    if speeds is None or speeds[key] is None:
        return "-"
    spread = speeds[ratio] if ratio else None
    return format(speeds[key], form) + _times(spread and spread["median"])


def _times(ratio: float | None) -> str:
    """' (2.1x)'; a second digit where it is needed to see how much slower or larger something is."""
    if ratio is None:  # not part of the interleaved run
        return ""
    return f" ({ratio:.1f}x)" if ratio >= 0.95 else f" ({ratio:.2f}x)"


def _verdict(row: dict, comparison: dict) -> str:
    """The paired tests' word for a row; a dash where there was nothing to test."""
    if row["name"] == comparison["tests"]["reference"]:
        return "reference"
    return row["tests"]["verdict"] if row["tests"] else "-"


@complete("the comparison")
def render_page(family: Family, pictures: list[Path]) -> str:
    """The text of `comparison.md`; ``pictures`` are shown by their file names, in this order."""
    comparison, benchmarks = family.comparison, family.benchmarks
    seeds = comparison["seeds"]
    return render(
        "comparison.md",
        about=comparison["about"],
        tests=comparison["tests"],
        table=render_table(comparison),
        kinds={row["kind"] for row in comparison["rows"]},  # they decide which sentences a caption needs
        ensemble=describe_ensemble(comparison),
        tests_table=tests_table(comparison),
        seeds_table=seeds_table(seeds) if seeds else "",
        chosen_seeds=sorted({one["chosen_seed"] for one in seeds}),
        several=max((len(one["seeds"]) for one in seeds), default=0) > 1,
        remedies_table=remedies_table(family.records),
        classes_table=classes_table(family.records),
        pictures=pictures,
        benchmarks={TITLES[name]: run for name, run in benchmarks.items()},
        benchmark_tables={TITLES[name]: benchmark_table(run) for name, run in benchmarks.items()},
        fastest={TITLES[name]: fastest_of(run) for name, run in benchmarks.items()},
        scored_alternatives=any(row["kind"] == "alternative" and row["macro_f1"] for row in comparison["rows"]),
    )


def describe_ensemble(comparison: dict) -> dict | None:
    """The ensemble of the baselines beside what they score themselves; None where it was not scored."""
    ensemble = comparison["ensemble"]
    for one in comparison["seeds"]:
        if ensemble and f"{one['variant']}-{one['format']}" == comparison["tests"]["reference"]:
            mean, deviation = one["macro_f1"]["mean"], one["macro_f1"]["standard_deviation"]
            # Within what two seeds differ by, averaging them has brought nothing.
            gains = ensemble["macro_f1"] - mean > (deviation or 0)
            return {**ensemble, "mean": mean, "deviation": deviation, "gains": gains}
    return None


def tests_table(comparison: dict) -> str:
    """The paired tests with all their figures, a line per record."""
    lines = []
    for row in comparison["rows"]:
        one = row["tests"]
        if not one:  # the reference itself, and lines without a score
            continue
        low, high = one["change_ci95"]
        lines.append(
            [
                row["name"],
                f"{100 * one['change']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
                # Corrected for the number of comparisons; the raw ones are in comparison.json.
                _p(one["p_macro_f1_holm"]),
                _p(one["p_margin_holm"]),
                _p(one["p_loss_holm"]),
                f"{100 * one['minimal_difference']:.2f}",
                str(one["flips"]),
                f"{one['lost']} / {one['won']}",
                _p(one["p_mcnemar_holm"]),
                number(row["expected_calibration_error"], 100, ".2f"),
                _verdict(row, comparison),
            ]
        )
    head = ["artifact", "change of macro F1, points [95 %]", "p", "p no loss", "p not worse", "smallest seen", "flips"]
    return markdown_table([*head, "lost / won", "p McNemar", "calibration error %", "verdict"], lines)


def seeds_table(seeds: list[dict]) -> str:
    """Means and standard deviations over independently trained baselines, a line per form."""
    lines = []
    for one in seeds:
        change = "-"  # the baseline's own line: nothing to compare it with
        if one["change"]:
            change = _mean(one["change"], 100, "+.2f")
            if one["change_ci95"]:  # None for a single seed
                low, high = one["change_ci95"]
                change += f" [{100 * low:+.2f}, {100 * high:+.2f}]"
        lines.append(
            [
                one["variant"],
                one["format"],
                str(len(one["seeds"])),  # not the same for all: a format may be missing for one
                _mean(one["macro_f1"], 100, ".2f"),
                _mean(one["accuracy"], 100, ".2f"),
                f"{100 * one['conflict_free_macro_f1']:.2f}",
                change,
                _mean(one["flips"], 1, ".1f") if one["flips"] else "-",
            ]
        )
    head = ["variant", "format", "seeds", "macro F1 % (sd)", "accuracy % (sd)", "macro F1 %, agreed rows"]
    return markdown_table([*head, "change, points (sd) [95 %]", "flips (sd)"], lines)


def remedies_table(records: list[dict]) -> str:
    """Each step of the ladder that a format went up when it was quantized; empty if no record tells of one."""
    lines = []
    for record in records:
        for one in steps_tried(record):
            name = f"**{one['remedy']}**" if one.get("kept") else one["remedy"]
            change, size = f"{100 * one['macro_f1_change']:+.2f}", f"{one['bytes_to_serve'] / 1e6:.1f}"
            lines.append([record_name(record), name, change, str(one["flips"]), size, f"{one['seconds']:.0f}"])
    head = ["artifact", "step", "macro F1, points", "labels that differ", "MB", "s to quantize"]
    return markdown_table(head, lines) if lines else ""


def classes_table(records: list[dict]) -> str:
    """F1 of each class in percent, a line per record."""
    labels = records[0]["quality"]["labels"]  # all records were scored on the same rows, so on the same classes
    lines = []
    for record in records:
        of_class = record["quality"]["per_class_f1"]
        lines.append([record_name(record), *(f"{100 * of_class[label]:.1f}" for label in labels)])
    return markdown_table(["artifact", *labels], lines)


def benchmark_table(run: dict) -> str:
    """One interleaved run, a line per artifact: the only place where speeds are divided by each other."""
    with_peaks = "peaks" in run  # a run may leave out the measurement of the processor's peaks
    with_strings = bool(run.get("strings_a_round"))  # and the way from strings to labels
    lines = []
    for artifact, one in run["artifacts"].items():
        cold = one.get("cold_start_ms")
        cells = [
            artifact,
            f"{one['bytes_to_serve'] / 1e6:.1f}",
            number(cold and cold["median"], 1e-3, ".2f"),  # ms to s
            f"{one['latency_ms']['p50']:.2f}",
            _spread(one["times_faster_at_batch_1"]),
            f"{one['throughput_per_s']['median']:.0f}",
            _spread(one["times_faster_at_batch_32"]),
        ]
        if with_strings:
            cells += [f"{one['strings_per_s']['median']:.0f}", _spread(one["times_faster_from_strings"])]
        cells.append(f"{100 * one['equal_labels']:.1f}")
        for batch in ("batch_1", "batch_32") if with_peaks else ():
            limit = one["roofline"] and one["roofline"][batch]  # `bound_by`: compute or memory
            cells.append(f"{100 * limit['share']:.0f} ({limit['bound_by']})" if limit else "-")
        lines.append(cells)
    head = ["artifact", "MB", "cold start s", "p50 ms", "times faster", "texts/s", "times faster, batches of 32"]
    head += ["strings to labels, texts/s", "times faster, strings"] if with_strings else []
    head += ["equal labels %", *(["% of peak, batch 1", "batch 32"] if with_peaks else [])]
    return markdown_table(head, lines)


def fastest_of(run: dict) -> dict[str, str]:
    """What is measured -> the artifact, or plain alternative, that was fastest of all in an interleaved run."""
    measured = run["artifacts"]
    fastest = {
        "one text": min(measured, key=lambda name: measured[name]["latency_ms"]["p50"]),
        "batches of 32": max(measured, key=lambda name: measured[name]["throughput_per_s"]["median"]),
    }
    if run.get("strings_a_round"):
        fastest["strings to labels"] = max(measured, key=lambda name: measured[name]["strings_per_s"]["median"])
    return fastest


def number(value: float | None, factor: float, form: str) -> str:
    """The value times the factor, formatted; a dash for None, which stands for a value that was not measured."""
    return "-" if value is None else format(factor * value, form)


def _mean(one: dict, factor: float, form: str) -> str:
    """The mean and, in brackets, the standard deviation; a single run has none."""
    deviation = one["standard_deviation"]
    return format(factor * one["mean"], form) + ("" if deviation is None else f" ({factor * deviation:.2f})")


def _spread(values: dict) -> str:
    """A ratio's median over the rounds and, in brackets, its least and its most."""
    return f"{values['median']:.2f} [{values['min']:.2f}, {values['max']:.2f}]"


def _p(value: float) -> str:
    """A p-value with three digits."""
    # No verdict depends on how far below 0.001 a p-value is.
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
