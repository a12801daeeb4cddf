"""Everything that the comparison shows, computed from the records: rows of the table, paired tests, means over seeds.

It is written to `results/comparison.json`, so that the pages, the pictures and the report show the same numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from pydantic import BaseModel

from emotion.data.metrics import softmax
from emotion.evaluation.peers import COMPILED, TITLES, is_peer
from emotion.evaluation.record import read_predictions, read_records, read_seeds, score_again, scores_of_seed
from emotion.evaluation.schema import Benchmark, Mean, Record, Seeds, TextBaselines, Timed
from emotion.evaluation.statistics import LEVEL, NO_LOSS_MARGIN, POWER, RESAMPLES, compare_with, mean_interval
from emotion.inference.model_folder import WEIGHT_FILES
from emotion.utils.errors import UserError
from emotion.utils.machine import PROCESSORS

REFERENCE = "baseline-pytorch"  # FP32 as it was trained
# Instruction sets that decide how fast INT8 and BF16 are; a processor has dozens of others
NOTEWORTHY_SETS = {"avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8"}
ENDINGS = {8: "", 4: "-int4", 2: "-int2"}  # bits of a weight -> how the names of PTQ's and QAT's variants end
WORTH_RECOVERING = 0.003  # of macro F1: a smaller loss is noise, and a share of it says nothing
SCORES = ("examples", "macro_f1", "macro_f1_ci95", "accuracy", "expected_calibration_error")


@dataclass(frozen=True)
class Family:
    """The results of one encoder."""

    folder: Path  # of the results
    records: list[Record]
    comparison: dict  # of `build_comparison`
    benchmarks: dict[str, Benchmark]  # class of processors -> the interleaved run on one


def read_family(folder: Path) -> Family:
    """Reads the records and the interleaved runs in a results folder, and compares them."""
    records = read_records(folder)
    benchmarks = read_benchmarks(folder, records)
    return Family(folder, records, build_comparison(records, folder, benchmarks), benchmarks)


def read_benchmarks(folder: Path, records: list[Record]) -> dict[str, Benchmark]:
    """Reads the interleaved runs in a results folder, without the models that have been replaced since.

    Returns class of processors, the highest first -> the run on one; raises `UserError` if one is damaged.
    """
    runs = {}
    for name in PROCESSORS:
        path = folder / "benchmark" / f"{name}.json"
        if path.is_file():
            run = Benchmark.read(path)
            if (found := run.environment.processor) != name:
                raise UserError(f"{path}: by its instruction sets it was measured on {found}; measure it again")
            runs[name] = run.model_copy(update={"artifacts": _drop_replaced(run, records)})
    return runs


def _drop_replaced(run: Benchmark, records: list[Record]) -> dict[str, Timed]:
    """The models of a run, without those (compiled or not) whose record has another size: their files are new."""
    sizes = {record.timed_as: record.size.bytes_to_serve for record in records}
    kept = {}
    for name, timed in run.artifacts.items():
        size = sizes.get(name.removesuffix(COMPILED), timed.bytes_to_serve)
        # All ratios are against the reference: without it they would mean nothing.
        if size == timed.bytes_to_serve or name == run.compared_with:
            kept[name] = timed
    return kept


def build_comparison(records: list[Record], results: Path, runs: dict[str, Benchmark]) -> dict:
    """Computes the numbers of all pages from the records and their folder. One that was not measured is None.

    Speeds are divided only within one of the ``runs``, of `read_benchmarks`. Raises `UserError` if the records are not
    of the same rows, or lack the reference, or a summary over seeds is damaged.
    """
    if len({record.provenance.dataset_fingerprint for record in records}) != 1:
        raise UserError("the records were not scored on the same rows; measure them again with run_evaluation.py")
    # The order of every table: the variants by name, the formats of each as a folder lists them.
    records = sorted(records, key=lambda record: (record.variant, list(WEIGHT_FILES).index(record.format)))
    reference = find_reference(records)
    # A record of another base model is a peer. It is tested apart, or it would change the corrected p-values.
    encoder = reference.provenance.base_model
    own = [record for record in records if record.provenance.base_model == encoder]
    peers = [record for record in records if record.provenance.base_model != encoder]
    own_tests = _compare_records(own, results)
    tests = own_tests | _compare_records([reference, *peers], results)
    timed = {}  # model -> class of processors -> its times there
    for processor, run in runs.items():
        for name, result in run.artifacts.items():
            timed.setdefault(name, {})[processor] = result
    rows = []
    for record in records:
        row = _record_row(record, timed.pop(record.timed_as, {}), runs, tests.get(record.name))
        rows.append({"kind": "peer" if record in peers else "record"} | row)
    # What was timed and has no record is shown if another library has made it.
    rows += [_alternative_row(name, result, runs) for name, result in timed.items() if is_peer(format_of(name))]
    rows += _text_baseline_rows(results, runs)
    seeds = read_seeds(results)
    about = _describe(own, peers, reference, runs, [record for _, kept in seeds for record in kept])
    comparison = {"about": about, "tests": _describe_tests(own_tests), "rows": rows, "seeds": list_means(seeds)}
    comparison["bits"] = list_bits(comparison, records, seeds, results)
    baselines = [summary for summary, _ in seeds if summary.variant == reference.variant]
    ensemble = score_ensemble(baselines[0], results, about["labels"]) if baselines else None
    return rounded(comparison | {"ensemble": ensemble})


def find_reference(records: list[Record]) -> Record:
    """The record that the others are compared with. Raises `UserError` if it is missing."""
    for record in records:
        if record.name == REFERENCE:
            return record
    raise UserError(f"no record {REFERENCE}, with which the others are compared; measure it first")


def _compare_records(records: list[Record], results: Path) -> dict[str, dict]:
    """Record -> the result of the paired tests against the reference, one of them; see evaluation/statistics.py."""
    logits, labels = {}, None
    for record in records:
        labels, logits[record.name] = read_predictions(results / "predictions" / f"{record.name}.parquet")
    return compare_with(logits.pop(REFERENCE), logits, labels)


def _describe_tests(tests: dict[str, dict]) -> dict:
    """The settings of the paired tests, and the smallest and the largest of the minimum detectable effects."""
    found = [test["minimum_detectable_effect"] for test in tests.values() if test["flips"]]  # else 0
    return {
        "reference": REFERENCE,
        "comparisons": len(tests),
        "level": LEVEL,
        "power": POWER,
        "margin": NO_LOSS_MARGIN,
        "resamples": RESAMPLES,
        "minimum_detectable_effect": [min(found), max(found)] if found else None,
    }


def _describe(
    own: list[Record], peers: list[Record], reference: Record, runs: dict[str, Benchmark], of_seeds: list[Record]
) -> dict:
    """What was measured on what, for captions; ``of_seeds`` are the records of all seeds."""
    measured = list(runs.values()) or own + peers  # the times that the table shows are those of the interleaved runs
    machines = []
    for environment in [result.environment for result in measured]:
        machine = {
            "title": PROCESSORS[environment.processor],
            "cpu": environment.cpu,
            "threads": environment.threads,
            "instruction_sets": sorted(set(environment.instruction_sets) & NOTEWORTHY_SETS),
        }
        if machine not in machines:
            machines.append(machine)
    commits = {run.git_commit for run in runs.values()} or {record.provenance.git_commit for record in own}
    weights = reference.size.files.get("model.safetensors")
    return {
        # The same in all records: their rows have the same fingerprint.
        "dataset": reference.provenance.dataset,
        "examples": reference.quality.examples,
        "labels": reference.quality.labels,
        "parameters": weights and weights // 4,  # FP32; the file's header adds a tenth of a percent
        "base_model": reference.provenance.base_model,  # None without a recipe.yaml
        "peers": [
            {"name": peer.name, **peer.provenance.model_dump(include={"base_model", "train_rows", "git_commit"})}
            for peer in peers
        ],
        "machines": machines,
        "dates": sorted({result.date for result in measured}),
        "commits": sorted(commits - {None}),
        "made_at": sorted({record.provenance.git_commit for record in own + of_seeds} - {None}),
        "runs": {
            processor: {"title": PROCESSORS[processor], "compared_with": run.compared_with, "rounds": run.rounds}
            for processor, run in runs.items()
        },
    }


def _record_row(record: Record, timed: dict[str, Timed], runs: dict[str, Benchmark], tests: dict | None) -> dict:
    """The row of a record, with the times of the interleaved runs (by class), or with its own if it is in none."""
    row = {"name": record.name, "variant": record.variant, "format": record.format, "earlier": record.earlier}
    row |= {score: getattr(record.quality, score) for score in SCORES} | {"megabytes": record.size.megabytes}
    row |= _times_of(timed, runs) | {"tests": tests}
    # On a kind of processor without such a run, a few times of their own would make a column of dashes.
    processor = record.environment.processor
    if not timed and (processor in runs or not runs):
        latency = record.latency_ms
        own = {"p50_ms": latency.p50, "p95_ms": latency.p95, "texts_per_s": record.throughput_per_s.value}
        # Measured alone, so nothing may be divided by them.
        row["speeds"] = {processor: own | dict.fromkeys(("times_faster_at_batch_1", "times_faster_at_batch_32"))}
    return row


def _alternative_row(name: str, timed: dict[str, Timed], runs: dict[str, Benchmark]) -> dict:
    """The row of what another library makes of the same weights; ``timed`` as for `_record_row`."""
    format = format_of(name)
    title = TITLES.get(format, format)
    # The same on each processor, but for a few texts.
    quality = next((result.quality for result in timed.values() if result.quality), {})
    # A type that a library chooses by itself on a processor: beside FP32 it would pass for that.
    halved = [PROCESSORS[processor] for processor, result in timed.items() if result.precision == "bfloat16"]
    if halved and "BF16" not in title:
        title += ", in BF16" if len(halved) == len(timed) else f", in BF16 with {' and '.join(halved)}"
    variant = Path(name.rsplit(":", 1)[0]).name
    row = {"kind": "alternative", "name": name, "variant": variant, "format": title, "earlier": False}
    row |= {score: quality.get(score) for score in SCORES}
    row["megabytes"] = next(iter(timed.values())).bytes_to_serve / 1e6
    return row | _times_of(timed, runs) | {"tests": None}


def _text_baseline_rows(results: Path, runs: dict[str, Benchmark]) -> list[dict]:
    """The rows of the classifiers without a neural network, with their own times if the runs have that processor."""
    path, rows = results / "text_baselines.json", []
    study = TextBaselines.read(path) if path.is_file() else None
    for name, model in study.models.items() if study else ():
        row = {"kind": "alternative", "name": name, "variant": name, "format": "scikit-learn", "earlier": False}
        row |= {score: getattr(model.quality, score) for score in SCORES} | {"megabytes": model.bytes_to_serve / 1e6}
        speed = {"p50_ms": model.latency_ms.p50, "p95_ms": model.latency_ms.p95, "texts_per_s": None}
        speed |= dict.fromkeys(("times_faster_at_batch_1", "times_faster_at_batch_32"))
        processor = study.environment.processor
        row |= {"times_smaller": None, "speeds": {processor: speed} if processor in runs else {}, "tests": None}
        rows.append(row)
    return rows


def _times_of(timed: dict[str, Timed], runs: dict[str, Benchmark]) -> dict:
    """The times of a model in the interleaved runs, and its size and speed against their reference; None in no run."""
    smaller, speeds = None, {}
    for processor, result in timed.items():
        run = runs[processor]
        smaller = smaller or run.artifacts[run.compared_with].bytes_to_serve / result.bytes_to_serve
        speeds[processor] = {
            "p50_ms": result.latency_ms.p50,
            "p95_ms": result.latency_ms.p95,
            "texts_per_s": result.throughput_per_s.median,
            "times_faster_at_batch_1": result.times_faster_at_batch_1,
            "times_faster_at_batch_32": result.times_faster_at_batch_32,
        }
    return {"times_smaller": smaller, "speeds": speeds}


def processors_of(rows: list[dict]) -> list[str]:
    """The classes of processors that any of the rows was timed on, the highest first."""
    return [processor for processor in PROCESSORS if any(processor in row["speeds"] for row in rows)]


def read_means(results: Path) -> list[dict]:
    """The means over seeds in a results folder, a row per variant and format; empty if none were measured."""
    return rounded(list_means(read_seeds(results)))


def list_means(seeds: list[tuple[Seeds, list[Record]]]) -> list[dict]:
    """A row per variant and format of `read_seeds`: means, and the change against the baseline of the same seed."""
    rows = []
    for summary, records in seeds:
        for format, means in summary.formats.items():
            runs = summary.runs_of(format)  # not every seed has every format
            row = {
                "variant": summary.variant,
                "format": format,
                "seeds": [seed for seed, _ in runs],
                "macro_f1_of_seeds": [scores.macro_f1 for _, scores in runs],
                "chosen_seed": summary.chosen_seed,
                **{name: getattr(means, name) for name in ("macro_f1", "accuracy", "change", "flips")},
                "conflict_free_macro_f1": sum(scores.conflict_free_macro_f1 for _, scores in runs) / len(runs),
                "change_ci95": mean_interval([scores.change for _, scores in runs]) if means.change else None,
                "per_class_f1": _mean_by_class([record for record in records if record.format == format]),
                "earlier": any(record.earlier for record in records if record.format == format),
            }
            rows.append(row)
    return rows


def _mean_by_class(records: list[Record]) -> dict[str, Mean]:
    """The mean F1 of each class over the records; empty without records."""
    labels = records[0].quality.labels if records else ()
    return {label: Mean.of([record.quality.per_class_f1[label] for record in records]) for label in labels}


def list_bits(comparison: dict, records: list[Record], seeds: list[tuple[Seeds, list[Record]]], results: Path) -> list:
    """PTQ and QAT by the bits of a weight, the most bits first: size, changes over seeds, and what QAT's files score.

    `control` is the change after QAT's training without fake quantization, `recovered` QAT's share of PTQ's loss
    (None if PTQ loses next to nothing, 1 if QAT loses nothing), and `forms` has the scores on validation.
    """
    rows = {(row["variant"], row["format"]): row for row in comparison["rows"] if row["kind"] == "record"}
    means = {row["variant"]: row for row in comparison["seeds"] if row["format"] == "onnx"}
    kept = {summary.variant: [record for record in own if record.format == "onnx"] for summary, own in seeds}
    found = []
    for bits, ending in ENDINGS.items():
        ptq, qat = means.get(f"ptq{ending}"), means.get(f"qat{ending}")
        scheme = next((record.scheme for record in records if record.name == f"qat{ending}-onnx"), None)
        if not (ptq and qat and scheme):
            continue
        lost, left = -ptq["change"].mean, -qat["change"].mean
        controls = sorted((results / "seeds").glob(f"*/metrics/qat{ending}-float-onnx.json"))
        changes = [scores_of_seed(Record.read(path), path.parent.parent)["change"] for path in controls]
        row = {
            "bits": bits,
            **scheme.model_dump(include={"weights", "embeddings", "activations"}),
            "megabytes": rows[f"qat{ending}", "onnx"]["megabytes"],
            "times_smaller": rows["baseline", "pytorch"]["megabytes"] / rows[f"qat{ending}", "onnx"]["megabytes"],
            "seeds": qat["seeds"],
            "ptq": ptq["change"],
            "qat": qat["change"],
            "control": Mean.of(changes) if changes else None,
            "recovered": None if lost <= WORTH_RECOVERING else min(1, 1 - left / lost),
            "forms": _mean_of_forms([record.provenance.forms for record in kept[f"qat{ending}"]]),
        }
        found.append(row)
    return found


def _mean_of_forms(forms: list[dict | None]) -> dict[str, dict]:
    """Means over seeds of the validation scores of QAT's model and files; empty if a seed has none."""
    if not forms or None in forms:
        return {}
    found = {}
    for name in forms[0]:
        scores = [one[name].validation_macro_f1 for one in forms]
        # The largest of any seed: a mean would hide one file that went wrong.
        differences = [abs(score - one["fake"].validation_macro_f1) for score, one in zip(scores, forms, strict=True)]
        gap = fmean(one[name].mean_logit_gap for one in forms)
        found[name] = {"macro_f1": fmean(scores), "largest_difference": max(differences), "mean_logit_gap": gap}
    return found


