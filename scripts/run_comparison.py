"""Reads all records and writes the comparison: `results/comparison.md` and the README's results block.

No number is typed by hand, and rendering twice changes nothing. A record that lacks a field stops the rendering, and a
result from the sample or from a short run never enters the README.

    python scripts/run_comparison.py
    python scripts/run_comparison.py --results_dir build/run/results --print_only
"""

from dataclasses import dataclass, field
from pathlib import Path

from utils_cli import ROOT, UserError, parse_flags, run

# isort: split
import run_processors
import run_ptq_study
import utils_bits
from utils_card import render_cards
from utils_files import write_text
from utils_pages import render_study_pages
from utils_record import markdown_table, read_json, read_records, record_name

START, END = "<!-- results: written by scripts/run_comparison.py -->", "<!-- end of results -->"


@dataclass
class ComparisonArguments:
    """Where from, where to."""

    results_dir: str = field(
        default=str(ROOT / "results"), metadata={"help": "Folder with metrics/, seeds/, benchmark/."}
    )
    readme: str = field(default=str(ROOT / "README.md"), metadata={"help": "File whose results block is written."})
    check: bool = field(default=False, metadata={"help": "Write nothing; fail if a file differs."})
    print_only: bool = field(default=False, metadata={"help": "Print the table and write nothing."})


