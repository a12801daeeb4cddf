"""What each kind of file among the results holds, as pydantic models: a damaged file is named before a page shows it.

Only fields that a table, picture or card shows are listed; a file may hold more, and null says that a value was not
measured. Types are strict: true is no number, and neither NaN nor infinity is a measurement.
"""

import json
import statistics
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Predicate
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from emotion.inference.model_folder import WEIGHT_FILES
from emotion.utils.errors import FILE_NAME, UserError
from emotion.utils.files import read_json
from emotion.utils.processor import ARM, class_of

LARGEST = 1e15  # no measurement is larger; float64 still tells its integers apart
ROUNDING = 1e-6  # of a score: no page shows as many digits, and processors differ in fewer
SUMMARIZED = ("macro_f1", "accuracy", "change", "flips")  # over seeds, on test
SUMMARIZED_OF_TRAINING = ("validation_macro_f1", "validation_accuracy", "validation_loss")  # in a sweep
# Numbers that never fall between two of their names
RISING = (("min", "median", "max"), ("p5", "p25", "p50", "p75", "p95", "p99"))


def one_line_of_text(text: str) -> bool:
    """Another line would end a row of a table."""
    return bool(text.strip()) and text.splitlines() == [text]


def no_entry_twice(names: list) -> bool:
    """Whether all entries differ."""
    return len(set(names)) == len(names)


def inside_the_folder(name: str) -> bool:
    """Whether a name leads to a file inside the artifact's folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


T = TypeVar("T")
Filled = Annotated[T, Field(min_length=1)]
Text = Annotated[str, Predicate(one_line_of_text)]
Date = Annotated[str, Field(pattern=r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])$")]
FileName = Annotated[str, Field(pattern=f"^{FILE_NAME}$")]
Labels = Filled[Annotated[list[Text], Predicate(no_entry_twice)]]
Integer = Annotated[int, Field(gt=-LARGEST, lt=LARGEST)]
Count = Annotated[int, Field(ge=0, lt=LARGEST)]
Whole = Annotated[int, Field(ge=1, lt=LARGEST)]
Number = Annotated[float, Field(gt=-LARGEST, lt=LARGEST)]
Amount = Annotated[float, Field(ge=0, lt=LARGEST)]
Positive = Annotated[float, Field(gt=0, lt=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Change = Annotated[float, Field(ge=-1, le=1)]


class Part(BaseModel):
    """A mapping inside a file of results."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow", protected_namespaces=())

    @model_validator(mode="after")
    def _agrees(self):
        for names in RISING:
            values = [self.__dict__[name] for name in names if self.__dict__.get(name) is not None]
            if values != sorted(values):
                raise ValueError(f"does not rise from {names[0]} to {names[-1]}")
        for is_wrong, fault in self.contradictions():
            if is_wrong:
                raise ValueError(fault)
        return self

    def contradictions(self):
        """Yields what fields must not say of each other: whether they do, and the message."""
        return ()


def part(base: type = Part, /, **fields) -> type:
    """A model of required fields, name=type: what has no relation between its fields needs no class of its own."""
    return create_model("Part", __base__=base, **fields)


def each(kind, names: str) -> dict:
    """Fields of one type."""
    return dict.fromkeys(names.split(), kind)


def optional(kind) -> tuple:
    """The type of a field that may be missing, or null."""
    return (kind | None, None)


Spread = part(**each(Positive, "median min max"))  # over the rounds of an interleaved run
Deviation = part(mean=Number, standard_deviation=Amount | None)  # over seeds; null for a single one
Latency = part(**each(Positive, "p50 p95"))  # ms
Speedup = part(**each(Spread, "times_faster_at_batch_1 times_faster_at_batch_32"))
# A bfloat16 product takes minutes where the processor has no instruction for it: null.
Peaks = part(**each(Positive, "float32_gop_per_s int8_gop_per_s memory_gb_per_s"), bfloat16_gop_per_s=Positive | None)


class Environment(part(**each(Text, "cpu device python"), threads=Whole, packages=dict[Text, Text])):
    """The machine and the packages that something was measured with."""

    instruction_sets: list[Text]

    @property
    def processor(self) -> str:
        """The class of the processor, see common/processor.py."""
        return class_of(self.instruction_sets) or ARM


