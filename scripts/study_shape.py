"""Size and speed in the shape of BERT-base, where neither depends on what the weights are: random ones do.

Builds a BERT-base with random weights and the baseline's tokenizer and labels, quantizes it as the recipe says, and
times both interleaved. Its answers mean nothing and are not scored.

    python scripts/study_shape.py
"""

from dataclasses import dataclass, field
from pathlib import Path

import run_baseline
import run_ptq
from emotion.common.command import run
from emotion.common.files import ROOT
from emotion.common.flags import parse_flags
from emotion.common.machine import run_script
from emotion.common.recipe import read_recipe_of
from emotion.model.artifact import new_artifact
from emotion.quantize.scheme import FORMATS

import torch
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForSequenceClassification


@dataclass
class ShapeArguments:
    """Whose tokenizer and labels, and where the results go."""

    baseline: str = field(default="weights/baseline", metadata={"help": "Folder of run_baseline.py."})
    rounds: int = field(default=6, metadata={"help": "Turns that each form gets; a turn of these takes a while."})
    cold_starts: int = field(default=3, metadata={"help": "As for run_benchmark.py."})
    work_dir: str = field(default=str(ROOT / "build" / "bert-base"), metadata={"help": "Where the models are saved."})
    output: str = field(
        default=str(ROOT / "results" / "benchmark" / "bert-base.json"), metadata={"help": "JSON file of the result."}
    )


def main(argv=None) -> None:
    (arguments,) = parse_flags((ShapeArguments,), positional="baseline", argv=argv)
    work, made_by = Path(arguments.work_dir), read_recipe_of(Path(arguments.baseline))
    of_baseline = AutoConfig.from_pretrained(arguments.baseline)
    tokenizer = AutoTokenizer.from_pretrained(arguments.baseline)
    config = BertConfig(
        vocab_size=of_baseline.vocab_size, id2label=of_baseline.id2label, label2id=of_baseline.label2id
    )
    torch.manual_seed(0)
    with new_artifact(work / "baseline", made_by) as folder:
        run_baseline.save_forms(BertForSequenceClassification(config), tokenizer, folder)
    run_ptq.main(["--baseline", str(work / "baseline"), "--output_dir", str(work / "ptq"), "--max_loss", "100"])
    named = [f"{work / 'baseline'}:{format}" for format in ("pytorch", "bf16", "onnx", "openvino-plain")]
    named += [f"{work / 'ptq'}:{format}" for format in FORMATS]
    flags = {name: getattr(arguments, name) for name in ("rounds", "cold_starts", "output")} | {"batches": 4}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    # In a process of its own, or each of its workers would load again what this one has loaded.
    run_script("run_benchmark.py", *named, *words, check=True)


if __name__ == "__main__":
    run(main)
