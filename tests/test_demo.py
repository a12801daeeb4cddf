"""The server of the demo page: whom it answers, and with which files. The page itself is tested by test_web.py."""

import http.client
import os
import shutil
import subprocess
import sys
import threading

import pytest

import demo
from conftest import ROOT
from emotion.utils.errors import UserError

TYPES = {"js": "text/javascript", "mjs": "text/javascript", "wasm": "application/wasm"}
LIBRARY = "libraries/onnxruntime-web/dist/"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a folder of weights and one of libraries, beside which a secret stands."""
    monkeypatch.setattr(demo, "LIBRARIES", tmp_path / "libraries")
    (tmp_path / "libraries" / "@huggingface" / "transformers").mkdir(parents=True)
    (tmp_path / "weights" / "qat").mkdir(parents=True)
    for name in ("secret", "weights/qat/config.json", "weights/qat/.env", *(f"{LIBRARY}a.{end}" for end in TYPES)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "weights" / "qat" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with demo.make_server(0, tmp_path / "weights") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # asks often whether to stop
        yield server
        server.shutdown()


def ask(server, path: str, **headers):
    """The path as it stands: no client in between that mends it."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace"), answer.headers


def test_the_server_gives_the_page_the_models_and_the_libraries(server):
    status, page, headers = ask(server, "/")
    assert server.server_address[0] == "127.0.0.1"  # it listens to this machine alone
    assert status == 200 and "Emotion of a text" in page and headers["Cache-Control"] == "no-store"
    assert ask(server, "/worker.js")[0] == 200
    assert ask(server, "/weights/qat/config.json")[:2] == (200, "weights/qat/config.json")
    assert headers["X-Content-Type-Options"] == "nosniff" and "sha256-" in headers["Content-Security-Policy"]
    for ending, kind in TYPES.items():
        name = f"{LIBRARY}a.{ending}"
        status, body, headers = ask(server, f"/node_modules/{name.removeprefix('libraries/')}")
        assert (status, body, headers["Content-Type"]) == (200, name, kind)


def test_the_server_answers_to_no_other_name(server):
    assert ask(server, "/", Host="localhost:8000")[0] == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        assert ask(server, "/weights/qat/config.json", Host=host)[0] == 403


@pytest.mark.parametrize(
    "path",
    [
        "/secret",
        "/weights/../../secret",
        "/weights/%2e%2e/secret",
        "/weights/..%2fsecret",
        "//secret",
        "/demo.py",
        "/weights/",
        "/weights/qat/",
        "/weights/qat/.env",
        "/weights/qat/tokenizer.json",  # a link to the secret
        "/weights/" + 300 * "a",
    ],
)
def test_the_server_gives_no_other_file(path, server):
    status, body, _ = ask(server, path)
    assert status == 404 and body != "secret"


def test_a_clone_has_its_float_model_made_for_the_browser_once(artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "check_libraries", lambda folder: None)
    left_out = shutil.ignore_patterns("onnx", "*.bf16.safetensors", "SHA256SUMS")
    shutil.copytree(artifact, tmp_path / "weights" / "baseline", ignore=left_out)
    (folder,) = demo.make_fp32(tmp_path / "weights")
    made = folder / demo.FP32
    assert made.read_bytes() == (artifact / "onnx" / "model.onnx").read_bytes()
    before = made.stat().st_mtime_ns
    with demo.make_server(0, tmp_path / "weights") as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        assert ask(server, "/weights/baseline/onnx/model.onnx")[0] == 200
        assert ask(server, "/weights/baseline/config.json")[0] == 200
        server.shutdown()
    assert made.stat().st_mtime_ns == before
    shutil.copytree(tmp_path / "weights", tmp_path / "damaged")
    (tmp_path / "damaged" / "baseline" / "model.safetensors").write_bytes(b"nothing")
    with demo.make_server(0, tmp_path / "damaged"):
        assert capsys.readouterr().out.splitlines()[-1].startswith("no FP32 model for the browser: ")
    assert demo.make_fp32(artifact.parent) == [] == demo.make_fp32(tmp_path / "nowhere")


def test_the_server_needs_python_alone():
    """As in a fresh clone: without the packages of this environment, torch among them."""
    path = os.pathsep.join(str(ROOT / name) for name in ("scripts", "tools"))
    code = "import demo, pathlib; print(demo.make_fp32(pathlib.Path('weights')))"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_what_keeps_the_server_from_starting_is_one_line(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"--port {server.server_port}: .* in use; choose another"):
        demo.make_server(server.server_port, tmp_path)
    monkeypatch.setattr(demo, "LIBRARIES", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no transformers.js in .*; 'make demo' installs it"):
        demo.make_server(0, tmp_path)
    for port in ("-1", "65536", "many"):
        with pytest.raises(UserError, match="--port"):
            demo.main(["--port", port])
