"""All that the comparison shows, in one value made from the records: rows of the table, paired tests, seeds.

It is written to `results/comparison.json`, so that the pages, the pictures and the report show the very same numbers.
"""

from dataclasses import dataclass
from pathlib import Path

from emotion.common.errors import UserError
from emotion.measure.contenders import TITLES, is_alternative
from emotion.measure.evidence import commits_of, read_predictions, read_seeds, score_again
from emotion.measure.paired_tests import LEVEL, NO_LOSS_MARGIN, POWER, RESAMPLES, compare_with, mean_interval
from emotion.measure.record import read_records
from emotion.measure.schema import Benchmark, Record, Seeds, Timed
from emotion.model.artifact import WEIGHT_FILES
from emotion.task.scores import softmax

import numpy as np
from pydantic import BaseModel

REFERENCE = "baseline-pytorch"  # FP32 as it was trained: what the others must not fall behind
MAIN_RUN = "all"  # file of results/benchmark
OPERATORS = "benchmark/operators"  # file of study_operators.py, without its ending
# Instruction sets that decide how fast INT8 and BF16 are; a processor has dozens of others
NOTEWORTHY_SETS = {"avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8"}
RATIOS = ("times_smaller", "times_faster_at_batch_1", "times_faster_at_batch_32")


@dataclass(frozen=True)
class Family:
    """The results of one encoder.

    Attributes:
        folder: that of the results.
        comparison: the result of `build_comparison`.
        benchmarks: name of an interleaved run -> its JSON file.
    """

    folder: Path
    records: list[Record]
    comparison: dict
    benchmarks: dict[str, Benchmark]


def read_family(folder: Path) -> Family:
    """Reads the records and the runs in a folder of results, and compares them."""
    records = read_records(folder)
    benchmarks = read_benchmarks(folder)
    return Family(folder, records, build_comparison(records, folder, benchmarks.get(MAIN_RUN)), benchmarks)


def read_benchmarks(folder: Path) -> dict[str, Benchmark]:
    """Name -> interleaved run among the results in ``folder``."""
    runs = {}
    for path in sorted((folder / "benchmark").glob("*.json")):
        if path != folder / f"{OPERATORS}.json":  # a study of single artifacts beside the interleaved runs
            runs[path.stem] = Benchmark.read(path)
    return runs


def build_comparison(records: list[Record], results: Path, run: Benchmark | None) -> dict:
    """The numbers of all pages; the keys say which. A number that was not measured is None.

    Args:
        records: of one dataset's test rows; their order does not matter.
        results: the folder that they came from, with predictions/ and seeds/.
        run: the interleaved run `MAIN_RUN`; None if there is none. Speeds are divided within it alone.

    Raises:
        UserError: if the records are not of the same rows, or lack the reference, or a summary over seeds is damaged.
    """
    if len({record.made.dataset_fingerprint for record in records}) != 1:
        raise UserError("the records were not scored on the same rows; measure them again with run_evaluation.py")
    # The order of every table: the variants by name, the formats of each as a folder lists them.
    records = sorted(records, key=lambda one: (one.variant, list(WEIGHT_FILES).index(one.format)))
    reference = find_reference(records)
    # A record of another base model is no form of the encoder: the table shows it, pictures and report do not. It is
    # tested apart, or its presence would change the corrected p-values of all others.
    encoder = reference.made.base_model
    guests = [record for record in records if record.made.base_model != encoder]
    own_tests = compare_records([record for record in records if record not in guests], results)
    tests = own_tests | compare_records([reference, *guests], results)
    timed = dict(run.artifacts) if run else {}  # a copy: each record takes its times out
    rows = []
    for record in records:
        row = scored_row(record, timed.pop(record.timed_as, None), run, tests)
        rows.append({"kind": "guest" if record in guests else "record"} | row)
    for name, one in timed.items():
        # What was timed and not scored: shown if it is a plain alternative, not if it lacks its record.
        if is_alternative(format_of(name)):
            rows.append(alternative_row(name, one, run))
    summaries, ensemble = read_seeds(results), None  # read once: each is held against the predictions of its seeds
    about = describe(records, reference, guests, run, commits_of(summaries, results))
    for summary in summaries:
        if summary.variant == reference.variant:
            ensemble = score_ensemble(summary, results, about["labels"])
    comparison = {"about": about, "tests": describe_tests(own_tests), "rows": rows}
    return rounded(comparison | {"seeds": list_means(summaries), "ensemble": ensemble})


