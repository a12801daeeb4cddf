"""Times several artifacts interleaved in one run (A B A B): the only place where a ratio of speeds comes from.

Each artifact lives in a process of its own, so that no runtime's threads disturb another's, and answers the same texts
in turn. Beside the formats of a folder it times what a user would make of it without us: `pytorch-compiled`,
`bf16-compiled` and `torchao-compiled` (torch.compile), `onnx-plain` and `onnx-dynamic` (ONNX Runtime's export and its
dynamic INT8, with defaults), `openvino-plain`. All are compared with the fastest that computes in FP32.

    python scripts/run_benchmark.py weights/baseline:pytorch weights/baseline:pytorch-compiled weights/ptq:onnx
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.command import run
from emotion.common.files import write_json
from emotion.common.flags import parse_flags
from emotion.common.machine import choose_threads, describe_run
from emotion.common.recipe import read_recipe_of
from emotion.measure.benchmark import fastest_fp32, interleave, name_of, split_name
from emotion.measure.contenders import make_contender
from emotion.measure.roofline import add_roofline
from emotion.task.dataset import get_split, load_task_of


@dataclass
class BenchmarkArguments:
    """What is timed, and how often."""

    artifacts: list[str] = field(metadata={"help": "folder:format words."})
    rounds: int = field(default=12, metadata={"help": "Turns that each artifact gets; the spread is over these."})
    texts: int = field(default=50, metadata={"help": "Texts a turn at batch 1."})
    batches: int = field(default=8, metadata={"help": "Batches of 32 a turn."})
    cold_starts: int = field(
        default=3, metadata={"help": "Processes, one after another, timed from their start to the first answer."}
    )
    threads: int | None = field(default=None, metadata={"help": "Threads to compute with; all if not given."})
    roofline: bool = field(default=True, metadata={"help": "Measure the machine's peaks, and the distance to them."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Texts to use; the first artifact's if not given."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file of the result; printed only if not given."})


def main(argv=None) -> None:
    (arguments,) = parse_flags((BenchmarkArguments,), positional="artifacts", argv=argv)
    named = [split_name(name) for name in arguments.artifacts]
    task = load_task_of(read_recipe_of(named[0][0]), arguments.dataset_name)
    print(f"texts: {task.name} ({task.source}), test")
    texts = list(get_split(task, "test")["text"])
    threads = choose_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as work:
        contenders = {name_of(*one): make_contender(*one, Path(work)) for one in named}
        measured = interleave(contenders, texts, threads, arguments.rounds, arguments.texts, arguments.batches,
                              arguments.cold_starts)  # fmt: skip
    result = describe_run(threads) | {
        "dataset": task.name,
        "dataset_source": task.source,
        "rounds": arguments.rounds,
        "texts_a_round": arguments.texts,
        "batches_a_round": arguments.batches,
        "compared_with": fastest_fp32(measured),
        "artifacts": measured,
    }
    if arguments.roofline:
        add_roofline(result, named[0][0], texts, threads)
    if arguments.output:
        write_json(Path(arguments.output), result)
    for name, one in measured.items():
        faster, faster_in_batches = (one[f"times_faster_at_batch_{size}"]["median"] for size in (1, 32))
        print(
            f"{name:34} p50 {one['latency_ms']['p50']:7.2f} ms ({faster:.2f} x)"
            f"   {one['throughput_per_s']['median']:7.0f} texts/s ({faster_in_batches:.2f} x)"
        )


if __name__ == "__main__":
    run(main)
