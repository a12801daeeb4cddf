"""The tables of the comparison, and the page that shows all of them."""

from pathlib import Path

from emotion.evaluation.schema import Benchmark
from emotion.hub.comparison import Family, processors_of
from emotion.hub.render import complete, render
from emotion.utils.processor import TITLES
from report import TEMPLATES


def render_table(comparison: dict) -> str:
    """One line per artifact."""
    rows, reference = comparison["rows"], comparison["tests"]["reference"]
    return render(TEMPLATES / "formats.md", rows=rows, processors=processors_of(rows), reference=reference)


@complete("the comparison")
def render_page(family: Family, pictures: list[Path]) -> str:
    """The text of `comparison.md`; ``pictures`` are shown by their file names, in this order."""
    comparison, benchmarks = family.comparison, family.benchmarks
    seeds = comparison["seeds"]
    return render(
        TEMPLATES / "comparison.md",
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


def fastest_of(run: Benchmark) -> dict[str, str]:
    """What is measured -> the artifact, or plain alternative, that was fastest of all in an interleaved run."""
    measured = run.artifacts
    fastest = {
        "one text": min(measured, key=lambda name: measured[name].latency_ms.p50),
        "batches of 32": max(measured, key=lambda name: measured[name].throughput_per_s.median),
    }
    if run.texts_end_to_end_a_round:
        fastest["strings to labels"] = max(measured, key=lambda name: measured[name].end_to_end_per_s.median)
    return fastest