def find_reference(records: list[Record]) -> Record:
    """The record that the others are compared with. Raises `UserError` if it is missing."""
    for record in records:
        if record.name == REFERENCE:
            return record
    raise UserError(f"no record {REFERENCE}, with which the others are compared; measure it first")


def read_means(results: Path) -> list[dict]:
    """The means over seeds of every form in a folder of results, a line each; empty if none were measured."""
    return rounded(list_means(read_seeds(results)))


def list_means(summaries: list[Seeds]) -> list[dict]:
    """The lines of all summaries over seeds, in the order of the variants."""
    rows = []
    for summary in sorted(summaries, key=lambda one: one.variant):
        rows += seed_rows(summary)
    return rows


def describe_tests(tests: dict[str, dict]) -> dict:
    """The settings of the paired tests, and the least and the most that the rows could have shown."""
    found = [one["minimal_difference"] for one in tests.values() if one["flips"]]  # 0 where no answer differs
    return {
        "reference": REFERENCE,
        "comparisons": len(tests),
        "level": LEVEL,
        "power": POWER,
        "margin": NO_LOSS_MARGIN,
        "resamples": RESAMPLES,
        "minimal_difference": [min(found), max(found)] if found else None,
    }


def describe(
    records: list[Record], reference: Record, guests: list[Record], run: Benchmark | None, of_seeds: set[str]
) -> dict:
    """What was measured on what, for captions.

    Args:
        guests: those of the records that have another base model.
        of_seeds: the commits whose code made what the means over seeds are of.
    """
    # The times that the table shows are those of the interleaved run, where there is one.
    environments = [run.environment] if run else [record.environment for record in records]
    made = {record.made.git_commit for record in records if record not in guests} - {None}
    sets, machines = set(), set()
    for one in environments:
        sets |= set(one.instruction_sets) & NOTEWORTHY_SETS
        machines.add(f"{one.cpu}, {one.threads} threads")
    return {
        # The same in all records: their rows have the same fingerprint.
        "dataset": records[0].made.dataset,
        "examples": records[0].quality.examples,
        "labels": records[0].quality.labels,
        "parameters": count_parameters(reference),
        "base_model": reference.made.base_model,  # None without a recipe.yaml
        "guests": [guest_of(record) for record in guests],
        "machines": sorted(machines),
        "instruction_sets": sorted(sets),
        "dates": sorted({run.date} if run else {record.date for record in records}),
        "commits": sorted({run.git_commit} - {None} if run else made),
        "made_at": sorted(made | of_seeds),  # the commits whose code made the artifacts
        "compared_with": run.compared_with if run else None,
        "rounds": run.rounds if run else None,
    }


def guest_of(record: Record) -> dict:
    """What a caption must say of a record that does not come from the encoder of the others."""
    made = record.made
    return {"name": record.name, **made.model_dump(include={"base_model", "train_rows", "git_commit"})}


def count_parameters(reference: Record) -> int | None:
    """Those of the reference, which are four bytes each in its file; None where that cannot be told."""
    size = reference.size.files.get("model.safetensors")
    return size and size // 4  # the file's header adds a tenth of a percent


def compare_records(records: list[Record], results: Path) -> dict[str, dict]:
    """Record -> what the paired tests find against the reference, one of them; see measure/paired_tests.py."""
    logits, labels = {}, None
    for record in records:
        name = record.name
        labels, logits[name] = read_predictions(results / "predictions" / f"{name}.parquet")
    return compare_with(logits.pop(REFERENCE), logits, labels)


