"""The JSON files in `results/` as pydantic models, so that a damaged file is named before a page shows it.

The models list the fields that the code reads or checks; a file holds more, which pages show as they are. `None` means
that a value was not measured. Types are strict: `true` is not a number.
"""

import json
import statistics
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from annotated_types import Predicate
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from emotion.inference.model_folder import WEIGHT_FILES
from emotion.utils.errors import FILE_NAME, UserError, visible
from emotion.utils.files import read_json
from emotion.utils.machine import ARM, class_of

LARGEST = 1e15  # no measurement is larger, and float64 still tells its integers apart
ROUNDING = 1e-6  # of a score: no page shows as many digits, and processors differ in fewer
SUMMARIZED = ("macro_f1", "accuracy", "change", "flips")  # over seeds, on test


def is_one_line(text: str) -> bool:
    """Whether a text has one line, all of which can be seen: a second one would end a row of a table."""
    return bool(text.strip()) and visible(text) == text


def is_inside_folder(name: str) -> bool:
    """Whether a file name stays inside the model folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


Text = Annotated[str, Predicate(is_one_line)]
FileName = Annotated[str, Field(pattern=f"^{FILE_NAME}$")]
Count = Annotated[int, Field(ge=0, lt=LARGEST)]
Whole = Annotated[int, Field(ge=1, lt=LARGEST)]
Number = Annotated[float, Field(gt=-LARGEST, lt=LARGEST)]
Amount = Annotated[float, Field(ge=0, lt=LARGEST)]
Positive = Annotated[float, Field(gt=0, lt=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """A results file, or a mapping inside one."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow", protected_namespaces=())

    @model_validator(mode="after")
    def _check_contradictions(self):
        for contradiction in self.contradictions():
            raise ValueError(contradiction)
        return self

    def contradictions(self):
        """Yields a message for each contradiction between fields."""
        return ()

    @classmethod
    def check(cls, value: dict, name):
        """Validates a whole file; raises `UserError` that begins with ``name`` and names the first wrong field."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
            # As JSON: a key in a damaged file may hold line breaks.
            field = json.dumps(".".join(map(str, fault["loc"])))[1:-1]
            where = f"'{field}': " if field else ""  # a contradiction names its fields itself
            raise UserError(f"{name}: {where}{fault['msg'].removeprefix('Value error, ')}; measure it again") from None

    @classmethod
    def read(cls, path: Path):
        """Reads a results file; raises `UserError` that names file and field if it is missing or damaged."""
        return cls.check(read_json(path), path)


class Environment(Part):
    """The machine and the packages of a measurement."""

    cpu: Text
    threads: Whole
    instruction_sets: list[Text]
    packages: dict[Text, Text]

    @property
    def processor(self) -> str:
        """The class of the processor, see utils/machine.py."""
        return class_of(self.instruction_sets) or ARM


class Measurement(Part):
    """Date, commit and machine of a measurement; the studies add fields that only their pages read."""

    date: Text
    git_commit: Text | None
    environment: Environment


class Spread(Part):
    """Median, minimum and maximum over the rounds of an interleaved run."""

    median: Positive
    min: Positive
    max: Positive

    def contradictions(self):
        if not self.min <= self.median <= self.max:
            yield "'median' is not between 'min' and 'max'"


# Records


class Form(Part):
    """A form of a model that QAT trained, on validation: its score, and the gap of its logits to the training's."""

    validation_macro_f1: Share
    mean_logit_gap: Amount


class Provenance(Part):
    """How the model was made, and the data that it was scored on."""

    base_model: Text | None
    base_model_source: Text | None = None
    dataset: Text
    dataset_source: Literal["hub", "folder", "sample"]
    dataset_fingerprint: Text
    train_dataset_source: Text | None
    train_rows: Whole | None = None
    recipe: dict[Text, Any] | None
    training: dict[Text, Any] | None = None
    merged: dict[Text, Share] | None = None
    forms: dict[Text, Form] | None = None  # of QAT: the fake-quantized model, its integers and its files
    fallbacks: dict[Text, list[dict[Text, Any]]] | None = None  # format -> what accuracy-aware quantization tried
    outlier_channels: dict[Text, Any] | None = None
    seed: int | None
    git_commit: Text | None

    @property
    def training_recipe(self) -> dict:
        """The recipe of the training: a quantized model keeps that of its baseline inside its own."""
        recipe = self.recipe or {}
        return recipe.get("baseline", recipe)

    def contradictions(self):
        if not isinstance(self.training_recipe, dict):
            yield "'recipe.baseline' is not a mapping"


