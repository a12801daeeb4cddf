"""The pages of the studies, from their JSON files alone: nothing that was measured is needed again to show it."""

from pathlib import Path

from emotion.common.files import read_json
from emotion.quantize.levels import SAFE_WEIGHT
from emotion.report.tables import markdown_table

import numpy as np

MARGIN = 0.002  # of macro F1, within which the study takes two candidates for equal: four rows of 2,000
WORTH_GIVING_BACK = 0.003  # of macro F1: below it the loss is noise, and a share of it says nothing


def render_study_pages(results: Path) -> dict[Path, str]:
    """Path -> text of each page whose JSON file stands in the results."""
    pages = {
        "ptq_study": render_study,
        "ptq_sensitivity": render_sensitivity,
        "ptq_processors": render_processors,
        "qlora_sweep": render_sweep,
        "training_cost": render_cost,
    }
    return {
        results / f"{name}.md": render(read_json(results / f"{name}.json"))
        for name, render in pages.items()
        if (results / f"{name}.json").is_file()
    }


def render_study(study: dict) -> str:
    winners = {one["candidate"] for one in study["chosen"].values()}
    rows = [
        [f"**{name}**" if name in winners else name, f"{100 * one['macro_f1_change']:+.2f}", f"{one['flips']:.1f}",
         f"{one['mean_logit_shift']:.3f}", f"{one['megabytes']:.1f}", str(one["scheme"]["largest_weight"]),
         f"{one['latency_ms']['p50']:.2f}", f"{one['times_faster_at_batch_1']['median']:.2f} x",
         f"{one['times_faster_at_batch_32']['median']:.2f} x"]
        for name, one in study["candidates"].items()
    ]  # fmt: skip
    head = ["candidate", "macro F1, points", "flips", "logit shift", "MB", "largest weight", "p50 ms", "batch 1",
            "batch 32"]  # fmt: skip
    environment, seeds = study["environment"], ", ".join(map(str, study["baselines"]))
    return (
        f"# How the baseline is quantized\n\n{study['dataset']}, validation, {study['examples']} texts. Changes are "
        f"against the FP32 ONNX file (macro F1 {100 * study['baseline']['macro_f1']:.2f}, p50 "
        f"{study['baseline']['latency_ms']['p50']:.2f} ms), means of the baselines with seeds {seeds}. Times: one "
        f"interleaved run with the first of them on {environment['cpu']}, {environment['threads']} threads; "
        f"{study['date']}.\n\n{markdown_table(head, rows)}\n"
        f"**Chosen** (bold), for each format: of the candidates whose weights do not exceed {SAFE_WEIGHT}, where a "
        f"format has such, and whose macro F1 lies within {100 * MARGIN:.1f} points of the best of them, the fastest "
        "at batch 1. What smaller processors make of them: ptq_processors.md.\n"
    )


def render_sensitivity(sensitivity: dict) -> str:
    order = sorted(sensitivity["layers"], key=lambda one: -one["mean_logit_shift"])
    rows = [
        [f"{one['kind']}, {'all layers' if one['layer'] is None else one['layer']}", f"{one['mean_logit_shift']:.4f}",
         str(one["flips"]), f"{100 * one['macro_f1_change']:+.2f}"]
        for one in order
    ]  # fmt: skip
    return (
        f"# One layer at a time\n\nWhat quantizing one layer alone (dynamic INT8, ONNX Runtime) does to the baseline "
        f"with seed {sensitivity['baselines'][0]} on the {sensitivity['examples']} texts of validation; most harmful "
        "first. A change of macro F1 below half a point is within the noise of so many texts; the shift of the logits "
        "is not.\n\n![](ptq_sensitivity.png)\n\n"
        + markdown_table(["quantized", "mean logit shift", "flips", "macro F1, points"], rows)
    )


