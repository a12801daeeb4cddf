"""The Hub's odd answers: each is one line or a second try, never a traceback, a hang or the token."""

import random
import re
import time
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http, close_session

from conftest import run_script, seeds_for
from emotion.hub.upload import upload
from emotion.inference import emotion_classifier as download
from emotion.utils import command, hub_requests
from emotion.utils.errors import UserError
from hub_server import WRITE, Fault, Repository
from mutations import inject_fault

REPOSITORY = "user/model"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "config.json": b'{"id2label": {}}',
    "tokenizer.json": b'{"words": []}' * 50,
    "tokenizer_config.json": b"{}",
    "onnx/model_quantized.onnx": bytes(range(256)) * 1000,
    "results/metrics/ptq-onnx.json": b'{"score": 1}',
    "results/confusion_matrices/ptq-onnx.png": b"picture" * 100,
}
SERVED = [name for name in FILES if name.startswith(("config", "tokenizer", "onnx"))]
FOREVER = 1000
CONFLICT = b"Cannot create repo: another conflicting operation is in progress"
QUOTA = {"objects": [{"oid": "1", "size": 1, "error": {"code": 413, "message": "private storage limit reached"}}]}


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited for: none of them is, and a silent server is given up after a short while."""
    waited = []
    for module in (hub_requests, _http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waited.append, monotonic=time.monotonic))
    for name, value in (("TIMEOUT_S", 0.2), ("GRACE_S", 0.2), ("MAX_ANSWER", 1_000_000)):
        monkeypatch.setattr(hub_requests, name, value)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.5)
    close_session()  # a connection of the test before may be in the midst of something
    return waited


def publish():
    return upload(dict(FILES), REPOSITORY, "model", private=False, message="m", marker="results/metrics/")


def fetch():
    return download.fetch(REPOSITORY, ["onnx"])


def hold(hub):
    hub.repositories[REPOSITORY] = Repository(commits=[FILES | {".gitattributes": b""}])


def is_whole(folder) -> bool:
    return all((folder / name).read_bytes() == FILES[name] for name in SERVED)


def is_published(hub) -> bool:
    return FILES.items() <= hub.repositories[REPOSITORY].commits[-1].items()


def check_line(message: str) -> None:
    assert len(message) < 500 and message.isprintable() and WRITE not in message, message


@pytest.mark.parametrize(
    ("headers", "waited"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "86400"}, 120),
        ({"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}, 120),
        ({"Retry-After": "Fri, 01 Jan 2010 00:00:00 GMT"}, 0),
        ({"Retry-After": "Fri, 01 Jan 2100 00:00:00"}, 0),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "9" * 400}, 120),
        ({"RateLimit": '"api";r=0;t=30'}, 30),
        ({"RateLimit": '"api";r=0;t=99999'}, 120),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["HEAD", "POST"])
def test_the_wait_that_is_asked_for_is_kept_and_bounded(method, headers, waited, hub, waits, capsys):
    if method == "HEAD":
        hold(hub)
    # The library asks once more for the headers, and a few times more where no wait is asked for.
    times = 2 if method == "HEAD" and waited else 1
    path = "config.json" if method == "HEAD" else "/objects/batch"
    hub.faults.append(Fault(method, path, (429, b"", headers), times))
    fetch() if method == "HEAD" else publish()
    if waited:
        assert waits == [waited]
        line = capsys.readouterr().err
        assert "status 429" in line and f" {waited} s" in line


def test_a_repository_of_something_else_is_left_alone_and_a_private_one_stays_private(hub, waits):
    hub.repositories[REPOSITORY] = Repository(commits=[{".gitattributes": b"", "thesis.pdf": b"years of work"}])
    with pytest.raises(UserError, match="user/model"):
        publish()
    assert len(hub.repositories[REPOSITORY].commits) == 1
    hub.repositories[REPOSITORY] = Repository(private=True)
    publish()
    assert hub.repositories[REPOSITORY].private


def test_a_file_that_the_hub_ignores_is_named(hub, waits):
    ignored = [{"path": name, "uploadMode": "regular", "shouldIgnore": name == "config.json"} for name in FILES]
    hub.faults.append(Fault("POST", "/preupload/", (200, {"files": ignored})))
    with pytest.raises(UserError, match="config.json"):
        publish()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/api/repos/create", 429, times=2),
        Fault("POST", "/api/validate-yaml", 500),
        Fault("POST", "/objects/batch", "cut"),
        Fault("PUT", "/lfs/", "cut"),
        Fault("POST", "/commit/", "cut"),
        Fault("POST", "/commit/", 500),
        Fault("POST", "/commit/", "slow"),
        # The commit is not made, and the second try finds that out.
        Fault("POST", "/commit/", (200, {"success": True})),
        Fault("GET", "model_quantized.onnx", "cut"),
        Fault("GET", "model_quantized.onnx", "stall"),
        Fault("GET", "model_quantized.onnx", "trickle"),
        Fault("GET", "model_quantized.onnx", "shorter"),
        Fault("GET", "model_quantized.onnx", "longer"),
        Fault("GET", "model_quantized.onnx", 500, times=2),
        Fault("GET", "tokenizer.json", {"Content-Encoding": "gzip"}),
        Fault("HEAD", "config.json", {"ETag": None}),
        Fault("HEAD", "config.json", {"X-Repo-Commit": None}),
        Fault("HEAD", "config.json", (200, b"<html>Sign in</html>")),
        Fault("HEAD", "config.json", 500),
        Fault("HEAD", "config.json", "hang"),
    ],
    ids=lambda fault: f"{fault.method} {fault.action}",
)
def test_what_passes_is_tried_again(fault, hub, waits):
    hub.faults.append(fault)
    if fault.method in {"POST", "PUT"}:
        publish()
        assert is_published(hub) and len(hub.repositories[REPOSITORY].commits) == 2
    else:
        hold(hub)
        assert is_whole(fetch())
    assert not fault.times


def test_a_revision_is_fetched_and_one_that_is_not_there_is_named(hub, waits):
    hold(hub)
    repository = hub.repositories[REPOSITORY]
    repository.commits.append(dict.fromkeys(FILES, b"newer"))
    assert is_whole(download.fetch(REPOSITORY, ["onnx"], revision=repository.sha(0)))
    with pytest.raises(UserError, match="no revision"):
        download.fetch(REPOSITORY, ["onnx"], revision="v2")


TO_ITSELF = {"Location": "/user/model/resolve/main/config.json"}


@pytest.mark.parametrize(
    ("request_", "action", "message"),
    [
        # What a publisher is told
        ("POST /objects/batch", (200, QUOTA), "private storage limit"),
        ("POST /objects/batch", 403, "may not do that with user/model"),
        ("PUT /lfs/", 507, "status 507"),
        ("POST /commit/", 401, "this token"),
        ("POST /preupload/", (403, b"quota\nof the \x1b[2J" + WRITE.encode()), r"quota of the \\x1b.2J.the token."),
        ("POST /preupload/", (418, b"x" * 9999, {"Content-Type": "text/plain"}), "status 418. .x+ ...$"),
        ("POST /preupload/", (400, ["a list"]), "status 400"),
        ("POST /repos/create", (200, b"<html>Sign in</html>"), "no useful answer"),
        ("POST /repos/create", (409, CONFLICT), "no useful answer"),
        ("GET /api/models/", (200, ["a list"]), "no useful answer"),
        ("GET /api/models/", "endless", "is larger than"),
        ("POST /preupload/", (200, {}), "no useful answer"),
        ("POST /preupload/", (302, b""), "no useful answer"),
        ("POST /preupload/", "hang", "no useful answer"),
        ("PUT /lfs/", "hang", "no useful answer"),
        # What a reader is told
        ("HEAD config.json", (404, {}, {"ETag": 'W/"2-a/b+c="'}), "user/model"),
        ("HEAD config.json", {"ETag": None}, "no useful answer.*ETag"),
        ("HEAD config.json", {"ETag": '"../../../outside"'}, "ETag cannot be"),
        ("HEAD config.json", {"X-Linked-ETag": "/outside"}, "X-Linked-ETag cannot be"),
        ("HEAD config.json", {"X-Repo-Commit": "../outside"}, "X-Repo-Commit cannot be"),
        ("HEAD tokenizer.json", {"X-Repo-Commit": "0" * 40}, "X-Repo-Commit cannot be"),
        ("HEAD config.json", (200, b"<html>Sign in</html>"), "no useful answer"),
        ("HEAD config.json", (307, b"", TO_ITSELF), "no useful answer"),
        ("HEAD config.json", (302, b""), "no useful answer"),
        ("HEAD config.json", 500, "status 500"),
        ("HEAD config.json", "hang", "no useful answer"),
        ("GET config.json", (302, b"", {"Location": "http://127.0.0.1:9/nowhere"}), "ConnectError|127.0.0.1/nowhere"),
        ("GET config.json", (307, b"", TO_ITSELF), "no useful answer"),
        ("GET model_quantized.onnx", "cut", "no useful answer"),
        ("GET model_quantized.onnx", "trickle", "fewer than 1,000 bytes a second"),
        ("GET model_quantized.onnx", "endless", "larger than"),
        ("GET model_quantized.onnx", "shorter", "Consistency check"),
        ("GET model_quantized.onnx", "longer", "Consistency check"),
        ("GET model_quantized.onnx", 500, "status 500"),
        ("GET model_quantized.onnx", 401, "this token"),
    ],
)
def test_what_does_not_pass_is_one_line(request_, action, message, hub, waits, capsys, tmp_path):
    method, path = request_.split()
    hub.faults.append(Fault(method, path, action, FOREVER))
    publishing, start = path.startswith("/"), time.monotonic()
    if not publishing:
        hold(hub)
    with pytest.raises(UserError, match=message) as caught:
        publish() if publishing else fetch()
    check_line(str(caught.value))
    printed = capsys.readouterr().err
    assert WRITE not in printed and bool(printed) >= bool(waits)  # no second try in silence
    assert time.monotonic() - start < 20 and sum(waits) <= 60 and not list(tmp_path.rglob("outside*"))
    assert REPOSITORY not in hub.repositories or len(hub.repositories[REPOSITORY].commits) == 1


def test_a_failing_hub_does_not_keep_from_the_cache(hub, waits):
    hold(hub)
    fetch()
    for action in (500, "hang", {"ETag": None}, (429, b"", {"Retry-After": "60"})):
        hub.faults[:] = [Fault("HEAD", "config.json", action)]
        assert is_whole(fetch())


def test_where_nothing_listens_nobody_asks_again(hub, waits, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    for attempt in (publish, fetch):
        with pytest.raises(UserError, match="http://127.0.0.1:9.* cannot be reached"):
            attempt()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "onnx/model_quantized.onnx"])
def test_half_a_download_is_no_model_offline(missing, hub, waits, tmp_path, monkeypatch):
    hold(hub)
    pointer = fetch() / missing
    blob = pointer.resolve()
    blob.rename(f"{blob}.12345678.incomplete")  # as a killed download leaves it
    pointer.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run_script("predict.py", "--model", REPOSITORY, "text")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "user/model" in done.stderr and "HF_HUB_OFFLINE" in done.stderr
    assert is_whole(fetch())  # and with the Hub the rest comes


def test_a_cache_that_cannot_be_written_is_named(hub, waits, tmp_path, monkeypatch):
    hold(hub)
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "taken"))
    done = run_script("predict.py", "--model", REPOSITORY, "text")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert re.search(r"taken.*HF_HOME", done.stderr), done.stderr


def test_no_command_shows_the_token(hub, capsys, monkeypatch):
    """Whatever library was asked: a server may send back what it was sent."""
    monkeypatch.setenv(command.TRACEBACK_VARIABLE, "1")

    def main():
        raise UserError(f"the Hub says: {WRITE} is no token")

    with pytest.raises(SystemExit):
        command.run(main)
    printed = capsys.readouterr().err
    assert "error: the Hub says:" in printed and "Traceback" in printed and WRITE not in printed


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", seeds_for(4))
def test_no_fault_of_a_hub_is_more_than_a_line(seed, hub, waits, capsys, tmp_path, monkeypatch, record_property):
    draw = random.Random(seed)
    record_property("draws", 15)
    for round_ in range(15):
        hub.repositories.clear(), hub.blobs.clear(), hub.faults.clear(), close_session()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{round_}"))
        attempt = draw.choice((publish, fetch))
        if attempt is fetch:
            hold(hub)
        fault = inject_fault(hub, draw)
        start = time.monotonic()
        try:
            result = attempt()
            assert is_whole(result) if attempt is fetch else is_published(hub)
        except UserError as error:
            check_line(str(error))
        except Exception as error:
            raise AssertionError(f"{attempt.__name__} under {fault}") from error
        assert time.monotonic() - start < 20, fault
        assert sum(waits) <= 4 * 120 + 4 * 23, (fault, waits)
        waits.clear()
    for line in capsys.readouterr().err.splitlines():
        check_line(line)
    assert not list(tmp_path.rglob("outside*"))
