"""Classes of processors, what the benchmark skips, and the peers that it compares with."""

import json
import os
import re
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import render_report
import run_benchmark
import run_evaluation
from conftest import ROOT, build_rows, copy_to_edit, edit_json, logits_of, read_json
from emotion.evaluation import benchmark, ctranslate2_peer, peers, roofline
from emotion.evaluation.benchmark import Protocol, interleave
from emotion.export import peers as made_peers
from emotion.hub.model_card import render_card
from emotion.inference.emotion_classifier import EmotionClassifier
from emotion.inference.model_folder import files_to_serve
from emotion.utils import machine as processor
from emotion.utils.errors import UserError
from emotion.utils.machine import PROCESSORS, class_of, find_processor_class, has_bf16
from report.pages import render_table
from test_comparison import words_of_report

SHORTLY = Protocol(threads=1, rounds=1, texts=4, batches=1, texts_end_to_end=0, cold_starts=0)
AVX2 = {"avx2": True, "avx512_bf16": False, "cpu_name": "of this test"}
VNNI = {"avx2", "avx_vnni", "avx512_bw", "avx512_vnni"}


@pytest.fixture
def on_avx2(monkeypatch):
    """The libraries see a processor with AVX2 alone, and so does Linux."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AVX2)
    monkeypatch.setattr(processor, "instruction_sets_of_kernel", lambda: ["avx2"])
    monkeypatch.setattr(processor, "is_arm", lambda: False)


@pytest.mark.parametrize(
    ("instruction_sets", "expected"),
    [
        ({"avx", "sse4_2"}, None),
        ({"avx2"}, "avx2"),
        ({"avx2", "avx_vnni"}, "avx_vnni"),
        ({"avx2", "avx512_f", "avx512_bw"}, "avx512"),
        (VNNI, "avx512_vnni"),
        (VNNI | {"amx_int8", "amx_bf16"}, "amx"),
        (VNNI | {"amx_bf16"}, "avx512_vnni"),
    ],
)
def test_a_processor_has_the_highest_class_that_fits(instruction_sets, expected):
    assert class_of(instruction_sets) == expected
    as_linux_writes = {re.sub("^avx512_(f|bw)$", r"avx512\1", name) for name in instruction_sets}
    assert class_of(as_linux_writes) == expected


def test_each_tracked_run_is_of_the_class_that_it_is_named_after():
    paths = list((ROOT / "results").rglob("benchmark/*.json"))
    for path in paths:
        assert path.stem in PROCESSORS and class_of(read_json(path)["environment"]["instruction_sets"]) == path.stem
    assert len(paths) >= 2


def test_no_class_is_found_where_instructions_are_hidden(on_avx2, monkeypatch, artifact, tmp_path):
    assert find_processor_class() == "avx2"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with pytest.raises(UserError, match="ONEDNN_MAX_CPU_ISA"):
        find_processor_class()
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(processor, "instruction_sets_of_kernel", lambda: ["avx2", "avx512bw", "avx512_vnni"])
    start = time.monotonic()
    for output in ("results", "avx2.json", "avx512_vnni.json"):
        with pytest.raises(UserError, match="the libraries see avx2, and .* avx512_vnni"):
            run_benchmark.main([f"{artifact}:onnx", "--output", output])
    assert time.monotonic() - start < 5 and not list(tmp_path.glob("*"))  # before anything is timed
    run_benchmark.choose_file("run.json")  # a file of no class may be written


def test_a_run_goes_into_the_file_of_its_processor(on_avx2, tmp_path):
    assert run_benchmark.choose_file("results/benchmark").name == "avx2.json"  # a folder that is not there yet
    assert run_benchmark.choose_file(str(tmp_path)) == tmp_path / "avx2.json"
    with pytest.raises(UserError, match="amx.json .* avx2.json"):
        run_benchmark.choose_file("amx.json")


@pytest.fixture
def two_kinds(tmp_path):
    """The tracked results with times of today's files, known ones for two of them, and on AVX2 at half the ratios."""
    results = tmp_path / "results"
    shutil.copytree(ROOT / "results", results)
    run = read_json(results / "benchmark" / "avx512_vnni.json")
    shutil.rmtree(results / "benchmark")
    (results / "benchmark").mkdir()
    for name, one in run["artifacts"].items():
        record = results / "metrics" / f"{name.removeprefix('weights/').replace(':', '-')}.json"
        if record.is_file():
            one["bytes_to_serve"] = read_json(record)["size"]["bytes_to_serve"]
    for name, latency, ratio in (("qat-int4:onnx", 0.63, 3.2), ("baseline:bf16", 3.5, 0.58)):
        one = run["artifacts"][f"weights/{name}"]
        one["latency_ms"]["p50"], one["times_faster_at_batch_1"]["median"] = latency, ratio
    (results / "benchmark" / "avx512_vnni.json").write_text(json.dumps(run))
    run["environment"] |= {"cpu": "another", "instruction_sets": ["avx", "avx2"]}
    run["peaks"]["bfloat16_gop_per_s"] = None
    for one in run["artifacts"].values():
        ratios = one["times_faster_at_batch_1"]
        one["times_faster_at_batch_1"] = {name: value / 2 for name, value in ratios.items()}
        if one["precision"] == "bfloat16":
            one["roofline"] = None
    del run["artifacts"]["weights/baseline:bf16"]
    quality = {"examples": 2000, "macro_f1": 0.8765, "macro_f1_ci95": [0.86, 0.89], "accuracy": 0.92}
    quality |= {"expected_calibration_error": 0.02, "equal_labels": 0.99}
    run["artifacts"]["weights/baseline:onnx-dynamic"]["quality"] = quality
    (results / "benchmark" / "avx2.json").write_text(json.dumps(run))
    return results


