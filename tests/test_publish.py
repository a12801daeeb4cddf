"""Publishing against a server that speaks the Hub's protocol: what arrives, who can open it, what may go wrong."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

import run_baseline
import run_evaluation
import run_ptq
import run_publish
from conftest import HAS_OPTIMUM, ROOT, build_rows, copy_to_edit, run_code, run_script, train_flags
from emotion.data.metrics import softmax
from emotion.evaluation.record import read_records
from emotion.inference.model_folder import HOW_TO_GET, RELEASED, find_formats, weights_of
from emotion.inference.runtimes import open_artifact
from emotion.training.trainer import RecipeTrainingArguments
from emotion.utils.errors import UserError
from emotion.utils.files import SUMS_FILE, check_sums, read_sums
from hub_server import READ, WRITE, Fault, Repository

VARIANTS = ["baseline", "ptq", "qat", "qlora"]
TEXTS = build_rows(30)["text"]


@pytest.fixture(scope="module")
def folders(artifact, quantized, trained, adapted):
    return dict(zip(VARIANTS, (artifact, quantized, trained / "8", adapted), strict=True))


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    results = tmp_path_factory.mktemp("scored")
    for folder in folders.values():
        for format in find_formats(folder):
            flags = f"--format {format} --results_dir {results} --latency_runs 0 --threads 1"
            run_evaluation.main([str(folder), *flags.split()])
    return results


@pytest.mark.parametrize("variant", RELEASED)
def test_a_clone_can_publish_each_of_its_folders(variant, capsys):
    run_publish.main([str(ROOT / "weights" / variant), "--repo_id", f"user/mine-{variant}", "--dry_run", "true"])
    said = capsys.readouterr().out
    assert re.search(rf"results/metrics/{variant}-\w+\.json", said) and f"user/mine-{variant}" in said


def publish(folder, results, *flags, repo_id="user/bert-emotion"):
    run_publish.main([str(folder), "--repo_id", repo_id, "--results_dir", str(results), *flags])


@pytest.mark.processes
@pytest.mark.parametrize("variant", VARIANTS)
def test_strangers_open_what_was_pushed(variant, folders, results, hub, encoder, tmp_path):
    """From an empty cache, in a fresh process: every client, the card's snippets, the widget."""
    folder, repo_id = folders[variant], f"user/bert-emotion-{variant}"
    done = run_script("run_publish.py", folder, "--repo_id", repo_id, "--results_dir", results)
    assert done.returncode == 0, done.stderr
    assert WRITE not in done.stdout + done.stderr
    repository = hub.repositories[repo_id]
    assert len(repository.commits) == 2  # the one that creating it makes, and this one
    records = [record for record in read_records(results) if record.variant == variant]
    sent = {f"results/metrics/{record.name}.json" for record in records}
    sent.add(f"results/confusion_matrices/{variant}-{next(iter(find_formats(folder)))}.png")  # the card shows this one
    sent |= {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert repository.commits[-1].keys() == sent | {"README.md", ".gitattributes"}
    for name, content in repository.commits[-1].items():
        if name.endswith((".json", ".md", ".yaml")):
            assert str(folder.parent).encode() not in content and WRITE.encode() not in content, name

    hub.repositories[encoder.name] = Repository(commits=[{path.name: path.read_bytes() for path in encoder.iterdir()}])
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    command = [sys.executable, ROOT / "tests" / "hub_clients.py", repo_id, folder, tmp_path / "texts.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    clients = {"baseline": set(), "ptq": {"openvino"}, "qat": {"openvino"}, "qlora": {"peft"}}[variant]
    missing = set() if HAS_OPTIMUM else clients & {"openvino"}
    assert report["gaps"].keys() == {"transformers", "pipeline", "onnxruntime"} | clients - missing
    assert max(report["gaps"].values()) < 1e-5, report["gaps"]  # sums of floats depend on how memory is aligned
    assert report["card"]["library_name"] == "transformers"
    shown = re.search(r"!\[Confusion matrix\]\((.+)\)", repository.commits[-1]["README.md"].decode())[1]
    assert repository.commits[-1][shown].startswith(b"\x89PNG")

    root = next(iter(find_formats(folder)))
    by_format = {record.format: record for record in records}
    joined = "\n".join(report["snippets"])
    assert len(report["snippets"]) == len(records) + (variant == "qlora") - len(missing)
    for code, printed in report["snippets"].items():
        promised = re.search(r"# (\w+) ([\d.]+)$", code.strip())
        assert promised is None or promised[1] in printed, code
    assert joined.count(repo_id) >= len(report["snippets"]) - (variant == "qlora")

    classifier = open_artifact(folder, root, threads=1)
    probabilities = softmax(classifier.logits(classifier.encode(TEXTS[:3])))
    widget = report["widget"]
    for row, single, batched in zip(probabilities, widget["single"], widget["batched"], strict=True):
        order = row.argsort()[::-1]
        assert [one["label"] for one in single[0]] == [classifier.labels[index] for index in order[:5]]
        np.testing.assert_allclose([one["score"] for one in single[0]], row[order[:5]], atol=1e-4)
        assert [one["label"] for one in batched] == [classifier.labels[order[0]]]
        assert batched[0]["score"] == pytest.approx(row[order[0]], abs=1e-4)
    measured = {example.text: example.scores for example in by_format[root].examples}
    assert len(report["card"]["widget"]) == 6  # one text for each emotion, whatever the classes
    for example in report["card"]["widget"]:
        assert {one["label"]: one["score"] for one in example["output"]} == measured[example["text"]]


def test_publishing_again_commits_only_changes(folders, results, hub, tmp_path):
    for _ in range(2):
        publish(folders["qlora"], results)
    repository = hub.repositories["user/bert-emotion"]
    assert len(repository.commits) == 2
    for name, content in repository.commits[-1].items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert read_sums(tmp_path / "copy").keys() == repository.commits[-1].keys() - {SUMS_FILE, ".gitattributes"}
    check_sums(tmp_path / "copy")
    repository.commits[-1]["old.bin"] = b"old"
    publish(folders["qlora"], results)
    assert "old.bin" not in repository.commits[-1]


def test_only_what_was_scored_is_uploaded(folders, results, hub, tmp_path, capsys):
    folder = shutil.copytree(folders["qlora"], tmp_path / "qlora")
    names = [".env", "training_args.bin", "checkpoint-7/optimizer.pt"]
    names += ["adapter/adapter_notes.txt", "adapter/adapter_model.safetensors.bak"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    publish(folder, results, "--private")
    left_out = capsys.readouterr().out.partition("left out: ")[2]
    assert all(name in left_out for name in names)
    repository = hub.repositories["user/bert-emotion"]
    assert repository.private and b"secret" not in repository.commits[-1].values()


@pytest.mark.parametrize("token", [WRITE, "hf_" + "aB3" * 12], ids=["own", "another's"])
def test_a_token_is_never_published(token, hub, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"note": token}))
    for content in (tmp_path / "config.json", f"recipe: {token}".encode()):
        with pytest.raises(UserError, match="file holds a token of the Hub") as caught:
            run_publish.refuse_tokens({"good": b"hf_hub_download", "file": content})
        assert token not in str(caught.value)


def test_a_page_names_the_model_that_it_loads(hub):
    with pytest.raises(UserError, match="--model_id user/name-qat-int4"):
        publish(ROOT / "docs" / "demo", "unused", repo_id="user/emotions")
    for name in ("user/mine", "user/qat", "mine-qat"):  # which siblings it has cannot be told
        with pytest.raises(UserError, match=f"--model_id {name}: its name must end"):
            publish(ROOT / "docs" / "demo", "unused", "--model_id", name, repo_id="user/emotions")
    assert not hub.requests


def test_a_dry_run_sends_nothing(folders, results, hub, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    publish(folders["qlora"], results, "--dry_run")
    shown = capsys.readouterr().out
    size = (folders["qlora"] / "model.safetensors").stat().st_size
    assert f"{size:>12,}  model.safetensors" in shown and "adapter/adapter_config.json" in shown
    assert "base_model_relation" not in shown  # a base of no repository
    assert not hub.requests


def test_weights_that_changed_after_scoring_or_that_all_could_read_are_refused(folders, results, hub, tmp_path):
    folder = copy_to_edit(folders["ptq"], tmp_path / "ptq")
    with (folder / "onnx" / "model_quantized.onnx").open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match="model_quantized.onnx .* --format onnx"):
        publish(folder, results)
    assert not hub.requests
    hub.repositories["user/bert-emotion"] = Repository()  # which everybody can read
    with pytest.raises(UserError, match="user/bert-emotion"):
        publish(folders["ptq"], results, "--private")
    assert len(hub.repositories["user/bert-emotion"].commits) == 1


def test_an_endpoint_answers_from_the_onnx_file_as_the_widget_does(folders, results, hub, tmp_path):
    """Called as the service calls it: from the repository alone, with nothing of this project on the path."""
    publish(folders["ptq"], results, "--endpoint_handler")
    files = hub.repositories["user/bert-emotion"].commits[-1]
    for name, content in files.items():
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_bytes(content)
    check_sums(tmp_path / "repository")
    record = next(one for one in read_records(results) if (one.variant, one.format) == ("ptq", "onnx"))
    texts = [one.text for one in record.examples] + ["a red house " * 500]
    code = f"""if True:
        import importlib.util, json, sys
        spec = importlib.util.spec_from_file_location("handler", "handler.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        handler = module.EndpointHandler(".")
        texts = {texts!r}
        answers = [handler(data={{"inputs": text}}) for text in texts]
        assert answers == [[one] for one in handler({{"inputs": texts}})]
        assert len(handler({{"inputs": "a", "parameters": {{"top_k": 1}}}})[0]) == 1
        assert not {{"torch", "transformers", "emotion"}} & set(sys.modules)
        print(json.dumps(answers))"""
    command, env = [sys.executable, "-c", code], {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=tmp_path / "repository", env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    *answers, cut = json.loads(done.stdout)
    assert len(cut[0]) == len(record.quality.labels)
    for example, (ranking,) in zip(record.examples, answers, strict=True):
        expected = sorted(example.scores.items(), key=lambda one: -one[1])
        assert [one["label"] for one in ranking] == [label for label, _ in expected]
        np.testing.assert_allclose([one["score"] for one in ranking], [score for _, score in expected], atol=1e-4)
    with pytest.raises(UserError, match="--endpoint_handler: .* no onnx/"):
        run_publish.main([str(ROOT / "weights" / "baseline"), "--repo_id", "user/mine-baseline", "--endpoint_handler"])


def test_the_demo_page_becomes_a_static_space(hub):
    publish(ROOT / "docs" / "demo", "unused", "--model_id", "user/mine-qat-int4", repo_id="user/emotions")
    files = hub.repositories["spaces/user/emotions"].commits[-1]
    assert files.keys() == {"index.html", "worker.js", "README.md", ".gitattributes"}
    assert b'"user/mine"' in files["index.html"]
    assert not any(run_publish.PAGE_MODEL.encode() in content for content in files.values())
    about = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert about["sdk"] == "static" and about["app_file"] == "index.html"
    assert set(about["models"]) < {f"user/mine-{variant}" for variant in RELEASED}


@pytest.mark.processes
def test_push_to_hub_quantizes_scores_and_publishes(artifact, results, hub, tmp_path):
    shutil.copytree(results, tmp_path / "results")
    folders = ["--model_name_or_path", artifact, "--output_dir", "ptq", "--results_dir", tmp_path / "results"]
    flags = ["--formats", "onnx", "--push_to_hub", "--hub_model_id", "user/pushed"]
    run_ptq.main(list(map(str, folders + flags)))
    files = hub.repositories["user/pushed"].commits[-1]
    record = json.loads(files["results/metrics/ptq-onnx.json"])
    assert record["latency_ms"]["runs"] == 500
    assert "hub_model_id" not in files["recipe.yaml"].decode() and "push_to_hub" not in json.dumps(record)
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers.js"
    assert card.data.eval_results[0].metric_value == record["quality"]["macro_f1"]


def test_a_model_of_the_hub_is_quantized(folders, results, hub, colors, tmp_path):
    publish(folders["baseline"], results)
    words = ["--model_name_or_path", "user/bert-emotion", "--dataset_name", str(colors), "--formats", "onnx"]
    run_ptq.main([*words, "--num_calibration_samples", "60", "--output_dir", str(tmp_path / "ptq")])
    recipe = yaml.safe_load((tmp_path / "ptq" / "recipe.yaml").read_text())["recipe"]
    assert recipe["model_name_or_path"] == "user/bert-emotion" and recipe["baseline"]["learning_rate"] == 5e-3
    made, expected = (weights_of(folder, "onnx") for folder in (tmp_path / "ptq", folders["ptq"]))
    assert made.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_unknown", "this token"),
        (READ, "may not do that with user/bert-emotion"),
        (None, "hf auth login"),
    ],
)
def test_who_may_not_write_is_told_so(token, message, folders, results, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message):
        publish(folders["ptq"], results)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--push_to_hub", "true"], "--hub_model_id"),
        (["--push_to_hub", "true", "--hub_model_id", "alone"], "'alone'"),
        (["--hub_token", "hf_x"], "--hub_token|hub_token"),
    ],
)
def test_what_cannot_be_published_is_said_before_the_training(flags, message, hub, encoder, colors, tmp_path):
    with pytest.raises(UserError, match=message):
        run_baseline.main([*train_flags(encoder, colors, tmp_path / "out"), *flags])
    assert not hub.requests and not (tmp_path / "out").exists()
    training = RecipeTrainingArguments(output_dir=str(tmp_path / "out"), push_to_hub=True, hub_model_id="user/mine")
    assert training.publish and not training.push_to_hub  # never the Trainer itself


