"""Times several artifacts interleaved in one run (A B A B): the only place where a ratio of speeds comes from.

Each artifact lives in a process of its own, so that no runtime's threads disturb another's. All answer the same texts,
in turn. Besides the formats of a folder, it can time the plain alternatives that other libraries make of that folder:
`pytorch-compiled`, `bf16-compiled` and `torchao-compiled` (torch.compile), `pytorch-dynamic` (PyTorch's
`quantize_dynamic`), `onnx-plain` and `onnx-dynamic` (ONNX Runtime's export and its dynamic INT8, with defaults),
`openvino-plain` and `ctranslate2` (its INT8 of BERT, DistilBERT and RoBERTa; `make benchmark` installs it). These have
no record, so they are scored here. All are compared with the fastest one that computes in FP32. What the processor has
no instructions for is left out, and so is a library that fails; a line tells of each.

Latency and batches are timed from token ids to logits. Many strings to their labels are timed through
`EmotionClassifier`, for every artifact and plain alternative alike, so that these numbers compare models and runtimes
and not the code around them.

    python scripts/run_benchmark.py weights/baseline:pytorch weights/baseline:pytorch-compiled weights/ptq:onnx
    python scripts/run_benchmark.py weights/baseline:onnx weights/ptq:onnx --output results/benchmark  # avx2.json, say
"""

import importlib.metadata
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from emotion.data.dataset import Task, get_split, load_task_of
from emotion.evaluation.benchmark import (
    NOISE_LIMIT,
    Protocol,
    fastest_fp32,
    interleave,
    list_noisy,
    name_of,
    split_name,
)
from emotion.evaluation.peers import CTRANSLATE2, is_alternative, leave_out_unfit
from emotion.evaluation.roofline import add_roofline, count_work
from emotion.export.peers import make_peers
from emotion.utils.arguments import COUNT, Range, parse_args
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import check_result, write_json
from emotion.utils.machine import THREADS, choose_threads, describe_run
from emotion.utils.processor import TITLES, find_processor_class
from emotion.utils.recipe import read_recipe_of


@dataclass
class BenchmarkArguments:
    """Which artifacts are timed, and how often."""

    artifacts: list[str] = field(metadata={"help": "folder:format words."})
    # Enough for a spread that shows how steady the machine was, in a few minutes per artifact.
    rounds: int = field(
        default=12, metadata={"help": "Turns that each artifact gets; the spread is over these.", "choices": COUNT}
    )
    texts: int = field(default=50, metadata={"help": "Texts per turn at batch 1.", "choices": COUNT})
    batches: int = field(default=8, metadata={"help": "Batches of 32 texts per turn.", "choices": COUNT})
    # Enough that each of several threads computes many batches; few would show which thread got the last one.
    strings: int = field(
        default=1024,
        metadata={
            "help": "Texts per turn from strings to labels, in one call; 0 leaves this out.",
            "choices": Range(0),
        },
    )
    # Three, since the first start may read the libraries from disk; the median leaves it out.
    cold_starts: int = field(
        default=3,
        metadata={
            "help": "Processes per artifact that are timed from their start to the first answer.",
            "choices": Range(0),
        },
    )
    threads: int | None = field(
        default=None, metadata={"help": "Threads to compute with; all if not given.", "choices": THREADS}
    )
    roofline: bool = field(
        default=True, metadata={"help": "Measure the machine's peaks, and how close each artifact comes."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Texts to use; the first artifact's if not given."}
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "JSON file of the result, or a folder, in which the file is named after the kind of processor; "
            "printed only if not given."
        },
    )


