"""Trains one variant with several seeds, scores each, and keeps the seed that is best on validation.

The chosen model becomes `weights/<variant>`, and the summary is written to `results/seeds/<variant>.json`. A seed is
trained again only if the recipe has changed, or the baseline that it started from; a training that was interrupted is
resumed. A variant that starts from a baseline takes the baseline of the same seed, and is compared with it row by row.

    python tools/train_seeds.py baseline --seeds 42 43 44 45 46
    python tools/train_seeds.py ptq
    python tools/train_seeds.py qat-int4 --config_dir configs/mpnet-base  # run_qat.py with its qat-int4.yaml
    python tools/train_seeds.py qat-int4-float  # the float fine-tuning control
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from emotion.evaluation.seeds import CONFIGS, check_seeds, choose_seed, make_and_score, summarize
from emotion.inference.model_folder import ARTIFACT
from emotion.utils.arguments import SEED, parse_args
from emotion.utils.command import run
from emotion.utils.files import ROOT, atomic_folder, check_replaceable, write_json


@dataclass
class SeedsArguments:
    """Which variant is trained, and with which seeds."""

    variant: str = field(metadata={"help": "A config, as qat-int4; with -float: without fake quantization."})
    config_dir: str = field(default=str(CONFIGS), metadata={"help": "Folder of the encoder's configs."})
    # Five seeds: the deviation of fewer says little, and the baseline of each is trained only once.
    seeds: list[int] = field(
        default_factory=lambda: [42, 43, 44, 45, 46], metadata={"help": "Seeds.", "choices": SEED}
    )
    weights_dir: str = field(default=str(ROOT / "weights"), metadata={"help": "Where the models are saved."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    """Trains, scores and summarizes."""
    (arguments,) = parse_args((SeedsArguments,), positional="variant", argv=argv)
    check_seeds(arguments.seeds)
    weights, results = Path(arguments.weights_dir), Path(arguments.results_dir)
    check_replaceable(weights / arguments.variant, ARTIFACT)  # now, not after hours of training
    configs = Path(arguments.config_dir)
    runs = [make_and_score(seed, arguments.variant, weights, results, configs) for seed in arguments.seeds]
    chosen, chosen_by = choose_seed(arguments.variant, runs, results)
    # A copy: the variants start from the models of all seeds.
    with atomic_folder(weights / arguments.variant, ARTIFACT) as folder:
        shutil.copytree(weights / "seeds" / f"{arguments.variant}-{chosen}", folder, dirs_exist_ok=True)
    summary = {
        "variant": arguments.variant,
        "chosen_seed": chosen,
        "chosen_by": chosen_by,
        **summarize(runs),
        "runs": runs,
    }
    write_json(results / "seeds" / f"{arguments.variant}.json", summary)
    print(f"{len(runs)} seeds, test; seed {chosen}, chosen by {chosen_by} -> {weights / arguments.variant}")
    # The baseline's summary has no formats: it was scored in PyTorch.
    for name, scores in summary.get("formats", {"pytorch": summary}).items():
        deviation = scores["macro_f1"]["standard_deviation"]
        spread = "one seed" if deviation is None else f"standard deviation {deviation:.4f}"
        change = f"   change {100 * scores['change']['mean']:+.2f} points" if "change" in scores else ""
        print(f"  {name:10} macro F1 {scores['macro_f1']['mean']:.4f} ({spread}){change}")


if __name__ == "__main__":
    run(main)
