"""The results in the README, and the pages of comparison and studies, rendered from the files in `results/` alone."""

from pathlib import Path
from statistics import fmean

from emotion.data.metrics import VALIDATION_NOISE
from emotion.evaluation.record import MPNET_BASE, read_records
from emotion.evaluation.schema import Benchmark, Bits, read_study
from emotion.hub.comparison import REFERENCE, Family, find_reference, processors_of
from emotion.hub.render import complete, render
from emotion.inference.model_folder import LARGEST_SAFE_WEIGHT, RELEASED, SCORES_OF_OPENED
from emotion.utils.files import RECOMMENDED
from emotion.utils.machine import PROCESSORS

TEMPLATES = Path(__file__).resolve().parent / "templates"
# Variant -> the title of its row in the README
ROWS = {"baseline": "baseline, BF16", "ptq": "ptq, INT8", "qat": "qat, INT8", "qlora": "qlora, NF4"}
# The README's snippets: format, variant, runtime, folder in `weights/`
RUNTIMES = (
    ("onnx", RECOMMENDED, "ONNX Runtime", RECOMMENDED),
    ("openvino", "ptq", "OpenVINO, quantized below", "mine/ptq"),  # a clone does not have its file
    ("bf16", "baseline", "Transformers, BF16", "baseline"),
    ("nf4", "qlora", "Transformers, NF4", "qlora"),
)
# Page -> the studies that it shows, of both encoders as far as they were measured
PAGES = {
    "ptq": ["ptq_study", "ptq_sensitivity"],
    "qlora": ["qlora_sweep", "training_cost"],
    **{page: [page] for page in ("dataset", "bits", "batch", "reliability")},
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
        benchmarks={PROCESSORS[name]: run for name, run in family.benchmarks.items()},
        fastest={PROCESSORS[name]: _find_fastest(run) for name, run in family.benchmarks.items()},
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


# The README


@complete("the README's block")
def render_block(families: list[Family], root: Path) -> str:
    """Renders the recommendation, the table with its caption, and the picture; ``root`` is the README's folder."""
    comparison, folders = families[0].comparison, [family.folder for family in families]
    results = folders[0]
    lines = list_lines(comparison)
    for family in families[1:]:
        lines += list_lines(family.comparison, f"{encoder_name(family)} ", ("ptq",))
    shown = (results / "bits.json").is_file() and results.is_relative_to(root)
    study = read_study(results / "bits.json") if shown else None
    opened = results / SCORES_OF_OPENED  # the released baseline in float32, as `from_pretrained` opens it
    return render(
        TEMPLATES / "readme_block.md",
        encoders=[(encoder_name(family), family.comparison["about"]["parameters"]) for family in families],
        about=comparison["about"],
        recommended=RECOMMENDED,
        advice=find_line(comparison, RECOMMENDED),
        choice=_describe_choice(study, lines) if study else None,
        table=summary_table(lines),
        earlier=any(line.get("earlier") for line in lines),
        compared_with=sorted({run["compared_with"] for run in comparison["about"]["runs"].values()}),
        machines=_merge_machines(families),
        dates=_merge(families, "dates"),
        commits=_merge(families, "commits"),
        made_at=_merge(families, "made_at"),
        opened=find_reference(read_records(opened)).quality.macro_f1 if opened.is_dir() else None,
        links=[path.relative_to(root).as_posix() for path in folders if path.is_relative_to(root)],
        bits=[cell.bits for cell in study.cells_of("qat")] if study else None,
        seeds_of_bits=len(study.cells_of("qat")[0].runs) if study else None,
    )


def encoder_name(family: Family) -> str:
    """The name of the encoder, without the owner."""
    return (family.comparison["about"]["base_model"] or "an unknown model").split("/")[-1]


def validation_scores(study: Bits) -> dict[str, float]:
    """Variant of QAT -> macro F1 of its reopened ONNX file on validation, the mean over the seeds."""
    cells = {variant: cell for variant, cell in study.cells.items() if cell.method == "qat"}
    return {name: fmean(cell.over_seeds("onnx, reopened", "validation_macro_f1")) for name, cell in cells.items()}


def _describe_choice(study: Bits, lines: list[dict]) -> dict | None:
    """The scores of the recommended variant and the next smaller; None if validation prefers another or none is."""
    scores, sizes = validation_scores(study), {line["variant"]: line["megabytes"] for line in lines}
    smaller = [variant for variant in scores.keys() & sizes.keys() if sizes[variant] < sizes.get(RECOMMENDED, 0)]
    if not smaller or max(scores, key=scores.get) != RECOMMENDED:
        return None
    other = max(smaller, key=sizes.get)
    return {"score": scores[RECOMMENDED], "smaller": other, "score_of_smaller": scores[other]}


def list_lines(comparison: dict, prefix: str = "", variants: tuple = RELEASED) -> list[dict]:
    """The lines of FP32, and of the released formats of ``variants`` that were measured."""
    lines = [{"title": f"{prefix}baseline, FP32", **_reference_line(comparison)}]
    for variant in variants:
        if line := find_line(comparison, variant):
            lines.append({"title": prefix + ROWS.get(variant, variant), **line})
    return lines


def _reference_line(comparison: dict) -> dict:
    """FP32's scores, with size and speed of the fastest FP32 model, which the others are divided by."""
    line, fastest = find_line(comparison, *REFERENCE.split("-")), {}
    for processor, run in comparison["about"]["runs"].items():
        for row in comparison["rows"]:
            # A record is called variant-format, a timed model folder:format.
            compared_with = Path(run["compared_with"]).name, run["compared_with"]
            if f"{row['variant']}:{row['format']}" == compared_with[0] or row["name"] == compared_with[1]:
                fastest[processor] = row
    if not fastest:
        return line
    speeds = {processor: row["speeds"][processor] for processor, row in fastest.items()}
    return {**line, **_size_and_speed(next(iter(fastest.values()))), "speeds": speeds}


def find_line(comparison: dict, variant: str, format: str | None = None) -> dict | None:
    """Scores, size and speed of a variant, in the released format by default; None if it was not measured."""
    format = format or RELEASED.get(variant, "onnx")
    line = None
    for row in comparison["rows"]:
        if (row["variant"], row["format"], row["kind"]) == (variant, format, "record"):
            line = {name: {"mean": row[name], "standard_deviation": None} for name in ("macro_f1", "accuracy")}
            line |= {
                "variant": variant,
                "seeds": [],
                "change": None,
                "earlier": row["earlier"],
                **_size_and_speed(row),
            }
    for means in comparison["seeds"]:
        if line and (means["variant"], means["format"]) == (variant, format):
            line |= {name: means[name] for name in ("macro_f1", "accuracy", "seeds", "change", "earlier")}
    return line


def _size_and_speed(row: dict) -> dict:
    """The fields of a row that do not depend on a seed."""
    return {name: row[name] for name in ("megabytes", "times_smaller", "speeds")}


def summary_table(lines: list[dict]) -> str:
    """Renders the README's table."""
    return render(TEMPLATES / "readme_table.md", lines=lines, processors=processors_of(lines))


def _merge(families: list[Family], name: str) -> list[str]:
    """The values of a field of `about` in all families, each once."""
    return sorted({value for family in families for value in family.comparison["about"][name]})


def _merge_machines(families: list[Family]) -> list[str]:
    """The processors that the families were timed on, each once: 'AVX2: AMD EPYC, 2 threads'."""
    machines = {}  # in order
    for family in families:
        for machine in family.comparison["about"]["machines"]:
            threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
            machines[f"{machine['title']}: {machine['cpu']}, {threads}"] = None
    return list(machines)


@complete("the README's times")
def render_times(family: Family) -> str:
    """Renders the time of one text in each runtime of the README's snippets; a sentence if none was timed."""
    rows, study = [], None
    for format, variant, runtime, folder in RUNTIMES:
        line = find_line(family.comparison, variant, format)
        if line and any(speed["p50_ms"] is not None for speed in line["speeds"].values()):
            rows.append({"runtime": runtime, "folder": f"weights/{folder}", **_size_and_speed(line)})
    if (family.folder / "javascript.json").is_file():
        study = read_study(family.folder / "javascript.json")
        speeds = {study.environment.processor: {"p50_ms": study.latency_ms["p50"]}}
        megabytes = study.bytes_to_serve / 1e6
        rows.append({"runtime": "Node.js", "folder": study.artifact, "megabytes": megabytes, "speeds": speeds})
    return render(TEMPLATES / "readme_times.md", rows=rows, processors=processors_of(rows), study=study)
