"""The results in the README, and the pages of comparison and studies, rendered from the files in `results/` alone."""

from pathlib import Path

from emotion.data.metrics import VALIDATION_NOISE
from emotion.evaluation.record import MPNET_BASE, read_records
from emotion.evaluation.schema import Benchmark, Measurement
from emotion.hub.comparison import ENDINGS, REFERENCE, Family, find_reference, processors_of, validation_scores
from emotion.hub.model_card import clearest, ranking
from emotion.hub.render import complete, name_of, render
from emotion.inference.model_folder import LARGEST_SAFE_WEIGHT, RELEASED, SCORES_OF_OPENED
from emotion.utils.files import RECOMMENDED
from emotion.utils.machine import PROCESSORS

TEMPLATES = Path(__file__).resolve().parent / "templates"
# The models of the README and of the pictures
LINES = ("baseline", *(method + ending for method in ("ptq", "qat") for ending in ENDINGS.values()), "qlora")
MEANS = ("macro_f1", "accuracy", "change", "seeds", "earlier", "per_class_f1")  # of a line, over seeds
# Page -> the studies that it shows, of both encoders as far as they were measured
PAGES = {
    "ptq": ["ptq_study", "ptq_sensitivity"],
    "qlora": ["qlora_sweep", "training_cost"],
    **{page: [page] for page in ("dataset", "batch", "reliability", "clients")},
}


def render_table(comparison: dict) -> str:
    """Renders the table of the comparison, a line per model and format."""
    rows, reference = comparison["rows"], comparison["tests"]["reference"]
    return render(TEMPLATES / "formats.md", rows=rows, processors=processors_of(rows), reference=reference)