def main(argv=None) -> None:
    (arguments,) = parse_flags((ComparisonArguments,), positional="results_dir", argv=argv)
    results, readme = Path(arguments.results_dir), Path(arguments.readme)
    records = read_records(results)
    table = render_table(records)
    if not arguments.print_only:
        pages = render_pages(records, results, readme)
        if arguments.check:
            stale = [str(p) for p, text in pages.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
            if stale:
                raise UserError(f"not what the records say: {', '.join(stale)}; run python scripts/run_comparison.py")
        else:
            for path, text in pages.items():
                write_text(path, text)
    print(table)


def render_pages(records: list[dict], results: Path, readme: Path) -> dict[Path, str]:
    """The files that show the records, and their whole text."""
    for record in records:
        check_publishable(record)
    block = "\n".join(
        [render_table(records), render_caption(records), *render_seeds(results), *render_benchmarks(results)]
    )
    text = readme.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise UserError(f"{readme}: needs one line '{START}' and, below it, one line '{END}'")
    before, after = text.split(START)[0], text.split(END)[1]
    return {
        readme: f"{before}{START}\n\n{block}\n{END}{after}",
        results / "comparison.md": f"# Comparison\n\n{block}\n## F1 of each class\n\n{render_classes(records)}",
        **render_cards(records, readme.parent / "model_cards"),
        **run_ptq_study.render_pages(results),
        **run_processors.render_pages(results),
        **render_study_pages(results),
        **utils_bits.render_pages(results),
    }


def check_publishable(record: dict) -> None:
    """Only a full training on the real data, scored on its test split, is shown to the world."""
    made, name = record["made"], record_name(record)
    if "sample" in {made["dataset_source"], made["train_dataset_source"]}:
        raise UserError(f"{name} was trained or scored on the sample: not for the README")
    if record["quality"]["split"] != "test":
        raise UserError(f"{name} was scored on {record['quality']['split']}, not on test: not for the README")
    recipe = made["recipe"] or {}
    short = {"max_train_rows", "max_steps"} & {**recipe, **recipe.get("baseline", {})}.keys()
    if short:
        raise UserError(f"{name} is a short run ({', '.join(sorted(short))} in its recipe): not for the README")


def render_table(records: list[dict]) -> str:
    """One line a record; a value that was not measured is a dash."""
    rows = []
    for record in records:
        quality, latency = record["quality"], record["latency_ms"]
        low, high = (100 * bound for bound in quality["macro_f1_ci95"])
        rows.append([
            record_name(record),
            f"{100 * quality['macro_f1']:.2f} [{low:.1f}, {high:.1f}]",
            f"{100 * quality['accuracy']:.2f}",
            f"{record['size']['megabytes']:.1f}",
            number(latency["p50"], ".2f"),
            number(latency["p95"], ".2f"),
            number(record["throughput_per_s"]["value"], ".0f"),
        ])  # fmt: skip
    head = ["artifact", "macro F1 % [95 %]", "accuracy %", "MB to serve", "p50 ms", "p95 ms", "texts/s"]
    return markdown_table(head, rows)


def render_caption(records: list[dict]) -> str:
    """What the figures were measured on; all records must agree on the texts."""
    if len({record["made"]["dataset_fingerprint"] for record in records}) != 1:
        raise UserError("the records were not scored on the same rows; measure them again with run_evaluation.py")
    first = records[0]
    machines = sorted({f"{r['environment']['cpu']}, {r['environment']['threads']} threads" for r in records})
    sets = sorted({name for r in records for name in r["environment"]["instruction_sets"]} & NOTEWORTHY_SETS)
    bases = sorted({str(record["made"]["base_model"]) for record in records})
    days = sorted({record["date"] for record in records})
    return (
        f"{first['made']['dataset']}, test split, {first['quality']['examples']} texts; base model "
        f"{', '.join(bases)}; {'; '.join(machines)} ({', '.join(sets)}); {' and '.join(days)}. "
        "Interval: bootstrap over the test rows. Latency: one text at its own length, token ids to logits. "
        "Throughput: batches of 32.\n"
    )


NOTEWORTHY_SETS = {"avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8"}


def render_seeds(results: Path) -> list[str]:
    """One sentence a variant: what several seeds gave."""
    lines = []
    for path in sorted((results / "seeds").glob("*.json")):
        summary = read_json(path)
        if "formats" in summary:
            lines.append(render_changes(summary))
            continue
        f1, accuracy = summary["macro_f1"], summary["accuracy"]
        clean = sum(one["conflict_free_macro_f1"] for one in summary["runs"]) / len(summary["runs"])
        chosen = next(one for one in summary["runs"] if one["seed"] == summary["chosen_seed"])
        threads = (
            f" on {chosen['threads']} {'thread' if chosen['threads'] == 1 else 'threads'}" if chosen["threads"] else ""
        )
        lines.append(
            f"{summary['variant']}, {len(summary['runs'])} seeds: macro F1 {100 * f1['mean']:.2f} "
            f"(standard deviation {100 * f1['standard_deviation']:.2f}), accuracy {100 * accuracy['mean']:.2f} "
            f"({100 * accuracy['standard_deviation']:.2f}); on the test rows whose text has no other label elsewhere "
            f"macro F1 {100 * clean:.2f}. The table shows seed {chosen['seed']}, the best on validation, "
            f"trained in {chosen['seconds'] / 60:.1f} minutes{threads}.\n"
        )
    return lines


def render_changes(summary: dict) -> str:
    """What a variant changes against the baseline of the same seed, format by format."""
    changes = "; ".join(
        f"{format} {100 * one['change']['mean']:+.2f} points of macro F1 (standard deviation "
        f"{100 * one['change']['standard_deviation']:.2f}), {one['flips']['mean']:.1f} labels differ"
        for format, one in summary["formats"].items()
    )
    return f"{summary['variant']}, {len(summary['runs'])} seeds, each against its own FP32 baseline: {changes}.\n"


def render_benchmarks(results: Path) -> list[str]:
    """One table an interleaved run: the only place where speeds are divided by each other."""
    parts = []
    for path in sorted((results / "benchmark").glob("*.json")):
        benchmark = read_json(path)
        rows = [
            [name, f"{one['bytes_to_serve'] / 1e6:.1f}", number(one["latency_ms"]["p50"], ".2f"),
             times(one["times_faster_at_batch_1"]), number(one["throughput_per_s"]["median"], ".0f"),
             times(one["times_faster_at_batch_32"])]
            for name, one in benchmark["artifacts"].items()
        ]  # fmt: skip
        against = benchmark["compared_with"]
        head = ["interleaved", "MB", "p50 ms", f"faster than {against}", "texts/s", "in batches of 32"]
        parts.append(markdown_table(head, rows))
    return parts


def render_classes(records: list[dict]) -> str:
    labels = records[0]["quality"]["labels"]
    rows = [
        [record_name(record), *(f"{100 * record['quality']['per_class_f1'][label]:.1f}" for label in labels)]
        for record in records
    ]
    return markdown_table(["artifact", *labels], rows)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def times(values: dict) -> str:
    return f"{values['median']:.2f} x [{values['min']:.2f}, {values['max']:.2f}]"


if __name__ == "__main__":
    run(main)
