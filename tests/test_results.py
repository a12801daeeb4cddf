"""What is rendered from the records: tables, the README, pages; the benchmark, the seeds and the dataset study."""

import re
import shutil

import numpy as np
import pytest
import yaml
from pyarrow import parquet
from sklearn.metrics import f1_score

import render_report
import run_baseline
import run_benchmark
import run_evaluation
import text_baselines
import train_seeds
from conftest import HAS_OPTIMUM, ROOT, contents, copy_to_edit, edit_json, read_json
from emotion.evaluation import benchmark, roofline
from emotion.evaluation.record import read_predictions
from emotion.evaluation.schema import Seeds
from emotion.hub.comparison import list_means, score_ensemble
from emotion.hub.render import shorten
from emotion.utils.arguments import resolve_config
from emotion.utils.errors import UserError
from emotion.utils.machine import ARM, PROCESSORS, class_of
from report.pages import find_line, render_block

SHORT_RUN = "--rounds 3 --texts 20 --batches 2 --threads 1 --cold_starts 1".split()


@pytest.fixture(scope="module")
def measured(artifact, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    for format in ("pytorch", "onnx"):
        run_evaluation.main([str(artifact), "--format", format, "--results_dir", str(folder), "--latency_runs", "200"])
    named = [f"{artifact}:{one}" for one in ("pytorch", "onnx", "onnx-dynamic", "openvino-plain", "pytorch-dynamic")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "SIZE", 256)
        patch.setattr(roofline, "COPIED_BYTES", 2**24)
        run_benchmark.main([*named, *SHORT_RUN, "--texts_end_to_end", "64", "--output", str(folder / "run.json")])
    run = read_json(folder / "run.json")
    # By hand, since these tests pass where instructions are hidden too.
    (folder / "benchmark").mkdir()
    name = class_of(run["environment"]["instruction_sets"]) or ARM
    (folder / "run.json").rename(folder / "benchmark" / f"{name}.json")
    return folder


def run_file(folder):
    (path,) = [path for path in (folder / "benchmark").glob("*.json") if path.stem in PROCESSORS]
    return path


@pytest.fixture
def page(measured, tmp_path):
    """A copy of the results, and a README with an empty block."""
    shutil.copytree(measured, tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{render_report.START}\noutdated\n{render_report.END}\n\nend\n")
    return ["--results_dir", str(tmp_path / "results"), "--readme", str(readme)]


def test_the_block_shows_the_records_and_nothing_else_changes(page, tmp_path):
    render_report.main(page)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Title\n") and text.endswith("\n\nend\n") and "outdated" not in text
    record = read_json(tmp_path / "results" / "metrics" / "baseline-onnx.json")
    path = run_file(tmp_path / "results")
    run, processor = read_json(path), PROCESSORS[path.stem]
    timed = run["artifacts"]["baseline:onnx"]
    (line,) = [line for line in text.splitlines() if line.startswith("| FP32 ")]
    fastest = run["artifacts"][run["compared_with"]]  # FP32 in whichever form is the fastest here
    assert f" {100 * record['quality']['macro_f1']:.2f} |" in line and line.endswith(" (1.0x) |")
    cells = [cell.strip() for cell in line.split("|")]
    assert (
        cells[3] == f"{fastest['bytes_to_serve'] / 1e6:.1f}"
        and cells[7] == f"{fastest['latency_ms']['p50']:.2f} (1.0x)"
    )
    assert f"| ms, {processor} |" in text.replace("  ", "")
    assert record["environment"]["cpu"] in text and shorten(run["git_commit"]) in text
    assert "Take" not in text  # the recommended one was not measured here
    page = (tmp_path / "results" / "comparison.md").read_text()
    (line,) = [line for line in page.splitlines() if re.match(r"\| baseline +\| +onnx \|", line)]
    assert f"{timed['latency_ms']['p50']:.2f}" in line  # of the interleaved run, which the columns beside it divide
    assert "**" not in page  # no single seed's number in bold


def test_rendering_twice_changes_nothing_and_an_edit_by_hand_is_found(page, tmp_path):
    render_report.main(page)
    before = contents(tmp_path)
    render_report.main([*page, "--check"])
    render_report.main(page)
    assert contents(tmp_path) == before
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text().replace("| FP32 ", "| the best "))
    with pytest.raises(UserError, match="README.md"):
        render_report.main([*page, "--check"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("latency_ms/p95", ..., "baseline-onnx.json: 'latency_ms.p95'"),
        ("provenance/dataset_source", "sample", "not for the README"),
        ("provenance/train_dataset_source", "sample", "not for the README"),
        ("provenance/recipe", {"max_train_samples": 100}, "max_train_samples"),
        ("quality/split", "validation", "not for the README"),
        ("provenance/dataset_fingerprint", "other", "not scored on the same rows"),
    ],
)
def test_what_is_missing_or_not_comparable_does_not_enter_the_readme(field, value, message, page, tmp_path):
    edit_json(tmp_path / "results" / "metrics" / "baseline-onnx.json", field, value)
    with pytest.raises(UserError, match=message):
        render_report.main(page)
    assert "outdated" in (tmp_path / "README.md").read_text()


def test_classifiers_without_a_network_stand_beside_the_models(page, colors, tmp_path):
    text_baselines.main(["--dataset_name", str(colors), "--results_dir", str(tmp_path / "results")])
    models = read_json(tmp_path / "results" / "text_baselines.json")["models"]
    scores = {name: model["quality"] for name, model in models.items()}
    assert scores["TF-IDF with logistic regression"]["macro_f1"] > 0.9  # the colors are words
    counts = np.sum(scores["majority class"]["confusion_matrix"], axis=1)
    assert scores["majority class"]["accuracy"] == counts.max() / counts.sum()
    render_report.main(page)
    text = (tmp_path / "results" / "comparison.md").read_text()
    assert all(f"| {name} " in text for name in scores) and "without a neural network" in text
    edit_json(tmp_path / "results" / "text_baselines.json", "models/majority class/quality/macro_f1", 2)
    with pytest.raises(UserError, match="text_baselines.json"):
        render_report.main(page)


def test_a_readme_without_markers_is_left_alone_and_no_records_are_said(page, tmp_path):
    (tmp_path / "README.md").write_text("# Title\n")
    with pytest.raises(UserError, match="needs one line"):
        render_report.main(page)
    assert (tmp_path / "README.md").read_text() == "# Title\n"
    with pytest.raises(UserError, match="no records in"):
        render_report.main([str(tmp_path), "--print_only"])


def test_the_benchmark_divides_what_one_run_measured(measured, artifact):
    run = read_json(run_file(measured))
    first_name, other_name = "baseline:pytorch", "baseline:onnx"
    medians = {name: run["artifacts"][name]["latency_ms"]["p50"] for name in (first_name, other_name)}
    assert run["compared_with"] == min(medians, key=medians.get) and run["environment"]["threads"] == 1
    first_name, other_name = sorted(medians, key=medians.get)
    first, other = run["artifacts"][first_name], run["artifacts"][other_name]
    assert first["times_faster_at_batch_1"] == {"median": 1.0, "min": 1.0, "max": 1.0} and first["equal_labels"] == 1
    assert first["precision"] == "float32" and first["cold_start_ms"]["median"] > first["latency_ms"]["p50"]
    roofline = first["roofline"]["batch_1"]
    # Both are rounded, and with so small a model a digit in the last place is a percent of them.
    assert roofline["share"] == pytest.approx(roofline["least_ms"] / first["latency_ms"]["mean"], rel=0.02)
    for peer in ("onnx-dynamic", "pytorch-dynamic"):
        assert run["artifacts"][f"baseline:{peer}"]["precision"] == "int8"
    plain = run["artifacts"].get("baseline:openvino-plain")  # optimum-intel's export
    assert bool(plain) == HAS_OPTIMUM and (not plain or plain["equal_labels"] > 0.95)
    assert all(one["latency_ms"]["runs"] == 60 for one in run["artifacts"].values())
    ratio = first["latency_ms"]["p50"] / other["latency_ms"]["p50"]
    spread = other["times_faster_at_batch_1"]
    assert 0 < spread["min"] <= spread["median"] <= spread["max"] and run["texts_end_to_end_a_round"] == 64
    for one in run["artifacts"].values():
        assert 0 < one["end_to_end_per_s"]["min"] <= one["end_to_end_per_s"]["max"]
        assert set(one["noise"]) == {"batch_1", "batch_32", "end_to_end"}
    assert run["artifacts"][run["compared_with"]]["times_faster_end_to_end"]["median"] == 1
    assert spread["min"] * 0.7 <= ratio <= spread["max"] * 1.4


def test_every_round_draws_texts_of_the_same_lengths():
    texts, rng = ["x" * length for length in range(1, 2001)], np.random.default_rng(0)
    draws = [benchmark.draw_texts(texts, 50, rng) for _ in range(5)]
    medians = [np.median([len(text) for text in drawn]) for drawn in draws]
    assert max(medians) - min(medians) < 60 and len({tuple(drawn) for drawn in draws}) == 5
    assert draws[0] != sorted(draws[0], key=len)
    assert len(benchmark.draw_texts(texts[:3], 50, rng)) == 50  # more than there are


def test_noise_is_the_spread_of_the_middle_half():
    assert benchmark.noise_of([10, 10, 10, 10, 90]) == 0  # one disturbed round moves no median
    assert benchmark.noise_of([8, 9, 10, 11, 12]) == pytest.approx(0.2)
    steady, shaken = {"noise": {"batch_1": 0.02, "batch_32": 0.1}}, {"noise": {"batch_1": 0.02, "batch_32": 0.11}}
    assert benchmark.list_noisy({"steady": steady, "shaken": shaken}) == ["shaken"]


def test_the_page_names_noisy_models(page, tmp_path):
    path = run_file(tmp_path / "results")
    run = read_json(path)
    assert run["too_noisy"] == benchmark.list_noisy(run["artifacts"])
    edit_json(path, "too_noisy", ["baseline:onnx"])
    render_report.main(page)
    text = (tmp_path / "results" / "comparison.md").read_text()
    assert re.search("noisy.*`baseline:onnx`", text) and "64 texts" in text  # end to end


@pytest.mark.processes
def test_a_compiled_model_is_timed(artifact, tmp_path):
    named = [f"{artifact}:{one}" for one in ("pytorch", "pytorch-compiled")]
    flags = ["--texts_end_to_end", "0", "--roofline", "false", "--output", "compiled.json"]
    run_benchmark.main([*named, *SHORT_RUN, *flags])
    compiled = read_json(tmp_path / "compiled.json")["artifacts"]["baseline:pytorch-compiled"]
    assert compiled["latency_ms"]["runs"] == 60 and compiled["equal_labels"] > 0.99
    assert compiled["end_to_end_per_s"] is None


def test_the_benchmark_says_what_cannot_be_opened(artifact, tmp_path):
    copy_to_edit(artifact, tmp_path / "broken")
    (tmp_path / "broken" / "onnx" / "model.onnx").write_bytes(b"not a graph")
    for format, noun in (("onnx", "ONNX Runtime"), ("gguf", "'gguf'")):
        with pytest.raises(UserError, match=noun):
            run_benchmark.main([f"{tmp_path / 'broken'}:{format}"])


@pytest.mark.parametrize("seeds", [["42", "42"], ["1", "2", "1"]])
def test_a_seed_counts_once(seeds, tmp_path):
    with pytest.raises(UserError, match=f"--seeds {' '.join(seeds)}"):
        train_seeds.main(["ptq", "--seeds", *seeds, "--weights_dir", str(tmp_path), "--results_dir", str(tmp_path)])


@pytest.mark.processes
def test_seeds_are_scored_and_the_best_on_validation_is_kept(encoder, colors, tmp_path, capsys, in_this_process):
    config = baseline_config(tmp_path, encoder, colors)
    folders = {"config_dir": tmp_path, "weights_dir": tmp_path / "weights", "results_dir": tmp_path / "results"}
    words = ["--seeds", "1", "2", *(word for name, path in folders.items() for word in (f"--{name}", str(path)))]
    train_seeds.main(["baseline", *words])
    summary = read_json(tmp_path / "results" / "seeds" / "baseline.json")
    runs = {one["seed"]: one for one in summary["runs"]}
    assert summary["macro_f1"]["mean"] == pytest.approx((runs[1]["macro_f1"] + runs[2]["macro_f1"]) / 2)
    best = max(runs.values(), key=lambda one: one["validation_macro_f1"])
    assert summary["chosen_seed"] == best["seed"]
    chosen = (tmp_path / "weights" / "baseline" / "model.safetensors").read_bytes()
    assert chosen == (tmp_path / "weights" / "seeds" / f"baseline-{best['seed']}" / "model.safetensors").read_bytes()
    artifact = tmp_path / "weights" / "seeds" / "baseline-1"
    values = resolve_config(run_baseline.ARGUMENTS, [config]).values
    assert train_seeds.is_up_to_date(artifact, values | {"seed": 1}, None)
    assert train_seeds.is_up_to_date(artifact, values | {"seed": 1.0}, None)  # a number is what it is worth
    assert not train_seeds.is_up_to_date(artifact, values | {"seed": 2}, None)
    assert not train_seeds.is_up_to_date(artifact, values | {"seed": 1, "num_train_epochs": 2}, None)

    (tmp_path / "ptq.yaml").write_text("formats: [onnx]\nnum_calibration_samples: 30\n")
    train_seeds.main(["ptq", *words])
    summary_of_ptq = read_json(tmp_path / "results" / "seeds" / "ptq.json")
    assert summary_of_ptq["chosen_seed"] == best["seed"]
    changes = [one["formats"]["onnx"]["macro_f1"] - runs[one["seed"]]["macro_f1"] for one in summary_of_ptq["runs"]]
    assert summary_of_ptq["formats"]["onnx"]["change"]["mean"] == pytest.approx(sum(changes) / 2)
    made = yaml.safe_load((tmp_path / "weights" / "ptq" / "recipe.yaml").read_text())
    assert made["seed"] == best["seed"] and made["recipe"]["num_calibration_samples"] == 30
    (row,) = list_means([(Seeds.read(tmp_path / "results" / "seeds" / "ptq.json"), [])])
    low, high = row["change_ci95"]
    assert low <= row["change"].mean <= high


def test_a_seed_with_another_format_counts_in_that_format():
    scores = {"macro_f1": 0.9, "accuracy": 0.9, "conflict_free_macro_f1": 0.9, "change": 0.01, "flips": 2}
    runs = []
    for seed, root in ((1, "nf4"), (2, "bf16")):
        runs.append({"seed": seed, "validation_macro_f1": None, "formats": {root: scores, "onnx": scores}})
    summary = {"variant": "qlora", "chosen_seed": 1, "runs": runs, **train_seeds.summarize(runs)}
    rows = list_means([(Seeds.check(summary, "qlora.json"), [])])
    assert {row["format"]: row["seeds"] for row in rows} == {"nf4": [1], "onnx": [1, 2], "bf16": [2]}


def baseline_config(folder, encoder, colors):
    values = {"model_name_or_path": str(encoder), "dataset_name": str(colors), "learning_rate": 5e-3, "bf16": False}
    (folder / "baseline.yaml").write_text(yaml.safe_dump(values | {"num_train_epochs": 1}))
    return folder / "baseline.yaml"


@pytest.fixture(scope="module")
def families():
    return [render_report.read_family(ROOT / "results" / name) for name in ("", "mpnet-base")]


def test_the_readme_shows_means_of_eight_models(families):
    table = [line for line in render_block(families, ROOT).splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip().rstrip("†") for line in table[2:]]
    bits = ["INT8", "INT4", "INT2"]
    assert names[:7] == ["FP32", *(f"PTQ {one}" for one in bits), *(f"QAT {one}" for one in bits)] and len(names) == 8
    assert names[7] == "QLoRA INT8"  # its fastest file
    summary = read_json(ROOT / "results" / "seeds" / "qat-int4.json")["formats"]["onnx"]["macro_f1"]
    (row,) = [line for line in table if line.startswith("| QAT INT4")]
    assert f" {100 * summary['mean']:.2f} ± {100 * summary['standard_deviation']:.2f} |" in row and "**" not in row
    # One seed is not shown as a mean.
    comparison = families[0].comparison | {"seeds": []}
    line = find_line(comparison, "qat-int4")
    assert line["macro_f1"]["standard_deviation"] is None and line["change"] is None
    assert line["seeds"] == []


def test_the_ensemble_is_that_of_the_probabilities_of_the_same_rows(families, tmp_path):
    results, shares = ROOT / "results" / "seeds", []
    for seed in families[0].comparison["ensemble"]["seeds"]:
        labels, logits = read_predictions(results / str(seed) / "predictions" / "baseline-pytorch.parquet")
        shares.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    expected = f1_score(labels, np.mean(shares, axis=0).argmax(axis=1), average="macro")
    assert families[0].comparison["ensemble"]["macro_f1"] == pytest.approx(expected)
    assert families[1].comparison["ensemble"] is None  # one seed is none
    shutil.copytree(ROOT / "results" / "seeds", tmp_path / "seeds")
    path = tmp_path / "seeds" / "43" / "predictions" / "baseline-pytorch.parquet"
    table = parquet.read_table(path)
    parquet.write_table(table.slice(0, 100), path)
    summary = Seeds.read(tmp_path / "seeds" / "baseline.json")
    with pytest.raises(UserError, match="43/predictions/baseline-pytorch.parquet"):
        score_ensemble(summary, tmp_path, list("abcdef"))


def test_a_commit_is_short_and_no_result_is_of_code_that_was_changed():
    assert shorten("95508beb9d1bdb53-dirty") == "95508be-dirty" and shorten(None) == "unknown"
    paths = sorted((ROOT / "results").rglob("*.json"))
    assert len(paths) > 100
    assert [path for path in paths if '-dirty"' in path.read_text(encoding="utf-8")] == []


def test_pages_and_pictures_of_the_studies_are_compared_too(page, tmp_path):
    results = tmp_path / "results"
    shutil.copy(ROOT / "results" / "dataset.json", results)
    render_report.main(page)
    render_report.main([*page, "--check"])
    (results / "dataset.md").write_text((results / "dataset.md").read_text().replace("4666", "4667"))
    for name in ("dataset.png", "rounding.png"):
        shutil.copy(results / "figures" / "pareto.png", results / name)
    with pytest.raises(UserError, match="not what the records say") as error:
        render_report.main([*page, "--check"])
    named = re.findall(r"(\w+\.\w+)[,;]", str(error.value))
    assert sorted(named) == ["dataset.md", "dataset.png", "rounding.png"]