def render_processors(measured: dict) -> str:
    rows = [
        [name, "none" if limit == "None" else limit, *_shares(one)]
        for name, limits in measured["artifacts"].items()
        for limit, one in limits.items()
    ]
    head = ["artifact", "limit of oneDNN", "equal labels %", "mean gap", "largest gap"]
    return (
        "# The same answers on smaller processors\n\n"
        "A processor without VNNI adds two products of 8 bits in 16 bits: with an 8-bit activation they overflow if a "
        "weight exceeds 64 (2 x 255 x 64 < 2^15), so the shipped weights have 7 bits. ONNX Runtime cannot be limited "
        "from outside; there the largest weight, counted in its record, is the proof. PyTorch and OpenVINO multiply "
        "with oneDNN, which was limited; labels and logits are compared with the limit "
        f"{measured['reference']}, where integer products are exact and all else is FP32. Without a limit OpenVINO "
        "computes what is not INT8 in bfloat16, if the processor has it. A dash: the runtime does not work so "
        "limited.\n\n"
        f"{markdown_table(head, rows)}\n{measured['environment']['cpu']}, {measured['date']}.\n"
    )


def _shares(one: dict) -> list[str]:
    if one["equal_labels"] is None:
        return ["-", "-", "-"]
    gaps = [f"{one['mean_logit_gap']:.4f}", f"{one['largest_logit_gap']:.3f}"]
    return [f"{100 * one['equal_labels']:.2f}", *gaps]


def render_sweep(sweep: dict) -> str:
    rows = [
        [f"**{name}**" if name == sweep["chosen"] else name, f"{100 * one['validation_macro_f1']:.2f}",
         f"{100 * one['validation_accuracy']:.2f}", f"{one['validation_loss']:.4f}",
         f"{100 * one['trained_parameters'] / one['parameters']:.2f}", f"{one['adapter_bytes'] / 1e6:.2f}",
         f"{one['cpu_seconds'] / 60:.1f}"]
        for name, one in sweep["candidates"].items()
    ]  # fmt: skip
    head = ["candidate", "macro F1 %", "accuracy %", "loss", "trained %", "adapter MB", "CPU minutes"]
    centre = ", ".join(f"{name} {value}" for name, value in sweep["centre"].items())
    return (
        f"# How the adapter is trained\n\n{sweep['base_model']} on {sweep['dataset']}, scored on validation after "
        f"{sweep['epochs']:g} epochs, seed {sweep['seed']}. Each candidate changes one thing of the centre: {centre}."
        f"\n\n![](qlora_sweep.png)\n\n{markdown_table(head, rows)}\n"
        f"**Chosen** (bold): of the candidates within {100 * MARGIN:.1f} points of the best macro F1, the one with "
        f"the lowest loss. {sweep['environment']['cpu']}, {sweep['date']}.\n"
    )


def render_cost(cost: dict) -> str:
    parts = []
    for shape, methods in cost["shapes"].items():
        rows = [
            [name, f"{one['trained_parameters'] / 1e6:.2f}", str(one["peak_memory_mb"]), str(one["before_loading_mb"]),
             f"{one['peak_memory_ratio']:.2f}", f"{one['seconds_a_step']['median']:.2f}",
             f"{one['times_slower']['median']:.2f} x [{one['times_slower']['min']:.2f}, "
             f"{one['times_slower']['max']:.2f}]"]
            for name, one in methods.items()
        ]  # fmt: skip
        head = ["method", "millions trained", "peak MB", "of it before loading", "ratio", "s a step", "times slower"]
        parts.append(f"## {shape}\n\n{markdown_table(head, rows)}")
    environment = cost["environment"]
    return (
        f"# What a training step costs\n\nBatches of {cost['batch_size']} texts of {cost['dataset']}, the same for "
        f"all, {cost['rounds']} interleaved rounds of {cost['steps_a_round']} steps; ratios are against "
        f"{cost['compared_with']}. Peak memory is the whole process's during the steps, libraries included. "
        f"{environment['cpu']}, {environment['threads']} threads, {cost['date']}.\n\n" + "\n".join(parts)
    )