def validation_scores(comparison: dict) -> dict[str, float]:
    """Variant of QAT -> macro F1 of its reopened ONNX file on validation, the mean over seeds, which chooses one."""
    rows = [row for row in comparison["bits"] if row["forms"]]
    return {f"qat{ENDINGS[row['bits']]}": row["forms"]["onnx, reopened"]["macro_f1"] for row in rows}


def score_ensemble(summary: Seeds, results: Path, names: list[str]) -> dict | None:
    """Scores the mean of the probabilities of all seeds' baselines; None if fewer than two kept their logits."""
    seeds, probabilities, labels = [], [], None
    for run in summary.runs:
        path = results / "seeds" / str(run.seed) / "predictions" / f"{REFERENCE}.parquet"
        if path.is_file():
            before, (labels, logits) = labels, read_predictions(path)
            if logits.shape[1] != len(names) or before is not None and not np.array_equal(before, labels):
                raise UserError(f"{path} is not of the rows and classes of the other seeds; measure it again")
            seeds.append(run.seed)
            probabilities.append(softmax(logits))
    if len(seeds) < 2:
        return None
    # The largest of each row is what counts, so that probabilities serve as well as logits.
    scores = score_again(labels, np.mean(probabilities, axis=0), names)
    return {"seeds": seeds, "macro_f1": scores["macro_f1"], "accuracy": scores["accuracy"]}


def format_of(name: str) -> str:
    """The format of a model, by its name in the results of run_benchmark.py."""
    return name.rsplit(":", 1)[1]  # a folder's name may contain a colon too


def rounded(value):
    """Converts models to mappings, and rounds floats to nine digits: the last bits depend on the processor."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    # Far more digits than any page shows, and fewer than the 16 that a float64 has.
    return float(f"{value:.9g}") if isinstance(value, float) else value
