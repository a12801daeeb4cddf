"""The tracked weights: how they are released and verified."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import pipeline

import predict
import release
import run_evaluation
import run_ptq
import run_publish
from conftest import ROOT, contents, edit_json
from emotion import EmotionClassifier
from emotion.inference.model_folder import HOW_TO_GET, LICENSE_FILE, OPENED_AS, RELEASED, SCORES_OF_OPENED
from emotion.utils.errors import UserError
from emotion.utils.files import RECOMMENDED, check_covered, write_json

OF_TEST = ("baseline", "ptq", "qlora")


@pytest.fixture
def three(monkeypatch) -> None:
    for variant in set(RELEASED) - set(OF_TEST):
        monkeypatch.delitem(RELEASED, variant)


def other_record(folder: Path) -> None:
    edit_json(folder / "results" / "metrics" / "ptq-onnx.json", "sha256/onnx~model_quantized.onnx", "0" * 64)


@pytest.fixture(scope="module")
def scored(artifact, quantized, adapted, tmp_path_factory) -> Path:
    """Three tiny artifacts as `make results` leaves them, in weights/, and their scores in results/."""
    folder = tmp_path_factory.mktemp("scored")
    weights, results = folder / "weights", folder / "results"
    for variant, made in zip(OF_TEST, (artifact, quantized, adapted), strict=True):
        shutil.copytree(made, weights / "seeds" / f"{variant}-7")
        shutil.copytree(made, weights / variant)
        write_json(results / "seeds" / f"{variant}.json", {"variant": variant, "chosen_seed": 7})
        for format in [RELEASED[variant], "torchao"][: 2 if variant == "ptq" else 1]:
            words = ["--format", format, "--latency_runs", "0", "--results_dir", str(results)]
            run_evaluation.main([str(weights / variant), *words])
    shutil.copy(ROOT / "weights" / LICENSE_FILE, weights)
    return folder


@pytest.fixture
def folder(scored, tmp_path) -> Path:
    return shutil.copytree(scored, tmp_path / "copy")


def words_of(folder: Path) -> list[str]:
    return ["--weights_dir", str(folder / "weights"), "--results_dir", str(folder / "results")]


@pytest.fixture
def released(three, folder) -> Path:
    release.main(words_of(folder))
    results = folder / "results" / SCORES_OF_OPENED
    words = ["--format", OPENED_AS["baseline"], "--latency_runs", "0", "--results_dir", str(results)]
    run_evaluation.main([str(folder / "weights" / "baseline"), *words])
    return folder


def test_a_release_keeps_one_format_of_each_variant(released):
    everywhere = {"config.json", "tokenizer.json", "tokenizer_config.json", "recipe.yaml", "LICENSE", "SHA256SUMS"}
    own = {
        "baseline": {"model.safetensors"},  # in bfloat16
        "ptq": {"onnx/model_quantized.onnx", "model.safetensors"},  # what its config.json names
        "qlora": {"model.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"},
    }
    for variant, names in own.items():
        assert contents(released / "weights" / variant).keys() == everywhere | names
        check_covered(released / "weights" / variant)
    assert "onnx/model.onnx" in contents(released / "weights" / "seeds" / "baseline-7")  # nothing is lost


def test_what_git_tracks_of_a_whole_weights_folder_is_the_release(three, folder, released, tmp_path):
    """Untracked formats beside them, other variants, other encoders and the seeds stay out."""
    clone = tmp_path / "clone"
    shutil.copytree(released / "weights", clone / "weights")
    shutil.copy(ROOT / ".gitignore", clone)
    for variant, whole in (("baseline", "baseline-7"), ("qlora", "qlora-7"), ("ptq", "ptq-7")):
        shutil.copytree(released / "weights" / "seeds" / whole, clone / "weights" / variant, dirs_exist_ok=True)
        shutil.copytree(released / "weights" / "seeds" / whole, clone / "weights" / "mpnet-base" / variant)
    shutil.copytree(released / "weights" / "ptq", clone / "weights" / "ptq-int4")
    git = ["git", "-C", str(clone)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    done = subprocess.run([*git, "ls-files", "--others", "--exclude-standard"], stdout=subprocess.PIPE, text=True)
    expected = {".gitignore", f"weights/{LICENSE_FILE}"}
    for variant in OF_TEST:
        expected |= {f"weights/{variant}/{name}" for name in contents(released / "weights" / variant)}
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "results/seeds/ptq.json").unlink(), "ptq.json; run .*train_seeds.py ptq"),
        (lambda folder: shutil.rmtree(folder / "weights/seeds/qlora-7/adapter"), "adapter/adapter_config.json"),
        (lambda folder: (folder / "weights/LICENSE").unlink(), "LICENSE"),
        (lambda folder: (folder / "weights/qlora/notes.txt").write_text("mine"), "notes.txt"),
        (other_record, "run_evaluation.py .*--format onnx"),
    ],
)
def test_a_release_is_whole_or_does_not_happen(spoil, message, three, folder):
    spoil(folder)
    before = contents(folder / "weights").keys()
    with pytest.raises(UserError, match=message):
        release.main(words_of(folder))
    assert contents(folder / "weights").keys() == before


def test_a_clone_that_grows_too_large_is_refused(three, folder, monkeypatch):
    for limit in ("BYTES_OF_FILE", "BYTES_IN_ALL"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="10,000 at most"):
            patch.setattr(release, limit, 10_000)
            release.main(words_of(folder))


def test_the_released_baseline_opens_as_it_is_and_can_be_quantized(released, tmp_path):
    folder, out = released / "weights" / "baseline", tmp_path / "ptq"
    classify = pipeline("text-classification", model=str(folder))
    assert classify.model.dtype == torch.float32 and classify("a red house")[0]["label"] == "warm"
    words = ["--model_name_or_path", str(folder), "--formats", "onnx", "--num_calibration_samples", "60"]
    run_ptq.main([*words, "--output_dir", str(out)])
    assert EmotionClassifier.from_pretrained(out).classify(["a red house"])[0]["label"] == "warm"


def test_verifying_a_release(released, capsys):
    release.main([*words_of(released), "--verify"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    expected = [(name, OPENED_AS.get(name, RELEASED[name]), "100.00", "verified") for name in OF_TEST]
    assert [(line[1], line[3], line[5], line[-2]) for line in lines] == expected


def test_a_released_folder_is_published_with_its_licence(released, capsys):
    shutil.rmtree(released / "results" / "seeds")  # the card would show their means, which the fixture lacks
    words = ["--repo_id", "user/bert-emotion-ptq", "--dry_run", "--results_dir", str(released / "results")]
    run_publish.main([str(released / "weights" / "ptq"), *words])
    sent = re.findall(r"^ *[\d,]+  (\S+)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert {"LICENSE", "onnx/model_quantized.onnx", "SHA256SUMS", "model.safetensors"} <= set(sent)


def test_other_labels_than_the_published_are_found(released, capsys):
    """The files are whole, but the published logits are reversed."""
    path = released / "results" / "predictions" / "ptq-onnx.parquet"
    table = parquet.read_table(path)
    turned = pyarrow.array([row[::-1] for row in table["logits"].to_pylist()], pyarrow.list_(pyarrow.float32()))
    parquet.write_table(table.set_column(2, table.schema.field(2), [turned]), path)
    with pytest.raises(UserError, match=r"^ptq \(onnx\): the labels are not those that were published"):
        release.main([*words_of(released), "--verify"])
    assert re.search(r"ptq .* differs", capsys.readouterr().out)


OF_OPENED = f"results/{SCORES_OF_OPENED}/metrics/baseline-pytorch.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: append(folder / "weights/ptq/onnx/model_quantized.onnx"), "model_quantized.onnx differs from"),
        (lambda folder: append(folder / "weights/baseline/recipe.yaml"), "recipe.yaml differs from"),
        (
            lambda folder: append(folder / "weights/qlora/adapter/adapter_model.safetensors"),
            "adapter_model.safetensors",
        ),
        (lambda folder: append(folder / "weights/ptq/onnx/other.onnx"), "other.onnx is not named in"),
        (lambda folder: (folder / "weights/baseline/SHA256SUMS").unlink(), "baseline has no SHA256SUMS"),
        (other_record, r"ptq .*ptq-onnx\.json"),
        (lambda folder: edit_json(folder / OF_OPENED, "provenance/dataset_fingerprint", "0" * 64), "baseline-pytorch"),
    ],
)
def test_what_is_not_as_it_was_measured_is_named(change, message, released):
    change(released)
    with pytest.raises(UserError, match=message):
        release.main([*words_of(released), "--verify"])


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


@pytest.mark.parametrize(
    ("same_machine", "equal", "macro_f1", "verdict"),
    [
        (True, 1.0, 0.9, "verified"),
        (True, 1.0, 0.9 + 1e-12, "differs"),  # the same processor gives the same digits
        (True, 0.999, 0.9, "differs"),  # two rows changed sides, and the score is the same
        (False, 0.9985, 0.9015, "verified"),
        (False, 0.9975, 0.9, "differs"),
        (False, 1.0, 0.9025, "differs"),
    ],
)
def test_the_verdict(same_machine, equal, macro_f1, verdict):
    found = {"same_machine": same_machine, "equal": equal, "macro_f1": macro_f1, "published": 0.9}
    assert release.judge(found) == verdict


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_the_tracked_weights_are_whole():
    """As committed: a training may have put other weights into the folders since."""

    def git(*words) -> bytes:
        return subprocess.run(["git", "-C", str(ROOT), *words], check=True, stdout=subprocess.PIPE).stdout

    sizes = {}
    for line in git("ls-tree", "-r", "-l", "HEAD", "weights").decode().splitlines():
        size, name = line.split()[3:]
        sizes[name.removeprefix("weights/")] = int(size)
    assert {name.split("/")[0] for name in sizes} == {LICENSE_FILE, *RELEASED}
    assert max(sizes.values()) <= release.BYTES_OF_FILE and sum(sizes.values()) <= release.BYTES_IN_ALL
    for variant in RELEASED:
        lines = git("show", f"HEAD:weights/{variant}/SHA256SUMS").decode().splitlines()
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        assert {name for name in sizes if name.startswith(f"{variant}/")} == {
            f"{variant}/{name}" for name in [*sums, "SHA256SUMS"]
        }
        for name, digest in sums.items():
            assert hashlib.sha256(git("show", f"HEAD:weights/{variant}/{name}")).hexdigest() == digest, name


def test_predict_takes_the_recommended_variant_and_says_so(capsys):
    predict.main(["i miss my old home", "i feel so happy that you came"])
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["sadness", "joy"]
    assert f"by {RECOMMENDED}" in shown.err and f"weights/{RECOMMENDED}" in HOW_TO_GET