def render_pages(results: Path) -> dict[Path, str]:
    """Path -> text of the page; none where the study has not been run."""
    path = results / "bits.json"
    return {results / "bits.md": render_bits(read_json(path))} if path.is_file() else {}


def render_bits(study: dict) -> str:
    first, rows = next(iter(study["cells"].values())), []
    without = {cell["bits"]: cell for cell in _cells(study, "ptq")}  # a study that was stopped may have one more
    for qat in _cells(study, "qat"):
        ptq = without[qat["bits"]]
        rows.append([str(qat["bits"]), qat["weights"], qat["embeddings"], f"{qat['megabytes']:.1f}",
                     f"1/{1 / qat['share_of_fp32']:.1f}", _points(ptq["change"]), _points(qat["change"]),
                     _given_back(ptq, qat), ", ".join(str(one["seed"]) for one in qat["runs"])])  # fmt: skip
    head = ["bits", "linear layers", "embeddings", "MB", "of FP32", "PTQ, points", "QAT, points", "given back",
            "seeds"]  # fmt: skip
    return (
        f"# The ladder: fewer bits, with and without training\n\n{first['dataset']}, test, {first['examples']} texts; "
        "each cell is a file for ONNX Runtime, scored against the FP32 baseline of the same seed. Points of macro F1, "
        "the mean over the seeds and, in brackets, their standard deviation. Given back: how much of what PTQ loses "
        "QAT gains; a dash where PTQ loses next to nothing. Settings were chosen on validation. Activations: "
        f"{first['activations']}.\n\n![](bits.png)\n\n{markdown_table(head, rows)}"
        f"{_render_forms(study)}{_render_choices(study['choices'])}\n"
        f"{study['environment']['cpu']}; {study['date']}.\n"
    )


def _cells(study: dict, method: str) -> list[dict]:
    """The cells of a method, those of most bits first."""
    cells = [cell for cell in study["cells"].values() if cell["method"] == method]
    return sorted(cells, key=lambda cell: -cell["bits"])


def _points(change: dict) -> str:
    deviation = change["standard_deviation"]
    return f"{100 * change['mean']:+.2f}" + (f" ({100 * deviation:.2f})" if deviation is not None else "")


def _given_back(ptq: dict, qat: dict) -> str:
    loss = -ptq["change"]["mean"]
    return f"{100 * (1 + qat['change']['mean'] / loss):.0f} %" if loss > WORTH_GIVING_BACK else "-"


def _render_forms(study: dict) -> str:
    """Side by side: the model as it was trained, its integers, and each file."""
    rows = []
    for cell in _cells(study, "qat"):
        fake = _over_seeds(cell, "fake", "validation_macro_f1")
        for form in cell["forms"][0]:
            scores, gaps = (_over_seeds(cell, form, name) for name in ("validation_macro_f1", "mean_logit_gap"))
            rows.append([str(cell["bits"]), form, f"{100 * scores.mean():.2f}",
                         f"{100 * np.abs(scores - fake).max():.2f}", f"{gaps.mean():.6f}"])  # fmt: skip
    head = ["bits", "form", "macro F1 %", "furthest from fake, points", "mean logit gap"]
    return (
        "\nQAT as it was trained (fake-quantized), its integers, and its files, opened again: validation, the mean "
        "over the seeds. The gap is that of the logits to the fake-quantized ones.\n\n" + markdown_table(head, rows)
    )


def _over_seeds(cell: dict, form: str, name: str) -> np.ndarray:
    return np.array([one[form][name] for one in cell["forms"]])


def _render_choices(choices: dict) -> str:
    if not choices:
        return ""
    rows = [
        [name, f"{100 * one['validation_macro_f1']:.2f}", f"{one['mean_logit_gap']:.3f}"]
        for name, one in choices.items()
    ]
    seed = next(iter(choices.values()))["seed"]
    return (
        f"\nWhat distillation is worth at 2 bits (validation, seed {seed}); the gap is that between the file and the "
        "model as it was trained:\n\n" + markdown_table(["QAT", "macro F1 %", "mean logit gap"], rows)
    )
