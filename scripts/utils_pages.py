"""The pages of the studies, from their JSON files alone: nothing that was measured is needed again to show it."""

from pathlib import Path

from utils_record import markdown_table, read_json

MARGIN = 0.002  # of macro F1, within which the study takes two candidates for equal: four rows of 2,000


def render_study_pages(results: Path) -> dict[Path, str]:
    """Path -> text of each page whose JSON file stands in the results."""
    pages = {"qlora_sweep": render_sweep, "training_cost": render_cost}
    return {
        results / f"{name}.md": render(read_json(results / f"{name}.json"))
        for name, render in pages.items()
        if (results / f"{name}.json").is_file()
    }


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
        f"{sweep['epochs']:g} epochs, seed {sweep['seed']}. Each candidate changes one thing of the centre: {centre}.\n"
        f"\n![](qlora_sweep.png)\n\n{markdown_table(head, rows)}\n"
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