class ConflictFree(Part):
    """Scores on consistently labelled samples: those whose text has no other label anywhere in the dataset."""

    examples: Count
    macro_f1: Share
    accuracy: Share


class Quality(Part):
    """Scores on a split."""

    split: Text
    examples: Whole
    texts_cut: Count
    labels: list[Text]
    macro_f1: Share
    accuracy: Share
    # Of a model that gives a text several labels: those whose score reaches it; accuracy counts the texts all right
    threshold: Share | None = None
    micro_f1: Share | None = None
    per_class_f1: dict[Text, Share]
    confusion_matrix: Any  # compared with the predictions, cell by cell: many classes have millions
    macro_f1_ci95: Annotated[list[Share], Field(min_length=2, max_length=2)]
    expected_calibration_error: Share
    conflict_free: ConflictFree

    def contradictions(self):
        if self.conflict_free.examples > self.examples:
            yield "'conflict_free' counts more rows than there are"
        if list(self.per_class_f1) != self.labels:
            yield "'per_class_f1' is not of 'labels'"


class Size(Part):
    """The files that inference needs, in bytes, and their total in megabytes (10^6 bytes)."""

    files: Annotated[dict[Text, Whole], Field(min_length=1)]
    bytes_to_serve: Whole
    megabytes: Amount

    def contradictions(self):
        if self.bytes_to_serve != sum(self.files.values()):
            yield "'bytes_to_serve' is not the total of 'files'"
        if abs(self.megabytes - self.bytes_to_serve / 1e6) > 0.006:  # two digits are kept
            yield "'megabytes' is not 'bytes_to_serve'"


class Scheme(Part):
    """Which layers are quantized and how, counted in the saved files."""

    weights: Text
    activations: Text
    embeddings: Text
    linear_layers: Count
    quantized_layers: Count
    kept_in_float: dict[Text, Text | None]


class Latency(Part):
    """Milliseconds at batch 1; null if nothing was timed."""

    runs: Count
    p50: Positive | None
    p95: Positive | None

    def contradictions(self):
        if any((time is None) == bool(self.runs) for time in (self.p50, self.p95)):
            yield "times are null where 'runs' is 0, and nowhere else"
        elif self.runs and self.p50 > self.p95:
            yield "'p50' exceeds 'p95'"


class Throughput(Part):
    """Texts per second in batches; null if nothing was timed."""

    batch_size: Whole
    value: Positive | None


class Encoder(Part):
    """The size of the encoder, without the classification head."""

    layers: Whole
    width: Whole
    parameters: Whole


class Example(Part):
    """A text, the class that it was written for, and the probability of each class."""

    text: Text
    meant: Text | None = None
    scores: Annotated[dict[Text, Share], Field(min_length=1)]


class Record(Part):
    """The measurement of a model in one format."""

    variant: FileName
    format: Literal[tuple(WEIGHT_FILES)]
    artifact: Text
    date: Text
    scheme: Scheme
    provenance: Provenance
    quality: Quality
    size: Size
    latency_ms: Latency
    throughput_per_s: Throughput
    encoder: Encoder | None = None
    examples: list[Example] = []
    sha256: dict[Annotated[Text, Predicate(is_inside_folder)], Text] = {}
    environment: Environment

    @property
    def name(self) -> str:
        """The stem of the record's files: 'ptq-onnx'."""
        return f"{self.variant}-{self.format}"

    @property
    def earlier(self) -> bool:
        """Whether it measures an earlier file, whose activations had dynamic ranges without anyone asking for them."""
        return "int8 dynamic" in self.scheme.activations and not self.variant.endswith("-dynamic")

    @property
    def timed_as(self) -> str:
        """The name of the model in the results of run_benchmark.py."""
        return f"{self.artifact}:{self.format}"

    @property
    def fallbacks(self) -> list[dict]:
        """What accuracy-aware quantization tried for this format, the first without a fallback."""
        return (self.provenance.fallbacks or {}).get(self.format, [])

    def contradictions(self):
        for example in self.examples:
            of_one_label = self.quality.threshold is None and abs(sum(example.scores.values()) - 1) > 1e-4
            if list(example.scores) != self.quality.labels or of_one_label:
                yield "the scores in 'examples' are not probabilities of 'quality.labels'"


