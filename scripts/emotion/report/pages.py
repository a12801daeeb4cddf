"""The pages of the studies, from their JSON files alone: no study has to be run again to show its page."""

from pathlib import Path

from emotion.measure.evidence import read_study
from emotion.measure.paired_tests import mean_interval
from emotion.measure.record import BASE_FAMILY
from emotion.quantize.levels import LARGEST_SAFE_WEIGHT
from emotion.report.comparison import OPERATORS
from emotion.report.render import complete, render
from emotion.report.tables import markdown_table, plus_minus
from emotion.task.scores import VALIDATION_NOISE

import numpy as np

SMALLEST_SHARE = 0.01  # of a call: kinds of operators below it are shown as one
MANY = 10**9  # texts, for which the page of many texts does the sum
WORTH_GIVING_BACK = 0.003  # of macro F1: a smaller loss is noise, and a share of it says nothing


def families_of(results: Path) -> list[Path]:
    """The folders of results: that of the small encoder, then that of the base-size one, if it is there.

    Args:
        results: either of the two.
    """
    main = results.parent if results.name == BASE_FAMILY else results
    return [folder for folder in (main, main / BASE_FAMILY) if folder.is_dir()]


def page_of(results: Path, name: str) -> Path:
    """The page of a study, one for all encoders: it lies in the small encoder's folder."""
    return families_of(results)[0] / f"{name}.md"


def render_study_pages(results: Path) -> dict[Path, str]:
    """Path -> text of each page whose JSON file is among the results, of either encoder."""
    of_one = {
        "dataset": render_dataset,
        "ptq_processors": render_processors,
        "qlora_sweep": render_sweep,
        "training_cost": render_cost,
        "reliability": render_reliability,
        "batch": render_batch,
    }
    # One page shows what both encoders say: a small one hides what a base-size one does not forgive.
    of_both = {
        "ptq_study": render_study,
        "ptq_sensitivity": render_sensitivity,
        "bits": render_bits,
        "graphs": render_graphs,
        "openvino": render_openvino,
        OPERATORS: render_operators,
    }
    pages = {}
    for name, render_one in (of_one | of_both).items():
        studies = []
        for family in families_of(results):
            if (family / f"{name}.json").is_file():
                studies.append(read_study(family / f"{name}.json"))
        if studies:
            pages[page_of(results, name)] = render_one(studies if name in of_both else studies[0])
    return pages


@complete("the page of the dataset")
def render_dataset(study: dict) -> str:
    """`results/dataset.md`, from what study_dataset.py counted."""
    splits = study["splits"]
    classes = []  # the lines of the table
    for index, label in enumerate(study["labels"]):
        cells = [label]
        for one in splits.values():
            count = one["class_counts"][index]
            cells.append(f"{count} ({100 * count / one['rows']:.1f} %)")
        classes.append(cells)
    classes.append(["all", *(str(one["rows"]) for one in splits.values())])

    lengths, repeats = [], []
    for split, one in splits.items():
        quantiles = map(str, one["length_quantiles"].values())  # 5, 50, 95 and 99 %, in this order
        lengths.append([split, *quantiles, str(one["longest"]), f"{one['mean_length']:.1f}", str(one["texts_cut"])])
        found = ("repeated_texts", "rows_too_many", "texts_with_two_labels")
        repeats.append([split, *(str(one[name]) for name in found)])

    # By row numbers: the texts are not ours to publish. A cell is empty where the split does not have the text.
    conflicts = []
    for places in study["conflicts_across_splits"]:
        cells = []
        for split in splits:
            cells.append(", ".join(f"{one['label']} (row {one['row']})" for one in places[split]))
        conflicts.append(cells)

    length_head = ["split", "5 %", "median", "95 %", "99 %", "longest", "mean", f"cut at {study['cut_at']}"]
    repeat_head = ["split", "texts that stand more than once", "rows too many", "of the texts, with two labels"]
    return render(
        "dataset.md",
        study=study,
        classes=markdown_table(["class", *splits], classes),
        lengths=markdown_table(length_head, lengths),
        repeats=markdown_table(repeat_head, repeats),
        conflicts=markdown_table(list(splits), conflicts),
    )


@complete("the page of the INT8 candidates")
def render_study(studies: list[dict]) -> str:
    """`results/ptq_study.md`: each candidate against FP32, and which was chosen for each format, per encoder."""
    return render(
        "ptq_study.md",
        studies=studies,
        tables=[_candidates_table(study) for study in studies],
        largest_safe_weight=LARGEST_SAFE_WEIGHT,
        noise=VALIDATION_NOISE,
    )


