"""Damaged results: each ends in one line that names the file and the field, before anything is written."""

import random
import shutil

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from pyarrow import parquet
from pydantic import BaseModel

import render_report
from conftest import ROOT, contents, edit_json, read_json, save_dataset, seeds_for
from emotion.data.dataset import load_task
from emotion.evaluation import statistics as paired_tests
from emotion.evaluation.record import read_records
from emotion.evaluation.schema import Benchmark, Measurement, Record, Seeds
from emotion.utils.errors import UserError
from mutations import damage_results

RESULTS = ROOT / "results"
NAMES = ("baseline-pytorch", "ptq-onnx")
RECORD = "metrics/ptq-onnx.json"
BENCHMARK = "benchmark/avx512_vnni.json"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of two records, and of all studies, of the tracked results."""
    monkeypatch.setattr(paired_tests, "RESAMPLES", 200)
    folder = tmp_path / "results"
    for name in NAMES:
        for file in (f"metrics/{name}.json", f"predictions/{name}.parquet"):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(RESULTS / file, folder / file)
    for path in [*RESULTS.glob("*.json"), *RESULTS.glob("benchmark/*.json"), *RESULTS.glob("seeds/*.json")]:
        target = folder / path.relative_to(RESULTS)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return folder


def pages_of(folder) -> dict:
    readme = folder.parent / "README.md"
    readme.write_text(f"{render_report.START}\n{render_report.END}\n")
    family = render_report.read_family(folder)
    return render_report.render_family(family, []) | render_report.render_pages([family], readme)


@pytest.mark.parametrize(
    ("file", "place", "value"),
    [
        (RECORD, "quality/macro_f1", 0.9999),
        (RECORD, "quality/macro_f1", float("nan")),
        (RECORD, "quality/accuracy", 0.5),
        (RECORD, "quality/per_class_f1/joy", 0.5),
        (RECORD, "quality/confusion_matrix/0/0", 7),
        (RECORD, "quality/macro_f1_ci95", [0.5, 0.99]),
        (RECORD, "quality/expected_calibration_error", 0.0),
        (RECORD, "quality/examples", 1999),
        (RECORD, "quality/labels/0", "joy"),
        (RECORD, "quality/conflict_free/examples", 2001),
        (RECORD, "size/bytes_to_serve", 1),
        (RECORD, "size/megabytes", 0.01),
        (RECORD, "latency_ms/p50", -1.0),
        (RECORD, "latency_ms/p50", 100.0),
        (RECORD, "variant", "../../elsewhere"),
        (RECORD, "examples/1/scores/joy", 3.0),
        (BENCHMARK, "compared_with", "nobody"),
        (BENCHMARK, "artifacts/weights~ptq:onnx/latency_ms/p50", 0),
        (BENCHMARK, "artifacts/weights~ptq:onnx/times_faster_at_batch_1", {"median": 9, "min": 1, "max": 2}),
        (BENCHMARK, "environment/instruction_sets", ["avx2"]),
        ("seeds/ptq.json", "formats/onnx/macro_f1/mean", 0.99),
        ("seeds/ptq.json", "runs/0/formats/onnx/macro_f1", 0.99),
        ("seeds/ptq.json", "chosen_seed", 7),
        ("dataset.json", "splits/test/class_counts", [2000]),
        ("qlora_sweep.json", "chosen", "nobody"),
    ],
)
def test_a_damaged_field_is_named(file, place, value, results):
    edit_json(results / file, place, value)
    before = contents(results)
    with pytest.raises(UserError, match=file.split("/")[-1]) as error:
        pages_of(results)
    assert len(str(error.value).splitlines()) == 1 and contents(results) == before


def required_fields(model, *place):
    """The places of the fields that a file of this model must have: those of its own, and of the parts inside."""
    for name, field in model.model_fields.items():
        if field.is_required():
            yield (*place, name)
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from required_fields(field.annotation, *place, name)


FILES = {RECORD: Record, BENCHMARK: Benchmark, "seeds/ptq.json": Seeds, "dataset.json": Measurement}


@pytest.mark.parametrize("file", FILES)
def test_every_field_that_is_missing_is_named(file, tmp_path):
    model = FILES[file]
    places = list(required_fields(model))
    assert len(places) >= 4
    for place in places:
        shutil.copy(RESULTS / file, tmp_path / "file.json")
        edit_json(tmp_path / "file.json", "/".join(place), ...)
        with pytest.raises(UserError, match=f"^{file}: '{'.'.join(place)}"):
            model.check(read_json(tmp_path / "file.json"), file)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"[" * 5000, b'{"a": NaN}', b'{"a": "\xff"}'])
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_no_json_object_is_named(file, content, results):
    (results / file).write_bytes(content)
    with pytest.raises(UserError, match=file.split("/")[-1]):
        pages_of(results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row, label, logits: (row[::-1], label[::-1], logits[::-1]), "'row'"),
        (lambda row, label, logits: (row, label[::-1], logits[::-1]), "baseline-pytorch"),
        (lambda row, label, logits: (row[:-1], label[:-1], logits[:-1]), "'quality.examples'"),
        (lambda row, label, logits: ([], [], []), "'logits' is empty"),
        (lambda row, label, logits: (row, [one + 1 for one in label], logits), "'label'"),
        (lambda row, label, logits: (row, label, [[float("nan")] * 6] + logits[1:]), "'logits' are not finite"),
        (lambda row, label, logits: (row, label, [one[1:] for one in logits]), "'label'|'quality.labels'"),
        (lambda row, label, logits: (row, label, [logits[0][1:]] + logits[1:]), "different lengths"),
        (lambda row, label, logits: (row, list(map(str, label)), logits), "ptq-onnx.parquet.* not int64"),
        (lambda row, label, logits: (list(map(float, row)), label, logits), "ptq-onnx.parquet.* not int64"),
        (lambda row, label, logits: (row, None, logits), "ptq-onnx.parquet"),
        (lambda row, label, logits: (row, label, [[2 * x for x in one] for one in logits]), "'quality.expected_cal"),
    ],
)
def test_predictions_that_are_not_the_records_are_named(change, message, results):
    path = results / "predictions" / "ptq-onnx.parquet"
    table = parquet.read_table(path)
    row, label, logits = change(*(table[name].to_pylist() for name in ("row", "label", "logits")))
    if not row:
        row, label = pyarrow.array(row, pyarrow.int64()), pyarrow.array(label, pyarrow.int64())
    columns = {"row": row, "label": label, "logits": pyarrow.array(logits, pyarrow.list_(pyarrow.float32()))}
    columns = {name: column for name, column in columns.items() if column is not None}
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(UserError, match=message) as error:
        read_records(results)
    assert "ptq-onnx" in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("kept", [None, 0, 100, 20_000])
def test_truncated_or_missing_predictions_are_named(kept, results):
    path = results / "predictions" / "ptq-onnx.parquet"
    path.unlink() if kept is None else path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="ptq-onnx.parquet"):
        read_records(results)


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", seeds_for(40))
def test_no_damage_of_results_ends_in_a_traceback(seed, results):
    """What it did is either said in one line, or was in a field that no page shows, or is as good as another value."""
    done = damage_results(results, random.Random(seed))
    try:
        pages = pages_of(results)
    except UserError as error:
        assert len(str(error).splitlines()) == 1, done
    else:
        assert not any(word in text.split() for text in pages.values() for word in ("nan", "inf")), done


@pytest.mark.parametrize("names", [["b", "a"], ["a", "b", "c"], ["a", "c"]])
@pytest.mark.parametrize("on_disk", [True, False])
def test_splits_that_name_the_classes_otherwise_are_refused(names, on_disk, tmp_path):
    columns, splits = {"text": ["x", "y"], "label": [0, 1]}, {}
    for split, one in (("train", ["a", "b"]), ("test", names)):
        features = Features({"text": Value("string"), "label": ClassLabel(names=one)})
        splits[split] = Dataset.from_dict(columns, features=features)
        save_dataset(tmp_path / "files", {split: columns}, features)
    DatasetDict(splits).save_to_disk(tmp_path / "disk")
    with pytest.raises(UserError, match="the labels are a|the labels are b"):
        load_task(str(tmp_path / ("disk" if on_disk else "files")))
