"""Scores one saved artifact by the ruler: quality on the test split, bytes, latency, throughput, environment.

Writes the record (`results/metrics`), the logits of every scored row (`results/predictions`) and the picture of the
confusion matrix (`results/confusion_matrices`). It opens the folder as any user would, in this fresh process.

    python scripts/run_evaluation.py weights/baseline                        # the folder's first format
    python scripts/run_evaluation.py weights/baseline --format onnx --threads 1
    python scripts/run_evaluation.py weights/ptq --trace "i didnt feel humiliated"    # -> docs/follow_one_text.md
"""

import datetime
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.command import run
from emotion.common.errors import UserError
from emotion.common.files import ROOT, relative, sha256
from emotion.common.flags import parse_flags
from emotion.common.machine import choose_threads, describe_environment
from emotion.common.recipe import read_recipe_of
from emotion.measure.inspection import describe_scheme
from emotion.measure.record import describe_origin, explain, record_name, write_record
from emotion.measure.ruler import measure_quality, measure_speed
from emotion.model.artifact import WEIGHT_FILES, adapter_bytes, files_to_serve, find_formats, weights_of
from emotion.model.classifier import open_artifact, predict
from emotion.report.plots import plot_confusion_matrix
from emotion.report.trace import measure_trace, write_trace
from emotion.task.dataset import get_split, load_task_of
from emotion.task.scores import softmax

import numpy as np

# Sentences of our own, one for each emotion of the default dataset: what model cards show
EXAMPLES = (
    "i miss my old home and the garden behind it",
    "i feel so happy that you came",
    "i feel so tender and caring towards my little sister tonight",
    "i am furious about this delay and nobody even says sorry",
    "i am scared of walking home in the dark",
    "i was amazed to find the whole street covered in snow this morning",
)


@dataclass
class EvaluationArguments:
    """What is scored, and on what."""

    artifact: str = field(metadata={"help": "The folder to score; the one word that needs no flag."})
    format: str | None = field(
        default=None,
        metadata={"help": f"One of {', '.join(WEIGHT_FILES)}; the first that the folder has if not given."},
    )
    dtype: str | None = field(
        default=None, metadata={"help": "float32 or bfloat16, for PyTorch; bfloat16 is the format bf16."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset to score on, Hub id or folder; the one it was trained on if not given."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    split: str = field(default="test", metadata={"help": "Split to score."})
    threads: int | None = field(default=None, metadata={"help": "Threads to compute with; all if not given."})
    latency_runs: int = field(
        default=500, metadata={"help": "Counted runs at batch 1, at least 200; 0 leaves out latency and throughput."}
    )
    trace: str | None = field(
        default=None,
        metadata={"help": "A text of the dataset to follow through the artifact, instead of scoring it."},
    )
    baseline: str = field(default="weights/baseline", metadata={"help": "The FP32 folder that --trace compares with."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    (arguments,) = parse_flags((EvaluationArguments,), positional="artifact", argv=argv)
    folder = Path(arguments.artifact)
    format = choose_format(folder, arguments.format, arguments.dtype)
    if arguments.latency_runs and arguments.latency_runs < 200:
        raise UserError(f"--latency_runs {arguments.latency_runs}: a latency needs at least 200 runs, or 0 for none")
    threads = choose_threads(arguments.threads)
    Path(arguments.results_dir).mkdir(parents=True, exist_ok=True)  # an error now, not after the measuring
    made_by = read_recipe_of(folder)
    task = load_task_of(made_by, arguments.dataset_name, arguments.dataset_config_name)
    if arguments.trace:
        trace = measure_trace(arguments.trace, folder, Path(arguments.baseline), task, threads)
        write_trace(trace, Path(arguments.results_dir))
        return
    rows = get_split(task, arguments.split)
    print(f"{folder} ({format}) on {task.name} ({task.source}), {arguments.split}: {len(rows)} texts")

    classifier = open_artifact(folder, format, threads=threads)
    if classifier.labels != task.labels:
        raise UserError(
            f"{folder} answers {len(classifier.labels)} labels ({', '.join(classifier.labels)}), "
            f"{task.name} has {len(task.labels)} ({', '.join(task.labels)})"
        )
    token_ids = classifier.encode(list(rows["text"]))
    if classifier.encode.texts_cut:
        print(f"{classifier.encode.texts_cut} texts are longer than the model takes and were cut")
    labels = np.asarray(rows["label"])
    logits = predict(classifier, token_ids)
    if not np.isfinite(logits).all():
        raise UserError(f"{folder}: the logits of row {np.argwhere(~np.isfinite(logits))[0][0]} are not finite")

    files = files_to_serve(folder, format)
    record = {
        "variant": made_by.get("variant", folder.resolve().name),
        "format": format,
        "artifact": relative(folder),
        "date": datetime.date.today().isoformat(),
        "scheme": explain(describe_scheme(classifier, weights_of(folder, format), format), made_by),
        "made": describe_origin(made_by, task, rows),
        "quality": measure_quality(logits, labels, task, rows, arguments.split)
        | {"texts_cut": classifier.encode.texts_cut},
        "size": {
            "bytes_to_serve": sum(files.values()),
            "megabytes": round(sum(files.values()) / 1e6, 2),
            "files": files,
            "adapter_bytes": adapter_bytes(folder),
        },
        **measure_speed(classifier, token_ids, arguments.latency_runs),
        "examples": answer_examples(classifier),
        "sha256": {name: sha256(folder / name) for name in files},  # which files were measured
        "environment": describe_environment(threads),
    }
    path = write_record(record, Path(arguments.results_dir), logits, labels)
    plot_confusion_matrix(record, Path(arguments.results_dir) / "confusion_matrices" / record_name(record))
    quality, latency = record["quality"], record["latency_ms"]
    print(f"macro F1 {quality['macro_f1']:.4f}   accuracy {quality['accuracy']:.4f}", end="   ")
    if latency["p50"] is not None:
        print(f"{record['size']['megabytes']:.1f} MB   p50 {latency['p50']:.2f} ms", end="   ")
    print(f"-> {relative(path)}")


def choose_format(folder: Path, format: str | None, dtype: str | None) -> str:
    """The format named, or that of the dtype, or the first that the folder has."""
    if dtype not in {None, "float32", "bfloat16"}:
        raise UserError(f"--dtype {dtype}: it takes float32 or bfloat16")
    if dtype == "bfloat16":
        if format not in {None, "pytorch", "bf16"}:
            raise UserError(f"--dtype bfloat16 goes with --format pytorch, not {format}")
        format = "bf16"
    elif dtype == "float32" and format == "bf16":
        raise UserError("--dtype float32 does not go with --format bf16")
    format = format or next(iter(find_formats(folder)))
    weights_of(folder, format)  # says what is wrong with the folder before the dataset is loaded
    return format


def answer_examples(classifier) -> list[dict]:
    """The probabilities that the artifact gives our own sentences."""
    probabilities = softmax(predict(classifier, classifier.encode(list(EXAMPLES)))).tolist()
    return [
        {"text": text, "scores": dict(zip(classifier.labels, scores, strict=True))}
        for text, scores in zip(EXAMPLES, probabilities, strict=True)
    ]


if __name__ == "__main__":
    run(main)
