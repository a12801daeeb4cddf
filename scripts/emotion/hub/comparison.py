"""All that the comparison shows, in one value made from the records: rows of the table, paired tests, seeds.

It is written to `results/comparison.json`, so that the pages, the pictures and the report show the very same numbers.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from emotion.data.metrics import softmax
from emotion.evaluation.peers import COMPILED, TITLES, is_alternative
from emotion.evaluation.predictions import commits_of, read_predictions, read_seeds, score_again
from emotion.evaluation.record import read_records
from emotion.evaluation.schema import Benchmark, Environment, Record, Seeds, Timed
from emotion.evaluation.statistics import LEVEL, NO_LOSS_MARGIN, POWER, RESAMPLES, compare_with, mean_interval
from emotion.inference.model_folder import WEIGHT_FILES
from emotion.utils.errors import UserError
from emotion.utils.processor import TITLES as PROCESSORS

REFERENCE = "baseline-pytorch"  # FP32 as it was trained: what the others must not fall behind
# Instruction sets that decide how fast INT8 and BF16 are; a processor has dozens of others
NOTEWORTHY_SETS = {"avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8"}
SCORES = ("examples", "macro_f1", "macro_f1_ci95", "accuracy", "expected_calibration_error")


@dataclass(frozen=True)
class Family:
    """The results of one encoder.

    Attributes:
        folder: that of the results.
        comparison: the result of `build_comparison`.
        benchmarks: class of processors -> the interleaved run on one.
    """

    folder: Path
    records: list[Record]
    comparison: dict
    benchmarks: dict[str, Benchmark]


def read_family(folder: Path) -> Family:
    """Reads the records and the runs in a folder of results, and compares them."""
    records = read_records(folder)
    benchmarks = read_benchmarks(folder, records)
    return Family(folder, records, build_comparison(records, folder, benchmarks), benchmarks)


def read_benchmarks(folder: Path, records: list[Record]) -> dict[str, Benchmark]:
    """Class of processors, the highest first -> the interleaved run on one, among the results in ``folder``.

    What was timed of a file that has been replaced since is left out: its record tells another number of bytes.

    Raises:
        UserError: if one is damaged, or was measured on a processor of another class than it is named after.
    """
    runs = {}
    for name in PROCESSORS:
        path = folder / "benchmark" / f"{name}.json"
        if path.is_file():
            runs[name] = Benchmark.read(path)
            runs[name] = runs[name].model_copy(update={"artifacts": drop_replaced(runs[name].artifacts, records)})
            if (found := runs[name].environment.processor) != name:
                raise UserError(f"{path}: by its instruction sets it was measured on {found}; measure it again")
    return runs


def drop_replaced(artifacts: dict[str, Timed], records: list[Record]) -> dict[str, Timed]:
    """The artifacts of a run but those that have been made anew since, in the formats that are compiled too."""
    sizes = {record.timed_as: record.size.bytes_to_serve for record in records}
    kept = {}
    for name, timed in artifacts.items():
        if sizes.get(name.removesuffix(COMPILED), timed.bytes_to_serve) == timed.bytes_to_serve:
            kept[name] = timed
    return kept


def build_comparison(records: list[Record], results: Path, runs: dict[str, Benchmark]) -> dict:
    """The numbers of all pages; the keys say which. A number that was not measured is None.

    Args:
        records: of one dataset's test rows; their order does not matter.
        results: the folder that they came from, with predictions/ and seeds/.
        runs: of `read_benchmarks`. Speeds are divided within one of them alone.

    Raises:
        UserError: if the records are not of the same rows, or lack the reference, or a summary over seeds is damaged.
    """
    if len({record.provenance.dataset_fingerprint for record in records}) != 1:
        raise UserError("the records were not scored on the same rows; measure them again with run_evaluation.py")
    # The order of every table: the variants by name, the formats of each as a folder lists them.
    records = sorted(records, key=lambda one: (one.variant, list(WEIGHT_FILES).index(one.format)))
    reference = find_reference(records)
    # A record of another base model is no form of the encoder: the table shows it, pictures and report do not. It is
    # tested apart, or its presence would change the corrected p-values of all others.
    encoder = reference.provenance.base_model
    peers = [record for record in records if record.provenance.base_model != encoder]
    own_tests = compare_records([record for record in records if record not in peers], results)
    tests = own_tests | compare_records([reference, *peers], results)
    timed, rows = times_by_artifact(runs), []  # each record takes its own out
    for record in records:
        row = scored_row(record, timed.pop(record.timed_as, {}), runs, tests)
        rows.append({"kind": "peer" if record in peers else "record"} | row)
    for name, one in timed.items():
        # What was timed and has no record: shown if it is a plain alternative, not if it lacks its record.
        if is_alternative(format_of(name)):
            rows.append(alternative_row(name, one, runs))
    summaries, ensemble = read_seeds(results), None  # read once: each is held against the predictions of its seeds
    about = describe(records, reference, peers, runs, commits_of(summaries, results))
    for summary in summaries:
        if summary.variant == reference.variant:
            ensemble = score_ensemble(summary, results, about["labels"])
    comparison = {"about": about, "tests": describe_tests(own_tests), "rows": rows}
    return rounded(comparison | {"seeds": list_means(summaries, results), "ensemble": ensemble})


def find_reference(records: list[Record]) -> Record:
    """The record that the others are compared with. Raises `UserError` if it is missing."""
    for record in records:
        if record.name == REFERENCE:
            return record
    raise UserError(f"no record {REFERENCE}, with which the others are compared; measure it first")


def read_means(results: Path) -> list[dict]:
    """The means over seeds of every form in a folder of results, a line each; empty if none were measured."""
    return rounded(list_means(read_seeds(results), results))


def list_means(summaries: list[Seeds], results: Path) -> list[dict]:
    """The lines of all summaries over seeds, by variant; ``results`` has the records of the seeds."""
    rows = []
    for summary in sorted(summaries, key=lambda one: one.variant):
        for row in seed_rows(summary):
            name = f"{row['variant']}-{row['format']}.json"
            kept = [results / "seeds" / str(seed) / "metrics" / name for seed in row["seeds"]]
            rows.append(row | {"earlier": any(Record.read(path).earlier for path in kept if path.is_file())})
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


def times_by_artifact(runs: dict[str, Benchmark]) -> dict[str, dict[str, Timed]]:
    """Artifact -> class of processors -> what the run there says of it."""
    timed = {}
    for processor, run in runs.items():
        for name, one in run.artifacts.items():
            timed.setdefault(name, {})[processor] = one
    return timed


def describe(
    records: list[Record], reference: Record, peers: list[Record], runs: dict[str, Benchmark], of_seeds: set[str]
) -> dict:
    """What was measured on what, for captions.

    Args:
        peers: those of the records that have another base model.
        of_seeds: the commits whose code made what the means over seeds are of.
    """
    measured = list(runs.values()) or records  # the times that the table shows are those of the interleaved runs
    made = {record.provenance.git_commit for record in records if record not in peers} - {None}
    machines = []
    for one in measured:
        if (machine := describe_machine(one.environment)) not in machines:
            machines.append(machine)
    return {
        # The same in all records: their rows have the same fingerprint.
        "dataset": records[0].provenance.dataset,
        "examples": records[0].quality.examples,
        "labels": records[0].quality.labels,
        "parameters": count_parameters(reference),
        "base_model": reference.provenance.base_model,  # None without a recipe.yaml
        "peers": [peer_of(record) for record in peers],
        "machines": machines,
        "dates": sorted({one.date for one in measured}),
        "commits": sorted({run.git_commit for run in runs.values()} - {None} if runs else made),
        "made_at": sorted(made | of_seeds),  # the commits whose code made the artifacts
        "runs": {
            processor: {"title": PROCESSORS[processor], "compared_with": run.compared_with, "rounds": run.rounds}
            for processor, run in runs.items()
        },
    }


def describe_machine(environment: Environment) -> dict:
    """What a caption says of the processor that something was measured on."""
    return {
        "title": PROCESSORS[environment.processor],
        "cpu": environment.cpu,
        "threads": environment.threads,
        "instruction_sets": sorted(set(environment.instruction_sets) & NOTEWORTHY_SETS),
    }


def peer_of(record: Record) -> dict:
    """What a caption must say of a record that does not come from the encoder of the others."""
    return {"name": record.name, **record.provenance.model_dump(include={"base_model", "train_rows", "git_commit"})}


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


def scored_row(record: Record, timed: dict[str, Timed], runs: dict[str, Benchmark], tests: dict) -> dict:
    """A record's line. Its times are those of the interleaved runs, or its own if it is in none.

    Args:
        timed: class of processors -> the artifact in the run on one, of those that it is in.
        tests: what `compare_records` returns.
    """
    name, latency, kind = record.name, record.latency_ms, record.environment.processor
    # Its own were taken alone, so that nothing may be divided by them.
    own = {"p50_ms": latency.p50, "p95_ms": latency.p95, "texts_per_s": record.throughput_per_s.value}
    own |= dict.fromkeys(("times_faster_at_batch_1", "times_faster_at_batch_32"))
    return {
        "name": name,
        "variant": record.variant,
        "format": record.format,
        "earlier": record.earlier,
        **{score: getattr(record.quality, score) for score in SCORES},
        "megabytes": record.size.megabytes,
        "times_smaller": times_smaller(timed, runs),
        # On a kind of processor without such a run, a few times of their own would make a column of dashes.
        "speeds": speeds_of(timed) or ({} if runs and kind not in runs else {kind: own}),
        "tests": tests.get(name),
    }


def alternative_row(name: str, timed: dict[str, Timed], runs: dict[str, Benchmark]) -> dict:
    """A line for what a library makes of the same weights by itself; ``timed`` is that of `scored_row`."""
    folder, format = name.rsplit(":", 1)
    title, first = TITLES.get(format, format), next(iter(timed.values()))
    scored = [one.quality for one in timed.values() if one.quality]  # the same on each, but for a few texts
    # What a library chooses by itself on a processor: beside FP32 it would pass for that.
    halved = [PROCESSORS[one] for one in timed if timed[one].precision == "bfloat16"]
    if halved and "BF16" not in title:
        title += ", in BF16" if len(halved) == len(timed) else f", in BF16 with {' and '.join(halved)}"
    return {
        "kind": "alternative",
        "name": name,
        "variant": Path(folder).name,
        "format": title,
        "earlier": False,
        **{score: getattr(scored[0], score) if scored else None for score in SCORES},
        "megabytes": first.bytes_to_serve / 1e6,  # a record has them already
        "times_smaller": times_smaller(timed, runs),
        "speeds": speeds_of(timed),
        "tests": None,
    }


def times_smaller(timed: dict[str, Timed], runs: dict[str, Benchmark]) -> float | None:
    """How many times fewer bytes an artifact takes than what it is compared with; None if it is in no run."""
    if not timed:
        return None
    processor, one = next(iter(timed.items()))
    run = runs[processor]
    return run.artifacts[run.compared_with].bytes_to_serve / one.bytes_to_serve


def speeds_of(timed: dict[str, Timed]) -> dict[str, dict]:
    """Class of processors -> the times of an artifact in the run there, and the ratios to what it is compared with."""
    speeds = {}
    for processor, one in timed.items():
        speeds[processor] = {
            "p50_ms": one.latency_ms.p50,
            "p95_ms": one.latency_ms.p95,
            "texts_per_s": one.throughput_per_s.median,
            "times_faster_at_batch_1": one.times_faster_at_batch_1,
            "times_faster_at_batch_32": one.times_faster_at_batch_32,
        }
    return speeds


def processors_of(rows: list[dict]) -> list[str]:
    """The classes of processors that any of the rows was timed on, the highest first."""
    return [one for one in PROCESSORS if any(one in row["speeds"] for row in rows)]


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
