"""The model card of a variant, rendered from its records: no weights are needed, and no number is typed by hand.

The text is in `model_cards/template.md`; a field that it names and a record lacks stops the rendering.
"""

import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from emotion.data.dataset import DEFAULT_DATASET
from emotion.evaluation.schema import Benchmark, Example, Provenance, Record
from emotion.hub.render import Markdown, complete, name_of, render
from emotion.inference.model_folder import RELEASED, WEIGHT_FILES
from emotion.utils.arguments import PLACES
from emotion.utils.base_model import BASE_SIZE_MODEL, DEFAULT_MODEL, EMBEDDED_MODEL
from emotion.utils.errors import REPO_ID, UserError
from emotion.utils.files import RECOMMENDED, ROOT
from emotion.utils.machine import PROCESSORS

TEMPLATE = ROOT / "model_cards" / "template.md"
BASELINE = "baseline"
PLACEHOLDER = "user/bert-emotion"  # how the repositories in the tracked cards begin, until they are published
# Arguments that no card shows, since they do not decide the result; `training` has the precision that was used
HIDDEN_ARGUMENTS = PLACES | {"report_to", "disable_tqdm", "logging_strategy", "logging_steps", "bf16"}
HIDDEN_ARGUMENTS |= {"dataloader_pin_memory", "save_total_limit", "baseline"}
LICENSES = dict.fromkeys((DEFAULT_MODEL, EMBEDDED_MODEL, BASE_SIZE_MODEL), "apache-2.0")  # of base models


class Runtime(NamedTuple):
    """What a card says of a format: its name, the Hub's tags, and packages with the oldest versions that open it."""

    title: str
    tags: tuple[str, ...]
    needs: dict[str, str]


RUNTIMES = {
    "pytorch": Runtime("PyTorch FP32", ("pytorch",), {"transformers": "4.57"}),
    "bf16": Runtime("PyTorch BF16", ("pytorch",), {"transformers": "4.57"}),
    "torchao": Runtime("torchao", ("torchao",), {"transformers": "5.5", "torchao": "0.18"}),
    "nf4": Runtime("bitsandbytes NF4", ("bitsandbytes",), {"transformers": "4.57", "bitsandbytes": "0.46.1"}),
    "onnx": Runtime("ONNX Runtime", ("onnx", "transformers.js"), {"onnxruntime": "1.18.1"}),
    "openvino": Runtime("OpenVINO", ("openvino",), {"openvino": "2024.0", "optimum-intel": "2.2"}),
}
TRANSFORMERS_JS = "3.8.1"  # the oldest that opened the ONNX files
DEMO = "https://huggingface.co/spaces/{owner}/emotions"  # as the documentation publishes it


def render_cards(
    records: list[Record], folder: Path, runs: dict[str, Benchmark] | None = None, seeds: list[dict] | None = None
) -> dict[Path, str]:
    """Renders the card of each variant as it is tracked in ``folder``, for a repository named after the variant."""
    # On the Hub `results/` is beside the card, in this repository one folder higher.
    shared = {"root": "../", "runs": runs, "seeds": seeds, "code": "../README.md"}
    cards = {}
    for variant in variants_with_card(records):
        cards[folder / f"{variant}.md"] = render_card(records, variant, f"{PLACEHOLDER}-{variant}", **shared)
    return cards


def variants_with_card(records: list[Record]) -> list[str]:
    """The variants of the records with a tracked card, sorted: no language model, and none with dynamic ranges."""
    found = {record.variant for record in records if record.format in RUNTIMES}
    return sorted(variant for variant in found if not variant.endswith("-dynamic"))


def render_card(
    records: list[Record],
    variant: str,
    repo_id: str,
    root: str = "",
    runs: dict[str, Benchmark] | None = None,
    seeds: list[dict] | None = None,
    code: str | None = None,
) -> str:
    """Renders a card; raises `UserError` if a record lacks a field, or the records cannot be compared.

    Args:
        records: of the variant, of the baseline that it is compared with, and of the variants that it links to.
        root: path from the card to the folder with `results/`; empty on the Hub.
        runs, seeds: of `read_benchmarks` and `read_means`, if there are any.
        code: address of the code's repository, if it is known.
    """
    own, baseline = order(records, variant), order(records, BASELINE)
    _check_comparable(own, baseline, variant)
    fields = {"repo_id": repo_id, "root": root, "code": code, "baseline": baseline}
    with complete(f"the card of {variant}"):
        data = _metadata(own, repo_id)
        compared = own if variant == BASELINE else baseline + own
        fields |= {"card_data": Markdown(data.to_yaml()), "tags": data.tags, "compared": compared}
        fields |= _collect_facts(own) | _collect_times(compared, runs or {})
        fields["demo"] = f"{root}docs/demo/" if root else DEMO.format(owner=repo_id.split("/")[0])
        # A seed whose NF4 lost too much has another format.
        formats = {record.format for record in own}
        means = [row for row in seeds or () if row["variant"] == variant and row["format"] in formats]
        fields |= {"means": {row["format"]: row for row in means}, "headline": _headline(own)}
        rows = own[0].provenance.dataset_fingerprint  # one table has only scores on the same rows
        comparable = [record for record in records if record.provenance.dataset_fingerprint == rows]
        fields["family"] = _list_family(comparable, variant, repo_id, seeds or [], on_hub=not root)
        return render(TEMPLATE, **fields).rstrip("\n") + "\n"


