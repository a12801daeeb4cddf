"""run_batch.py: every row of every kind of file comes out once, whatever is in it and whenever the job is cut."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import run_batch
from conftest import ROOT, as_flags, build_rows, contents, copy_to_edit, locked, read_json, run_code, run_script
from emotion import EmotionClassifier
from emotion.inference import batch_job as shards
from emotion.inference import batch_reader as rows
from emotion.inference.batch_reader import RowReader, kind_of, survey
from emotion.utils.errors import UserError
from emotion.utils.files import RECOMMENDED, sha256

COUNT = 700
TEXTS = build_rows(COUNT)["text"]
HOSTILE = ["", None, " \t ", "red \x00\x01\x1b\x7f sky", "red " * 250_000, "NA", "\N{PILE OF POO}" * 3, "blue sky"]
HOSTILE += ["red \udcff\udcfe sky", 'a "quoted", red\n\r\nsky']  # bytes that are no UTF-8, as Python writes them down
HOSTILE += ["\u05d0\u05d3\u05d5\u05dd \u202e blue", "red\u2028sky\x85now\x0b"]


def call(*args, **flags) -> Path:
    run_batch.main([*map(str, args), *as_flags(**flags)])
    return Path(args[-1])


def encode(kind: str, texts: list) -> bytes:
    """The rows `id` and `text` (of plain lines the text alone) as a file of that kind."""
    if kind == "parquet":
        file = io.BytesIO()
        values = [None if text is None else text.encode("utf-8", "surrogateescape") for text in texts]
        # Parquet takes bytes for a string, valid or not.
        column = pa.array(values, pa.binary()).view(pa.string())
        pq.write_table(pa.table({"id": range(len(texts)), "text": column}), file, row_group_size=90)
        return file.getvalue()
    if kind == "jsonl":
        lines = [json.dumps({"id": row, "text": text}, ensure_ascii=False) for row, text in enumerate(texts)]
    elif kind == "txt":
        lines = texts
    else:
        file = io.StringIO()
        table = csv.writer(file, delimiter="," if kind == "csv" else "\t", lineterminator="\n")
        table.writerows([["id", "text"], *enumerate(texts)])
        return file.getvalue().encode("utf-8", "surrogateescape")
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


@pytest.fixture
def table(tmp_path) -> Path:
    (tmp_path / "texts.parquet").write_bytes(encode("parquet", TEXTS))
    return tmp_path / "texts.parquet"


@pytest.fixture(scope="module")
def expected(artifact) -> list[str]:
    return [one["label"] for one in EmotionClassifier.from_pretrained(artifact).classify(TEXTS)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "txt"])
def test_every_kind_of_file_gives_the_same_answers(kind, artifact, expected, tmp_path):
    file = tmp_path / f"texts.{kind}"
    file.write_bytes(encode(kind, TEXTS))
    output = call(file, tmp_path / "out", model=artifact, shard_rows=300)
    assert [path.name for path in sorted(output.glob("*.parquet"))] == [f"part-0000{n}.parquet" for n in range(3)]
    answers = pq.read_table(output)
    assert answers["label"].to_pylist() == expected and answers["text"].to_pylist() == TEXTS
    assert set(answers["status"].to_pylist()) == {"ok"}
    if kind in {"csv", "tsv"}:  # which have no types: what was read is what is written
        assert answers["id"].to_pylist() == [str(row) for row in range(COUNT)]
    elif kind != "txt":
        assert answers["id"].to_pylist() == list(range(COUNT))


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_compressed_files_are_read(ending, tmp_path):
    codec = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    compress = codec.get(ending, lambda content: pa.compress(content, codec="zstd", asbytes=True))
    content = compress(encode("csv", TEXTS))
    whole, cut = tmp_path / f"A.CSV.{ending}", tmp_path / f"cut.csv.{ending}"
    whole.write_bytes(content)
    assert kind_of(whole.name) == "csv" and survey("csv", [str(whole)], "text", None).rows == COUNT
    cut.write_bytes(content[:-20])
    with pytest.raises(UserError, match="cut.csv"):
        survey("csv", [str(cut)], "text", None)


def test_folders_and_patterns_are_read_in_order(artifact, tmp_path):
    for number in range(3):
        folder = tmp_path / "in" / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jsonl").write_bytes(encode("jsonl", TEXTS[number * 100 : number * 100 + 100]))
    (tmp_path / "in" / "_temporary.jsonl").write_text("no JSON", encoding="utf-8")  # of another program
    (tmp_path / "in" / "README.md").write_text("what it is", encoding="utf-8")
    order = TEXTS[:100] + TEXTS[200:300] + TEXTS[100:200]
    for number, word in enumerate(["in", "in/*/*.jsonl"]):
        # A shard may hold rows of several files.
        output = call(tmp_path / word, tmp_path / str(number), model=artifact, shard_rows=130)
        assert pq.read_table(output)["text"].to_pylist() == order
    output = call(*sorted((tmp_path / "in").rglob("?.jsonl")), tmp_path / "listed", model=artifact)
    assert pq.read_table(output)["text"].to_pylist() == order
    names = [file["path"] for file in read_json(output / "_manifest.json")["input"]["files"]]
    assert names == ["0/0.jsonl", "0/2.jsonl", "1/1.jsonl"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "txt"])
def test_hostile_texts_come_out_once(kind, artifact, tmp_path):
    lines = [text.replace("\n", " ") if text else "" for text in HOSTILE]
    texts = lines if kind == "txt" else HOSTILE
    count = 10_000
    values = [texts[row % len(texts)] if row < 30 or row % len(texts) != 4 else "red" for row in range(count)]
    (tmp_path / f"hostile.{kind}").write_bytes(encode(kind, values))
    output = call(tmp_path / f"hostile.{kind}", tmp_path / "out", model=artifact, shard_rows=3000)
    answers, counts = pq.read_table(output).to_pylist(), read_json(output / "_manifest.json")["output"]
    assert len(answers) == count == counts["rows"] == sum(counts[status] for status in shards.STATUSES)
    for row, answer in enumerate(answers):
        text = values[row]
        if kind != "txt":
            assert int(answer["id"]) == row
        if text is None:
            status = "empty" if kind == "csv" else "null"
        elif not text.strip():
            status = "empty"
        else:
            status = "cut" if len(text) > 10_000 else "replaced" if "\udcff" in text else "ok"
        assert answer["status"] == status, text
        assert (answer["label"] is None) == (answer["status"] in {"null", "empty"}) == (answer["score"] is None)
        if text and "\udcff" not in text:
            assert answer["text"].encode() == text.encode()
    assert counts["cut"] == 3


@pytest.mark.parametrize(
    ("name", "content", "texts", "statuses"),
    [
        ("a.csv", b"\xef\xbb\xbftext\nred\n\nblue\n", ["red", "", "blue"], ["ok", "empty", "ok"]),  # one column
        ("a.jsonl", b'{"text": "red \\ud83d sky"}\n\n{"text": ""}', ["red \ufffd sky", ""], ["replaced", "empty"]),
        ("a.jsonl", b'{"text": "blue \xff"}', ["blue \ufffd"], ["replaced"]),
        ("a.csv", b"text\n", [], []),
    ],
)
def test_odd_rows_come_out(name, content, texts, statuses, artifact, tmp_path):
    (tmp_path / name).write_bytes(content)
    output = call(tmp_path / name, tmp_path / "out", model=artifact)
    assert len(read_json(output / "_manifest.json")["shards"]) == len(list(output.glob("part-*"))) == bool(texts)
    answers = pq.read_table(output).to_pylist() if texts else []
    assert [(row["text"], row["status"]) for row in answers] == list(zip(texts, statuses, strict=True))


def test_json_lines_of_different_shapes_have_one_schema(artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BATCH_ROWS", 1)
    lines = [
        {"text": "red", "n": 1, "day": "2026-01-01"},
        {"n": 2.5, "text": None, "list": [1], "day": "now"},
        {"text": "blue " * 30},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    answers = pq.read_table(call(tmp_path / "a.jsonl", tmp_path / "out", model=artifact, shard_rows=1)).to_pylist()
    assert [row["n"] for row in answers] == [1.0, 2.5, None] and [row["list"] for row in answers] == [None, [1], None]
    assert [row["day"] for row in answers] == ["2026-01-01", "now", None]
    assert [row["status"] for row in answers] == ["ok", "null", "ok"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "txt"])
def test_any_range_is_read(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "BATCH_SIZE", 3000)
    names = []
    for start, stop in [(0, 250), (250, 250), (250, 400), (400, COUNT)]:  # the second one has no rows
        names.append(str(tmp_path / f"{len(names)}.{kind}"))
        nothing = start == stop and kind in {"jsonl", "txt"}
        Path(names[-1]).write_bytes(b"" if nothing else encode(kind, TEXTS[start:stop]))
    source = survey(kind, names, "text", None)
    assert source.rows == COUNT
    reader, draw = RowReader(source), random.Random(0)
    for _ in range(40):
        start = draw.randrange(COUNT)
        stop = draw.randint(start, COUNT)
        got = [text for batch in reader.read(start, stop) for text in batch.column("text").to_pylist()]
        assert got == TEXTS[start:stop]


def test_all_columns_of_an_answer(artifact, table, tmp_path):
    output = call(table, tmp_path / "out", model=artifact, top_k=2, probabilities=True, keep_columns="id")
    answers = pq.read_table(output)
    assert answers.column_names == [
        *("id", "label", "score", "label_2", "score_2"),
        *("probability_warm", "probability_cold", "probability_none", "status"),
    ]
    classes = EmotionClassifier.from_pretrained(artifact).classify(TEXTS, top_k=None)
    for answer, row in zip(classes, answers.to_pylist(), strict=True):
        assert [row["label"], row["label_2"]] == [answer[0]["label"], answer[1]["label"]]
        assert row["score"] == pytest.approx(answer[0]["score"], abs=1e-4)
        for one in answer:
            assert row[f"probability_{one['label']}"] == pytest.approx(one["score"], abs=1e-4)


def test_an_answer_does_not_depend_on_the_shard_or_on_the_order(tmp_path):
    texts = [*build_rows(60)["text"], "i feel so happy", "sky " * 300, "\u05d0\u05d3\u05d5\u05dd", "!?" * 200]
    answers = []
    for name, count, order in (("alone", 1, 1), ("few", 7, 1), ("together", 1000, 1), ("backwards", 1000, -1)):
        pq.write_table(pa.table({"text": texts[::order]}), tmp_path / f"{name}.parquet")
        model = ROOT / "weights" / RECOMMENDED
        output = call(tmp_path / f"{name}.parquet", tmp_path / name, model=model, shard_rows=count, probabilities=True)
        answers.append(pq.read_table(output).to_pylist()[::order])
    for others in answers[1:]:
        for alone, other in zip(answers[0], others, strict=True):
            assert alone["label"] == other["label"] and alone["text"] == other["text"]
            scores = [name for name in alone if name.startswith("probability_")]
            assert len(scores) == 6 and all(alone[name] == pytest.approx(other[name], abs=1e-5) for name in scores)


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_shards_of_text(format, artifact, tmp_path):
    texts = ["red", None, "", 'a "blue",\nsky']
    table = pa.table(
        {"text": texts, "n": [1.5, float("nan"), None, 2.0], "day": pa.array([0, 1, None, 3], pa.date32())}
    )
    if format == "jsonl":
        table = table.append_column("list", [[[{"n": float("inf")}], [{"n": 1.5}], None, []]])
    pq.write_table(table, tmp_path / "a.parquet")
    output = call(tmp_path / "a.parquet", tmp_path / "out", model=artifact, output_format=format)
    content = (output / f"part-00000.{format}").read_text(encoding="utf-8")
    if format == "jsonl":
        answers = [json.loads(line) for line in content.splitlines()]
        assert [answer["n"] for answer in answers] == [1.5, None, None, 2.0] and "NaN" not in content
        assert [answer["list"] for answer in answers] == [[{"n": None}], [{"n": 1.5}], None, []]
        assert [answer["text"] for answer in answers] == texts and answers[0]["day"] == "1970-01-01"
    else:
        answers = list(csv.DictReader(io.StringIO(content)))
        assert [answer["text"] for answer in answers] == ["red", "", "", texts[3]]
    assert [answer["label"] or None for answer in answers] == ["warm", None, None, "cold"]
    assert [answer["status"] for answer in answers] == ["ok", "null", "empty", "ok"]


def test_the_manifest_tells_what_was_done(artifact, table, tmp_path):
    output = call(table, tmp_path / "out", model=artifact, shard_rows=300)
    manifest = read_json(output / "_manifest.json")
    assert manifest["complete"] and manifest["output"]["rows"] == COUNT == manifest["output"]["ok"]
    read = {"path": "texts.parquet", "rows": COUNT, "bytes": table.stat().st_size, "sha256": sha256(table)}
    assert manifest["input"]["files"] == [read]
    assert manifest["model"]["sha256"]["onnx/model.onnx"] == sha256(artifact / "onnx" / "model.onnx")
    shards = [(f"part-0000{number}.parquet", rows) for number, rows in enumerate((300, 300, 100))]
    assert [(shard["path"], shard["rows"]) for shard in manifest["shards"]] == shards
    assert all(shard["sha256"] == sha256(output / shard["path"]) for shard in manifest["shards"])
    assert str(tmp_path) not in (output / "_manifest.json").read_text(encoding="utf-8")


def stop_in_the_middle(output: Path) -> None:
    for number in (1, 2):
        (output / f"part-0000{number}.parquet").unlink()
        (output / ".done" / f"part-0000{number}.json").unlink()
    (output / ".part-00001.parquet.partial").write_bytes(b"half")
    manifest = read_json(output / "_manifest.json") | {"complete": False}
    (output / "_manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "shards"}))


def flip_a_shard(output: Path) -> None:
    path = output / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[100:200] = bytes(byte ^ 255 for byte in content[100:200])
    path.write_bytes(content)


def edit_a_record(output: Path) -> None:
    path = output / ".done" / "part-00001.json"
    path.write_text(json.dumps(read_json(path) | {"ok": 10**6}), encoding="utf-8")


DAMAGES = {
    "nothing": lambda output: None,
    "a shard is lost": lambda output: (output / "part-00001.parquet").unlink(),
    "a shard is cut": lambda output: os.truncate(output / "part-00002.parquet", 100),
    "a shard has other bytes": flip_a_shard,
    "a record is edited": edit_a_record,
    "a record is lost": lambda output: (output / ".done" / "part-00000.json").unlink(),
    "stopped in the middle": stop_in_the_middle,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_second_call_makes_what_is_missing(damage, artifact, table, tmp_path, capsys):
    flags = {"model": artifact, "shard_rows": 300}
    output = call(table, tmp_path / "out", **flags)
    printed, whole = capsys.readouterr().out, contents(output)
    DAMAGES[damage](output)
    call(table, output, **flags)
    assert capsys.readouterr().out == printed and contents(output) == whole
    written = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    call(table, output, **flags, threads=1)  # which changes no answer
    assert written == {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"top_k": 2}, "flags.top_k"),
        ({"shard_rows": 200}, "flags.shard_rows"),
        ({"output_format": "csv"}, "flags.output_format"),
        ({"keep_columns": "id"}, "columns.text"),
        ({"format": "bf16"}, "model.format"),
        ({"model": "other"}, "model.sha256.onnx/model.onnx"),
        ({"input": "other"}, "input.files.0.bytes"),
    ],
)
def test_another_question_into_the_same_folder_is_refused(changed, reason, artifact, table, tmp_path):
    flags = {"model": artifact, "shard_rows": 300}
    output = call(table, tmp_path / "out", **flags)
    whole = contents(output)
    if changed.get("model"):
        changed = {"model": copy_to_edit(artifact, tmp_path / "other")}
        with (tmp_path / "other" / "onnx" / "model.onnx").open("ab") as file:
            file.write(b"\x72\x00")  # an empty field that no reader minds
    if changed.get("input"):
        changed = {}
        table.write_bytes(encode("parquet", [*TEXTS[:-1], "another one"]))
    with pytest.raises(UserError, match=f"out .*{reason}"):
        call(table, output, **(flags | changed))
    assert contents(output) == whole


@pytest.mark.parametrize(
    ("files", "args", "message"),
    [
        ({}, ["nowhere.csv", "out"], "nowhere.csv"),
        ({}, ["*.csv", "out"], r"\*.csv"),
        ({"a.csv": b"text\nred\n"}, ["a.csv"], "output"),
        ({"a.csv": b"text\nred\n"}, ["a.csv", "out", "--shard_rows", "0"], "--shard_rows"),
        ({"a.csv": b"text\nred\n", "out/notes": b""}, ["a.csv", "out"], "out holds"),
        ({"a.xlsx": b""}, ["a.xlsx", "out"], "a.xlsx"),
        ({"in/a.csv": b"", "in/b.txt": b""}, ["in", "out"], "csv, txt"),
        ({"in/a.csv": b"text\nred\n"}, ["in", "in/out"], "in/out lies in in"),
        ({"out/a.csv": b"text\nred\n"}, ["out/a.csv", "out"], "out/a.csv lies in out"),
        ({"a/b.parquet": b""}, ["a/**/*.parquet", "a/out"], "a/out/part-00000.parquet"),
        ({"a/b.json": b"{}"}, ["*/*.json", "out"], "out/_manifest.json"),
        ({"out/_manifest.json": b"{}", "a.csv": b"text\nr\n"}, ["a.csv", "out"], "model_name"),
        ({"a.csv": b""}, ["a.csv", "out"], "a.csv"),
        ({"a.csv": b"t,n\nred,1\n"}, ["a.csv", "out"], "a.csv .*'text'; it has t, n"),
        ({"a.csv": b"text\nr\n"}, ["a.csv", "out", "--keep_columns", "n"], "a.csv .*'n'"),
        ({"a.csv": b"text,text\nred,1\n"}, ["a.csv", "out"], "a.csv .*two .*'text'"),
        ({"a.csv": b"text,label\nred,1\n"}, ["a.csv", "out"], "label .*--prefix"),
        ({"a.csv": b"n,text\n1,a\n1,b,c\n"}, ["a.csv", "out"], "a.csv .* line 3: "),
        ({"a.csv": b'n,text\n1,r\n2,"red\n3,r\n'}, ["a.csv", "out"], "line 3: a quote"),
        ({"a.csv": b'text\n"red\n' + b"x\n" * 1000}, ["a.csv", "out"], "line 2: "),
        ({"a.txt": b"red\n" + b"x" * 1000}, ["a.txt", "out"], "line 2 .*300"),
        ({"in/a.csv": b"text\nr\n", "in/b.csv": b"n,text\n1,r\n"}, ["in", "out"], "b.csv .* n;"),
        ({"a.jsonl": b'[{"text": "red"}]'}, ["a.jsonl", "out"], "a.jsonl .*object"),
        ({"a.jsonl": b'{"text": "r", "text": "b"}'}, ["a.jsonl", "out"], "a.jsonl .* line 1: 'text'"),
        ({"a.jsonl": b'{"text": "r", "n": 12345678901234567890}'}, ["a.jsonl", "out"], "a.jsonl .* 64 bits"),
        ({"a.jsonl": b'{"text": "", "n": 9007199254740993}\n{"n": 0.5}'}, ["a.jsonl", "out"], "a.jsonl .* 900719"),
        ({"a.jsonl": b'{"text": ' + b"[" * 8000 + b"]" * 8000 + b"}"}, ["a.jsonl", "out"], "a.jsonl .* line 1"),
        ({"a.jsonl": b'{"n": ' + b"[" * 40 + b"]" * 40 + b', "text": ""}'}, ["a.jsonl", "out"], "column n .* nested"),
        ({"a.jsonl": b'{"text": 5}'}, ["a.jsonl", "out"], "text of a.jsonl .*int64"),
        ({"a.jsonl": b'{"n": 5}'}, ["a.jsonl", "out"], "a.jsonl .*'text'"),
        ({"a.parquet": b"PAR1 it is not"}, ["a.parquet", "out"], "a.parquet"),
        ({"in/a.txt.gz": gzip.compress(b"red\n"), "in/b.txt.gz": b"no"}, ["in", "out"], "b.txt.gz"),
    ],
)
def test_what_cannot_be_done_is_said(files, args, message, artifact, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_VALUE", 300)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        run_batch.main([*args, "--model", str(artifact)])
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out/part-*"))


def test_ray_is_an_extra_and_two_at_once_are_refused(artifact, table, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "emotion.inference.batch_ray", raising=False)
    with pytest.raises(UserError, match="--engine ray needs Ray"):
        call(table, tmp_path / "out", model=artifact, engine="ray")
    with locked(tmp_path / "out"), pytest.raises(UserError, match="another process is writing"):
        call(table, tmp_path / "out", model=artifact)


def test_a_file_that_changes_while_it_is_read_is_named(table):
    source = survey("parquet", [str(table)], "text", None)
    for texts in (TEXTS[:-1], [*TEXTS, "red"]):
        table.write_bytes(encode("parquet", texts))
        with pytest.raises(UserError, match=f"texts.parquet .*{COUNT} .*{len(texts)}"):
            list(RowReader(source)._batches(0, 0))


def test_a_dataset_of_the_hub_is_found_by_its_splits(colors, artifact, tmp_path, monkeypatch):
    """The library finds the files of a split; here they lie in a folder, and are named as the Hub names them."""
    here, build = "hf://datasets/user/colors@" + "0" * 40, datasets.load_dataset_builder

    def build_from_folder(name, config):
        assert (name, config) == ("user/colors", None)
        builder = build(str(colors))
        files = {name: [f"{here}/{Path(one).name}" for one in all] for name, all in builder.config.data_files.items()}
        return SimpleNamespace(config=SimpleNamespace(data_files=files | {"sound": [f"{here}/a.wav"]}))

    def download(repo_id, filename, repo_type, revision):
        assert (repo_id, repo_type, revision) == ("user/colors", "dataset", "0" * 40)
        return str(colors / filename)

    monkeypatch.setattr(datasets, "load_dataset_builder", build_from_folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    output = call("user/colors", tmp_path / "out", split="test", model=artifact, prefix="predicted_")
    answers = pq.read_table(output)
    assert answers["label"].to_pylist() == [0, 1, 2] * 30
    assert answers["predicted_label"].to_pylist()[:3] == ["warm", "cold", "none"]
    [file] = read_json(output / "_manifest.json")["input"]["files"]
    assert file["path"] == f"{here}/test.parquet"
    with pytest.raises(UserError, match="split 'dev'"):
        call("user/colors", tmp_path / "other", split="dev", model=artifact)
    with pytest.raises(UserError, match="a.wav: unknown extension"):
        call("user/colors", tmp_path / "other", split="sound", model=artifact)


def test_torch_is_not_imported(artifact, table, tmp_path):
    code = (
        "import sys, run_batch; run_batch.main(sys.argv[1:])\n"
        "heavy = {'torch', 'datasets', 'sklearn', 'ray'} & set(sys.modules); assert not heavy, heavy"
    )
    done = run_code(code, table, tmp_path / "out", "--model", artifact, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"out: {COUNT} rows, {COUNT} ok\n") and "\r" not in done.stderr  # no bar in a pipe


def test_a_full_disk_is_one_line_and_the_next_call_goes_on(artifact, table, tmp_path):
    args = [table, tmp_path / "out", "--model", artifact, "--shard_rows", 300]

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4500, 4500))

    done = run_script("run_batch.py", *args, preexec_fn=fill)
    assert done.returncode == 1 and "part-00000.parquet" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot write")
    assert not list((tmp_path / "out").glob("*part*"))
    assert run_script("run_batch.py", *args).returncode == 0
    assert pq.read_table(tmp_path / "out").num_rows == COUNT


@pytest.mark.processes
def test_killed_at_any_moment_and_resumed(artifact, tmp_path):
    """Three times: the end is the same as without, byte for byte, and a shard that was done is not made again."""
    texts = [f"{text} {row}" for row, text in enumerate(TEXTS * 60)]
    (tmp_path / "many.csv").write_bytes(encode("csv", texts))
    args = ["--model", str(artifact), "--shard_rows", "2000"]
    assert run_script("run_batch.py", tmp_path / "many.csv", tmp_path / "whole", *args).returncode == 0
    draw, made, records = random.Random(5), {}, tmp_path / "cut" / ".done"
    command = [sys.executable, str(ROOT / "scripts" / "run_batch.py"), str(tmp_path / "many.csv")]
    for shards_done in (0, draw.randint(1, 8), draw.randint(9, 17)):
        process = subprocess.Popen([*command, str(tmp_path / "cut"), *args], stderr=subprocess.DEVNULL)
        while len(list(records.glob("*.json"))) < shards_done and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.5 if shards_done == 0 else 0.1))
        assert process.poll() is None  # it is at work
        process.kill()
        process.wait()
        for path, moment in made.items():
            assert path.stat().st_mtime_ns == moment
        made = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
        assert len(made) >= shards_done
    assert run_script("run_batch.py", tmp_path / "many.csv", tmp_path / "cut", *args).returncode == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    for path, moment in made.items():
        assert path.stat().st_mtime_ns == moment