def scored_row(record: Record, timed: Timed | None, run: Benchmark | None, tests: dict) -> dict:
    """A record's line. Its times are those of the interleaved run, where it is in that run.

    Args:
        timed: the artifact in that run, None where it is not in it.
        run: the run that ``timed`` is of.
        tests: what `compare_records` returns.
    """
    quality, name = record.quality, record.name
    return {
        "name": name,
        "variant": record.variant,
        "format": record.format,
        "macro_f1": quality.macro_f1,
        "macro_f1_ci95": quality.macro_f1_ci95,
        "accuracy": quality.accuracy,
        "expected_calibration_error": quality.expected_calibration_error,
        "megabytes": record.size.megabytes,
        "p50_ms": record.latency_ms.p50,
        "p95_ms": record.latency_ms.p95,
        "texts_per_s": record.throughput_per_s.value,
        # It replaces the times above. A record's own were taken alone, so nothing may be divided by them.
        **(speed_of(timed, run) if timed else dict.fromkeys(RATIOS)),
        "tests": tests.get(name),
    }


def alternative_row(name: str, timed: Timed, run: Benchmark) -> dict:
    """A line without a score: what a library makes of the same weights by itself."""
    folder, format = name.rsplit(":", 1)
    title = TITLES.get(format, format)
    # What a library chooses by itself on this processor: beside FP32 it would pass for that.
    if timed.precision == "bfloat16" and "BF16" not in title:
        title += ", in BF16"
    return {
        "kind": "alternative",
        "name": name,
        "variant": Path(folder).name,
        "format": title,
        **dict.fromkeys(("macro_f1", "macro_f1_ci95", "accuracy", "expected_calibration_error")),
        "megabytes": timed.bytes_to_serve / 1e6,  # a record has them already
        **speed_of(timed, run),
        "tests": None,
    }


def speed_of(timed: Timed, run: Benchmark) -> dict:
    """Times of one artifact in an interleaved run, and the ratios to what it is compared with."""
    return {
        "p50_ms": timed.latency_ms.p50,
        "p95_ms": timed.latency_ms.p95,
        "texts_per_s": timed.throughput_per_s.median,
        "times_smaller": run.artifacts[run.compared_with].bytes_to_serve / timed.bytes_to_serve,
        "times_faster_at_batch_1": timed.times_faster_at_batch_1,
        "times_faster_at_batch_32": timed.times_faster_at_batch_32,
    }


def seed_rows(summary: Seeds) -> list[dict]:
    """One line per format: means over the seeds, and the change against the FP32 baseline of the same seed."""
    rows = []
    for format, means in summary.formats.items():
        runs = summary.runs_of(format)  # not every seed has every format, see measure/seeds.py
        changes = [scores.change for _, scores in runs]
        rows.append(
            {
                "variant": summary.variant,
                "format": format,
                "seeds": [seed for seed, _ in runs],
                "macro_f1_of_seeds": [scores.macro_f1 for _, scores in runs],
                "chosen_seed": summary.chosen_seed,
                **{name: getattr(means, name) for name in ("macro_f1", "accuracy", "change", "flips")},
                "conflict_free_macro_f1": sum(scores.conflict_free_macro_f1 for _, scores in runs) / len(runs),
                "change_ci95": mean_interval(changes) if means.change else None,
            }
        )
    return rows


def score_ensemble(summary: Seeds, results: Path, names: list[str]) -> dict | None:
    """Scores of the mean of the probabilities of all seeds' baselines; None if fewer than two have kept their logits.

    Raises:
        UserError: if the seeds were not scored on the same rows.
    """
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
    # It reads the largest of each row, so that probabilities serve as well as logits.
    scores = score_again(labels, np.mean(probabilities, axis=0), names)
    return {"seeds": seeds, "macro_f1": scores["macro_f1"], "accuracy": scores["accuracy"]}


def format_of(name: str) -> str:
    """The format of an artifact, by the name that run_benchmark.py gives it."""
    return name.rsplit(":", 1)[1]  # a folder's name may hold a colon too


def rounded(value):
    """Models as mappings, and floats to nine digits: the last bits depend on the processor that added them."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    # Far more digits than any page shows, and fewer than the 16 that a float64 has.
    return float(f"{value:.9g}") if isinstance(value, float) else value
