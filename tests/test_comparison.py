"""The paired tests, the pictures and the report."""

import re
import resource
import shutil
import subprocess

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score

from conftest import ROOT, edit_json, read_json, run_code
from emotion.data import metrics as task_scores
from emotion.data.metrics import macro_f1_interval, resampled_macro_f1
from emotion.evaluation.schema import Measurement, Record
from emotion.evaluation.statistics import NO_LOSS_MARGIN, compare_with, holm, mean_interval
from emotion.hub.render import MOST_NAMED, plot_confusion_matrix
from emotion.utils.errors import UserError
from render_report import compile_report, inputs_of
from report.figures import plot_sensitivity, same_picture

PICTURES = {".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp", ".pdf"}
RNG = np.random.default_rng(0)
LABELS = RNG.choice(3, size=2000, p=[0.6, 0.3, 0.1])


def answers_of(errors: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    answers = LABELS.copy()
    wrong = rng.choice(len(LABELS), size=errors, replace=False)
    answers[wrong] = (answers[wrong] + rng.integers(1, 3, size=errors)) % 3
    return 5.0 * np.eye(3)[answers]


def change_rows(logits: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """The same answers but on so many rows, where another class is answered at random."""
    rng = np.random.default_rng(seed)
    changed, where = logits.copy(), rng.choice(len(logits), size=rows, replace=False)
    changed[where] = np.roll(changed[where], 1, axis=1)
    return changed


def test_the_bootstrap_is_that_of_resampled_rows():
    """Against the plain way: draw rows, score both classifiers on them with scikit-learn, subtract."""
    before, after = answers_of(200, seed=1).argmax(axis=-1), answers_of(260, seed=2).argmax(axis=-1)
    scores = resampled_macro_f1(LABELS, before, after, classes=3, resamples=2000)
    drawn = np.random.default_rng(3).integers(len(LABELS), size=(300, len(LABELS)))
    plain = []
    for one in (before, after):
        plain.append(np.array([f1_score(LABELS[rows], one[rows], average="macro") for rows in drawn]))
    change, plain_change = scores[1] - scores[0], plain[1] - plain[0]
    assert change.mean() == pytest.approx(plain_change.mean(), abs=0.002)
    assert change.std() == pytest.approx(plain_change.std(), rel=0.15)
    exact = resampled_macro_f1(LABELS, before, after, classes=3, resamples=0)[:, 0]
    assert exact == pytest.approx([f1_score(LABELS, one, average="macro") for one in (before, after)])
    interval = macro_f1_interval(np.eye(3)[before], LABELS)
    assert interval == pytest.approx(np.percentile(plain[0], [2.5, 97.5]), abs=0.01)
    assert interval == macro_f1_interval(np.eye(3)[before], LABELS)
    # A class that is only predicted counts.
    exact = resampled_macro_f1(np.array([0, 0, 1]), np.array([0, 2, 1]), classes=3, resamples=0)
    expected = f1_score([0, 0, 1], [0, 2, 1], average="macro", labels=[0, 1, 2], zero_division=0)
    assert exact[0, 0] == pytest.approx(expected)


def test_a_bootstrap_in_pieces_is_the_same(monkeypatch):
    whole = resampled_macro_f1(LABELS, answers_of(200, seed=1).argmax(axis=-1), classes=3, resamples=100)
    monkeypatch.setattr(task_scores, "BOOTSTRAP_CHUNK", 9 * 7)  # 9 cells: 7 resamples at once, and 2 in the end
    pieces = resampled_macro_f1(LABELS, answers_of(200, seed=1).argmax(axis=-1), classes=3, resamples=100)
    assert (whole == pieces).all()


def test_many_classes_take_little_memory(tmp_path):
    """Of 600 classes the counts of all cells and resamples would take 5.8 GB, and a picture with numbers minutes."""
    rng, classes = np.random.default_rng(0), 600
    labels = rng.integers(classes, size=1000)
    answers = np.where(rng.random(1000) < 0.8, labels, rng.integers(classes, size=1000))
    logits = np.zeros((1000, classes), dtype=np.float32)
    logits[np.arange(1000), answers] = 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    low, high = macro_f1_interval(logits, labels)
    assert low < f1_score(labels, answers, average="macro", labels=range(classes), zero_division=0) and low < high
    record = Record.read(ROOT / "results" / "metrics" / "ptq-onnx.json")
    record.quality.labels = [str(index) for index in range(classes)]
    record.quality.confusion_matrix = confusion_matrix(labels, answers, labels=range(classes))
    plot_confusion_matrix(record, tmp_path / "many")
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert classes > MOST_NAMED and grown_kb < 500_000
    assert plt.imread(tmp_path / "many.png").shape[0] < 4000


def test_holm_and_the_interval_over_seeds_of_known_cases():
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx([2 - 2.484, 2 + 2.484], abs=0.001)
    assert mean_interval([1.0]) is None
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([0.2]) == [0.2]


def test_verdicts():
    reference = answers_of(150, seed=1)
    others = {
        "same": reference,
        "alike": change_rows(reference, 4, seed=2),
        "worse": change_rows(reference, 200, seed=3),
        "better": answers_of(40, seed=1),
    }
    found = compare_with(reference, others, LABELS)
    verdicts = {"same": "same answers", "alike": "no loss", "worse": "worse", "better": "better"}
    assert {name: one["verdict"] for name, one in found.items()} == verdicts
    assert found["same"]["flips"] == 0 and found["worse"]["flips"] == 200
    assert found["worse"]["change"] < 0 and found["worse"]["p_mcnemar_holm"] < 0.001
    assert found["alike"]["p_macro_f1_holm"] > 0.05
    low, high = found["alike"]["change_ci95"]
    assert -NO_LOSS_MARGIN < low <= found["alike"]["change"] <= high < NO_LOSS_MARGIN


def test_few_rows_support_nothing():
    """The same share of changed answers, on a tenth of the rows: neither a loss nor its absence is shown."""
    reference, rows = answers_of(150, seed=1)[:200], LABELS[:200]
    one = compare_with(reference, {"alike": change_rows(reference, 3, seed=3)}, rows)["alike"]
    assert one["flips"] == 3 and one["verdict"] == "undecided"
    assert one["minimum_detectable_effect"] > NO_LOSS_MARGIN
    # McNemar's test counts rows, not scores.
    right = np.flatnonzero(reference.argmax(axis=-1) == rows)[:6]
    after = reference.copy()
    after[right] = np.roll(after[right], 1, axis=1)
    one = compare_with(reference, {"one": after}, rows)["one"]
    assert (one["lost"], one["won"]) == (6, 0) and one["p_mcnemar"] == pytest.approx(2 / 2**6)


def test_no_loss_is_seldom_said_of_a_loss_as_large_as_the_margin():
    """Thirty draws of test rows from a truth that is worse by 1.0 points: the claim must be wrong in 5 % at most."""
    wrong = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        labels = rng.integers(3, size=2000)
        before = np.where(rng.random(2000) < 0.07, (labels + 1) % 3, labels)
        spoilt = np.where(rng.random(2000) < 0.0108, (labels + 1) % 3, before)
        found = compare_with(np.eye(3)[before], {"one": np.eye(3)[spoilt]}, labels)["one"]
        wrong += found["p_margin_holm"] < 0.05
    assert wrong <= 4  # 1.5 expected


def test_pictures_are_the_same_again_and_a_changed_one_is_found(tmp_path):
    study = Measurement.read(ROOT / "results" / "ptq_sensitivity.json")
    plot_sensitivity(study, tmp_path / "one")
    plot_sensitivity(study, tmp_path / "two")
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "two.png"}  # one format alone
    assert one.read_bytes() == two.read_bytes() and same_picture(one, two)
    study.layers[0]["mean_logit_shift"] += 0.5
    plot_sensitivity(study, tmp_path / "two")
    assert not same_picture(one, two) and not same_picture(one, tmp_path / "three.png")
    # One step of 255 in one of 40,000 pixels is another processor's rounding; a visible mark is not.
    pixels = np.full((200, 200, 3), 128, dtype=np.uint8)
    plt.imsave(one, pixels)
    pixels[7, 7, 1] += 1
    plt.imsave(two, pixels)
    assert one.read_bytes() != two.read_bytes() and same_picture(one, two)
    pixels[5:9, 5:9] = 0
    for changed in (pixels, pixels[:199]):
        plt.imsave(two, changed)
        assert not same_picture(one, two)


def test_each_tracked_picture_of_the_results_is_shown_on_a_tracked_page():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    tracked = [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    pictures = {path for path in tracked if path.is_relative_to(ROOT / "results") and path.suffix in PICTURES}
    shown = set()
    for page in tracked:
        if page.suffix == ".md" and page.name != "template.md":
            for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
                shown.add((page.parent / link).resolve())
        elif page.suffix == ".typ":
            # Typst counts its paths from the root of the repository.
            for name in re.findall(r'"/?(results/[^"]+)"', page.read_text(encoding="utf-8")):
                shown.add(ROOT / name)
    assert pictures and pictures <= shown, f"no page shows {pictures - shown}"
    assert {path.suffix for path in pictures} == {".png"}


def test_rendering_needs_neither_torch_nor_a_quantizer():
    code = (
        "import sys, render_report; render_report.main(['--print_only']); "
        "print({'torch', 'onnxruntime', 'openvino', 'torchao'} & sys.modules.keys())"
    )
    done = run_code(code, cwd=ROOT / "tools")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("set()")


@pytest.fixture
def report_folder(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "results", tmp_path / "results")
    return tmp_path


def words_of_report(folder) -> str:
    import typst

    source, inputs = folder / "docs" / "report.typ", inputs_of(folder)
    page = typst.compile(source, root=folder, format="html", ignore_system_fonts=True, sys_inputs=inputs).decode()
    return " ".join(re.sub(r"<[^>]+>", " ", page.split("<body>")[1]).replace("\u00a0", " ").split())


def test_the_report_reads_the_records(report_folder):
    import typst

    report = compile_report(report_folder)
    assert report.startswith(b"%PDF") and compile_report(report_folder) == report
    source, inputs = report_folder / "docs" / "report.typ", inputs_of(report_folder)
    options = {"root": report_folder, "ignore_system_fonts": True, "sys_inputs": inputs}
    assert 5 <= len(typst.compile(source, format="png", ppi=20, **options)) <= 8
    path = report_folder / "results" / "comparison.json"
    number = [row["variant"] for row in read_json(path)["seeds"]].index("qat-int4")
    edit_json(path, f"seeds/{number}/macro_f1/mean", 0.123456)
    assert compile_report(report_folder) != report and "12.35 %" in words_of_report(report_folder)


def test_the_report_shows_no_deviation_of_one_training_and_no_time_of_a_resumed_one(report_folder):
    path, record = (report_folder / "results" / name for name in ("comparison.json", "metrics/qat-int4-onnx.json"))
    edit_json(path, "seeds", [])
    edit_json(record, "provenance/training/cpu_seconds", 3 * 60)
    (row,) = [row for row in read_json(path)["rows"] if row["name"] == "qat-int4-onnx"]
    for resumed, shown in ((False, " QAT INT4 3.0 min "), (True, " QAT INT4 – ")):
        edit_json(record, "provenance/training/resumed", resumed)
        words = words_of_report(report_folder)
        assert f" {row['megabytes']:.1f} {100 * row['macro_f1']:.2f} – " in words and shown in words


def test_the_report_does_without_what_was_not_measured_and_says_what_it_lacks(report_folder):
    results = report_folder / "results"
    for path in results.glob("*.*"):
        if path.name not in {"comparison.json", "dataset.png"}:
            path.unlink()
    shutil.rmtree(results / "figures", ignore_errors=True)
    shutil.rmtree(results / "benchmark")
    assert compile_report(report_folder).startswith(b"%PDF")
    (results / "metrics" / "baseline-pytorch.json").unlink()
    with pytest.raises(UserError, match="report.typ: .*baseline-pytorch.json"):
        compile_report(report_folder)