def _check_comparable(own: list[Record], baseline: list[Record], variant: str) -> None:
    """Raises `UserError` unless there are complete records of both, of the same test rows of a real dataset."""
    if own and own[0].format not in RUNTIMES:
        raise UserError(f"{variant} is a language model to compare with; this project publishes only classifiers")
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


def _metadata(records: list[Record], repo_id: str):
    """The metadata of a card, as `ModelCardData`; scores and widget are those of the first record."""
    first, provenance = records[0], records[0].provenance
    tags = ["emotion"]
    for record in records:
        tags += RUNTIMES[record.format].tags
    if provenance.merged:  # the Hub finds adapters by these
        tags += ["peft", "lora"]
    encoder = provenance.base_model if is_hub_id(provenance.base_model) else None
    # The parent of a quantized variant is the very model that it was made from: the same owner's baseline.
    quantized_from_baseline = "baseline" in (provenance.recipe or {})
    base = sibling(repo_id, first.variant, BASELINE) if quantized_from_baseline else encoder
    optional = {}  # what the Hub takes only with a value
    if base:
        quantized = any(record.scheme.quantized_layers for record in records)
        # An adapter first: its merged model is quantized too, and the Hub allows one word.
        relation = "adapter" if provenance.merged else "quantized" if quantized else "finetune"
        optional |= {"base_model": base, "base_model_relation": relation}
    if provenance.dataset == DEFAULT_DATASET:
        optional |= {"datasets": [DEFAULT_DATASET], "language": "en"}
    return ModelCardData(
        license=LICENSES.get(encoder, "other"),
        # It decides which snippet the Hub shows: `from_pretrained` of Transformers cannot open an ONNX file.
        library_name="transformers.js" if [record.format for record in records] == ["onnx"] else "transformers",
        pipeline_tag="text-classification",
        metrics=["f1", "accuracy"],
        tags=tags,
        # As measured: the Hub need not run the model to show them.
        widget=[{"text": one.text, "output": ranking(one)} for one in clearest(first.examples)],
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(first),
        **optional,
    )


def is_hub_id(name: str | None) -> bool:
    """Whether a base model has a repository to link to, and is not a local folder."""
    return "/" in (name or "") and REPO_ID.fullmatch(name) is not None


def sibling(repo_id: str, variant: str, other: str) -> str:
    """The repository of another variant of the same owner: 'me/mood-ptq' -> 'me/mood-qat'."""
    owner, slash, name = repo_id.rpartition("/")
    # A repository that is not named after its variant says nothing about the others' names.
    stem = name.removesuffix(variant) if name.endswith(f"-{variant}") else f"{PLACEHOLDER.split('/')[1]}-"
    return f"{owner}{slash}{stem}{other}"


def _eval_results(record: Record) -> list:
    """Macro F1, accuracy and the F1 of each class, for the card's `model-index`."""
    quality = record.quality
    values = [("f1", "Macro F1", quality.macro_f1), ("accuracy", "Accuracy", quality.accuracy)]
    if quality.micro_f1 is not None:
        values.append(("f1", "Micro F1", quality.micro_f1))
    values += [("f1", f"F1 {label}", value) for label, value in quality.per_class_f1.items()]
    scored_on = {
        "task_type": "text-classification",
        "task_name": "Text Classification",
        "dataset_type": record.provenance.dataset,
        "dataset_name": record.provenance.dataset,
        "dataset_split": quality.split,
        "dataset_args": {"sha256_of_rows": record.provenance.dataset_fingerprint},  # which rows, whatever the name
    }
    return [EvalResult(**scored_on, metric_type=kind, metric_name=name, metric_value=x) for kind, name, x in values]


def ranking(example: Example) -> list[dict]:
    """The classes of an example, most probable first, as the Hub's widget shows them."""
    scores = sorted(example.scores.items(), key=lambda item: -item[1])
    return [{"label": label, "score": score} for label, score in scores]


def clearest(examples: list[Example]) -> list[Example]:
    """For each class, the example written for it that is classified as it with the highest probability.

    A class without a correctly classified example has none, unless this is true of all classes: then the examples are
    not written for the classes of the dataset.
    """
    # An example of an older record, without `meant`, stands for itself.
    correct = [one for one in examples if one.meant in (None, ranking(one)[0]["label"])]
    best = {}
    for example in correct or examples:
        meant = example.meant or example.text
        if meant not in best or example.scores.get(meant, 0) > best[meant].scores.get(meant, 0):
            best[meant] = example
    return list(best.values())