def main(argv=None) -> None:
    """Times the artifacts and writes the result; ``argv``: the flags, those of the command line if not given."""
    (arguments,) = parse_args((BenchmarkArguments,), positional="artifacts", argv=argv)
    output = choose_file(arguments.output) if arguments.output else None  # an error now, not after the timing
    named = leave_out_unfit([split_name(name) for name in arguments.artifacts])
    first_folder = named[0][0]  # it tells the dataset, and the architecture that the roofline counts
    # The speed depends on the lengths of the texts, so that all artifacts get those of one dataset.
    task = load_task_of(read_recipe_of(first_folder), arguments.dataset_name)
    print(f"texts: {task.name} ({task.source}), test")
    rows, threads = get_split(task, "test"), choose_threads(arguments.threads)
    texts, labels = list(rows["text"]), [task.labels[label] for label in rows["label"]]
    # Alternatives are made before anything is timed, so that an error costs no measurement.
    with tempfile.TemporaryDirectory() as work:
        opened = make_peers(named, Path(work))
        artifacts = {name_of(*one): made for one, made in opened.items()}
        peers = {name_of(*one) for one in opened if is_alternative(one[1])}
        measured = interleave(artifacts, texts, make_protocol(arguments, threads), peers, labels)
    result = describe_benchmark(arguments, threads, task, measured)
    if output:
        write_json(output, result)  # before the peaks: who stops it then keeps what was timed
    print_speeds(measured)
    # After the timing: finding the peaks heats the processor and takes its memory.
    if arguments.roofline:
        add_roofline(result, count_work(first_folder, texts), threads)
        if output:
            write_json(output, result)


def choose_file(output: str) -> Path:
    """The file of the result: the one that is named, or in a folder the one of this kind of processor.

    Raises:
        UserError: if the file would be named after a kind of processor that this is not, since another kind's has its
            name or some of its instructions are hidden; or if something else stands there.
    """
    path = Path(output)
    if path.is_dir() or (path.suffix != ".json" and not path.exists()):
        path = path / f"{find_processor_class()}.json"
    elif path.stem in TITLES and path.stem != find_processor_class():
        raise UserError(f"{path} is for {TITLES[path.stem]}; this processor's is {find_processor_class()}.json")
    check_result(path, ("artifacts",))
    return path


def describe_benchmark(arguments: BenchmarkArguments, threads: int, task: Task, measured: dict[str, dict]) -> dict:
    """The result without the peaks; ``measured`` is that of `interleave`."""
    result = describe_run(threads) | {
        "dataset": task.name,
        "dataset_source": task.source,
        "rounds": arguments.rounds,
        # The pages read these two fields by these names, also from results that were measured before.
        "texts_a_round": arguments.texts,
        "batches_a_round": arguments.batches,
        "texts_end_to_end_a_round": arguments.strings,
        # By name: which of them is the fastest FP32 depends on the machine.
        "compared_with": fastest_fp32(measured),
        "noise_limit": NOISE_LIMIT,
        "too_noisy": list_noisy(measured),
        "artifacts": measured,
    }
    if any(name.endswith(f":{CTRANSLATE2}") for name in measured):  # not among the packages of every record
        result["environment"]["packages"][CTRANSLATE2] = importlib.metadata.version(CTRANSLATE2)
    return result


def make_protocol(arguments: BenchmarkArguments, threads: int) -> Protocol:
    """How long the flags let a run measure."""
    return Protocol(
        threads=threads,
        rounds=arguments.rounds,
        texts_per_round=arguments.texts,
        batches_per_round=arguments.batches,
        strings_per_round=arguments.strings,
        cold_starts=arguments.cold_starts,
    )


def print_speeds(measured: dict[str, dict]) -> None:
    """One line per artifact: latency and throughput, and how many times faster than the reference each is."""
    for name, one in measured.items():  # in the order in which they were named
        faster, faster_in_batches = one["times_faster_at_batch_1"], one["times_faster_at_batch_32"]
        print(
            f"{name:34} p50 {one['latency_ms']['p50']:7.2f} ms ({faster['median']:.2f} x)"
            f"   {one['throughput_per_s']['median']:7.0f} texts/s ({faster_in_batches['median']:.2f} x)",
            f"  from strings {one['end_to_end_per_s']['median']:7.0f} texts/s" if one["end_to_end_per_s"] else "",
            f"  macro F1 {one['quality']['macro_f1']:.4f}" if one.get("quality") else "",
        )
    if noisy := list_noisy(measured):
        limit = f"{100 * NOISE_LIMIT:.0f} % of the median"
        print(f"too noisy to tell, the middle half of the rounds spans more than {limit}: {', '.join(noisy)}")


if __name__ == "__main__":
    run(main)