class File(Part):
    """A whole file of results."""

    @classmethod
    def check(cls, value: dict, name):
        """The value as this model; raises `UserError` with ``name`` in front, naming the first field that is wrong."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
            # As JSON: a name in a damaged file may hold line breaks.
            field = json.dumps(".".join(map(str, fault["loc"])))[1:-1]
            where = f"'{field}': " if field else ""  # what contradicts another field names both
            raise UserError(f"{name}: {where}{fault['msg'].removeprefix('Value error, ')}; measure it again") from None

    @classmethod
    def read(cls, path: Path):
        """Reads a file of results; raises `UserError`, naming file and field, if it is missing or damaged."""
        return cls.check(read_json(path), path)


class Origin(File):
    """When, at which commit and on what something was measured."""

    date: Date
    git_commit: Text | None
    environment: Environment


class Study(Origin):
    """Of which encoder and dataset besides."""

    base_model: Text
    dataset: Text


def compare_means(runs: list, means, fields: tuple[str, ...] = SUMMARIZED):
    """Yields what contradicts: means and deviations over seeds must be those of the runs."""
    for field in fields:
        if told := getattr(means, field):
            values = [getattr(run, field) for run in runs]
            if None in values or not values:
                yield True, f"no '{field}' in the runs"
                return
            deviation = statistics.stdev(values) if len(values) > 1 else None
            wrong = (deviation is None) != (told.standard_deviation is None)
            for one, other in ((statistics.fmean(values), told.mean), (deviation, told.standard_deviation)):
                wrong |= abs((one or 0) - (other or 0)) > ROUNDING
            yield wrong, f"'{field}' is not the mean of the runs, or not with that deviation"


# Records


# A fallback that was tried when a format was quantized
Step = part(
    fallback=Text, macro_f1_change=Change, flips=Count, bytes_to_serve=Whole, seconds=Amount, kept=(bool, False)
)


class Provenance(Part):
    """How the artifact was made, and the data that it was scored on."""

    base_model: Text | None
    base_model_source: Text | None = None
    dataset: Text
    dataset_source: Literal["hub", "folder", "sample"]
    dataset_fingerprint: Text
    train_dataset_source: Text | None
    train_rows: Whole | None = None
    recipe: dict[Text, Any] | None
    training: part(steps=Count, precision=Text, validation_macro_f1=Share | None) | None = None
    merged: Filled[dict[Text, Share]] | None = None
    fallbacks: dict[Text, list[Step]] | None = None
    outlier_channels: part(channels=dict[Text, list[Count]], rule=Text) | None = None
    seed: Integer | None
    git_commit: Text | None

    def contradictions(self):
        yield not isinstance((self.recipe or {}).get("baseline", {}), dict), "'recipe.baseline' is no mapping"


class Quality(part(split=Text, labels=Labels, examples=Whole, texts_cut=Count)):
    """Scores on the rows of a split."""

    macro_f1: Share
    accuracy: Share
    # Compared with the predictions, cell by cell: of many classes there are millions.
    per_class_f1: Any
    confusion_matrix: Any
    macro_f1_ci95: Annotated[list[Share], Field(min_length=2, max_length=2)]
    expected_calibration_error: Share
    conflict_free: part(examples=Count, macro_f1=Share, accuracy=Share)

    def contradictions(self):
        # Of the rows without a conflict at most as many are right, and as many wrong, as of all.
        free, slack = self.conflict_free, ROUNDING * self.examples
        right, all_right = free.accuracy * free.examples, self.accuracy * self.examples
        wrong, all_wrong = free.examples - right, self.examples - all_right
        yield right > all_right + slack or wrong > all_wrong + slack, "'conflict_free' counts rows that are not there"


class Size(part(files=Filled[dict[Text, Whole]], bytes_to_serve=Whole, megabytes=Amount)):
    """The files that an answer needs."""

    def contradictions(self):
        yield self.bytes_to_serve != sum(self.files.values()), "'bytes_to_serve' is not the total of 'files'"
        # Two digits are kept.
        yield abs(self.megabytes - self.bytes_to_serve / 1e6) > 0.006, "'megabytes' is not 'bytes_to_serve'"


# A text, and the probabilities that it was answered with
Example = part(text=Text, meant=optional(Text), scores=Filled[dict[Text, Share]])


class Record(File):
    """What was measured of an artifact in one format."""

    variant: FileName
    format: Literal[tuple(WEIGHT_FILES)]
    artifact: Text
    date: Date
    scheme: part(
        **each(Text, "weights activations embeddings"),
        **each(Count, "linear_layers quantized_layers"),
        largest_weight=Count | None,
        kept_in_float=dict[Text, Text | None],
    )
    provenance: Provenance
    quality: Quality
    size: Size
    # Times are null where nothing was timed.
    latency_ms: part(batch_size=Whole, runs=Count, **each(Positive | None, "p50 p95 p99 mean"))
    throughput_per_s: part(batch_size=Whole, value=Positive | None)
    encoder: part(**each(Whole, "layers width parameters")) | None = None
    examples: list[Example] = []
    sha256: dict[Annotated[Text, Predicate(inside_the_folder)], Text] = {}
    environment: Environment

    @property
    def name(self) -> str:
        """The stem of the record's files: 'ptq-onnx'."""
        return f"{self.variant}-{self.format}"

    @property
    def earlier(self) -> bool:
        """Whether it is of a file as it was made before: activations of torchao's file were integers too."""
        return self.format == "torchao" and self.scheme.activations != "float32"

    @property
    def timed_as(self) -> str:
        """What run_benchmark.py calls the artifact of the record."""
        return f"{self.artifact}:{self.format}"

    @property
    def steps_tried(self) -> list:
        """The fallbacks that were tried when the format was quantized; empty if none are told."""
        return (self.provenance.fallbacks or {}).get(self.format, [])

    def contradictions(self):
        times = self.latency_ms
        for value in (times.p50, times.p95, times.p99, times.mean, self.throughput_per_s.value):
            yield (value is None) == bool(times.runs), "times are null where 'latency_ms.runs' is 0, and nowhere else"
        for one in self.examples:
            wrong = list(one.scores) != self.quality.labels or abs(sum(one.scores.values()) - 1) > 1e-4
            yield wrong, "the scores in 'examples' are no probabilities of 'quality.labels'"


