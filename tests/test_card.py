"""The model card: its numbers are those of the records, nothing is missing, and it follows the Hub's rules."""

import copy
import re

import pytest
from huggingface_hub import ModelCard

from conftest import ROOT
from emotion.evaluation.record import read_records
from emotion.evaluation.schema import Example
from emotion.hub.comparison import read_means
from emotion.hub.model_card import clearest, render_card, render_cards, sibling
from emotion.inference.model_folder import RELEASED
from emotion.utils import machine
from emotion.utils.base_model import BASE_SIZE_MODEL, EMBEDDED_MODEL
from emotion.utils.errors import UserError
from emotion.utils.files import RECOMMENDED
from hub_server import validate_card


@pytest.fixture(scope="module")
def tracked_records():
    return read_records(ROOT / "results")


@pytest.fixture
def records(tracked_records):
    return copy.deepcopy(tracked_records)


def of(records, variant, format):
    return next(record for record in records if (record.variant, record.format) == (variant, format))


def test_the_metadata_is_what_the_hub_wants(records):
    text = render_card(records, "ptq", "user/bert-emotion-ptq")
    sections = [text.index(f"\n## {name}\n") for name in ("Limitations", "Usage", "Results")]
    assert validate_card(text) == [] and sections == sorted(sections) and len(re.findall(r"^\|---", text, re.M)) == 3
    record = of(records, "ptq", "onnx")
    first = text.split("\n# ")[1].splitlines()[2]
    assert first.startswith(f"**Macro F1 {100 * record.quality.macro_f1:.1f} %, {record.size.megabytes:.1f} MB")
    assert "(https://huggingface.co/spaces/user/emotions)" in first
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "user/bert-emotion-baseline"  # the model that it was quantized from
    assert data["base_model_relation"] == "quantized" and data["license"] == "apache-2.0"
    assert data["language"] == "en" and data["datasets"] == ["dair-ai/emotion"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-classification"
    assert {"torchao", "onnx", "openvino", "transformers.js"} <= set(data["tags"])
    assert len(data["widget"]) == 6 and all(len(example["output"]) == 6 for example in data["widget"])
    for variant, relation in {"baseline": "finetune", "qlora": "adapter"}.items():
        data = ModelCard(render_card(records, variant, "user/mine")).data
        assert (data.base_model, data.base_model_relation) == (EMBEDDED_MODEL, relation)


def test_each_score_is_that_of_the_record(records):
    record = of(records, "ptq", "torchao")  # what from_pretrained opens
    quality = record.quality
    (result,) = ModelCard(render_card(records, "ptq", "user/mine")).data.to_dict()["model-index"][0]["results"]
    expected = {"Macro F1": quality.macro_f1, "Accuracy": quality.accuracy}
    expected |= {f"F1 {label}": value for label, value in quality.per_class_f1.items()}
    assert {metric["name"]: metric["value"] for metric in result["metrics"]} == expected
    assert result["dataset"]["args"] == {"sha256_of_rows": record.provenance.dataset_fingerprint}
    assert result["dataset"]["split"] == "test"


@pytest.mark.parametrize(
    ("dotted", "value", "shown"),
    [
        ("quality.macro_f1", 0.12344, "| 12.34 ("),
        ("quality.macro_f1_ci95", [0.1, 0.2], " (10.00 to 20.00) |"),
        ("quality.accuracy", 0.43211, "| 43.21 |"),
        ("size.megabytes", 1234.5, "| 1234.5 |"),
        ("latency_ms.p50", 17.123, "| 17.123 |"),
        ("throughput_per_s.value", 987.6, "| 987.6 |"),
        ("latency_ms.p95", 18.321, "| 18.321 |"),
        ("environment.cpu", "Some CPU", "Some CPU, 2 threads"),
        ("encoder.width", 96, " layers of 96, "),
        ("scheme.quantized_layers", 35, "ONNX Runtime: 35 of 38 linear layers"),
        ("scheme.activations", "int4 imagined", "activations in int4 imagined,"),
        ("quality.expected_calibration_error", 0.0567, "5.67 % (ONNX Runtime)"),
    ],
)
def test_a_figure_that_changes_in_the_record_changes_in_the_text(dotted, value, shown, records):
    before = render_card(records, "ptq", "user/mine")
    section, key = dotted.split(".")
    for record in records if section == "encoder" else [of(records, "ptq", "onnx")]:
        setattr(getattr(record, section), key, value)
    after = render_card(records, "ptq", "user/mine")
    assert shown in after and before.count(shown) < after.count(shown)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda record: record.examples.clear(), "examples"),
        (lambda record: record.sha256.clear(), "sha256"),
        (lambda record: record.quality.per_class_f1.pop("love"), "love"),
        (lambda record: record.environment.packages.pop("onnxruntime"), "onnxruntime"),
        (lambda record: setattr(record.quality, "split", "validation"), "not for a card"),
        (lambda record: setattr(record.provenance, "dataset_source", "sample"), "not for a card"),
        (lambda record: setattr(record.provenance, "dataset_fingerprint", record.name), "not scored on the same rows"),
    ],
)
def test_what_is_missing_or_not_comparable_gets_no_card(damage, message, records):
    for record in records:
        damage(record)
    with pytest.raises(UserError, match=message):
        render_card(records, "ptq", "user/mine")