def _candidates_table(study: dict) -> str:
    """A line per candidate; the chosen ones are bold."""
    winners = {one["candidate"] for one in study["chosen"].values()}
    rows = []
    for name, one in study["candidates"].items():
        rows.append(
            [
                f"**{name}**" if name in winners else name,
                f"{100 * one['macro_f1_change']:+.2f}",
                f"{one['flips']:.1f}",  # a mean over the baselines
                f"{one['mean_logit_shift']:.3f}",
                f"{one['megabytes']:.1f}",
                str(one["scheme"]["largest_weight"]),  # as counted in the file
                f"{one['latency_ms']['p50']:.2f}",
                # Against FP32 in ONNX Runtime, timed in turns with it; below 1 it is slower.
                f"{one['times_faster_at_batch_1']['median']:.2f} x",
                f"{one['times_faster_at_batch_32']['median']:.2f} x",
            ]
        )
    head = ["candidate", "macro F1, points", "flips", "logit shift", "MB", "largest weight", "p50 ms"]
    return markdown_table([*head, "batch 1", "batch 32"], rows)


@complete("the page of the layers")
def render_sensitivity(studies: list[dict]) -> str:
    """`results/ptq_sensitivity.md`: what quantizing one layer alone does, most harmful first, per encoder."""
    worst = [worst_layer(study["layers"]) for study in studies]
    tables = [_layers_table(study) for study in studies]
    return render("ptq_sensitivity.md", studies=studies, tables=tables, worst=worst)


def worst_layer(measured: list[dict]) -> dict:
    """The single layer that moves the logits most, of the result of `measure_layers`; whole kinds do not count."""
    single = [one for one in measured if one["layer"] is not None]
    return max(single, key=lambda one: one["mean_logit_shift"])


def _layers_table(sensitivity: dict) -> str:
    """A line per layer, or kind of layer, that was quantized alone."""
    rows = []
    # By the shift of the logits, not by macro F1: of one layer alone hardly a label flips, so that F1 is noise.
    for one in sorted(sensitivity["layers"], key=lambda one: -one["mean_logit_shift"]):
        # Without a number of a layer the line is of a kind of layer, all of which were quantized together.
        where = "all layers" if one["layer"] is None else one["layer"]
        shift, change = f"{one['mean_logit_shift']:.4f}", f"{100 * one['macro_f1_change']:+.2f}"
        rows.append([f"{one['kind']}, {where}", shift, str(one["flips"]), change])
    return markdown_table(["quantized", "mean logit shift", "flips", "macro F1, points"], rows)


@complete("the page of the processors")
def render_processors(measured: dict) -> str:
    """`results/ptq_processors.md`: whether an artifact answers alike where oneDNN may use fewer instructions."""
    rows = []
    for name, limits in measured["artifacts"].items():
        for limit, one in limits.items():
            gaps = ["-", "-", "-"]  # the runtime does not work with this limit
            if one["equal_labels"] is not None:
                gaps = [f"{100 * one['equal_labels']:.2f}", f"{one['mean_logit_gap']:.4f}"]
                gaps.append(f"{one['largest_logit_gap']:.3f}")
            rows.append([name, "none" if limit == "None" else limit, *gaps])  # a key of JSON is a string
    head = ["artifact", "limit of oneDNN", "equal labels %", "mean gap", "largest gap"]
    return render("ptq_processors.md", measured=measured, table=markdown_table(head, rows))


