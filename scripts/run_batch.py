"""Classifies files of any size in flat memory, and writes shards with the rows and their answers.

The same command resumes a job that was interrupted. See docs/many_texts.md.

    python scripts/run_batch.py texts.csv answers
    python scripts/run_batch.py 'logs/*.jsonl.gz' answers --text_column message --keep_columns id --top_k 3
    python scripts/run_batch.py dair-ai/emotion answers --split test --prefix predicted_
    python scripts/run_batch.py texts.parquet /shared/answers --engine ray
"""

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from emotion.utils.arguments import COUNT, SHARE, flag, parse_args
from emotion.utils.command import Bar, run
from emotion.utils.errors import UserError
from emotion.utils.files import recommended_model
from emotion.utils.machine import THREADS

INPUT = "files (CSV, TSV, JSON lines, Parquet, plain lines; compressed or not), folders, patterns, or a Hub dataset"


@dataclass
class BatchArguments:
    """What to classify, with which model, and what to write."""

    paths: list[str] = flag([], f"INPUT ... OUTPUT: {INPUT}; then the folder of the shards.")
    text_column: str = flag("text", "Column to classify; plain lines have one, text.")
    keep_columns: list[str] | None = flag(None, "Columns to keep; all if not given.")
    dataset_config: str | None = flag(None, "Configuration of a dataset of the Hub.")
    split: str = flag("train", "Split of a dataset of the Hub.")
    model: str = flag(str(recommended_model()), "Model folder, or user/name on the Hub.")
    model_revision: str | None = flag(None, "Branch, tag or commit of the model on the Hub.")
    format: str | None = flag(None, "Format to open; ONNX if the folder has it.")
    top_k: int = flag(1, "Labels per row, each with a score.", COUNT)
    threshold: float = flag(0.5, "Models with several labels a text: the least score of those in `labels`.", SHARE)
    long_texts: Literal["truncate", "mean"] = flag(
        "truncate", "Texts longer than the model takes: truncate, or the mean of the scores of their parts."
    )
    probabilities: bool = flag(False, "Adds a column for the probability of each label.")
    prefix: str = flag("", "Begins the names of the new columns.")
    output_format: Literal["parquet", "csv", "jsonl"] = flag("parquet", "Of the shards.")
    shard_rows: int = flag(20_000, "Rows per shard: what an interrupted job can lose.", COUNT)
    engine: Literal["plain", "ray"] = flag(
        "plain", "This machine, or Ray: a cluster if there is one, else this machine."
    )
    threads: int | None = flag(None, "Threads of the plain engine; all if not given.", THREADS)

    def __post_init__(self):
        if len(self.paths) < 2:
            raise ValueError("name the input and the output: python scripts/run_batch.py INPUT OUTPUT")


def main(argv=None) -> None:
    """Writes all shards that the output folder lacks, then completes its manifest."""
    (args,) = parse_args((BatchArguments,), positional="paths", argv=argv)

    # Imported here, so that --help and a wrong flag need neither PyArrow nor NumPy.
    from emotion.inference.batch_job import Answers, Job, begin_job, finish_job, lock_job, plan_columns
    from emotion.inference.batch_reader import find_files, survey
    from emotion.inference.emotion_classifier import EmotionClassifier, find_model

    *inputs, output = args.paths
    kind, names = find_files(inputs, args.dataset_config, args.split)
    check_apart(inputs, names, Path(output), args.output_format)
    folder = find_model(args.model, args.format, revision=args.model_revision)
    classifier = EmotionClassifier.from_pretrained(folder, args.format, args.threads, long_texts=args.long_texts)
    with lock_job(Path(output)):
        source = survey(kind, names, args.text_column, args.keep_columns)
        threshold = args.threshold if classifier.multi_label else None
        answers = Answers(args.top_k, args.probabilities, args.prefix, threshold, args.long_texts)
        job = Job(
            source=source,
            text_column=args.text_column,
            folder=folder.resolve(),
            format=classifier.format,
            answers=answers,
            schema=plan_columns(source, args.keep_columns, answers.schema(classifier.labels)),
            output=Path(output).resolve(),
            output_format=args.output_format,
            shard_rows=args.shard_rows,
        )
        manifest = begin_job(job)
        try:
            write_shards(job, classifier, args.engine)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command resumes the job") from None
        counts = finish_job(job, manifest)
    summary = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    print(f"{output}: {summary}")


def check_apart(inputs: list[str], names: list[str], output: Path, format: str) -> None:
    """Raises `UserError` if the next call would read the shards as input."""
    from emotion.inference.batch_job import MANIFEST

    pairs = [(output, Path(name)) for name in inputs] + [(Path(name), output) for name in names]
    for inner, outer in pairs:
        if outer.is_dir() and inner.resolve().is_relative_to(outer.resolve()):
            raise UserError(f"{inner} lies in {outer}: input and output must be apart; name another folder")
    for pattern in inputs:
        full = Path(pattern).absolute()
        for file in (output.absolute() / MANIFEST, output.absolute() / f"part-00000.{format}"):
            same_depth = "**" in full.parts or len(full.parts) == len(file.parts)
            # `**` stands for any number of folders, and `fnmatch` takes `*` for them too.
            if same_depth and fnmatch(str(file), str(full).replace(f"**{os.sep}", "*")):
                raise UserError(f"{pattern} finds {file}, which this command writes; name another folder")


def write_shards(job, classifier, engine: str) -> None:
    """Writes the shards that are missing of a `Job`, with a progress bar."""
    from emotion.inference.batch_job import ShardWriter

    missing = [number for number in job.shards if job.find_done(number) is None]
    done = job.source.rows - sum(job.rows_of(number) for number in missing)
    with Bar(total=job.source.rows, initial=done, desc="texts", unit=" rows", unit_scale=True) as bar:
        if engine == "ray":
            try:  # here, since Ray is an extra that nothing else needs
                from emotion.inference.batch_ray import write_on_ray
            except ModuleNotFoundError as error:
                raise UserError("--engine ray needs Ray; pip install 'ray[data]' installs it") from error
            write_on_ray(job, missing, bar.update)
            return
        writer = ShardWriter(job, classifier)
        for number in missing:
            writer.write(number, bar.update)


if __name__ == "__main__":
    run(main)
