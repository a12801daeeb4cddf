"""Classifies any number of texts: files in, shards of answers out, in flat memory, with all processors.

A job that was cut goes on with the same command: it makes the shards that are missing. docs/many_texts.md tells more.

    python scripts/run_batch.py texts.csv answers
    python scripts/run_batch.py 'logs/*.jsonl.gz' answers --text_column message --keep_columns id --top_k 3
    python scripts/run_batch.py dair-ai/emotion answers --split test --prefix predicted_
    python scripts/run_batch.py texts.parquet /shared/answers --engine ray
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from emotion.inference import batch_job as jobs
from emotion.inference.batch_job import Answers, Job, ShardMaker, plan_columns
from emotion.inference.batch_reader import find_files, survey
from emotion.inference.emotion_classifier import EmotionClassifier, find_model
from emotion.inference.released import RECOMMENDED
from emotion.utils.arguments import COUNT, parse_args
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT
from emotion.utils.machine import THREADS
from emotion.utils.progress import Bar


@dataclass
class BatchArguments:
    """What to classify, with which model, and what to write."""

    paths: list[str] = field(
        default_factory=list,
        metadata={
            "help": "INPUT ... OUTPUT: files (CSV, TSV, JSON lines, Parquet, plain lines; compressed or not), "
            "folders, patterns, or a dataset of the Hub; the last word is the folder of the shards."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column to classify; plain lines have one, text."})
    keep_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns of the input that the output keeps; all if not given."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    split: str = field(default="train", metadata={"help": "Split of a dataset of the Hub."})
    model: str = field(
        default=str(ROOT / "weights" / RECOMMENDED), metadata={"help": "Model folder, or user/name on the Hub."}
    )
    format: str | None = field(default=None, metadata={"help": "Format to open; ONNX if the folder has it."})
    top_k: int = field(
        default=1,
        metadata={"help": "Labels per row: columns label, label_2, ..., each with a score.", "choices": COUNT},
    )
    probabilities: bool = field(default=False, metadata={"help": "Adds a column for the probability of each label."})
    prefix: str = field(default="", metadata={"help": "Stands before the names of the new columns."})
    output_format: Literal["parquet", "csv", "jsonl"] = field(default="parquet", metadata={"help": "Of the shards."})
    shard_rows: int = field(
        default=20_000, metadata={"help": "Rows per shard; what a cut job can lose.", "choices": COUNT}
    )
    engine: Literal["plain", "ray"] = field(
        default="plain", metadata={"help": "This machine, or Ray: a cluster where one is, else this machine."}
    )
    threads: int | None = field(
        default=None, metadata={"help": "Threads of the plain engine; all if not given.", "choices": THREADS}
    )

    def __post_init__(self):
        if len(self.paths) < 2:
            raise ValueError("name the input and the output: python scripts/run_batch.py INPUT OUTPUT")


def main(argv=None) -> None:
    """Makes all shards that the output folder lacks, then its manifest.

    Raises:
        UserError: if a flag, the model or the input is wrong, or the folder holds something else.
    """
    (arguments,) = parse_args((BatchArguments,), positional="paths", argv=argv)
    *words, output = arguments.paths
    kind, names = find_files(words, arguments.dataset_config, arguments.split)
    refuse_overlap(words, names, Path(output))
    folder = find_model(arguments.model, arguments.format)
    classifier = EmotionClassifier.from_pretrained(folder, arguments.format, arguments.threads)
    with jobs.claim(Path(output)):
        source = survey(kind, names, arguments.text_column, arguments.keep_columns)
        answers = Answers(arguments.top_k, arguments.probabilities, arguments.prefix)
        columns = plan_columns(source, arguments.keep_columns, answers.schema(classifier.labels))
        job = Job(
            source=source,
            text_column=arguments.text_column,
            folder=folder.resolve(),
            format=classifier.format,
            answers=answers,
            schema=columns,
            output=Path(output).resolve(),
            output_format=arguments.output_format,
            shard_rows=arguments.shard_rows,
        )
        asked = jobs.describe(job)
        jobs.begin(job, asked)
        try:
            make_shards(job, classifier, arguments.engine)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on where it stopped") from None
        counts = jobs.finish(job, asked)
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    print(f"{output}: {told}")


def refuse_overlap(words: list[str], names: list[str], output: Path) -> None:
    """Raises `UserError` if the next call would take the shards for input."""
    for inside, around in [*((output, Path(word)) for word in words), *((Path(name), output) for name in names)]:
        if around.is_dir() and inside.resolve().is_relative_to(around.resolve()):
            raise UserError(f"{inside} lies in {around}: input and output must be apart; name another folder")


def make_shards(job: Job, classifier: EmotionClassifier, engine: str) -> None:
    """Makes the shards that are not there, and shows how far it is."""
    missing = [number for number in job.shards if job.find_made(number) is None]
    ready = job.source.rows - sum(job.rows_of(number) for number in missing)
    with Bar(total=job.source.rows, initial=ready, desc="texts", unit=" rows", unit_scale=True) as bar:
        if engine == "ray":
            try:  # here, since Ray is an extra that nothing else needs
                from emotion.inference.batch_ray import make_on_ray
            except ModuleNotFoundError as error:
                raise UserError("--engine ray needs Ray; pip install 'ray[data]' installs it") from error
            make_on_ray(job, missing, bar.update)
            return
        maker = ShardMaker(job, classifier)
        for number in missing:
            maker.make(number, bar.update)


if __name__ == "__main__":
    run(main)
