"""What the README shows of the results: which variant to take, nine rows, one picture, the time in each runtime.

Scores are means over the seeds. A form that one seed alone was scored in is marked, and nothing stands in bold: what
differs between two lines may be the luck of a seed.
"""

from collections import Counter
from pathlib import Path

from emotion.evaluation.record import read_records
from emotion.evaluation.schema import Bits, read_study
from emotion.hub.comparison import REFERENCE, Family, find_reference, processors_of
from emotion.hub.render import complete, render
from emotion.inference.released import RECOMMENDED, RELEASED, SCORES_OF_OPENED
from report import TEMPLATES

# The form of a released variant whose file this repository holds; all others are INT8 and fewer bits in ONNX Runtime
FORMS = {"baseline": "bf16", "qlora": "nf4"}
TITLES = {"baseline": "baseline, BF16", "ptq": "ptq, INT8", "qat": "qat, INT8", "qlora": "qlora, NF4"}
# What a line takes from the means over the seeds, where there are any
MEANS = ("macro_f1", "accuracy", "seeds", "change", "macro_f1_of_seeds")
# What opens the forms of the README's snippets: format, variant, words, folder in `weights/`
RUNTIMES = (
    ("onnx", RECOMMENDED, "ONNX Runtime", RECOMMENDED),
    ("openvino", "ptq", "OpenVINO, made below", "mine/ptq"),  # a clone does not hold its file
    ("bf16", "baseline", "Transformers, BF16", "baseline"),
    ("nf4", "qlora", "Transformers, NF4", "qlora"),
)


@complete("the README's block")
def render_block(families: list[Family], root: Path) -> str:
    """The recommendation, the table with its caption, and the picture.

    Args:
        families: of the small encoder and, if it was measured, of the base-size one.
        root: the README's folder, from which it finds the picture.
    """
    small, results = families[0].comparison, families[0].folder
    lines = list_lines(small)
    seeds = common_seeds(lines)
    fewer = [line for line in lines if is_mean(line["macro_f1"]) and len(line["seeds"]) < len(seeds)]
    for family in families[1:]:
        lines += list_lines(family.comparison, "base-size ", ("ptq",))
    study = None
    if (results / "bits.json").is_file() and results.is_relative_to(root):
        study = read_study(results / "bits.json")
    return render(
        TEMPLATES / "readme_block.md",
        encoders=[describe_encoder(family.comparison["about"]) for family in families],
        about=small["about"],
        recommended=RECOMMENDED,
        advice=find_line(small, RECOMMENDED),
        choice=describe_choice(study, lines) if study else None,
        table=summary_table(lines),
        marked=any(not is_mean(line["macro_f1"]) for line in lines),
        single=chosen_reference(small),
        seeds=len(seeds),
        fewer=fewer,  # QLoRA keeps floats where 4 bits cost a seed too much
        reference=lines[0],
        reference_mean=mean_of(lines[0], seeds),
        runtimes=sorted({run["compared_with"] for run in small["about"]["runs"].values()}),
        machines=merged_machines(families),
        origins=[merged(families, name) for name in ("dates", "commits", "made_at")],
        opened=opened_score(results),
        base_link=below(root, families[1].folder) if len(families) > 1 else None,
        link=below(root, results),
        picture=describe_picture(study) if study else None,
    )


def opened_score(results: Path) -> float | None:
    """Macro F1 of the released baseline as `from_pretrained` opens it, in float32; None if that was not measured."""
    folder = results / SCORES_OF_OPENED
    return find_reference(read_records(folder)).quality.macro_f1 if folder.is_dir() else None


def below(root: Path, folder: Path) -> str | None:
    """The way from the README to a folder, for a link; None if the folder lies elsewhere."""
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else None


def describe_encoder(about: dict) -> dict:
    """Its name without the owner's, and how many parameters it has."""
    name = (about["base_model"] or "an unknown model").split("/")[-1]
    return {"name": name, "parameters": about["parameters"]}


def validation_scores(study: Bits) -> dict[str, float]:
    """Variant of QAT -> macro F1 of its file for ONNX Runtime on validation, opened again; the mean over the seeds."""
    scores = {}
    for variant, cell in study.cells.items():
        if cell.method == "qat":
            of_seeds = cell.over_seeds("onnx, reopened", "validation_macro_f1")
            scores[variant] = sum(of_seeds) / len(of_seeds)
    return scores


def describe_choice(study: Bits, lines: list[dict]) -> dict | None:
    """What validation says of the recommended variant and of the next smaller one, which a reader would ask for.

    Returns:
        None where validation does not prefer the recommended variant, or none is smaller.
    """
    scores, sizes = validation_scores(study), {line["variant"]: line["megabytes"] for line in lines}
    smaller = {}
    for variant in scores.keys() & sizes.keys():
        if sizes[variant] < sizes.get(RECOMMENDED, 0):
            smaller[variant] = sizes[variant]
    if not smaller or max(scores, key=scores.get) != RECOMMENDED:
        return None
    other = max(smaller, key=smaller.get)
    return {"score": scores[RECOMMENDED], "smaller": other, "score_of_smaller": scores[other]}


