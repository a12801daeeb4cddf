"""The model card of a variant, rendered from its records alone: no weights are needed, and no number is typed.

The words stand in `model_cards/template.md`; a field that it names and a record lacks stops the rendering.
"""

import math
from pathlib import Path

from emotion.data.dataset import DEFAULT_DATASET
from emotion.evaluation.peers import COMPILED
from emotion.evaluation.schema import Benchmark, Example, Provenance, Record
from emotion.hub.render import complete, render
from emotion.inference.model_folder import WEIGHT_FILES
from emotion.inference.released import RECOMMENDED, RELEASED
from emotion.utils.base_model import BASE_SIZE_MODEL, DEFAULT_MODEL, EMBEDDED_MODEL
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT
from emotion.utils.processor import TITLES as PROCESSORS
from emotion.utils.recipe import PLACES

TEMPLATE = ROOT / "model_cards" / "template.md"
BASELINE = "baseline"
PLACEHOLDER = "user/bert-emotion"  # how the tracked cards' repositories begin: nobody's, until one is published
# Values of a recipe that no card shows: they do not decide the result; `training` tells the precision that was used
FREE = PLACES | {
    *("report_to", "disable_tqdm", "logging_strategy", "logging_steps", "dataloader_pin_memory", "save_total_limit"),
    "bf16",
}
# Of base models; any other's is not known here.
LICENSES = dict.fromkeys((DEFAULT_MODEL, EMBEDDED_MODEL, BASE_SIZE_MODEL), "apache-2.0")
RELATIONS = {"finetune", "quantized", "adapter"}  # of a model to its base model, in the Hub's words
# Of a card; that of another variant is its name in capitals
TITLES = {BASELINE: "fine-tuned", "qlora": "QLoRA"}
# Format -> how a card names it, the Hub's tags for it, and the packages that its users need
RUNTIMES = {
    "pytorch": ("PyTorch FP32", ("pytorch",), ("torch", "transformers")),
    "bf16": ("PyTorch BF16", ("pytorch",), ("torch", "transformers")),
    "torchao": ("torchao", ("torchao",), ("torch", "transformers", "torchao")),
    "nf4": ("bitsandbytes NF4", ("bitsandbytes",), ("torch", "transformers", "bitsandbytes")),
    "onnx": ("ONNX Runtime", ("onnx", "transformers.js"), ("transformers", "onnxruntime")),
    "openvino": ("OpenVINO", ("openvino",), ("transformers", "optimum-intel", "openvino")),
}


def render_cards(
    records: list[Record], folder: Path, runs: dict[str, Benchmark] | None = None, seeds: list[dict] | None = None
) -> dict[Path, str]:
    """The card of each variant as it is tracked in ``folder``, for a repository that is named after the variant.

    Args:
        runs: of `read_benchmarks`: the runs that have timed the variants in turns; None if there is none.
        seeds: the field `seeds` of comparison.json; None where no means over seeds were measured.
    """
    cards = {}
    for variant in variants_with_card(records):
        # On the Hub `results/` lies beside the card, in this repository one folder higher.
        cards[folder / f"{variant}.md"] = render_card(
            records, variant, f"{PLACEHOLDER}-{variant}", root="../", runs=runs, seeds=seeds, code="../README.md"
        )
    return cards


def variants_with_card(records: list[Record]) -> list[str]:
    """The variants of the records, sorted; a language model has no card, since it is there to compare with alone."""
    return sorted({record.variant for record in records if record.format in RUNTIMES})


def render_card(
    records: list[Record],
    variant: str,
    repo_id: str,
    root: str = "",
    runs: dict[str, Benchmark] | None = None,
    seeds: list[dict] | None = None,
    code: str | None = None,
) -> str:
    """The whole text of a card.

    Args:
        records: those of the variant, of the baseline that it is compared with, and of the variants that it links to.
        root: where the card finds `results/`; empty for a card on the Hub.
        runs, seeds: as for `render_cards`.
        code: where the repository of the code is; None if that is not known.

    Raises:
        UserError: if a record lacks a field, or the records cannot be compared.
    """
    from huggingface_hub import ModelCard

    own, baseline = order(records, variant), order(records, BASELINE)
    check_comparable(own, baseline, variant)
    with complete(f"the card of {variant}"):
        data = describe(own, repo_id)
        facts = collect_facts(own, baseline) | {"repo_id": repo_id, "root": root, "code": code, "tags": data.tags}
        facts["torchao_times"] = list_torchao_times(own, baseline, runs or {})
        facts["times"] = [line for record in facts["compared"] for line in times_of(record, runs or {})]
        timed_on = {line["run"] for line in facts["times"]}
        facts["interleaved"] = {PROCESSORS[one]: runs[one] for one in runs or {} if one in timed_on}
        forms = {record.format for record in own}  # a seed whose NF4 lost too much has kept another form
        facts["means"] = [row for row in seeds or () if row["variant"] == variant and row["format"] in forms]
        rows = own[0].provenance.dataset_fingerprint  # only what was scored on the same ones stands in one table
        comparable = [record for record in records if record.provenance.dataset_fingerprint == rows]
        facts["family"] = list_family(comparable, variant, repo_id, seeds or [], on_hub=not root)
        text = render(TEMPLATE, card_data=data.to_yaml(), first=own[0], climbed=climbed, **facts)
    card = ModelCard(text)  # parses the metadata again, so that what is checked is what the Hub will read
    check_metadata(card.data.to_dict(), variant)
    return str(card).rstrip("\n") + "\n"


