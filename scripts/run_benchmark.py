"""Times several models interleaved in one run (A B A B): speeds are divided only within such a run.

Each model runs in a process of its own, and all classify the same texts in turn. Besides the formats of a folder, it
times peers, which other libraries make of the same weights: `pytorch-compiled`, `bf16-compiled` and
`torchao-compiled` (torch.compile), `pytorch-dynamic` (PyTorch's `quantize_dynamic`), `onnx-plain` and `onnx-dynamic`
(ONNX Runtime's export and its dynamic INT8, with defaults), `openvino-plain` and `ctranslate2` (its INT8 of BERT,
DistilBERT and RoBERTa; `make benchmark` installs it). Peers have no record and are scored here. All are compared with
the fastest model that computes in FP32. What the processor does not support and what fails is left out with a message.

    python scripts/run_benchmark.py weights/baseline:pytorch weights/baseline:pytorch-compiled weights/ptq:onnx
    python scripts/run_benchmark.py weights/baseline:onnx weights/ptq:onnx --output results/benchmark  # e.g. avx2.json
"""

import importlib.metadata
import tempfile
from dataclasses import dataclass
from pathlib import Path

from emotion.data.dataset import DatasetArguments, Task, get_split, load_task_of
from emotion.evaluation import benchmark
from emotion.evaluation.peers import CTRANSLATE2, is_peer
from emotion.evaluation.roofline import add_roofline, count_work
from emotion.export.peers import make_peers
from emotion.utils.arguments import flag, parse_args
from emotion.utils.base_model import read_recipe_of
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import check_result, write_json
from emotion.utils.machine import PROCESSORS, choose_threads, describe_run, find_processor_class


@dataclass
class BenchmarkArguments(benchmark.Protocol):
    """Which models are timed, and how often."""

    artifacts: list[str] = flag(help="Models, as folder:format.", kw_only=True)
    roofline: bool = flag(True, "Measure the machine's peaks, and each model's share.")
    dataset_name: str | None = flag(None, "Dataset; the first model's by default.")
    output: str | None = flag(None, "JSON file, or a folder, in which the kind of processor names the file.")


def main(argv=None) -> None:
    """Times the models and writes the result."""
    (arguments,) = parse_args((BenchmarkArguments,), positional="artifacts", argv=argv)
    output = choose_file(arguments.output) if arguments.output else None  # an error now, not after the timing
    named = [benchmark.split_name(name) for name in arguments.artifacts]
    first_folder = named[0][0]  # for the dataset, and the architecture that the roofline counts
    task = load_task_of(read_recipe_of(first_folder), DatasetArguments(arguments.dataset_name))
    print(f"texts: {task.name} ({task.source}), test")
    rows, arguments.threads = get_split(task, "test"), choose_threads(arguments.threads)
    texts, labels = list(rows["text"]), [task.labels[label] for label in rows["label"]]
    # Peers are made before anything is timed, so that an error costs no measurement.
    with tempfile.TemporaryDirectory() as work:
        opened = make_peers(named, Path(work))
        artifacts = {benchmark.name_of(folder, format): made for (folder, format), made in opened.items()}
        peers = {benchmark.name_of(folder, format) for folder, format in opened if is_peer(format)}
        timed = benchmark.interleave(artifacts, texts, arguments, peers, labels)
    result = describe_benchmark(arguments, task, timed)
    if output:
        write_json(output, result)  # before the peaks: who stops it then keeps the times
    print_speeds(timed)
    # After the timing: finding the peaks heats the processor and takes its memory.
    if arguments.roofline:
        add_roofline(result, count_work(first_folder, texts), arguments.threads)
        if output:
            write_json(output, result)


def choose_file(output: str) -> Path:
    """Returns the file of the result: the named one, or in a folder the one of this kind of processor.

    Raises:
        UserError: if the file would be named after another kind of processor, or some instructions of this one are
            hidden; or if the path is taken by something else.
    """
    path = Path(output)
    if path.is_dir() or (path.suffix != ".json" and not path.exists()):
        path = path / f"{find_processor_class()}.json"
    elif path.stem in PROCESSORS and path.stem != find_processor_class():
        raise UserError(f"{path} is for {PROCESSORS[path.stem]}; this processor's is {find_processor_class()}.json")
    check_result(path, ("artifacts",))
    return path


def describe_benchmark(arguments: BenchmarkArguments, task: Task, timed: dict[str, dict]) -> dict:
    """Returns the result without the peaks; ``timed`` is the result of `interleave`."""
    result = describe_run(arguments.threads) | {
        "dataset": task.name,
        "dataset_source": task.source,
        "rounds": arguments.rounds,
        "texts_a_round": arguments.texts,
        "batches_a_round": arguments.batches,
        "texts_end_to_end_a_round": arguments.texts_end_to_end,
        "compared_with": benchmark.fastest_fp32(timed),
        "noise_limit": benchmark.NOISE_LIMIT,
        "too_noisy": benchmark.list_noisy(timed),
        "artifacts": timed,
    }
    if any(name.endswith(f":{CTRANSLATE2}") for name in timed):  # not among the packages of every record
        result["environment"]["packages"][CTRANSLATE2] = importlib.metadata.version(CTRANSLATE2)
    return result


def print_speeds(timed: dict[str, dict]) -> None:
    """Prints a line per model: latency and throughput, and how many times faster than the reference it is."""
    for name, result in timed.items():
        faster, faster_in_batches = result["times_faster_at_batch_1"], result["times_faster_at_batch_32"]
        print(
            f"{name:34} p50 {result['latency_ms']['p50']:7.2f} ms ({faster['median']:.2f} x)"
            f"   {result['throughput_per_s']['median']:7.0f} texts/s ({faster_in_batches['median']:.2f} x)",
            f"  end to end {result['end_to_end_per_s']['median']:7.0f} texts/s" if result["end_to_end_per_s"] else "",
            f"  macro F1 {result['quality']['macro_f1']:.4f}" if result.get("quality") else "",
        )
    if noisy := benchmark.list_noisy(timed):
        print(f"too noisy, by more than {100 * benchmark.NOISE_LIMIT:.0f} % of the median: {', '.join(noisy)}")


if __name__ == "__main__":
    run(main)