def test_no_gap_is_left_and_twice_is_the_same(records, tmp_path):
    cards = render_cards(records, tmp_path)
    published = {record.variant for record in records if record.format != "adapter"} - {"ptq-dynamic"}
    assert {path.name for path in cards} == {f"{variant}.md" for variant in published}
    for path, text in cards.items():
        for gap in ("More Information Needed", "TODO", "None", "nan", "{%", "{{ ", "Undefined"):
            assert gap not in text, (path, gap)
        assert "](../results/confusion_matrices/" in text
    assert render_cards(copy.deepcopy(records), tmp_path) == cards


@pytest.mark.parametrize("base_model", ["tiny-bert", "/home/me/bert"])
def test_another_dataset_and_a_local_base_model_are_not_linked(base_model, records):
    for record in records:
        record.provenance.base_model = BASE_SIZE_MODEL
    data = ModelCard(render_card(records, "baseline", "user/mine")).data.to_dict()
    assert (data["base_model"], data["license"]) == (BASE_SIZE_MODEL, "apache-2.0")
    for record in records:
        record.provenance.dataset, record.provenance.base_model = "colors", base_model
    text = render_card(records, "baseline", "user/mine")
    data = ModelCard(text).data.to_dict()
    assert "tweets" not in text and "datasets" not in data and "language" not in data and f"({base_model})" not in text
    assert "base_model" not in data and "base_model_relation" not in data and data["license"] == "other"


def test_means_over_seeds_come_first(records):
    seeds = read_means(ROOT / "results")
    (row,) = [row for row in seeds if (row["variant"], row["format"]) == ("ptq", "onnx")]
    row["macro_f1"], row["seeds"] = {"mean": 0.12345, "standard_deviation": 0.0678}, [1, 2, 3, 4]
    results = render_card(records, "ptq", "user/mine", seeds=seeds).split("## Results")[1]
    assert re.search(r" \| 4†? \| 12.35 ± 6.78 \|", results)
    without = render_card(records, "ptq", "user/mine").split("## Results")[1]
    assert "seed 42, chosen" in results and "±" not in without and "chosen" not in without


def test_outlier_channels_and_fallbacks_are_shown(records):
    record = of(records, "ptq-int2", "onnx")
    channels = sum(map(len, record.provenance.outlier_channels["channels"].values()))
    tried = [f"**{step['fallback']}** (kept)" if step.get("kept") else step["fallback"] for step in record.fallbacks]
    text = " ".join(render_card(records, "ptq-int2", "user/mine").split())
    assert channels and f"{channels} outlier channels" in text
    assert len(tried) > 1 and f"{'; '.join(tried)}." in text
    plain = render_card(records, "ptq", "user/mine")
    assert "outlier channels" not in plain and "(kept)" not in plain