def check_comparable(own: list[Record], baseline: list[Record], variant: str) -> None:
    """Raises `UserError` unless there are records of both, whole, of real test rows, and of the same ones."""
    if own and variant not in variants_with_card(own):
        raise UserError(f"{variant} is a language model to compare with; this project publishes classifiers alone")
    for record in own + baseline:
        if not record.examples or not record.sha256:
            raise UserError(f"{record.name} has no 'examples' or no 'sha256', which a card needs; measure it again")
        if record.quality.split != "test" or record.provenance.dataset_source == "sample":
            raise UserError(f"{record.name} was not scored on a real dataset's test split: not for a card")
    if not own or not baseline:
        missing = BASELINE if own else variant
        raise UserError(f"no record of '{missing}' to write a card from; measure it with run_evaluation.py")
    if len({record.provenance.dataset_fingerprint for record in own + baseline}) != 1:
        raise UserError(f"{variant} and {BASELINE} were not scored on the same rows; measure them again")


def order(records: list[Record], variant: str) -> list[Record]:
    """The records of a variant; the first is the card's main one, of the format that `from_pretrained` opens."""
    own = [record for record in records if record.variant == variant]
    return sorted(own, key=lambda record: list(WEIGHT_FILES).index(record.format))


def describe(records: list[Record], repo_id: str):
    """The metadata of a card, as `ModelCardData`.

    Args:
        records: of one variant, in the order of `order`: scores and widget are those of the first.
    """
    from huggingface_hub import ModelCardData

    first = records[0]
    made, formats = first.provenance, [record.format for record in records]
    tags = ["emotion"]
    for format in formats:
        tags += RUNTIMES[format][1]
    if made.merged:  # the Hub finds adapters by these
        tags += ["peft", "lora"]
    encoder = made.base_model if "/" in (made.base_model or "") else None  # a local model has no id to link to
    # A quantized variant's parent is the very model that it was made from: the same owner's baseline.
    from_baseline = "baseline" in (made.recipe or {})
    base = sibling(repo_id, first.variant, BASELINE) if from_baseline else encoder
    optional = {}  # what the Hub takes only with a value
    if base:
        optional |= {"base_model": base, "base_model_relation": relation(records)}
    if made.dataset == DEFAULT_DATASET:
        optional |= {"datasets": [DEFAULT_DATASET], "language": "en"}  # of another dataset neither is known
    widget = []
    # The answers as they were measured: the Hub need not run the model to show them.
    for example in clearest(first.examples):
        widget.append({"text": example.text, "output": ranking(example)})
    return ModelCardData(
        license=LICENSES.get(encoder, "other"),
        # What `from_pretrained` of Transformers cannot open must not carry its name.
        library_name="onnx" if formats == ["onnx"] else "transformers",
        pipeline_tag="text-classification",
        metrics=["f1", "accuracy"],
        tags=tags,
        widget=widget,
        model_name=repo_id.split("/")[-1],
        eval_results=list_results(first),
        **optional,
    )


def sibling(repo_id: str, variant: str, other: str) -> str:
    """The repository of another variant of the same owner: 'me/mood-ptq' -> 'me/mood-qat'."""
    owner, slash, name = repo_id.rpartition("/")
    # A repository that is not named after its variant tells nothing of the others' names.
    stem = name.removesuffix(variant) if name.endswith(f"-{variant}") else f"{PLACEHOLDER.split('/')[1]}-"
    return f"{owner}{slash}{stem}{other}"


def relation(records: list[Record]) -> str:
    """How the variant came from its base model, in the Hub's words."""
    # An adapter first: its joined model is quantized too, and the Hub allows one word.
    if records[0].provenance.merged:
        return "adapter"
    return "quantized" if any(record.scheme.quantized_layers for record in records) else "finetune"


