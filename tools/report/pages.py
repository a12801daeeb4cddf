"""The pages of the comparison and of the studies, rendered from the JSON files in `results/` alone."""

from pathlib import Path

from emotion.data.metrics import VALIDATION_NOISE
from emotion.evaluation.record import MPNET_BASE
from emotion.evaluation.schema import Benchmark, read_study
from emotion.hub.comparison import Family, processors_of
from emotion.hub.render import complete, render
from emotion.inference.model_folder import LARGEST_SAFE_WEIGHT
from emotion.utils.machine import PROCESSORS as TITLES
from report import TEMPLATES

# Page -> the studies that it shows, of both encoders as far as they were measured
PAGES = {
    "dataset": ["dataset"],
    "ptq": ["ptq_study", "ptq_sensitivity"],
    "qlora": ["qlora_sweep", "training_cost"],
    "bits": ["bits"],
    "batch": ["batch"],
    "reliability": ["reliability"],
}
WORTH_RECOVERING = 0.003  # of macro F1: a smaller loss is noise, and a share of it says nothing


def render_table(comparison: dict) -> str:
    """Renders the table of the comparison, a line per model and format."""
    rows, reference = comparison["rows"], comparison["tests"]["reference"]
    return render(TEMPLATES / "formats.md", rows=rows, processors=processors_of(rows), reference=reference)


@complete("the comparison")
def render_page(family: Family, pictures: list[Path]) -> str:
    """Renders `comparison.md`, with the ``pictures`` in this order."""
    comparison = family.comparison
    return render(
        TEMPLATES / "comparison.md",
        **comparison,
        table=render_table(comparison),
        kinds={row["kind"] for row in comparison["rows"]},
        chosen_seeds=sorted({row["chosen_seed"] for row in comparison["seeds"]}),
        baseline=next((row for row in comparison["seeds"] if row["variant"] == "baseline"), None),
        records=family.records,
        pictures=pictures,
        benchmarks={TITLES[name]: run for name, run in family.benchmarks.items()},
        fastest={TITLES[name]: _find_fastest(run) for name, run in family.benchmarks.items()},
    )


def _find_fastest(run: Benchmark) -> dict[str, str]:
    """Measurement -> the model that was the fastest in an interleaved run."""
    timed = run.artifacts
    fastest = {
        "one text": min(timed, key=lambda name: timed[name].latency_ms.p50),
        "batches of 32": max(timed, key=lambda name: timed[name].throughput_per_s.median),
    }
    if run.texts_end_to_end_a_round:
        fastest["end to end"] = max(timed, key=lambda name: timed[name].end_to_end_per_s.median)
    return fastest


def families_of(results: Path) -> list[Path]:
    """The results folders of both encoders, if they are there; ``results`` is either of the two."""
    main = results.parent if results.name == MPNET_BASE else results
    return [folder for folder in (main, main / MPNET_BASE) if folder.is_dir()]


def render_study_pages(results: Path) -> dict[Path, str]:
    """Renders each page that has a study in ``results``: path -> text. One page shows both encoders."""
    pages = {}
    for page, names in PAGES.items():
        studies = {}
        for name in names:
            paths = [family / f"{name}.json" for family in families_of(results)]
            studies[name] = [read_study(path) for path in paths if path.is_file()]
        if any(studies.values()):
            with complete(f"{page}.md, from {' and '.join(f'{name}.json' for name in names)},"):
                pages[families_of(results)[0] / f"{page}.md"] = render(
                    TEMPLATES / f"{page}.md",
                    **studies,
                    largest_safe_weight=LARGEST_SAFE_WEIGHT,
                    noise=VALIDATION_NOISE,
                    many=10**9,  # texts
                    recovered=_recovered,
                    largest_gap=lambda values, others: max(abs(a - b) for a, b in zip(values, others, strict=True)),
                )
    return pages


def _recovered(ptq: float, qat: float) -> str:
    """The share of PTQ's loss of macro F1 that QAT recovers, from their changes against FP32."""
    if -ptq <= WORTH_RECOVERING:
        return "-"
    return "all" if qat >= 0 else f"{100 * (1 - qat / ptq):.0f} %"