# Means over seeds, and interleaved runs


# What a seed scored on test, and what the seeds scored in the mean; the baseline has nothing to compare with.
Scores = part(
    **each(Share, "macro_f1 accuracy conflict_free_macro_f1"), change=optional(Change), flips=optional(Count)
)
Means = part(**each(Deviation, "macro_f1 accuracy"), **each(optional(Deviation), "change flips"))


class Seeds(File):
    """The scores of a variant over several seeds, not all of which need have every format."""

    variant: FileName
    chosen_seed: Integer
    formats: Filled[dict[Text, Means]]
    runs: Filled[list[part(seed=Integer, validation_macro_f1=Share | None, formats=dict[Text, Scores])]]

    @model_validator(mode="before")
    @classmethod
    def _name_the_format(cls, value):
        # A baseline is scored in one format alone, so that its file does not name it.
        runs = value.get("runs")
        if "formats" in value or not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
            return value
        runs = [{**run, "formats": {"pytorch": run}} for run in runs]
        return {**value, "formats": {"pytorch": value}, "runs": runs}

    def runs_of(self, format: str) -> list[tuple]:
        """The seeds that have a format, and what they scored in it."""
        return [(run.seed, run.formats[format]) for run in self.runs if format in run.formats]

    def contradictions(self):
        seeds = [run.seed for run in self.runs]
        yield self.chosen_seed not in seeds or not no_entry_twice(seeds), "'chosen_seed' or 'runs' has a wrong seed"
        for format, means in self.formats.items():
            yield from compare_means([scores for _, scores in self.runs_of(format)], means)


Roofline = part(**each(Positive, "least_ms share"), bound_by=Literal["compute", "memory"])


# Of a library's own artifact, which has no record
PeerQuality = part(
    **each(Share, "macro_f1 accuracy expected_calibration_error equal_labels"),
    examples=Whole,
    macro_f1_ci95=Annotated[list[Share], Field(min_length=2, max_length=2)],
)
# An artifact in an interleaved run; ratios are against the one that it is compared with.
Timed = part(
    Speedup,
    **each(optional(Spread), "cold_start_ms end_to_end_per_s times_faster_end_to_end"),
    bytes_to_serve=Whole,
    precision=Literal["float32", "bfloat16", "int8"],
    quality=optional(PeerQuality),
    latency_ms=part(**each(Positive, "p5 p25 p50 p75 p95 p99")),
    throughput_per_s=Spread,
    equal_labels=Share,
    roofline=optional(part(**each(Roofline, "batch_1 batch_32"))),
)