def chosen_reference(comparison: dict) -> dict | None:
    """The seed that lines of one seed are of, and FP32 there; None where FP32 is no mean over seeds either."""
    line = find_line(comparison, *REFERENCE.split("-"))
    for one in comparison["seeds"]:
        if f"{one['variant']}-{one['format']}" == REFERENCE and is_mean(line["macro_f1"]):
            scores = dict(zip(one["seeds"], one["macro_f1_of_seeds"], strict=True))
            return {"seed": one["chosen_seed"], "macro_f1": scores[one["chosen_seed"]]}
    return None


def common_seeds(lines: list[dict]) -> list[int]:
    """The seeds that most of the lines are a mean of; empty if all are of one seed."""
    counted = Counter(tuple(line["seeds"]) for line in lines if is_mean(line["macro_f1"]))
    return list(counted.most_common(1)[0][0]) if counted else []


def mean_of(line: dict, seeds: list[int]) -> float | None:
    """Macro F1 over these seeds alone, where the line is a mean of more than these; else None."""
    scores = dict(zip(line["seeds"], line["macro_f1_of_seeds"], strict=True))
    if not seeds or not set(seeds) < scores.keys():
        return None
    return sum(scores[seed] for seed in seeds) / len(seeds)


def list_lines(comparison: dict, prefix: str = "", variants: tuple = RELEASED) -> list[dict]:
    """FP32, then the forms of ``variants`` that were measured."""
    lines = [{"title": f"{prefix}baseline, FP32", **reference_line(comparison)}]
    for variant in variants:
        if line := find_line(comparison, variant):
            lines.append({"title": prefix + TITLES.get(variant, variant), **line})
    return lines


def reference_line(comparison: dict) -> dict:
    """FP32: its scores, and size and speed of what the others are divided by, the fastest form of it."""
    line, fastest = find_line(comparison, *REFERENCE.split("-")), {}
    for processor, run in comparison["about"]["runs"].items():
        for row in comparison["rows"]:
            # A record is called variant-format, an artifact folder:format.
            artifact = Path(run["compared_with"]).name
            if artifact == f"{row['variant']}:{row['format']}" or run["compared_with"] == row["name"]:
                fastest[processor] = row
    if not fastest:
        return line
    speeds = {processor: row["speeds"][processor] for processor, row in fastest.items()}
    return {**line, **speeds_of(next(iter(fastest.values()))), "speeds": speeds}


def find_line(comparison: dict, variant: str, format: str | None = None) -> dict | None:
    """Scores, size and speed of a variant in the form that is released; None if it was not measured."""
    format = format or FORMS.get(variant, "onnx")
    for row in comparison["rows"]:
        if (row["variant"], row["format"], row["kind"]) == (variant, format, "record"):
            line = {name: {"mean": row[name], "standard_deviation": None} for name in ("macro_f1", "accuracy")}
            line |= {"variant": variant, "seeds": [], "macro_f1_of_seeds": [], "change": None, **speeds_of(row)}
            break
    else:
        return None
    for one in comparison["seeds"]:
        if (one["variant"], one["format"]) == (variant, format):
            line |= {name: one[name] for name in MEANS}
    return line


def speeds_of(row: dict) -> dict:
    """The fields of a row that do not depend on a seed."""
    return {name: row[name] for name in ("megabytes", "times_smaller", "speeds")}


def is_mean(score: dict) -> bool:
    """Whether a score is the mean of several seeds, which alone has a deviation."""
    return score["standard_deviation"] is not None


def summary_table(lines: list[dict]) -> str:
    """The columns that tell which variant to take."""
    return render(TEMPLATES / "readme_table.md", lines=lines, processors=processors_of(lines))


def merged(families: list[Family], name: str) -> list[str]:
    """What the families say of a field of `about`, each value once."""
    return sorted({value for family in families for value in family.comparison["about"][name]})


def merged_machines(families: list[Family]) -> list[str]:
    """The processors that the families were timed on, each once: 'AVX2: AMD EPYC, 2 threads'."""
    found = {}  # in order
    for family in families:
        for one in family.comparison["about"]["machines"]:
            threads = "1 thread" if one["threads"] == 1 else f"{one['threads']} threads"
            found[f"{one['title']}: {one['cpu']}, {threads}"] = None
    return list(found)


def describe_picture(study: Bits) -> dict:
    """What the caption of `bits.png` tells: the bits, and how many seeds."""
    cells = study.cells_of("qat")
    return {"bits": [cell.bits for cell in cells], "seeds": len(cells[0].runs)}


@complete("the README's times")
def render_times(family: Family) -> str:
    """The time of one text in each runtime that the README's snippets use; a sentence if none was timed."""
    rows, study = [], None
    for format, variant, words, folder in RUNTIMES:
        line = find_line(family.comparison, variant, format)
        if line and any(speed["p50_ms"] is not None for speed in line["speeds"].values()):
            rows.append({"words": words, "folder": f"weights/{folder}", **speeds_of(line)})
    if (family.folder / "javascript.json").is_file():
        study = read_study(family.folder / "javascript.json")
        speeds = {study.environment.processor: {"p50_ms": study.latency_ms.p50}}
        megabytes = study.bytes_to_serve / 1e6
        rows.append({"words": "Node.js", "folder": study.artifact, "megabytes": megabytes, "speeds": speeds})
    return render(TEMPLATES / "readme_times.md", rows=rows, processors=processors_of(rows), study=study)
