"""The page and the picture of the ladder of bits, from `results/bits.json` alone."""

from pathlib import Path

import numpy as np
from utils_record import markdown_table, read_json

WORTH_GIVING_BACK = 0.003  # of macro F1: below it the loss is noise, and a share of it says nothing


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


def plot_rounding(path: Path) -> None:
    """What rounding makes of a weight at 4 and at 2 bits, and what its gradient takes it for."""
    import torch
    from utils_lowbit import choose_scales, round_matrix
    from utils_plots import STYLE, plt, save_figure, seaborn, styled

    weights = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0)).sort().values
    with styled():
        figure, both = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
        colors = seaborn.color_palette(STYLE["palette"])
        for axes, bits in zip(both, (4, 2), strict=True):
            rounded = round_matrix(weights, choose_scales(weights, bits, weights.shape[1]))
            axes.hist(weights[0], bins=60, density=True, color="0.88")
            axes.step(weights[0], rounded[0], where="mid", color=colors[0], label="forward: rounded")
            axes.plot(weights[0], weights[0], color=colors[1], linestyle="--", label="backward: straight through")
            axes.set(title=f"{bits} bits", xlabel="weight, in standard deviations")
        both[0].set(ylabel="what the layer multiplies with")
        both[0].legend(frameon=False, loc="upper left")
        seaborn.despine(figure)
        save_figure(figure, path)


def plot_bits(study: dict, path: Path) -> None:
    """Macro F1 against megabytes: a line a method, FP32 as the level to reach."""
    from utils_plots import STYLE, plt, save_figure, seaborn, styled

    with styled():
        figure, axes = plt.subplots(figsize=(7, 4.2))
        colors = seaborn.color_palette(STYLE["palette"])
        for method, color in (("ptq", colors[1]), ("qat", colors[0])):
            cells = _cells(study, method)[::-1]  # the smallest first
            axes.errorbar(
                [cell["megabytes"] for cell in cells], [100 * cell["change"]["mean"] for cell in cells],
                yerr=[100 * (cell["change"]["standard_deviation"] or 0) for cell in cells], color=color, marker="o",
                capsize=3, label=method.upper())  # fmt: skip
            for cell in cells if method == "qat" else ():
                above = cell["change"]["mean"] + (cell["change"]["standard_deviation"] or 0)
                axes.annotate(f"{cell['bits']} bits", (cell["megabytes"], 100 * above),
                              xytext=(0, 7), textcoords="offset points", ha="center", fontsize="small")  # fmt: skip
        axes.axhline(0, color="0.5", linewidth=1, linestyle="--", label="FP32")
        axes.set(xlabel="megabytes to serve", ylabel="macro F1 against FP32, points")
        axes.legend(frameon=False)
        seaborn.despine(figure)
        save_figure(figure, path)
