"""A small program that speaks the Hub's protocol on loopback, with switches for what may go wrong.

It keeps repositories as lists of commits in memory: pushing, reading, LFS uploads, the card's validation. Nothing here
knows `huggingface_hub`; its unmodified client is what the tests drive against it.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

WRITE, READ = "hf_may_write", "hf_may_read"  # the tokens that it knows; both are of `user`
LFS_ENDINGS = (".safetensors", ".onnx", ".bin", ".png", ".gz")
NAME = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"


@dataclass
class Fault:
    """What happens to the next ``times`` requests of that method whose path holds ``path``."""

    method: str
    path: str
    # A status; a whole answer (status, body, headers); headers that replace those of the true answer (None: it lacks
    # them); or one of: "cut" (half of the body, then the connection closes), "slow", "hang" (no answer ever), "stall"
    # (half of the body, then nothing), "trickle" (a byte now and then), "endless", and "shorter" or "longer" than what
    # was announced when the client asked for the headers alone.
    action: int | str | dict | tuple
    times: int = 1


@dataclass
class Repository:
    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.onnx filter=lfs\n"}])

    def sha(self, index: int = -1) -> str:
        index %= len(self.commits)
        return hashlib.sha1(f"{id(self)} {index}".encode()).hexdigest()

    def at(self, revision: str) -> dict[str, bytes] | None:
        shas = {self.sha(index): files for index, files in enumerate(self.commits)}
        return self.commits[-1] if revision == "main" else shas.get(revision)


class Hub(ThreadingHTTPServer):
    """The server and what it holds; `url` is what HF_ENDPOINT takes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}  # models by their id, Spaces by spaces/id
        self.blobs: dict[str, bytes] = {}  # LFS, by SHA-256
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        """A client that went away is no news."""

    def take_fault(self, method: str, path: str) -> int | str | dict | tuple | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault.action
        return None

    def downloads(self, name: str) -> list[str]:
        """The files of a repository whose bytes were asked for since `requests` was cleared."""
        found = (re.search(rf"/{name}/resolve/[^/]+/(.+)", path) for verb, path in self.requests if verb == "GET")
        return [match[1] for match in found if match]


