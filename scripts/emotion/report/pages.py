"""The pages of the studies, from their JSON files alone: no study has to be run again to show its page."""

from pathlib import Path

from emotion.common.files import read_json
from emotion.quantize.levels import LARGEST_SAFE_WEIGHT
from emotion.report.render import complete, render
from emotion.report.tables import markdown_table
from emotion.task.scores import VALIDATION_NOISE

import numpy as np

WORTH_GIVING_BACK = 0.003  # of macro F1: a smaller loss is noise, and a share of it says nothing


def render_study_pages(results: Path) -> dict[Path, str]:
    """Path -> text of each page whose JSON file is among the results."""
    renderers = {
        "dataset": render_dataset,
        "ptq_study": render_study,
        "ptq_sensitivity": render_sensitivity,
        "ptq_processors": render_processors,
        "qlora_sweep": render_sweep,
        "training_cost": render_cost,
        "bits": render_bits,
    }
    pages = {}
    for name, render_one in renderers.items():
        if (results / f"{name}.json").is_file():
            pages[results / f"{name}.md"] = render_one(read_json(results / f"{name}.json"))
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
def render_study(study: dict) -> str:
    """`results/ptq_study.md`: each candidate against FP32, and which was chosen for each format."""
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
    table = markdown_table([*head, "batch 1", "batch 32"], rows)
    return render(
        "ptq_study.md", study=study, table=table, largest_safe_weight=LARGEST_SAFE_WEIGHT, noise=VALIDATION_NOISE
    )


@complete("the page of the layers")
def render_sensitivity(sensitivity: dict) -> str:
    """`results/ptq_sensitivity.md`: what quantizing one layer alone does, most harmful first."""
    rows = []
    # By the shift of the logits, not by macro F1: of one layer alone hardly a label flips, so that F1 is noise.
    for one in sorted(sensitivity["layers"], key=lambda one: -one["mean_logit_shift"]):
        # Without a number of a layer the line is of a kind of layer, all of which were quantized together.
        where = "all layers" if one["layer"] is None else one["layer"]
        shift, change = f"{one['mean_logit_shift']:.4f}", f"{100 * one['macro_f1_change']:+.2f}"
        rows.append([f"{one['kind']}, {where}", shift, str(one["flips"]), change])
    table = markdown_table(["quantized", "mean logit shift", "flips", "macro F1, points"], rows)
    return render("ptq_sensitivity.md", sensitivity=sensitivity, table=table)


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
    rows = []
    for name, one in sweep["candidates"].items():
        rows.append(
            [
                f"**{name}**" if name == sweep["chosen"] else name,
                f"{100 * one['validation_macro_f1']:.2f}",
                f"{100 * one['validation_accuracy']:.2f}",
                f"{one['validation_loss']:.4f}",
                f"{100 * one['trained_parameters'] / one['parameters']:.2f}",  # percent of all
                f"{one['adapter_bytes'] / 1e6:.2f}",
                f"{one['cpu_seconds'] / 60:.1f}",  # of all threads: the machine may have been shared
            ]
        )
    head = ["candidate", "macro F1 %", "accuracy %", "loss", "trained %", "adapter MB", "CPU minutes"]
    return render("qlora_sweep.md", sweep=sweep, table=markdown_table(head, rows), noise=VALIDATION_NOISE)


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


@complete("the page of the bits")
def render_bits(study: dict) -> str:
    """`results/bits.md`: PTQ against QAT with ever fewer bits, the forms of QAT, and what distillation is worth."""
    rows = []  # one per number of bits, PTQ and QAT side by side
    without = {cell["bits"]: cell for cell in cells_of(study, "ptq")}  # a study that was stopped may have one more
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
                _given_back(ptq, qat),
                ", ".join(str(one["seed"]) for one in qat["runs"]),
            ]
        )
    head = ["bits", "linear layers", "embeddings", "MB", "of FP32", "PTQ, points", "QAT, points", "given back"]
    # The choices are tried at 2 bits alone: a ladder without that step has none.
    first_choice = next(iter(study["choices"].values()), None)
    return render(
        "bits.md",
        study=study,
        cell=next(iter(study["cells"].values())),  # dataset and activations are the same in all
        table=markdown_table([*head, "seeds"], rows),
        forms=_forms_table(study),
        choices=_choices_table(study["choices"]) if first_choice else "",
        choice_seed=first_choice and first_choice["seed"],
    )


def cells_of(study: dict, method: str) -> list[dict]:
    """The cells of a method (`ptq` or `qat`), those of most bits first."""
    cells = [cell for cell in study["cells"].values() if cell["method"] == method]
    return sorted(cells, key=lambda cell: -cell["bits"])


def _points(change: dict) -> str:
    """A change of macro F1 in points and, in brackets, its deviation over the seeds; a single seed has none."""
    deviation = change["standard_deviation"]
    return f"{100 * change['mean']:+.2f}" + (f" ({100 * deviation:.2f})" if deviation is not None else "")


def _given_back(ptq: dict, qat: dict) -> str:
    """How much of what PTQ loses QAT gains."""
    loss = -ptq["change"]["mean"]  # positive where PTQ loses; QAT's own change counts against FP32 too
    return f"{100 * (1 + qat['change']['mean'] / loss):.0f} %" if loss > WORTH_GIVING_BACK else "-"


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


def _choices_table(choices: dict) -> str:
    """What a setting of the recipe is worth, a line per setting."""
    rows = []
    for name, one in choices.items():
        rows.append([name, f"{100 * one['validation_macro_f1']:.2f}", f"{one['mean_logit_gap']:.3f}"])
    return markdown_table(["QAT", "macro F1 %", "mean logit gap"], rows)
