"""Scores one saved model by the evaluation protocol: quality on the test split, size, latency and throughput.

It opens the folder as any user would, in a fresh process, and writes the record (`results/metrics`) and the logits of
every row (`results/predictions`). tools/render_report.py renders pages and pictures from the records.

    python scripts/run_evaluation.py weights/baseline                        # the folder's first format
    python scripts/run_evaluation.py weights/baseline --format onnx --threads 1
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emotion.data.dataset import DatasetArguments, get_split, load_task_of, with_validation
from emotion.data.labels import label_array
from emotion.evaluation.inspection import describe_encoder, describe_scheme
from emotion.evaluation.protocol import measure_quality, measure_speed
from emotion.evaluation.record import MPNET_BASE, add_reasons, describe_provenance, write_record
from emotion.inference import model_folder
from emotion.inference.emotion_classifier import EmotionClassifier
from emotion.utils.arguments import COUNT, SHARE, Range, flag, parse_args
from emotion.utils.base_model import RANDOM, read_recipe_of
from emotion.utils.command import Bar, run
from emotion.utils.errors import UserError, check_name
from emotion.utils.files import ROOT, check_result, relative, sha256
from emotion.utils.machine import THREADS, choose_threads, describe_environment, has_bf16

# Sentences of our own, three per emotion of the default dataset; a card shows those with the clearest answers.
EXAMPLES = (
    ("sadness", "i miss my old home and the garden behind it"),
    ("sadness", "i feel so lonely since my best friend moved away"),
    ("sadness", "i feel miserable and cannot stop crying"),
    ("joy", "i feel so happy that you came"),
    ("joy", "i feel cheerful and proud of the house we built together"),
    ("joy", "i feel glad and thankful for this sunny day in the mountains"),
    ("love", "i feel so tender and caring towards my little sister tonight"),
    ("love", "i feel a deep affection for my gentle old dog"),
    ("love", "i feel loving and sympathetic towards the people in my street"),
    ("anger", "i am furious about this delay and nobody even says sorry"),
    ("anger", "i feel so angry and annoyed with the noise above us"),
    ("anger", "i feel irritated when people push into the queue"),
    ("fear", "i am scared of walking home in the dark"),
    ("fear", "i feel terrified of the operation on monday"),
    ("fear", "i feel nervous and anxious about my first day at the new school"),
    ("surprise", "i was amazed to find the whole street covered in snow this morning"),
    ("surprise", "i feel so surprised that all of my neighbours came"),
    ("surprise", "i feel shocked and impressed by the size of this whale"),
)


@dataclass
class EvaluationArguments(DatasetArguments):
    """Which model is scored, and on which rows."""

    artifact: str = flag(help="The model folder.", kw_only=True)
    format: str | None = flag(None, f"One of {', '.join(model_folder.WEIGHT_FILES)}; the folder's first by default.")
    split: str = flag("test", "Split.")
    threshold: float = flag(0.5, "Models with several labels a text: the least score of one.", SHARE)
    max_eval_samples: int | None = flag(None, "Score the first rows.", COUNT)
    threads: int | None = flag(None, "Threads; all by default.", THREADS)
    # Of 200 runs two lie above the 99th percentile; of fewer it would be a single outlier.
    latency_runs: int = flag(500, "Counted runs at batch 1, at least 200; 0 measures no speed.", Range(0))
    skip_checksum: bool = flag(False, "Open files that differ from SHA256SUMS.")
    results_dir: str = flag(str(ROOT / "results"), "Where the results are written.")


def main(argv=None) -> None:
    """Opens the folder, scores and times the model, and writes the record."""
    (args,) = parse_args((EvaluationArguments,), positional="artifact", argv=argv)
    folder, results = Path(args.artifact), Path(args.results_dir)
    format = args.format or next(iter(model_folder.find_formats(folder)))
    weights = model_folder.weights_of(folder, format, not args.skip_checksum)
    recipe, threads = read_recipe_of(folder), choose_threads(args.threads)
    variant = recipe.get("variant", folder.resolve().name)
    check_name(variant, folder)
    check_arguments(args, recipe, results / "metrics" / f"{variant}-{format}.json")
    if format == "bf16" and not has_bf16(use_cpu=True):
        print(f"left out: {folder} ({format}); this processor has no bfloat16 products, and emulates them slowly")
        return
    classifier = EmotionClassifier.from_pretrained(folder, format, threads, not args.skip_checksum)
    several = classifier.multi_label
    task = load_task_of(recipe, args, classifier.labels, multi_label=several)
    task = with_validation(task) if args.split == "validation" else task
    rows = get_split(task, args.split)
    rows = rows.select(range(min(args.max_eval_samples or len(rows), len(rows))))
    print(f"{variant}: {folder} ({format}) on {task.name} ({task.source}), {args.split}: {len(rows)} texts")
    logits = predict(classifier, rows)
    labels = label_array(rows, len(task.labels), several)
    quality = measure_quality(logits, labels, task, rows, args.split, args.threshold if several else None)
    record = {
        "variant": variant,
        "format": format,
        "artifact": relative(folder),
        "date": datetime.date.today().isoformat(),
        "scheme": add_reasons(describe_scheme(classifier.runtime, weights, format), recipe),
        "encoder": describe_encoder(folder),
        "provenance": describe_provenance(recipe, task, rows),
        "quality": quality | {"texts_cut": classifier.texts_cut},
        "size": describe_size(folder, format),
        **measure_speed(classifier.runtime, classifier.runtime.encode(list(rows["text"])), args.latency_runs),
        "examples": classify_examples(classifier),
        # Of each file that was measured; run_publish.py uploads no other
        "sha256": {name: sha256(folder / name) for name in model_folder.files_to_serve(folder, format)},
        "environment": describe_environment(threads),
    }
    print_summary(record, write_record(record, results, logits, labels))


def check_arguments(args: EvaluationArguments, recipe: dict, path: Path) -> None:
    """Raises `UserError` if the flags do not fit together, or the record ``path`` cannot be written or published."""
    if args.latency_runs and args.latency_runs < 200:
        raise UserError(f"--latency_runs {args.latency_runs}: a latency needs at least 200 runs, or 0 for none")
    results = Path(args.results_dir)
    results.mkdir(parents=True, exist_ok=True)
    check_result(path, ("variant",))
    random = recipe.get("provenance", {}).get("base_model_source") == RANDOM
    published = results.resolve() in (ROOT / "results", ROOT / "results" / MPNET_BASE)
    if published and (random or args.max_eval_samples):
        why = "a model with random weights" if random else f"--max_eval_samples {args.max_eval_samples}"
        raise UserError(f"a record of {why} does not belong into results/; name another folder with --results_dir")


def predict(classifier: EmotionClassifier, rows) -> np.ndarray:
    """Computes the logits of each row, float32 (rows, classes)."""
    with Bar(total=len(rows), desc="scored") as bar:
        logits = classifier.logits(rows["text"], bar.update)
    if classifier.texts_cut:
        print(f"{classifier.texts_cut} texts are longer than the model takes and were truncated")
    return logits


def describe_size(folder: Path, format: str) -> dict:
    """The bytes of all files that inference in this format needs."""
    files = model_folder.files_to_serve(folder, format)
    return {
        "bytes_to_serve": sum(files.values()),
        "megabytes": round(sum(files.values()) / 1e6, 2),  # millions of bytes, not MiB
        "files": files,
        "adapter_bytes": model_folder.adapter_bytes(folder),  # of QLoRA, not part of the sum
    }


def classify_examples(classifier: EmotionClassifier) -> list[dict]:
    """The probabilities of our own sentences; the dataset's are not ours to publish."""
    answers = []
    for emotion, text in EXAMPLES:
        # One at a time, as the card's readers do: in a batch, dynamic INT8 has one range for all its texts.
        (probabilities,) = classifier.probabilities(classifier.logits([text])).tolist()
        scores = dict(zip(classifier.labels, probabilities, strict=True))
        answers.append({"text": text, "meant": emotion, "scores": scores})
    return answers


def print_summary(record: dict, path: Path) -> None:
    """Prints the scores, size and latency if it was timed, and the record's file."""
    quality, latency = record["quality"], record["latency_ms"]
    if quality.get("threshold") is not None:
        print(f"several labels, score {quality['threshold']:g} or more: micro F1 {quality['micro_f1']:.4f}", end="   ")
    print(f"macro F1 {quality['macro_f1']:.4f}   accuracy {quality['accuracy']:.4f}", end="   ")
    if latency["p50"] is not None:  # --latency_runs 0
        print(f"{record['size']['megabytes']:.1f} MB   p50 {latency['p50']:.2f} ms", end="   ")
    print(f"-> {relative(path)}")


if __name__ == "__main__":
    run(main)