@complete("the page of the adapters")
def render_sweep(sweep: dict) -> str:
    """`results/qlora_sweep.md`: each candidate on validation, and which was chosen."""
    rows, trained_at = [], set()
    for name, one in sweep["candidates"].items():
        trained_at |= {run["git_commit"] for run in one["runs"]}
        rows.append(
            [
                f"**{name}**" if name == sweep["chosen"] else name,
                plus_minus(one["validation_macro_f1"]),
                plus_minus(one["validation_accuracy"]),
                plus_minus(one["validation_loss"], ".4f", factor=1),
                f"{100 * one['trained_parameters'] / one['parameters']:.2f}",  # percent of all
                f"{one['adapter_bytes'] / 1e6:.2f}",
                f"{np.mean([run['cpu_seconds'] for run in one['runs']]) / 60:.1f}",  # of all threads
            ]
        )
    head = ["candidate", "macro F1 %", "accuracy %", "loss", "trained %", "adapter MB", "CPU minutes"]
    table, trained_at = markdown_table(head, rows), sorted(trained_at, key=str)
    gains = []  # of the chosen candidate against that of the recipe, seed by seed; none where they are the same
    if sweep["recipe"] not in (None, sweep["chosen"]):
        pair = [sweep["candidates"][sweep[key]]["runs"] for key in ("chosen", "recipe")]
        for better, kept in zip(*pair, strict=True):
            gains.append(better["validation_macro_f1"] - kept["validation_macro_f1"])
    return render(
        "qlora_sweep.md",
        sweep=sweep,
        table=table,
        trained_at=trained_at,
        noise=VALIDATION_NOISE,
        gains=gains,
        interval=mean_interval(gains),
    )


@complete("the page of the training cost")
def render_cost(cost: dict) -> str:
    """`results/training_cost.md`: memory and time of a training step, a table per model."""
    tables = {}
    head = ["method", "millions trained", "peak MB", "of it before loading", "ratio", "s a step", "times slower"]
    for model, methods in cost["shapes"].items():
        rows = []
        for name, one in methods.items():
            slower = one["times_slower"]  # a ratio per round: the rounds' median, least and most
            rows.append(
                [
                    name,
                    f"{one['trained_parameters'] / 1e6:.2f}",
                    str(one["peak_memory_mb"]),
                    str(one["before_loading_mb"]),  # the libraries alone, the same for all methods
                    f"{one['peak_memory_ratio']:.2f}",
                    f"{one['seconds_a_step']['median']:.2f}",
                    f"{slower['median']:.2f} x [{slower['min']:.2f}, {slower['max']:.2f}]",
                ]
            )
        tables[model] = markdown_table(head, rows)
    return render("training_cost.md", cost=cost, tables=tables)


@complete("the page of what was drawn at random")
def render_reliability(study: dict) -> str:
    """`results/reliability.md`: how many faults of each kind `make fuzz` drew, and how many tests they failed."""
    rows = []
    for kind, one in study["kinds"].items():
        rows.append([kind, f"{one['draws']:,}", str(one["failed_tests"]), f"{one['seconds']:.0f}"])
    sums = [sum(one[name] for one in study["kinds"].values()) for name in ("draws", "failed_tests", "seconds")]
    rows.append(["all", f"{sums[0]:,}", str(sums[1]), f"{sums[2]:.0f}"])
    table = markdown_table(["kind", "draws", "failed tests", "seconds"], rows)
    return render("reliability.md", study=study, table=table)


@complete("the page of many texts")
def render_batch(study: dict) -> str:
    """`results/batch.md`: rates, memory and workers as measured, and the sum for a billion texts."""
    jobs, workers = [], []
    for one in study["plain"]:
        cells = [f"{one[name]:.0f}" for name in ("rows_a_second_at_the_start", "rows_a_second_at_the_end")]
        drift = one["rows_a_second_at_the_end"] / one["rows_a_second_at_the_start"] - 1
        jobs.append([f"{one['rows']:,}", f"{one['rows_a_second']:.0f}", *cells, f"{100 * drift:+.1f} %"])
        jobs[-1] += [f"{100 * one['share_of_the_class']:.0f} %", str(one["peak_memory_mb"])]
    for name, one in study["engines"].items():
        engine, count = name.split(", ")
        alone = study["engines"][f"{engine}, 1"]["rows_a_second"]
        beside = study["engines"][f"plain, {count}"]["rows_a_second"]
        cells = [f"{one['rows_a_second']:.0f}", f"{one['rows_a_second'] / alone:.2f} x"]
        cells += [f"{100 * one['rows_a_second'] / beside:.0f} %", f"{one['seconds_before_the_first_shard']:.0f}"]
        workers.append([engine, count, *cells])
    job = study["plain"][-1]
    head = ["rows", "rows/s", "start", "end", "change", "share of the class", "peak MB"]
    head_of_workers = ["engine", "workers", "rows/s", "of one", "of the plain engine", "s to the first shard"]
    return render(
        "batch.md",
        study=study,
        jobs=markdown_table(head, jobs),
        workers=markdown_table(head_of_workers, workers),
        job=job,
        one=study["engines"]["plain, 1"],
        texts=MANY,
        hours=MANY / job["rows_a_second"] / 3600,
        read=MANY * job["bytes_read"] / job["rows"] / 1e9,
        written=MANY * job["bytes_written"] / job["rows"] / 1e9,
    )