# Means over seeds


class Scores(Part):
    """The scores of one seed on test; the baseline has nothing to be compared with."""

    macro_f1: Share
    accuracy: Share
    conflict_free_macro_f1: Share
    change: Number | None = None
    flips: Count | None = None


class SeedRun(Part):
    """The scores of one seed, by format."""

    seed: int
    formats: dict[Text, Scores]


class Mean(Part):
    """Mean and sample standard deviation over seeds; the deviation of a single seed is null."""

    mean: Number
    standard_deviation: Amount | None

    @classmethod
    def of(cls, values: list[float]) -> "Mean":
        """Summarizes the values of all seeds."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(mean=statistics.fmean(values), standard_deviation=deviation)

    def is_close(self, other: "Mean") -> bool:
        """Whether both are the same but for rounding."""
        pairs = (self.mean, other.mean), (self.standard_deviation, other.standard_deviation)
        return all(a == b if None in (a, b) else abs(a - b) <= ROUNDING for a, b in pairs)


class Means(Part):
    """The means of scores over the seeds."""

    macro_f1: Mean
    accuracy: Mean
    change: Mean | None = None
    flips: Mean | None = None

    def differences(self, runs: list[Scores]):
        """Yields a message for each mean that is not that of the runs."""
        for field in SUMMARIZED:
            if summary := getattr(self, field):
                values = [getattr(run, field) for run in runs]
                if not values or None in values:
                    yield f"no '{field}' in the runs"
                elif not summary.is_close(Mean.of(values)):
                    yield f"'{field}' is not the mean of the runs, or not with that deviation"


class Seeds(Part):
    """The scores of a variant over several seeds, not all of which need have every format."""

    variant: FileName
    chosen_seed: int
    formats: Annotated[dict[Text, Means], Field(min_length=1)]
    runs: Annotated[list[SeedRun], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _name_the_format(cls, value):
        # The baseline is scored in one format, so that its file does not name it.
        runs = value.get("runs")
        if "formats" in value or not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
            return value
        runs = [{**run, "formats": {"pytorch": run}} for run in runs]
        return {**value, "formats": {"pytorch": value}, "runs": runs}

    def runs_of(self, format: str) -> list[tuple[int, Scores]]:
        """The seeds that have a format, and their scores in it."""
        return [(run.seed, run.formats[format]) for run in self.runs if format in run.formats]

    def contradictions(self):
        seeds = [run.seed for run in self.runs]
        if self.chosen_seed not in seeds or len(set(seeds)) != len(seeds):
            yield "'chosen_seed' or 'runs' has a wrong seed"
        for format, means in self.formats.items():
            yield from means.differences([scores for _, scores in self.runs_of(format)])


# Interleaved runs


class RunLatency(Part):
    """Milliseconds at batch 1, over all rounds."""

    p50: Positive
    p95: Positive


class Timed(Part):
    """A model in an interleaved run; ratios are against the model that it is compared with."""

    bytes_to_serve: Whole
    precision: Literal["float32", "bfloat16", "int8"]
    latency_ms: RunLatency
    throughput_per_s: Spread
    times_faster_at_batch_1: Spread
    times_faster_at_batch_32: Spread
    end_to_end_per_s: Spread | None = None
    times_faster_end_to_end: Spread | None = None
    cold_start_ms: Spread | None = None
    equal_labels: Share
    quality: dict[Text, Any] | None = None  # of a peer, which has no record
    roofline: dict[Text, Any] | None = None


class Benchmark(Measurement):
    """An interleaved run."""

    rounds: Whole
    texts_end_to_end_a_round: Count | None = None
    too_noisy: list[Text] | None = None
    noise_limit: Share | None = None
    peaks: dict[Text, Positive | None] | None = None
    artifacts: dict[Text, Timed]
    compared_with: Text

    def contradictions(self):
        if self.compared_with not in self.artifacts:
            yield "'compared_with' is not one of the artifacts"


class TextBaseline(Part):
    """A classifier without a neural network."""

    quality: Quality
    bytes_to_serve: Whole
    latency_ms: RunLatency


class TextBaselines(Measurement):
    """The results of studies/text_baselines.py."""

    models: dict[Text, TextBaseline]