@contextlib.contextmanager
def running_hub():
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def etag(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(LFS_ENDINGS) else git_oid(content)


def validate_card(content: str) -> list[str]:
    """What the Hub's validator says of a card's metadata, as far as its rules are documented."""
    parts = content.split("---\n")
    try:
        data = yaml.safe_load(parts[1]) if len(parts) > 2 else {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    errors = [] if "license" in data else ['"license" is required']
    for key in ("base_model", "datasets"):
        values = data.get(key, [])
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                errors.append(f'"{key}" with value "{value}" is not valid')
    if data.get("base_model_relation", "merge") not in {"finetune", "quantized", "adapter", "merge"}:
        errors.append('"base_model_relation" must be one of [finetune, quantized, adapter, merge]')
    for result in (result for model in data.get("model-index", []) for result in model.get("results", [])):
        for outer, inner in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
            if not result.get(outer, {}).get(inner):
                errors.append(f'"model-index[0].results[0].{outer}.{inner}" is required')
        for metric in result["metrics"]:
            errors += [f'"metrics[0].{key}" is required' for key in ("type", "value") if key not in metric]
    return errors


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are written apart: each answer would take 40 ms
    server: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append((self.command, path))
        self.fault = fault = self.server.take_fault(self.command, path)
        if fault == "slow":
            time.sleep(2)
        elif isinstance(fault, int):
            return self.send(fault, {"error": f"the server was told to answer {fault}"})
        elif isinstance(fault, tuple):
            return self.send(*fault)
        elif fault == "hang":
            return self.wait_for_the_client()
        elif fault == "cut" and self.command in {"PUT", "POST"}:  # the client gets no answer
            return self.hang_up()
        for method, pattern, handle in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return handle(self, **match.groupdict())
        return self.send(404, {"error": f"no route {self.command} {path}"})

    def hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client may have gone first
            self.connection.shutdown(2)

    def wait_for_the_client(self):
        """Until it gives up."""
        self.rfile.read(1)
        self.hang_up()

    def write_badly(self, content: bytes):
        """The body as the fault has it; the connection is of no use afterwards."""
        half = content[: len(content) // 2]
        if self.fault in {"cut", "stall"}:
            self.wfile.write(half)
            self.wfile.flush()
            if self.fault == "stall":
                self.wait_for_the_client()
        while self.fault in {"trickle", "endless"}:  # until the client closes the connection, which raises
            self.wfile.write(b"1\r\n \r\n" if self.fault == "trickle" else b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            if self.fault == "trickle":
                time.sleep(0.02)
        self.hang_up()

    def send(self, status: int, body, headers: dict | None = None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        common = {"Content-Length": str(len(content)), "Content-Type": "application/json"}
        common |= {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "*"}
        headers = common | (headers or {})
        if isinstance(body, dict) and "error" in body:
            headers["X-Error-Message"] = body["error"]
        if isinstance(self.fault, dict):
            headers |= self.fault
        badly = self.fault if isinstance(self.fault, str) else None
        if self.command != "HEAD" and badly in {"shorter", "longer"}:
            content = content[: len(content) // 2] if badly == "shorter" else content + b" more"
            headers["Content-Length"] = str(len(content))
        if badly in {"trickle", "endless"}:
            headers |= {"Content-Length": None, "Transfer-Encoding": "chunked"}
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value.replace("{hub}", self.server.url))
        self.end_headers()
        if self.command == "HEAD":
            return
        if badly in {"cut", "stall", "trickle", "endless"}:
            self.write_badly(content)
        else:
            self.wfile.write(content)

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def may_write(self, owner: str) -> bool:
        """Says no by an answer of its own."""
        if self.token not in {WRITE, READ}:
            self.send(401, {"error": "Invalid credentials in Authorization header"})
        elif self.token == READ or owner != "user":
            self.send(403, {"error": f"You don't have the rights to create a model under the namespace '{owner}'"})
        else:
            return True
        return False

    def find(self, kind: str | None, repo: str) -> Repository | None:
        """The repository, if the asker may see it; what is private is not there for others."""
        repository = self.server.repositories.get(f"spaces/{repo}" if kind and kind.startswith("space") else repo)
        if repository is None or (repository.private and self.token not in {WRITE, READ}):
            self.send(404 if self.token else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def create(self):
        asked = json.loads(self.body)
        owner, kind = asked.get("organization") or "user", asked.get("type") or "model"
        name = f"{owner}/{asked['name']}"
        key = f"spaces/{name}" if kind == "space" else name
        if not self.may_write(owner):
            return
        status = 409 if key in self.server.repositories else 200
        self.server.repositories.setdefault(key, Repository(private=asked.get("visibility") == "private"))
        answer = {"url": f"{self.server.url}/{key}", "id": name, "name": name}
        self.send(status, answer | ({"error": "You already created this repo"} if status == 409 else {}))

    def validate(self):
        errors = validate_card(json.loads(self.body)["content"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.send(400 if errors else 200, answer)

    def preupload(self, kind, repo, revision):
        repository = self.find(kind, repo)
        if repository is None or not self.may_write(repo.split("/")[0]):
            return
        there, files = repository.at(revision), []
        for name in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if name.endswith(LFS_ENDINGS) else "regular"
            oid = etag(name, there[name]) if name in there else None
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": files})

    def lfs_batch(self, repo, kind=None):
        if not self.may_write(repo.split("/")[0]):
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            places = {"upload": f"lfs/{wanted['oid']}", "verify": "lfs-verify"}
            actions = {name: {"href": f"{self.server.url}/{path}", "header": {}} for name, path in places.items()}
            objects.append(wanted | ({} if wanted["oid"] in self.server.blobs else {"actions": actions}))
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.send(400, {"error": "these bytes have another SHA-256"})
        self.server.blobs[oid] = self.body
        return self.send(200, b"")

    def lfs_verify(self):
        asked = json.loads(self.body)
        self.send(200 if len(self.server.blobs.get(asked["oid"], b"")) == asked["size"] else 404, {})

    def commit(self, kind, repo, revision):
        repository = self.find(kind, repo)
        if repository is None or not self.may_write(repo.split("/")[0]):
            return
        files = dict(repository.at(revision))
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repository.commits.append(files)
        url = f"{self.server.url}/{repo}/commit/{repository.sha()}"
        self.send(200, {"success": True, "commitOid": repository.sha(), "commitUrl": url})

    def info(self, kind, repo, revision="main"):
        if (repository := self.find(kind, repo)) is not None:
            if (files := repository.at(revision)) is None:
                return self.send(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in files]
            sha = repository.sha() if revision == "main" else revision
            answer = {"id": repo, "sha": sha, "private": repository.private, "siblings": siblings}
            return self.send(200, answer | {"tags": [], "downloads": 0, "likes": 0})
        return None

    def tree(self, kind, repo, revision, folder=None):
        repository = self.find(kind, repo)
        if repository is None:
            return None
        prefix, entries, folders = f"{folder}/" if folder else "", [], set()
        for name, content in repository.at(revision).items():
            if name.startswith(prefix):
                first, slash, _ = name.removeprefix(prefix).partition("/")
                if slash:
                    folders.add(prefix + first)
                if not slash or "recursive=true" in self.path.lower():
                    entries.append({"type": "file", "path": name, "size": len(content), "oid": git_oid(content)})
        if folder and not entries and not folders:
            return self.send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        entries += [{"type": "directory", "path": name, "size": 0, "oid": git_oid(b"")} for name in sorted(folders)]
        return self.send(200, entries)

    def resolve(self, repo, revision, file, kind=None):
        repository = self.find(kind, repo)
        if repository is None:
            return None
        files = repository.at(revision)
        if files is None:
            return self.send(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": repository.sha() if revision == "main" else revision}
        if file not in files:
            return self.send(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        content = files[file]
        headers |= {"ETag": f'"{etag(file, content)}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{min(end, len(content)) - 1}/{len(content)}"
            return self.send(206, content[start:end], headers)
        return self.send(200, content, headers)

    def whoami(self):
        if self.may_write("user"):
            self.send(200, {"name": "user", "type": "user"})


API, REVISION = rf"/api/(?P<kind>model|space)s/{NAME}", r"(?P<revision>[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", rf"{API}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"{API}/commit/{REVISION}", Handler.commit),
    ("POST", rf"/(?P<kind>spaces/)?{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.lfs_put),
    ("POST", "/lfs-verify", Handler.lfs_verify),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<folder>.+))?", Handler.tree),
    ("GET", rf"{API}/revision/{REVISION}", Handler.info),
    ("GET", API, Handler.info),
    ("GET HEAD", rf"/(?P<kind>spaces/)?{NAME}/resolve/{REVISION}/(?P<file>.+)", Handler.resolve),
]