@complete("the comparison")
def render_page(family: Family, pictures: list[Path]) -> str:
    """Renders `comparison.md`, with the ``pictures`` in this order."""
    comparison, javascript = family.comparison, family.folder / "javascript.json"
    return render(
        TEMPLATES / "comparison.md",
        **comparison,
        table=render_table(comparison),
        kinds={row["kind"] for row in comparison["rows"]},
        chosen_seeds=sorted({row["chosen_seed"] for row in comparison["seeds"]}),
        baseline=next((row for row in comparison["seeds"] if row["variant"] == "baseline"), None),
        records=family.records,
        pictures=pictures,
        javascript=Measurement.read(javascript) if javascript.is_file() else None,
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
            studies[name] = [Measurement.read(path) for path in paths if path.is_file()]
        if any(studies.values()):
            with complete(f"{page}.md, from {' and '.join(f'{name}.json' for name in names)},"):
                pages[families_of(results)[0] / f"{page}.md"] = render(
                    TEMPLATES / f"{page}.md",
                    **studies,
                    largest_safe_weight=LARGEST_SAFE_WEIGHT,
                    noise=VALIDATION_NOISE,
                    many=10**9,  # texts
                )
    return pages


# The README


@complete("the README's block")
def render_block(families: list[Family], root: Path) -> str:
    """Renders the picture, the findings and the table with its caption; ``root`` is the README's folder."""
    comparison, folders = families[0].comparison, [family.folder for family in families]
    lines = list_lines(comparison)
    records = [record for record in families[0].records if record.name == f"{RECOMMENDED}-onnx"]
    opened = folders[0] / SCORES_OF_OPENED  # the released baseline in float32, as `from_pretrained` opens it
    return render(
        TEMPLATES / "readme_block.md",
        encoders=[(encoder_name(family), family.comparison["about"]["parameters"]) for family in families],
        about=comparison["about"],
        recommended=RECOMMENDED,
        reference=lines[0],
        advice=next((line for line in lines if line["variant"] == RECOMMENDED), None),
        bits=comparison["bits"],
        choice=_describe_choice(comparison, lines),
        lines=lines,
        simple=[row for row in comparison["rows"] if row["format"] == "scikit-learn"],
        released=RELEASED,
        shown=[{"text": one.text, **ranking(one)[0]} for one in clearest(records[0].examples)[:2]] if records else [],
        large=[find_line(family.comparison, name) for family in families[1:] for name in ("baseline", "ptq")],
        processors=processors_of(lines),
        earlier=any(line["earlier"] for line in lines),
        compared_with=sorted({run["compared_with"] for run in comparison["about"]["runs"].values()}),
        machines=_merge_machines(families),
        dates=_merge(families, "dates"),
        commits=_merge(families, "commits"),
        made_at=_merge(families, "made_at"),
        opened=find_reference(read_records(opened)).quality.macro_f1 if opened.is_dir() else None,
        links=[path.relative_to(root).as_posix() for path in folders if path.is_relative_to(root)],
    )


def encoder_name(family: Family) -> str:
    """The name of the encoder, without the owner."""
    return (family.comparison["about"]["base_model"] or "an unknown model").split("/")[-1]


def _describe_choice(comparison: dict, lines: list[dict]) -> dict | None:
    """The scores of the recommended variant and the next smaller; None if validation prefers another or none is."""
    scores, sizes = validation_scores(comparison), {line["variant"]: line["megabytes"] for line in lines}
    smaller = [variant for variant in scores.keys() & sizes.keys() if sizes[variant] < sizes.get(RECOMMENDED, 0)]
    if not smaller or max(scores, key=scores.get) != RECOMMENDED:
        return None
    other = max(smaller, key=sizes.get)
    return {"score": scores[RECOMMENDED], "smaller": name_of(other), "score_of_smaller": scores[other]}


def list_lines(comparison: dict) -> list[dict]:
    """The lines of FP32, of PTQ and QAT with 8, 4 and 2 bits, and of QLoRA, as far as they were measured."""
    return [line for line in (find_line(comparison, variant) for variant in LINES) if line]


def find_line(comparison: dict, variant: str) -> dict | None:
    """Scores of a variant, the means over seeds if there are any, with size and speed of its fastest file.

    FP32's file is what the others are divided by. None if the variant was not measured.
    """
    rows = [row for row in comparison["rows"] if (row["variant"], row["kind"]) == (variant, "record")]
    if variant == "baseline":
        row, scored = _find_fastest_fp32(comparison), next(row for row in rows if row["name"] == REFERENCE)
    elif rows:
        # The file for ONNX Runtime, which all have, unless another was faster wherever both were timed.
        onnx = [row for row in rows if row["format"] == "onnx"] or rows
        row = scored = min(onnx if variant != "qlora" else rows, key=_slowness)
    else:
        return None
    line = {name: {"mean": scored[name], "standard_deviation": None} for name in ("macro_f1", "accuracy")}
    line |= {"variant": variant, "title": _title(variant, row), "seeds": [], "change": None, "per_class_f1": {}}
    line |= {name: row[name] for name in ("format", "earlier", "megabytes", "times_smaller", "speeds")}
    for means in comparison["seeds"]:
        if (means["variant"], means["format"]) == (variant, scored["format"]):
            line |= {name: means[name] for name in MEANS}
    return line


def _title(variant: str, row: dict) -> str:
    """The name of a line; QLoRA's says which of its files it is."""
    formats = {"onnx": " INT8", "nf4": " NF4"} if variant == "qlora" else {}
    return name_of(variant) + formats.get(row["format"], "")


def _slowness(row: dict) -> tuple[bool, float]:
    """The mean of the times of a row on all kinds of processors; those that were not timed come last."""
    times = [speed["p50_ms"] for speed in row["speeds"].values() if speed["p50_ms"]]
    return not times, sum(times) / max(len(times), 1)


def _find_fastest_fp32(comparison: dict) -> dict:
    """The row of the model that the interleaved runs divide by, or the reference without such a run."""
    named = {run["compared_with"] for run in comparison["about"]["runs"].values()}
    rows = comparison["rows"]
    # A record is called variant-format, a timed model folder:format.
    stems = {Path(name).name for name in named}
    found = [row for row in rows if row["name"] in named or f"{row['variant']}:{row['format']}" in stems]
    return found[0] if found else next(row for row in rows if row["name"] == REFERENCE)


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
