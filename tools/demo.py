"""Serves the demo page on localhost, with the models in `weights/` and without any network access.

`make demo` installs the JavaScript libraries that the page needs, and runs this script. The FP32 model of a clone is
for Transformers; if PyTorch is installed, it is exported to ONNX for the browser.

    python tools/demo.py
    python tools/demo.py --port 8123 --weights_dir weights/mpnet-base
"""

import argparse
import base64
import contextlib
import hashlib
import os
import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

from emotion.utils.arguments import Range, configure_parser
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, atomic_write, check_file, sha256

PAGE = ROOT / "docs" / "demo"
LIBRARIES = ROOT / "build" / "demo" / "node_modules"
FP32 = Path("baseline") / "onnx" / "model.onnx"  # as the page asks for it
# All that the page asks for
ASKED = re.compile(
    r"/(index\.html|worker\.js)?|/weights/\w[\w.-]*/((config|tokenizer|tokenizer_config)\.json|onnx/model(_quantized)?\.onnx)"
    r"|/node_modules/(@huggingface/transformers|onnxruntime-web)/dist/[\w.-]+\.(m?js|wasm)"
)
HOSTS = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")


def content_policy() -> str:
    """The page's Content-Security-Policy: its own script, by its hash, and what this server sends."""
    (script,) = re.findall(rb'<script type="module">(.*?)</script>', (PAGE / "index.html").read_bytes(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    scripts = f"script-src 'self' 'sha256-{digest}' 'wasm-unsafe-eval' blob:"
    return f"default-src 'self'; {scripts}; style-src 'unsafe-inline'; connect-src 'self' blob: data:; base-uri 'none'"


class Handler(SimpleHTTPRequestHandler):
    """Serves the page's folder, and the folders that the first component of a path selects."""

    # Some systems have wrong types for these, with which no browser runs a script.
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *arguments, folders: dict[str, list[Path]]):
        self.folders = folders
        super().__init__(*arguments, directory=str(PAGE))

    def send_head(self):
        if not HOSTS.fullmatch(self.headers.get("Host") or ""):  # a site that gave its name this machine's address
            return self.send_error(403)
        path = self.path.partition("?")[0]
        if not ASKED.fullmatch(path):
            return self.send_error(404)
        found, parts = self.translate_path(path), path.split("/")
        try:
            if len(parts) > 2:  # a model or a library, whose own folder may be a link
                check_file(found, Path(self.directory) / parts[2])
        except UserError:
            return self.send_error(404)
        return super().send_head()

    def translate_path(self, path):
        first, _, rest = path.lstrip("/").partition("/")
        for folder in self.folders.get(first, [PAGE]):
            self.directory = str(folder)
            found = super().translate_path(rest if first in self.folders else path)  # which removes every ".."
            if os.path.exists(found):  # noqa: PTH110 - Path.exists raises for a name that is too long
                break
        return found

    def end_headers(self):
        self.send_header("Cache-Control", "no-store")  # a replaced model is loaded again
        self.send_header("Content-Security-Policy", content_policy())
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def copyfile(self, source, outputfile):
        with contextlib.suppress(ConnectionError):  # the page reads a model's size and closes the connection
            super().copyfile(source, outputfile)

    def log_message(self, *arguments):
        """Prints nothing: a line for each file would hide the address."""


def check_libraries(libraries: Path) -> None:
    """Raises `UserError` if transformers.js is not installed in the folder."""
    if not (libraries / "@huggingface" / "transformers").is_dir():
        raise UserError(f"no transformers.js in {libraries}; 'make demo' installs it")


def main(argv=None) -> None:
    """Serves until it is interrupted.

    Raises:
        UserError: if the libraries are not installed, or another program has the port.
    """
    parser = configure_parser(argparse.ArgumentParser())
    parser.add_argument(
        "--port", type=int, default=8000, choices=Range(0, 65535), help="port to listen at; 0 takes a free one"
    )
    parser.add_argument("--weights_dir", default=str(ROOT / "weights"), help="folder with a folder for each variant")
    arguments = parser.parse_args(argv)
    server = make_server(arguments.port, Path(arguments.weights_dir))
    print(f"the demo page: http://127.0.0.1:{server.server_port}/   (Ctrl+C ends it)", flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def make_server(port: int, weights: Path) -> ThreadingHTTPServer:
    """Returns a listening server; raises as ``main`` does."""
    check_libraries(LIBRARIES)
    folders = {"weights": [weights], "node_modules": [LIBRARIES]}
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, folders=folders))
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; choose another, or 0 for a free one") from error
    try:
        folders["weights"] += make_fp32(weights)
    except (ImportError, UserError) as error:
        print(f"no FP32 model for the browser: {error}", flush=True)
    return server


def make_fp32(weights: Path) -> list[Path]:
    """Exports the FP32 model for the browser to a folder of its own, once for the same weights.

    Returns:
        The folder; none if `weights` has the file already, or the source or PyTorch is missing.

    Raises:
        ImportError: if another package that the export needs is not installed.
        UserError: if the weights are damaged or cannot be exported.
    """
    baseline, source = weights / "baseline", weights / "baseline" / "model.safetensors"
    if (weights / FP32).exists() or not source.is_file() or not find_spec("torch"):
        return []
    folder = ROOT / "build" / "demo" / sha256(source)[:16]
    if not (folder / FP32).is_file():
        print("making the FP32 model for the browser", flush=True)
        from transformers import AutoTokenizer

        from emotion.export.onnx_export import export_onnx
        from emotion.inference.model_folder import load_trained_classifier
        from emotion.utils.command import quiet_libraries

        quiet_libraries()
        with atomic_write(folder / FP32) as path:
            export_onnx(load_trained_classifier(baseline), AutoTokenizer.from_pretrained(baseline), path)
    return [folder]


if __name__ == "__main__":
    run(main)