def list_results(record: Record) -> list:
    """Macro F1, accuracy and the F1 of each class, for the card's `model-index`."""
    from huggingface_hub import EvalResult

    made, quality = record.provenance, record.quality
    values = [("f1", "Macro F1", quality.macro_f1), ("accuracy", "Accuracy", quality.accuracy)]
    for label, value in quality.per_class_f1.items():
        values.append(("f1", f"F1 {label}", value))
    scored_on = {
        "task_type": "text-classification",
        "task_name": "Text Classification",
        "dataset_type": made.dataset,
        "dataset_name": made.dataset,
        "dataset_split": quality.split,
        "dataset_args": {"sha256_of_rows": made.dataset_fingerprint},  # which rows, whatever the name
    }
    results = []
    for kind, name, value in values:
        results.append(EvalResult(**scored_on, metric_type=kind, metric_name=name, metric_value=value))
    return results


def ranking(example: Example) -> list[dict]:
    """The classes of an example, most probable first, as the Hub's widget shows them."""
    scores = sorted(example.scores.items(), key=lambda item: -item[1])
    return [{"label": label, "score": score} for label, score in scores]


def clearest(examples: list[Example]) -> list[Example]:
    """Of the texts that are meant for one class, the one that is answered most surely with it; in their order.

    A class whose texts are all answered wrongly shows none, unless no text at all is answered rightly: then the
    classes are another dataset's, for which the texts are not meant.
    """
    # A text of an older record, which does not say what it is meant for, stands for itself.
    rightly = [one for one in examples if one.meant in (None, ranking(one)[0]["label"])]
    best = {}
    for example in rightly or examples:
        scores, meant = example.scores, example.meant or example.text
        if meant not in best or scores.get(meant, 0) > best[meant].scores.get(meant, 0):
            best[meant] = example
    return list(best.values())


def collect_facts(own: list[Record], baseline: list[Record]) -> dict:
    """What the template tells, by the names that it uses."""
    first = own[0]
    made, shown = first.provenance, clearest(first.examples)
    example = shown[min(1, len(shown) - 1)].text  # which one is as good as any
    method = first.variant.split("-")[0]  # ptq-int4 is a ptq: its words and its citation are the same
    weights, packages = {}, {"peft"} if made.merged else set()
    for record in own:
        weights[record.format] = weights_file(record)
        packages.update(RUNTIMES[record.format][2])
    versions = first.environment.packages
    return {
        "title": f"BERT emotion classifier, {TITLES.get(first.variant, first.variant.upper())}",
        "method": method,
        "records": own,
        "baseline": baseline,
        "compared": own if first.variant == BASELINE else baseline + own,
        "weights": weights,
        "runtimes": {format: words[0] for format, words in RUNTIMES.items()},
        "seed": trained_seed(made),
        # Counted in the files, not taken from the variant's name.
        "quantized": any(record.scheme.quantized_layers for record in own),
        # transformers.js does not take a file's name: it makes one of this word, and of q8 model_quantized.onnx.
        "dtype": "q8" if "quantized" in weights.get("onnx", "") else "fp32",
        "hyperparameters": used_values(made),
        "epochs": trained_epochs(made),
        "versions": {name: versions[name] for name in sorted(packages)},  # KeyError: a record without a version
        "example": example,
        "answer": lambda record: answer(record, example),
    }


def answer(record: Record, text: str) -> dict:
    """What a form was measured to answer to one of its examples: `label` and `score`."""
    answers = {example.text: example for example in record.examples}
    return ranking(answers[text])[0]


def climbed(record: Record) -> list[str]:
    """All steps that were tried for a form, the one that was kept in bold; empty if there was one alone."""
    named = [f"**{step.fallback}** (kept)" if step.kept else step.fallback for step in record.steps_tried]
    return named if len(named) > 1 else []


def trained_seed(made: Provenance) -> int | None:
    """The seed of the training: of a variant that was made from a baseline, that baseline's."""
    recipe = made.recipe or {}
    return recipe.get("baseline", recipe).get("seed", made.seed)


def trained_epochs(made: Provenance) -> float | None:
    """The epochs of the training that a record tells of: its own, or of PTQ that of the baseline."""
    recipe = made.recipe or {}
    return recipe.get("num_train_epochs", recipe.get("baseline", {}).get("num_train_epochs"))


