"""Random faults of the Hub, for as many rounds as one likes: what a proxy, a broken server or a liar may answer."""

import random

from hub_server import WRITE, Fault, Hub

REQUESTS = (
    ("POST", "/api/repos/create"),
    ("GET", "/api/models/"),
    ("POST", "/validate-yaml"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", "/lfs-verify"),
    ("POST", "/commit/"),
    ("HEAD", "/resolve/"),
    ("GET", "/resolve/"),
    ("HEAD", "config.json"),
    ("GET", "tokenizer.json"),
    ("GET", "model_quantized.onnx"),
)
STATUSES = tuple(
    map(int, "204 206 300 302 304 400 401 402 403 404 408 409 413 416 418 422 429 451 500 502 503 507".split())
)
BODIES = (
    b"",
    b"<html><body>Sign in to the network</body></html>",
    b"\xff\xfe\x00",
    b'{"error": ',
    None,
    [],
    [None],
    {},
    3,
    "words",
    {"error": [f"no\nto\x1b[2J {WRITE}"]},
    {"errors": 3, "files": {}, "objects": 7, "siblings": "x"},
    {"files": [None], "objects": [None], "siblings": [{}], "url": 3, "commitUrl": [], "commitOid": 1},
    {"objects": [{"oid": "1", "size": 1, "error": {"code": 413, "message": f"quota of {WRITE}"}}]},
    {"objects": [{"oid": 1, "size": "x", "actions": {"upload": {}}}]},
)
HEADERS = (
    {"ETag": None},
    {"ETag": '"../../../../outside"'},
    {"X-Linked-ETag": "/outside"},
    {"X-Repo-Commit": None},
    {"X-Repo-Commit": "../../outside"},
    {"X-Repo-Commit": "0" * 40},
    {"Content-Length": None, "Connection": "close"},
    {"Content-Length": "many"},
    {"Content-Length": "-1"},
    {"Content-Encoding": "gzip"},
    {"Content-Range": "bytes x"},
    {"X-Linked-Size": "7"},
    {"X-Error-Code": "RepoNotFound"},
    {"Link": '<{hub}/api/models/user/model/tree/main>; rel="next"'},
    {"Location": "http://127.0.0.1:9/nowhere"},
)
PAUSES = (
    "0",
    "2",
    "86400",
    "-1",
    "soon",
    "nan",
    "9" * 5000,
    "Fri, 01 Jan 2100 00:00:00 GMT",
    "Fri, 01 Jan 2100 00:00:00",
)
LOCATIONS = (
    "",
    "/",
    "http://127.0.0.1:9/nowhere",
    "ftp://host/file",
    "http://[",
    "file:///etc/passwd",
    "//127.0.0.1:9/x",
)
BADLY = ("cut", "hang", "stall", "trickle", "endless", "shorter", "longer")


def inject(hub: Hub, draw: random.Random) -> str:
    """Gives the server one fault, for some requests or for all; returns what it is."""
    method, path = draw.choice(REQUESTS)
    actions = (
        draw.choice(STATUSES),
        (draw.choice((200, 200, *STATUSES)), draw.choice(BODIES)),
        (draw.choice((301, 307, 308)), b"", {"Location": draw.choice(LOCATIONS)}),
        (draw.choice((429, 503)), b"", {"Retry-After": draw.choice(PAUSES)}),
        (429, b"", {"RateLimit": '"api";r=0;t=100000'}),
        draw.choice(HEADERS),
        draw.choice(BADLY),
    )
    fault = Fault(method, path, draw.choice(actions), times=draw.choice((1, 2, 1000)))
    hub.faults.append(fault)
    return repr(fault)[:300]
