"""The engines of a cluster: Ray on two nodes of this machine, one of which dies, and the Spark job of the docs."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import ROOT, build_rows, contents, run_script

pytestmark = pytest.mark.cluster
SHARD_ROWS, SHARDS = 1500, 24


@pytest.fixture
def nodes(monkeypatch):
    """A cluster of two nodes with one processor each; the second one may be removed."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    settings = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    second = cluster.add_node(**settings)
    cluster.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster, second
    cluster.shutdown()


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    values = [f"{text} {row}" for row, text in enumerate(build_rows(SHARD_ROWS)["text"] * SHARDS)]
    for part in range(2):
        pq.write_table(
            pa.table({"text": values[part::2], "row": range(part, len(values), 2)}), folder / f"{part}.parquet"
        )
    return folder


@pytest.fixture(scope="module")
def whole(texts, artifact, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run_script("run_batch.py", *args(texts, output, artifact)).returncode == 0
    return output


def args(texts: Path, output: Path, artifact: Path, *more) -> list[str]:
    return [str(word) for word in (texts, output, "--model", artifact, "--shard_rows", SHARD_ROWS, *more)]


def start(texts: Path, output: Path, artifact: Path, shards: int) -> subprocess.Popen:
    """Starts the job on Ray; returns when so many shards are made."""
    command = [
        sys.executable,
        str(ROOT / "scripts" / "run_batch.py"),
        *args(texts, output, artifact, "--engine", "ray"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(list((output / ".done").glob("*.json"))) < shards:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


def test_a_node_dies_in_the_middle(nodes, texts, whole, artifact, tmp_path):
    cluster, second = nodes
    process = start(texts, tmp_path / "out", artifact, shards=4)
    cluster.remove_node(second, allow_graceful=False)
    assert not (tmp_path / "out" / f"part-{SHARDS - 1:05d}.parquet").exists()  # it was the middle
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert contents(tmp_path / "out") == contents(whole)
    rows = pq.read_table(tmp_path / "out")["row"].to_pylist()
    assert sorted(rows) == list(range(SHARD_ROWS * SHARDS)) and f"{len(rows):,} rows" in printed


def test_a_worker_dies_and_then_the_command(nodes, texts, whole, artifact, tmp_path):
    process = start(texts, tmp_path / "out", artifact, shards=2)
    workers = [one for one in psutil.Process().children(recursive=True) if "ShardActor" in " ".join(one.cmdline())]
    assert workers
    workers[0].kill()
    while len(list((tmp_path / "out" / ".done").glob("*.json"))) < 8:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.kill()
    process.wait()
    # The plain engine finishes what the cluster began.
    assert run_script("run_batch.py", *args(texts, tmp_path / "out", artifact)).returncode == 0
    assert contents(tmp_path / "out") == contents(whole)


def test_what_an_actor_cannot_do_is_one_line(nodes, texts, artifact, tmp_path):
    process = start(texts, tmp_path / "out", artifact, shards=1)
    (tmp_path / "gone").mkdir()
    for path in (tmp_path / "out").glob("part-*"):
        path.rename(tmp_path / "gone" / path.name)
    (tmp_path / "out" / ".done").rename(tmp_path / "gone" / ".done")
    (tmp_path / "out" / ".done").write_text("a file in the way", encoding="utf-8")
    _, errors = process.communicate(timeout=240)
    last = errors.splitlines()[-1]
    assert process.returncode == 1 and last.startswith("error: ") and ".done" in last and "Traceback" not in errors


def test_the_spark_job_of_the_docs(artifact, tmp_path):
    [job] = re.findall(r"```python\n(.*?mapInPandas.*?)```", (ROOT / "docs" / "many_texts.md").read_text(), re.DOTALL)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "ptq").symlink_to(artifact)
    (tmp_path / "texts").mkdir()
    pq.write_table(pa.table({"text": ["red", None, "blue sky"] * 40}), tmp_path / "texts" / "a.parquet")
    settings = {"PYTHONPATH": str(ROOT / "scripts"), "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    environment = os.environ | settings
    done = subprocess.run([sys.executable, "-c", job], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = pq.read_table(tmp_path / "answers").to_pylist()
    assert len(answers) == 80 and {(row["text"], row["label"]) for row in answers} == {
        ("red", "warm"),
        ("blue sky", "cold"),
    }