def list_family(records: list[Record], variant: str, repo_id: str, seeds: list[dict], on_hub: bool) -> list[dict]:
    """The variants that are released together, this one among them: where they are, and what tells them apart."""
    family = []
    for name in dict.fromkeys((*RELEASED, variant)):
        forms = {record.format: record for record in order(records, name)}
        means = {row["format"]: row["macro_f1"] for row in seeds if row["variant"] == name}
        if not forms or name not in variants_with_card(records):
            continue
        # The form that is released, if it has a mean over seeds: a baseline's is that of FP32.
        released = RELEASED.get(name, "onnx")
        shown = released if released in forms and released in means else next(iter(forms))
        other = sibling(repo_id, variant, name)
        family.append(
            {
                "variant": name,
                "repo_id": other,
                "link": f"https://huggingface.co/{other}" if on_hub else f"{name}.md",
                "form": RUNTIMES[shown][0],
                "megabytes": forms[shown].size.megabytes,
                "macro_f1": means.get(shown),
                "recommended": name == RECOMMENDED,
            }
        )
    return family if len(family) > 1 else []


def list_torchao_times(
    own: list[Record], baseline: list[Record], runs: dict[str, Benchmark]
) -> dict[str, dict[str, float]]:
    """Kind of processor -> form -> median milliseconds of one text, of FP32 in PyTorch and the variant's own forms."""
    found = {}
    for processor, run in runs.items():
        for record in [record for record in baseline if record.format == "pytorch"] + own:
            title = RUNTIMES[record.format][0]
            for ending, words in (("", ""), (COMPILED, " with torch.compile")):
                if one := run.artifacts.get(f"{record.timed_as}{ending}"):
                    found.setdefault(PROCESSORS[processor], {})[title + words] = one.latency_ms.p50
    return found


def times_of(record: Record, runs: dict[str, Benchmark]) -> list[dict]:
    """A form's times on each kind of processor, a line each; its record's own, taken alone, if it is in no run.

    `faster` is the ratio to the fastest FP32 of the same run, and `run` the class of its processors; None without one.
    """
    lines = []
    for processor, run in runs.items():
        if timed := run.artifacts.get(record.timed_as):
            lines.append(
                {
                    "run": processor,
                    "latency": timed.latency_ms,
                    "texts_per_s": round(timed.throughput_per_s.median),
                    "faster": timed.times_faster_at_batch_1.median,
                }
            )
    own = {"run": None, "latency": record.latency_ms, "texts_per_s": record.throughput_per_s.value}
    lines = lines or [own | {"faster": None}]
    for line in lines:
        processor = line["run"] or record.environment.processor
        line |= {"record": record, "processor": PROCESSORS[processor]}
    return lines


def weights_file(record: Record) -> str:
    """The file of weights of a record's format: the first that is neither a tokenizer's nor a configuration."""
    return next(name for name in record.size.files if "tokenizer" not in name and "config" not in name)


def used_values(made: Provenance) -> dict:
    """The values that decided the result, as they were used; those of a recipe in a recipe as names with dots."""
    recipe, used = made.recipe or {}, {}
    baseline = {f"baseline.{key}": value for key, value in recipe.get("baseline", {}).items()}
    for name, value in (recipe | baseline).items():
        key = name.split(".")[-1]
        if key == "model_name_or_path":  # the recipe's default, for which another encoder may have stood in
            value = made.base_model
        if key not in FREE and name != "baseline":
            used[name] = value
    return used


def check_metadata(data: dict, name: str) -> None:
    """Raises `UserError` for metadata that the Hub refuses, or shows wrongly without saying so.

    Args:
        name: of the variant, for the message.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    for key in ("license", "library_name", "pipeline_tag", "widget", "model-index"):
        if not data.get(key):
            raise UserError(f"the card of {name} has no '{key}'")
    # The Hub makes a link of each, and answers a card with one that cannot be a repository with an error.
    linked = list(data.get("datasets", []))
    if "base_model" in data:
        linked.append(data["base_model"])
    for repo_id in linked:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise UserError(f"the card of {name}: {repo_id} is no id of the Hub") from error
    if "base_model" in data and data.get("base_model_relation") not in RELATIONS:
        raise UserError(f"the card of {name}: base_model_relation must be one of {', '.join(sorted(RELATIONS))}")
    # Numbers that are true for Python and wrong for the Hub: an int, a NaN, a percentage.
    scores = []
    for result in data["model-index"][0]["results"]:
        scores += [metric["value"] for metric in result["metrics"]]
    for example in data["widget"]:
        scores += [one["score"] for one in example["output"]]
    if not all(isinstance(score, float) and math.isfinite(score) and 0 <= score <= 1 for score in scores):
        raise UserError(f"the card of {name}: a score is not between 0 and 1")