def _headline(own: list[Record]) -> Record:
    """The record of the released format, of which the first line of a card speaks."""
    released = RELEASED.get(own[0].variant, "onnx")
    return next((record for record in own if record.format == released), own[0])


def _collect_facts(own: list[Record]) -> dict:
    """What the template says of a variant, by the names that it uses."""
    first = own[0]
    provenance, shown = first.provenance, clearest(first.examples)
    example = shown[min(1, len(shown) - 1)].text  # any of them
    packages = {"peft", "torch"} if provenance.merged else {"torch"} if first.format != "onnx" else set()
    weights, answers = {}, {}
    for record in own:
        # The first file that is neither the tokenizer's nor a configuration
        weights[record.format] = next(name for name in record.size.files if not re.search("tokenizer|config", name))
        answers[record.format] = ranking({one.text: one for one in record.examples}[example])[0]
        packages |= {"transformers", *RUNTIMES[record.format].needs}  # the snippet's tokenizer is that of Transformers
    # The newest Transformers has none beside it.
    packages -= {"optimum-intel"} - first.environment.packages.keys()
    recipe = provenance.recipe or {}
    return {
        "title": f"BERT emotion classifier, {name_of(first.variant)}",
        "method": first.variant.split("-")[0],
        "first": first,
        "records": own,
        "weights": weights,
        "runtimes": {format: runtime.title for format, runtime in RUNTIMES.items()},
        "needs": {format: runtime.needs for format, runtime in RUNTIMES.items()},
        "javascript": TRANSFORMERS_JS,
        "encoder_link": is_hub_id(provenance.base_model),
        "seed": provenance.training_recipe.get("seed", provenance.seed),
        # Counted in the files, not taken from the variant's name
        "quantized": any(record.scheme.quantized_layers for record in own),
        # transformers.js takes this word, not a file's name: model_quantized.onnx is q8.
        "dtype": "q8" if "quantized" in weights.get("onnx", "") else "fp32",
        "hyperparameters": _hyperparameters(provenance),
        "epochs": recipe.get("num_train_epochs", provenance.training_recipe.get("num_train_epochs")),
        "versions": {name: first.environment.packages[name] for name in sorted(packages)},
        "example": example,
        "answers": answers,
    }


def _list_family(records: list[Record], variant: str, repo_id: str, seeds: list[dict], on_hub: bool) -> list[dict]:
    """The released variants, with this one: their repositories, sizes and mean scores; empty if there is only one."""
    family = []
    for name in dict.fromkeys((*RELEASED, variant)):
        formats = {record.format: record for record in order(records, name) if record.format in RUNTIMES}
        if not formats:
            continue
        means = {row["format"]: row["macro_f1"] for row in seeds if row["variant"] == name}
        # The released format if it has a mean over seeds: a baseline's is that of FP32.
        shown = RELEASED.get(name, "onnx")
        shown = shown if shown in formats and shown in means else next(iter(formats))
        other = sibling(repo_id, variant, name)
        row = {
            "variant": name,
            "link": f"https://huggingface.co/{other}" if on_hub else f"{name}.md",
            "format": shown,
            "megabytes": formats[shown].size.megabytes,
            "macro_f1": means.get(shown) or {"mean": formats[shown].quality.macro_f1, "standard_deviation": None},
            "recommended": name == RECOMMENDED,
        }
        family.append(row)
    return family if len(family) > 1 else []


def _collect_times(records: list[Record], runs: dict[str, Benchmark]) -> dict:
    """The `times` of the records, a row per class of processors, and the `interleaved` runs that they are of.

    `speedup` is over the fastest FP32 model of the same run; None for a record in no run, which was measured alone.
    """
    times, interleaved = [], {}
    for record in records:
        own = {PROCESSORS[processor]: run for processor, run in runs.items() if record.timed_as in run.artifacts}
        interleaved |= own
        for processor, run in own.items():
            timed = run.artifacts[record.timed_as]
            row = {"latency": timed.latency_ms, "texts_per_s": round(timed.throughput_per_s.median)}
            speedup = timed.times_faster_at_batch_1.median
            times.append(row | {"processor": processor, "speedup": speedup, "record": record})
        if not own:
            row = {"latency": record.latency_ms, "texts_per_s": record.throughput_per_s.value, "record": record}
            times.append(row | {"processor": PROCESSORS[record.environment.processor], "speedup": None})
    return {"times": times, "interleaved": interleaved}


def _hyperparameters(provenance: Provenance) -> dict:
    """The arguments that decided the result; those of the baseline's recipe have `baseline.` before their names."""
    recipe = provenance.recipe or {}
    shown = {}
    for prefix, values in (("", recipe), ("baseline.", recipe.get("baseline", {}))):
        for key, value in values.items():
            if key not in HIDDEN_ARGUMENTS:
                # The recipe's default, for which another encoder may have stood in
                shown[prefix + key] = provenance.base_model if key == "model_name_or_path" else value
    return shown