@complete("the page of the graphs")
def render_graphs(studies: list[dict]) -> str:
    """`results/graphs.md`: what each rewrite of the ONNX graph gives, and forms that were not taken, per encoder."""
    head = ["file", "p50 ms", "batch 1", "texts/s", "batch 32", "labels that differ", "MB"]
    tables = []
    for study in studies:
        rows = []
        for name, one in study["files"].items():
            rows.append(
                [
                    name,
                    f"{one['latency_ms']['p50']:.3f}",
                    f"{one['times_faster_at_batch_1']['median']:.2f} x",  # of the file with all rewrites
                    f"{one['throughput_per_s']['median']:.0f}",
                    f"{one['times_faster_at_batch_32']['median']:.2f} x",
                    str(one["flips"]),
                    f"{one['bytes_to_serve'] / 1e6:.1f}",
                ]
            )
        tables.append(markdown_table(head, rows))
    return render("graphs.md", studies=studies, tables=tables)


@complete("the page of OpenVINO's forms")
def render_openvino(studies: list[dict]) -> str:
    """`results/openvino.md`: ways to make and to open OpenVINO's INT8 file, and streams, per encoder."""
    head, streams_head = ["form", "p50 ms", "batch 1", "texts/s", "batch 32"], ["many strings", "texts/s", "speed"]
    tables = []
    for study in studies:
        rows, streams = [], []
        for name, one in study["forms"].items():
            p50, rate = one["latency_ms"]["p50"], one["throughput_per_s"]["median"]
            at_1, at_32 = one["times_faster_at_batch_1"], one["times_faster_at_batch_32"]
            rows.append([name, f"{p50:.3f}", f"{at_1['median']:.2f} x", f"{rate:.0f}", f"{at_32['median']:.2f} x"])
        for name, one in study["streams"].items():
            faster = one["times_faster_from_strings"]["median"]
            streams.append([name, f"{one['strings_per_s']['median']:.0f}", f"{faster:.2f} x"])
        tables.append((markdown_table(head, rows), markdown_table(streams_head, streams)))
    return render("openvino.md", studies=studies, tables=tables)


@complete("the page of the bits")
def render_bits(studies: list[dict]) -> str:
    """`results/bits.md`: PTQ against QAT with ever fewer bits, and the forms of QAT."""
    parts = []  # per encoder
    for study in studies:
        parts.append(
            {
                "base_model": study["base_model"],
                "study": study,
                "made_at": sorted(set().union(*(cell["made_at"] for cell in study["cells"].values()))),
                "table": _ladder_table(study),
                "forms": _forms_table(study),
            }
        )
    cell = next(iter(studies[0]["cells"].values()))  # dataset and activations are the same in all
    return render("bits.md", parts=parts, cell=cell, untrained=_untrained(studies))


def _untrained(studies: list[dict]) -> list[tuple]:
    """Bits, and what PTQ changes with them, in points, for each encoder; only of bits that all have."""
    changes = []
    for study in studies:
        changes.append({cell["bits"]: f"{100 * cell['change']['mean']:+.2f}" for cell in cells_of(study, "ptq")})
    lines = []
    for bits in changes[0]:
        if all(bits in one for one in changes):
            lines.append((bits, *(one[bits] for one in changes)))
    return lines


def _ladder_table(study: dict) -> str:
    """One line per number of bits: PTQ, QAT, and the training of QAT in floats."""
    rows = []
    without = {cell["bits"]: cell for cell in cells_of(study, "ptq")}  # a study that was stopped may have one more
    control = {cell["bits"]: cell for cell in cells_of(study, "qat-float")}
    for qat in cells_of(study, "qat"):
        ptq = without[qat["bits"]]
        rows.append(
            [
                str(qat["bits"]),
                qat["weights"],
                qat["embeddings"],
                f"{qat['megabytes']:.1f}",
                f"1/{1 / qat['share_of_fp32']:.1f}",  # PTQ's file is as large
                _points(ptq["change"]),
                _points(qat["change"]),
                _points(control[qat["bits"]]["change"]) if qat["bits"] in control else "-",
                _given_back(ptq, qat),
                ", ".join(str(one["seed"]) for one in qat["runs"]),
            ]
        )
    head = ["bits", "linear layers", "embeddings", "MB", "of FP32", "PTQ, points", "QAT, points"]
    return markdown_table([*head, "in floats, points", "given back", "seeds"], rows)