def test_predict_takes_only_what_it_needs(folders, results, hub, tmp_path):
    publish(folders["ptq"], results)
    hub.requests.clear()
    code = (
        "import sys, predict; predict.main(['--model', 'user/bert-emotion', 'a red house'])\n"
        "heavy = {'torch', 'transformers', 'optimum', 'openvino', 'datasets', 'pandas', 'sklearn', 'onnx'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    hub.faults.append(Fault("GET", "model_quantized.onnx", "cut"))
    for offline in ("0", "1"):  # the second time from the cache
        done = run_code(code, env=os.environ | {"HF_HUB_OFFLINE": offline})
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("warm")
    needed = {"config.json", "tokenizer.json", "tokenizer_config.json", "onnx/model_quantized.onnx", "SHA256SUMS"}
    assert set(hub.downloads("user/bert-emotion")) == needed
    done = run_script("predict.py", "--model", "user/bert-emotion", "--format", "openvino", "a red house")
    assert done.stdout.startswith("warm"), done.stderr
    assert "openvino/openvino_model.bin" in hub.downloads("user/bert-emotion")


def test_a_download_that_is_not_what_was_published_is_refused(folders, results, hub):
    publish(folders["ptq"], results)
    files = hub.repositories["user/bert-emotion"].commits[-1]
    files["config.json"] = files["config.json"].replace(b'"warm"', b'"hot"')
    words = ("--model", "user/bert-emotion", "a red house")
    done = run_script("predict.py", *words)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "config.json differs from" in done.stderr and "hf cache rm model/user/bert-emotion" in done.stderr
    assert run_script("predict.py", *words, "--skip_checksum").stdout.startswith("hot")


@pytest.mark.parametrize(
    ("endpoint", "offline", "message"),
    [(None, "0", "user/nowhere"), ("http://127.0.0.1:9", "0", "http://127.0.0.1:9"), (None, "1", "HF_HUB_OFFLINE")],
)
def test_a_repository_that_cannot_be_had_is_said(endpoint, offline, message, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint or hub.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    done = run_script("predict.py", "--model", "user/nowhere", "text")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr) and HOW_TO_GET in done.stderr, done.stderr