def test_every_table_has_each_class_of_processors(two_kinds, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{render_report.START}\n{render_report.END}")
    families = [render_report.read_family(two_kinds), render_report.read_family(two_kinds / "mpnet-base")]
    pages = render_report.render_family(families[0], []) | render_report.render_pages(families, readme)
    text = pages[readme]
    assert re.search(r"3\.2x with AVX-512 VNNI \(0\.6 ms a text\), 1\.6x with AVX2 \(0\.6 ms a text\)", text)
    rows = {}
    for line in re.findall(r"^\| .*", text, re.MULTILINE):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        rows[cells[0].rstrip("†")] = cells  # which marks means with earlier files
    assert rows["model"][-2:] == ["ms, AVX-512 VNNI", "ms, AVX2"]
    assert rows["QAT INT4"][-2:] == ["0.63 (3.2x)", "0.63 (1.6x)"] and "AVX2: another, 2 threads" in text
    page = pages[two_kinds / "comparison.md"]
    assert re.search(r"In Node.js, .* 0\.72 ms", page)
    assert "### AVX-512 VNNI" in page and "### AVX2" in page and "87.65 [86.0, 89.0]" in page
    card = pages[tmp_path / "model_cards" / "qat-int4.md"]
    speeds = re.findall(r"\| QAT INT4, ONNX Runtime \| (.*?) \| .* \| ([\d.]+x) \|", card)
    assert speeds == [("AVX-512 VNNI", "3.2x"), ("AVX2", "1.6x")] and "another, 2 threads" in card
    (two_kinds / "comparison.json").write_text(pages[two_kinds / "comparison.json"])
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    words = words_of_report(tmp_path)
    assert "3.2 × as fast" in words and "1.6 × as fast" in words and "FP32 and INT8" in words  # no BF16 peak with AVX2


def test_a_replaced_model_is_dropped_unless_all_ratios_are_against_it(two_kinds):
    for name in ("baseline-onnx", "ptq-onnx"):  # the first is what the others are compared with
        path = two_kinds / "metrics" / f"{name}.json"
        size = read_json(path)["size"]
        for place, more in (("files/config.json", 10_000), ("bytes_to_serve", 10_000), ("megabytes", 0.01)):
            old = size["files"]["config.json"] if "/" in place else size[place]
            edit_json(path, f"size/{place}", old + more)
    for run in render_report.read_family(two_kinds).benchmarks.values():
        assert run.compared_with == "weights/baseline:onnx" and "weights/ptq:onnx" not in run.artifacts
        assert run.compared_with in run.artifacts and "weights/qat:onnx" in run.artifacts


def test_a_record_that_was_not_timed_in_turns_shows_its_own_times(two_kinds):
    shutil.rmtree(two_kinds / "benchmark")
    family = render_report.read_family(two_kinds)
    head, _, *lines = render_table(family.comparison).splitlines()
    assert "p50 ms, AVX-512 VNNI" in head
    (record,) = [one for one in family.records if (one.variant, one.format) == ("baseline", "onnx")]
    line = next(line for line in lines if [cell.strip() for cell in line.split("|")[1:3]] == ["baseline", "onnx"])
    assert f" {record.latency_ms.p50:.2f} |" in line
    card = render_card(family.records, "baseline", "user/mine")
    assert f"| baseline, ONNX Runtime | AVX-512 VNNI | {record.latency_ms.p50} |" in card


def test_bfloat16_is_scored_where_the_processor_has_it(on_avx2, artifact, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run_evaluation, "has_bf16", has_bf16)
    run_evaluation.main([str(artifact), "--format", "bf16", "--results_dir", str(tmp_path)])
    assert "bf16" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_what_this_machine_lacks_is_left_out(on_avx2, artifact, monkeypatch, capsys, tmp_path):
    """Instructions of the processor, or a package."""
    monkeypatch.setattr(ctranslate2_peer, "is_installed", lambda: False)
    named = [(artifact, format) for format in ("onnx", "pytorch", "bf16", "bf16-compiled", "ctranslate2")]
    assert list(made_peers.make_peers(named, tmp_path)) == named[:2]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"{artifact}:{format}" for _, format in named[2:]]
    assert ["bfloat16" in line for line in lines] == [True, True, False]
    with pytest.raises(UserError, match="nothing is left"):
        made_peers.make_peers(named[2:3], tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mpnet"}')
    with pytest.raises(UserError, match="'mpnet'"):
        ctranslate2_peer.convert(tmp_path, tmp_path / "made")


def test_a_root_that_needs_missing_instructions_is_left_out(on_avx2, artifact, tmp_path):
    folder = copy_to_edit(artifact, tmp_path / "copy")
    settings = {"quant_method": "torchao", "quant_type": "Int8WeightOnly"}
    edit_json(folder / "config.json", "quantization_config", settings)
    assert peers.find_obstacle(folder, "torchao") is None
    edit_json(folder / "config.json", "dtype", "bfloat16")
    assert peers.find_obstacle(folder, "nf4")


def test_what_was_timed_is_kept_if_the_peaks_are_not_found(artifact, monkeypatch, tmp_path):
    def interrupted(*words):
        assert (tmp_path / "run.json").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(run_benchmark, "add_roofline", interrupted)
    words = "--rounds 1 --texts 4 --batches 1 --texts_end_to_end 0 --cold_starts 0 --threads 1 --output run.json"
    with pytest.raises(KeyboardInterrupt):
        run_benchmark.main([f"{artifact}:onnx", *words.split()])
    assert read_json(tmp_path / "run.json")["artifacts"]["baseline:onnx"]["latency_ms"]["p50"] > 0


def test_a_peer_that_dies_is_left_out_and_the_others_are_kept(artifact, capsys, monkeypatch):
    texts, turns = build_rows(40)["text"], []
    take_turn = benchmark.Worker.take_turn

    def kill_the_second(worker, *words):
        turns.append(worker.name)
        if turns.count("peer") == 2 and worker.name == "peer":
            os.kill(next(iter(worker._pool._processes)), signal.SIGSEGV)
        take_turn(worker, *words)

    monkeypatch.setattr(benchmark.Worker, "take_turn", kill_the_second)
    named = {"own": (artifact, "onnx"), "peer": (artifact, "pytorch"), "broken": (artifact / "nowhere", "onnx")}
    measured = interleave(named, texts, SHORTLY, peers=["peer", "broken"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert list(measured) == ["own"] and len(lines) == 2
    assert "broken" in lines[0] and "peer" in lines[1]
    with pytest.raises(UserError, match="nothing is left"):
        interleave({"broken": named["broken"]}, texts, SHORTLY, peers=["broken"])
    turns.clear()
    with pytest.raises(UserError, match="peer "):  # what is no peer ends the run
        interleave({"own": named["own"], "peer": named["peer"]}, texts, SHORTLY)


def fail_or_die(folder, format, work):
    """What stands for `make_peer` in the process that makes a peer."""
    if format == "onnx-plain":
        os.kill(os.getpid(), signal.SIGSEGV)
    raise TypeError("data type 'bfloat16' not understood")


def test_a_peer_that_cannot_be_made_is_left_out(artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(made_peers.shutil, "which", lambda name: None)
    compiled, own = (artifact, "pytorch-compiled"), (artifact, "onnx")
    assert made_peers.make_peers([compiled, own], tmp_path) == {own: own}
    assert "needs a C++ compiler" in capsys.readouterr().out
    monkeypatch.setattr(made_peers, "make_peer", fail_or_die)
    with pytest.raises(UserError, match="nothing is left"):
        made_peers.make_peers([(artifact, "onnx-plain"), (artifact, "openvino-plain")], tmp_path)
    first, second = capsys.readouterr().out.splitlines()
    assert re.match("left out: .*:onnx-plain ", first)
    assert re.match("left out: .*:openvino-plain .*'bfloat16' not understood", second)


def test_pytorchs_dynamic_int8_is_scored_and_counted(artifact):
    rows, names = build_rows(70), ["warm", "cold", "none"]
    labels = [names[label] for label in rows["label"]]
    named = {"own": (artifact, "pytorch"), "peer": (artifact, peers.DYNAMIC)}
    measured = interleave(named, rows["text"], SHORTLY, peers=["peer"], labels=labels)
    one = measured["peer"]
    assert "quality" not in measured["own"]  # it has a record
    assert one["precision"] == "int8" and one["scheme"]["quantized_layers"] == one["scheme"]["linear_layers"] == 14
    assert one["scheme"]["weights"] == "int8 per-tensor" and one["scheme"]["embeddings"] == "float32"
    assert one["quality"]["examples"] == 70 and one["quality"]["equal_labels"] > 0.9
    low, high = one["quality"]["macro_f1_ci95"]
    assert 0.5 < low <= one["quality"]["macro_f1"] <= high
    worker = SimpleNamespace(_model={"labels": names})
    assert benchmark.Worker.score(worker, ["a text"], ["another label"], None) is None


def test_a_file_of_bfloat16_that_is_computed_in_float32_is_compared_with():
    def timed(weights, precision, p50):
        return {"scheme": {"weights": weights}, "precision": precision, "latency_ms": {"p50": p50}}

    measured = {"int8": timed("int8 per-tensor", "int8", 1), "bf16": timed("bfloat16", "bfloat16", 2)}
    assert benchmark.fastest_fp32(measured) == "int8"  # none computes in FP32
    measured["clone"] = timed("bfloat16", "float32", 4)
    assert benchmark.fastest_fp32(measured) == "clone"
    assert benchmark.fastest_fp32(measured | {"fp32": timed("float32", "float32", 3)}) == "fp32"


@pytest.mark.processes  # with its package: `make benchmark` installs what the tests of `make test` do without
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "gamma and beta"])
def test_ctranslate2_answers_as_the_floats_that_it_was_made_of(artifact, tmp_path, stored):
    source = copy_to_edit(artifact, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    if stored == "bfloat16":
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    elif stored == "gamma and beta":  # as Transformers 5 names them where it saves what it has loaded
        for norm in [name.removesuffix("weight") for name in tensors if name.endswith("LayerNorm.weight")]:
            tensors[f"{norm}gamma"], tensors[f"{norm}beta"] = tensors.pop(f"{norm}weight"), tensors.pop(f"{norm}bias")
        assert sum(name.endswith("LayerNorm.gamma") for name in tensors) == 5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = made_peers.make_peers([(source, "ctranslate2")], tmp_path)  # in a process of its own
    folder, format = made[source, "ctranslate2"]
    assert not (folder / "model.safetensors").exists()  # the floats are no part of what it serves
    texts = build_rows(70)["text"]
    expected = logits_of(source, "pytorch", texts)
    peer = EmotionClassifier(folder, format, 2, peers.open_peer)
    agree = [one["label"] for one in peer.classify(texts)] == [peer.labels[row] for row in expected.argmax(axis=-1)]
    assert agree and np.corrcoef(peer.logits(texts).ravel(), expected.ravel())[0, 1] > 0.99
    (file,) = (folder / format).glob("model*")
    assert file.stat().st_size < peers.bytes_of(folder, format) < sum(files_to_serve(artifact, "pytorch").values())


def test_no_peak_is_made_up(on_avx2, monkeypatch):
    monkeypatch.setattr(roofline, "SIZE", 256)
    monkeypatch.setattr(roofline, "COPIED_BYTES", 2**24)
    result = {"artifacts": {}}
    for precision in ("bfloat16", "int8"):
        times = {"latency_ms": {"mean": 1.0}, "throughput_per_s": {"median": 100.0}}
        result["artifacts"][precision] = {"scheme": {"weights": precision}, "precision": precision, **times}
    roofline.add_roofline(result, (1e6, 1000), threads=1)
    assert result["peaks"]["bfloat16_gop_per_s"] is None and result["peaks"]["float32_gop_per_s"] > 0
    assert result["artifacts"]["bfloat16"]["roofline"] is None
    assert result["artifacts"]["int8"]["roofline"]["batch_1"]["share"] > 0