class Benchmark(Origin):
    """An interleaved run."""

    rounds: Whole
    texts_end_to_end_a_round: Count | None = None
    too_noisy: list[Text] | None = None
    noise_limit: Share | None = None
    peaks: Peaks | None = None
    artifacts: Filled[dict[Text, Timed]]
    compared_with: Text

    def contradictions(self):
        yield self.compared_with not in self.artifacts, "'compared_with' is none of the artifacts"
        yield self.too_noisy and self.noise_limit is None, "'noise_limit' is missing"
        for name, timed in self.artifacts.items():
            wanted = ["end_to_end_per_s", "times_faster_end_to_end"] if self.texts_end_to_end_a_round else []
            if self.peaks and (timed.precision != "bfloat16" or self.peaks.bfloat16_gop_per_s):
                wanted.append("roofline")
            missing = [field for field in wanted if getattr(timed, field) is None]
            yield missing, f"'artifacts.{name}' lacks {', '.join(missing)}"


# Studies


class Split(part(**each(Count, "longest texts_cut repeated_texts rows_too_many texts_with_two_labels"))):
    """What was counted in a split; the place of a length's count is the length."""

    class_counts: list[Count]
    length_counts: Filled[list[Count]]
    rows: Whole
    length_quantiles: Annotated[dict[Literal["5", "50", "95", "99"], Count], Field(min_length=4)]
    mean_length: Positive

    def contradictions(self):
        wrong = {sum(self.class_counts), sum(self.length_counts)} != {self.rows}
        yield wrong, "'rows' is not the total of 'class_counts' and of 'length_counts'"
        yield self.longest >= len(self.length_counts), "'longest' is beyond 'length_counts'"


class Dataset(Study):
    """The classes, lengths and repeated texts of a dataset."""

    dataset_source: Text
    cut_at: Whole
    labels: Labels
    splits: Filled[dict[Text, Split]]
    conflicts_across_splits: list[dict[Text, list[part(label=Text, row=Count)]]]

    def contradictions(self):
        for name, split in self.splits.items():
            yield len(split.class_counts) != len(self.labels), f"'splits.{name}.class_counts' does not fit 'labels'"
        for places in self.conflicts_across_splits:
            labels = {place.label for of_split in places.values() for place in of_split}
            wrong = not self.splits.keys() <= places.keys() or not labels <= set(self.labels)
            yield wrong, "'conflicts_across_splits' lacks a split, or has a label that is none of 'labels'"


Candidate = part(
    Speedup,
    **each(Amount, "flips mean_logit_shift"),
    macro_f1_change=Change,
    megabytes=Positive,
    latency_ms=Latency,
    scheme=part(largest_weight=Count | None),
)


class PtqStudy(Study):
    """Ways to quantize the baseline, on validation."""

    examples: Whole
    baselines: Filled[list[Integer | None]]
    baseline: part(macro_f1=Share, latency_ms=Latency)
    candidates: Filled[dict[Text, Candidate]]
    chosen: Filled[dict[Text, part(candidate=Text)]]

    @property
    def winners(self) -> set[str]:
        """The candidates that were chosen, for any format."""
        return {one.candidate for one in self.chosen.values()}

    def contradictions(self):
        yield not self.winners <= self.candidates.keys(), "'chosen' has one that is none of the candidates"


class PtqSensitivity(Origin):
    """What quantizing one layer alone does, or all of a kind: then the layer is null."""

    base_model: Text
    examples: Whole
    baselines: Filled[list[Integer | None]]
    layers: Filled[
        list[part(kind=Text, layer=Text | None, mean_logit_shift=Amount, flips=Count, macro_f1_change=Change)]
    ]

    @property
    def single_layers(self) -> list:
        """Those of one layer, the most harmful first."""
        return sorted((one for one in self.layers if one.layer), key=lambda one: -one.mean_logit_shift)


class Adapter(
    part(
        **each(Deviation, " ".join(SUMMARIZED_OF_TRAINING)),
        **each(Whole, "parameters trained_parameters adapter_bytes"),
    )
):
    """A candidate of QLoRA: its means over the seeds, on validation."""

    runs: Filled[
        list[
            part(
                **each(Share, "validation_macro_f1 validation_accuracy"),
                **each(Amount, "validation_loss cpu_seconds"),
                seed=Integer,
                git_commit=Text | None,
            )
        ]
    ]

    def contradictions(self):
        return compare_means(self.runs, self, SUMMARIZED_OF_TRAINING)


class QloraSweep(Study):
    """How the adapter is trained."""

    epochs: Positive
    seeds: Filled[list[Integer]]
    centre: Filled[dict[Text, Any]]
    candidates: Filled[dict[Text, Adapter]]
    chosen: Text
    recipe: Text | None

    @property
    def trained_at(self) -> list[str | None]:
        """The commits whose code trained the candidates."""
        return sorted({run.git_commit for one in self.candidates.values() for run in one.runs}, key=str)

    @property
    def gains(self) -> list[float]:
        """Macro F1 of the chosen candidate less that of the recipe's, seed by seed; empty where they are the same."""
        if self.recipe in (None, self.chosen):
            return []
        pairs = zip(self.candidates[self.chosen].runs, self.candidates[self.recipe].runs, strict=True)
        return [better.validation_macro_f1 - kept.validation_macro_f1 for better, kept in pairs]

    def contradictions(self):
        yield self.chosen not in self.candidates, "'chosen' is none of the candidates"