def test_the_other_variants_are_linked(records):
    seeds = read_means(ROOT / "results")
    text = render_card(records, "ptq", "me/mood-ptq", seeds=seeds, code="https://github.com/me/code")
    lines = dict(re.findall(r"\| (.+) \| [\w ]+ \| ([\d.]+ \| [\d.]+ ± [\d.]+) \|", text.split("## Variants")[1]))
    names = []
    for name in RELEASED:
        link = f"[{name}](https://huggingface.co/me/mood-{name})" if name != "ptq" else "**ptq** (this model)"
        names.append(link + (", recommended" if name == RECOMMENDED else ""))
    assert list(lines) == names and "[code](https://github.com/me/code)" in text
    assert "| [qlora](https://huggingface.co/me/mood-qlora) | bitsandbytes NF4 | " in text  # as it is released
    megabytes = of(records, RECOMMENDED, "onnx").size.megabytes
    assert lines[names[list(RELEASED).index(RECOMMENDED)]].startswith(f"{megabytes} | ")
    # What was scored on other rows is in no table with this one.
    of(records, "qat", "onnx").provenance.dataset_fingerprint = "other"
    for format in ("torchao", "openvino"):
        records.remove(of(records, "qat", format))
    assert "me/mood-qat)" not in render_card(records, "ptq", "me/mood-ptq", seeds=seeds)


def test_the_name_of_a_sibling():
    for repo_id, other in {"me/mood-ptq": "me/mood-baseline", "me/optq": "me/bert-emotion-baseline"}.items():
        assert sibling(repo_id, "ptq", "baseline") == other


@pytest.mark.parametrize(("variant", "name"), [("baseline", ""), ("qat", "baseline."), ("qlora", "")])
def test_hyperparameters_are_those_that_were_used(variant, name, records):
    text = render_card(records, variant, "user/mine")
    assert f"{name}model_name_or_path: {EMBEDDED_MODEL};" in text and "bert-base-uncased" not in text
    recipe = of(records, variant, "onnx").provenance.recipe
    assert f"learning_rate: {recipe['learning_rate']};" in text
    assert "disable_tqdm" not in text and "report_to" not in text


def example(text, meant, **scores):
    return Example(text=text, meant=meant, scores=scores)


@pytest.mark.parametrize(
    ("examples", "shown"),
    [
        ([example("a", "joy", joy=0.6, fear=0.4), example("b", "joy", joy=0.9, fear=0.1)], "b"),
        # The second is answered wrongly
        ([example("a", "joy", joy=0.6, fear=0.4), example("b", "fear", joy=0.7, fear=0.3)], "a"),
        ([example("b", "fear", joy=0.2, fear=0.8), example("a", "joy", joy=0.6, fear=0.4)], "ba"),
        # Of another dataset, whose classes are not those that the texts are meant for
        ([example("a", "joy", red=1.0), example("b", "joy", red=0.9), example("c", "fear", red=0.8)], "ac"),
        ([example("a", None, joy=1.0), example("b", None, joy=1.0)], "ab"),  # of an older record
    ],
)
def test_the_widget_shows_what_is_answered_clearly(examples, shown):
    assert "".join(one.text for one in clearest(examples)) == shown


@pytest.mark.parametrize(
    ("origin", "url"),
    [
        ("https://github.com/me/code.git", "https://github.com/me/code"),
        ("https://me:secret@github.com/me/code", "https://github.com/me/code"),
        ("git@github.com:me/my.code.git", "https://github.com/me/my.code"),
        ("ssh://git@machine.example.com/me/code", None),
        ("https://notgithub.com/me/code", None),
        ("/home/me/code", None),
    ],
)
def test_a_card_links_to_a_public_repository_alone(origin, url, monkeypatch):
    monkeypatch.setattr(machine, "_git", lambda *words: origin)
    assert machine.code_url() == url
