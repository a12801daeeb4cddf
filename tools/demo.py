"""Serves the demo page to this machine alone, with the models of `weights/`. It asks nothing of any network.

`make demo` installs the JavaScript libraries that the page needs, and starts this. A clone holds its FP32 model for
Transformers alone: where PyTorch is installed, the file for the browser is made of it.

    python tools/demo.py
    python tools/demo.py --port 8123 --weights_dir weights/mpnet-base
"""

import argparse
import contextlib
import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

from emotion.utils.arguments import Range, configure_parser
from emotion.utils.command import run
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT, atomic_write, sha256
from javascript import LIBRARIES, check_libraries

PAGE = ROOT / "docs" / "demo"
FP32 = Path("baseline") / "onnx" / "model.onnx"  # as the page asks for it


class Handler(SimpleHTTPRequestHandler):
    """Answers with files of the page's folder, and of those that the first name of a path chooses, the first first."""

    # Python asks the system for these types, and some systems have wrong ones, with which no browser runs a script.
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *words, folders: dict[str, list[Path]]):
        self.folders = folders
        super().__init__(*words, directory=str(PAGE))

    def translate_path(self, path):
        first, _, rest = path.lstrip("/").partition("/")
        for folder in self.folders.get(first, [PAGE]):
            self.directory = str(folder)
            found = super().translate_path(rest if first in self.folders else path)  # which leaves out every ".."
            if os.path.exists(found):  # noqa: PTH110 - Path.exists raises for a name that is too long
                break
        return found

    def end_headers(self):
        self.send_header("Cache-Control", "no-store")  # a model that was made anew is loaded anew
        super().end_headers()

    def copyfile(self, source, outputfile):
        with contextlib.suppress(ConnectionError):  # the page reads a model's size and closes the connection
            super().copyfile(source, outputfile)

    def log_message(self, *words):
        """A line for each file would bury the address."""


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
    """A server that listens already; see ``main`` for what it raises."""
    check_libraries(LIBRARIES)
    folders = {"weights": [weights], "node_modules": [LIBRARIES]}
    handler = partial(Handler, folders=folders)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; choose another, or 0 for a free one") from error
    try:
        folders["weights"] += make_fp32(weights)
    except (ImportError, UserError) as error:  # the other models are served all the same
        print(f"no FP32 model for the browser: {error}", flush=True)
    return server


def make_fp32(weights: Path) -> list[Path]:
    """The folder beside ``weights`` with the FP32 file for the browser, made once of those very weights.

    Returns:
        The folder; none where the file is there already, or its source or PyTorch is not.

    Raises:
        ImportError: if another package that the export needs is not installed.
        UserError: if the weights are damaged or cannot be exported.
    """
    baseline = weights / "baseline"
    source = baseline / "model.safetensors"
    if (weights / FP32).exists() or not source.is_file() or not find_spec("torch"):
        return []
    folder = ROOT / "build" / "demo" / sha256(source)[:16]
    if not (folder / FP32).is_file():
        print("making the FP32 model for the browser", flush=True)
        from transformers import AutoTokenizer

        from emotion.export.onnx_export import export_onnx
        from emotion.inference.pretrained import load_trained_classifier
        from emotion.utils.command import quiet_libraries

        quiet_libraries()
        with atomic_write(folder / FP32) as path:
            export_onnx(load_trained_classifier(baseline), AutoTokenizer.from_pretrained(baseline), path)
    return [folder]


if __name__ == "__main__":
    run(main)
