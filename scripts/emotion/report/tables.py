"""The tables of the comparison, and the page that shows all of them."""

from pathlib import Path

from emotion.common.processor import TITLES
from emotion.measure.schema import Benchmark
from emotion.report.comparison import Family, processors_of
from emotion.report.render import complete, markdown_table, number, render

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
        rows=comparison["rows"],
        kinds={row["kind"] for row in comparison["rows"]},  # they decide which sentences a caption needs
        ensemble=describe_ensemble(comparison),
        seeds=seeds,
        chosen_seeds=sorted({one["chosen_seed"] for one in seeds}),
        several=max((len(one["seeds"]) for one in seeds), default=0) > 1,
        records=family.records,
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


def benchmark_table(run: Benchmark) -> str:
    """One interleaved run, a line per artifact: the only place where speeds are divided by each other."""
    lines = []
    for artifact, one in run.artifacts.items():
        cells = [
            artifact,
            f"{one.bytes_to_serve / 1e6:.1f}",
            number(one.cold_start_ms and one.cold_start_ms.median, factor=1e-3),  # ms to s
            f"{one.latency_ms.p50:.2f}",
            _spread(one.times_faster_at_batch_1),
            f"{one.throughput_per_s.median:.0f}",
            _spread(one.times_faster_at_batch_32),
        ]
        if run.strings_a_round:  # a run may leave out the way from strings to labels
            cells += [f"{one.strings_per_s.median:.0f}", _spread(one.times_faster_from_strings)]
        cells.append(f"{100 * one.equal_labels:.1f}")
        if run.peaks:  # and the measurement of the processor's peaks
            limits = [one.roofline.batch_1, one.roofline.batch_32] if one.roofline else [None, None]
            cells += [f"{100 * limit.share:.0f} ({limit.bound_by})" if limit else "-" for limit in limits]
        lines.append(cells)
    head = ["artifact", "MB", "cold start s", "p50 ms", "times faster", "texts/s", "times faster, batches of 32"]
    head += ["strings to labels, texts/s", "times faster, strings"] if run.strings_a_round else []
    head += ["equal labels %", *(["% of peak, batch 1", "batch 32"] if run.peaks else [])]
    return markdown_table(head, lines)


def fastest_of(run: Benchmark) -> dict[str, str]:
    """What is measured -> the artifact, or plain alternative, that was fastest of all in an interleaved run."""
    measured = run.artifacts
    fastest = {
        "one text": min(measured, key=lambda name: measured[name].latency_ms.p50),
        "batches of 32": max(measured, key=lambda name: measured[name].throughput_per_s.median),
    }
    if run.strings_a_round:
        fastest["strings to labels"] = max(measured, key=lambda name: measured[name].strings_per_s.median)
    return fastest


def _spread(values) -> str:
    """A ratio's median over the rounds and, in brackets, its least and its most."""
    return f"{values.median:.2f} [{values.min:.2f}, {values.max:.2f}]"