def cells_of(study: dict, method: str) -> list[dict]:
    """The cells of a method (`ptq`, `qat`, or `qat-float`, its control), those of most bits first."""
    cells = [cell for cell in study["cells"].values() if cell["method"] == method]
    return sorted(cells, key=lambda cell: -cell["bits"])


def _points(change: dict) -> str:
    """A change of macro F1 in points and, in brackets, its deviation over the seeds; a single seed has none."""
    deviation = change["standard_deviation"]
    return f"{100 * change['mean']:+.2f}" + (f" ({100 * deviation:.2f})" if deviation is not None else "")


def _given_back(ptq: dict, qat: dict) -> str:
    """How much of what PTQ loses QAT gains."""
    loss = -ptq["change"]["mean"]  # positive where PTQ loses; QAT's own change counts against FP32 too
    if loss <= WORTH_GIVING_BACK:
        return "-"
    return "all" if qat["change"]["mean"] >= 0 else f"{100 * (1 + qat['change']['mean'] / loss):.0f} %"


def _forms_table(study: dict) -> str:
    """Side by side: the model as it was trained, its integers, and each file."""
    rows = []
    for cell in cells_of(study, "qat"):
        # Validation, on which the recipe was chosen: the forms are compared with each other, not with other models.
        fake = _over_seeds(cell, "fake", "validation_macro_f1")
        for form in cell["forms"][0]:
            scores = _over_seeds(cell, form, "validation_macro_f1")
            gaps = _over_seeds(cell, form, "mean_logit_gap")
            # The furthest of any seed: a mean would hide one file that went wrong.
            furthest = np.abs(scores - fake).max()
            rows.append([str(cell["bits"]), form, f"{100 * scores.mean():.2f}", f"{100 * furthest:.2f}"])
            rows[-1].append(f"{gaps.mean():.6f}")
    head = ["bits", "form", "macro F1 %", "furthest from fake, points", "mean logit gap"]
    return markdown_table(head, rows)


def _over_seeds(cell: dict, form: str, name: str) -> np.ndarray:
    """One number per seed, float64 (seeds,)."""
    return np.array([one[form][name] for one in cell["forms"]])


@complete("the page of the operators")
def render_operators(studies: list[dict]) -> str:
    """`results/benchmark/operators.md`: where the time of a call goes, a table per artifact, per encoder."""
    tables = []
    for study in studies:
        tables.append({name: _operators_table(one) for name, one in study["artifacts"].items()})
    return render("operators.md", studies=studies, tables=tables, smallest=SMALLEST_SHARE)


def _operators_table(profiled: dict) -> str:
    """A line per kind of operator, those that take longest at batch 1 first; then small kinds, and what is left."""
    sizes = [profiled["batch_1"], profiled["batch_32"]]
    lines, other = {}, np.zeros(4)  # per line: count and milliseconds at batch 1, the same at batch 32
    for kind in dict.fromkeys([*sizes[0]["operators"], *sizes[1]["operators"]]):
        values, large = [], False
        for size in sizes:
            one = size["operators"].get(kind, {"count": 0, "ms": 0.0})  # OpenVINO may need it at one size alone
            values += [one["count"], one["ms"]]
            large |= one["ms"] >= SMALLEST_SHARE * size["call_ms"]
        if large:
            lines[kind] = values
        else:
            other += values
    lines["other"] = other.tolist()
    sums = [sum(one["ms"] for one in size["operators"].values()) for size in sizes]
    lines["*between operators*"] = [None, sizes[0]["call_ms"] - sums[0], None, sizes[1]["call_ms"] - sums[1]]
    lines["*a call*"] = [None, sizes[0]["call_ms"], None, sizes[1]["call_ms"]]
    rows = []
    for kind, (count, ms, count_32, ms_32) in lines.items():
        # The same file computes the same operators at both sizes, or nearly so: one column tells how many.
        counted = "" if count is None else f"{max(count, count_32):.0f}"
        cells = [f"{ms:.3f}", f"{100 * ms / sizes[0]['call_ms']:.1f}"]
        rows.append([kind, counted, *cells, f"{ms_32:.3f}", f"{100 * ms_32 / sizes[1]['call_ms']:.1f}"])
    return markdown_table(["operator", "count", "ms, batch 1", "%", "ms, batch 32", "%"], rows)