StepCost = part(
    **each(Whole, "trained_parameters peak_memory_mb before_loading_mb"),
    **each(Spread, "seconds_a_step times_slower"),
    peak_memory_ratio=Positive,
)


class TrainingCost(
    part(Origin, **each(Text, "dataset compared_with"), **each(Whole, "batch_size rounds steps_a_round"))
):
    """Encoder -> method -> memory and time of a training step."""

    noise_limit: Share | None = None
    shapes: Filled[dict[Text, Filled[dict[Text, StepCost]]]]
    too_noisy: dict[Text, list[Text]] | None = None

    def contradictions(self):
        wrong = self.noise_limit is None or not self.shapes.keys() <= (self.too_noisy or {}).keys()
        yield self.too_noisy and wrong, "'noise_limit' is missing, or 'too_noisy' lacks a shape"


class Cell(
    part(
        **each(Text, "method weights embeddings activations dataset"),
        **each(Whole, "bits examples"),
        **each(Positive, "megabytes share_of_fp32"),
    )
):
    """A method with a number of bits, over the seeds."""

    macro_f1: Deviation | None = None
    accuracy: Deviation | None = None
    change: Deviation
    flips: Deviation | None = None
    made_at: list[Text]
    runs: Filled[list[create_model("Run", __base__=Scores, seed=Integer)]]
    # Of QAT, per seed: the model as it was trained, as integers, and each file
    formats: list[Filled[dict[Text, part(validation_macro_f1=Share, mean_logit_gap=Amount)]] | None] | None = None

    def over_seeds(self, form: str, name: str) -> list[float]:
        """A number of a form of QAT, per seed."""
        return [getattr(one[form], name) for one in self.formats]

    def contradictions(self):
        # Not against the records of the seeds: a cell stays in the study when its variant is made again.
        yield from compare_means(self.runs, self)
        measured = list(filter(None, self.formats or ()))
        yield self.method == "qat" and len(measured) != len(self.runs), "'formats' does not fit 'runs'"


class Bits(Origin):
    """PTQ against QAT with ever fewer bits."""

    base_model: Text
    cells: Filled[dict[Text, Cell]]

    def cells_of(self, method: str) -> list[Cell]:
        """The cells of a method (`ptq`, `qat`, or `qat-float`, its control), those of most bits first."""
        return sorted((cell for cell in self.cells.values() if cell.method == method), key=lambda cell: -cell.bits)

    def find(self, method: str, bits: int) -> Cell | None:
        """The cell of a method with a number of bits; None in a study that was stopped before."""
        return next((cell for cell in self.cells_of(method) if cell.bits == bits), None)

    @property
    def made_at(self) -> list[str]:
        """The commits whose code made the files."""
        return sorted(set().union(*(cell.made_at for cell in self.cells.values())))


Job = part(
    **each(Whole, "rows bytes_read bytes_written"),
    **each(Positive, "seconds rows_a_second rows_a_second_at_the_start rows_a_second_at_the_end share_of_the_class"),
    seconds_before_the_first_shard=Amount,
    peak_memory_mb=Whole | None,
)

# Name of a study's file, without its ending -> what it holds
STUDIES = {
    "dataset": Dataset,
    "ptq_study": PtqStudy,
    "ptq_sensitivity": PtqSensitivity,
    "qlora_sweep": QloraSweep,
    "training_cost": TrainingCost,
    "bits": Bits,
    "javascript": part(
        Origin, **each(Text, "artifact node transformers_js"), bytes_to_serve=Whole, latency_ms=Latency
    ),
    "batch": part(
        Origin,
        **each(Text, "model dataset"),
        shard_rows=Whole,
        plain=Filled[list[Job]],
        engines=Filled[dict[Text, Job]],
    ),
    "reliability": part(Origin, kinds=Filled[dict[Text, part(draws=Count, failed_tests=Count, seconds=Amount)]]),
}


def read_study(path: Path):
    """The JSON file of a study, which is named after its kind; raises `UserError` if it is damaged."""
    return STUDIES[path.stem].read(path)
