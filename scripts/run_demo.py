"""Serves the demo page to this machine alone, with the models of `weights/`. It asks nothing of any network.

`make demo` installs the JavaScript libraries that the page needs, and starts this.

    python scripts/run_demo.py
    python scripts/run_demo.py --port 8123 --weights_dir weights/base
"""

import argparse
import contextlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from emotion.common.command import run
from emotion.common.errors import UserError
from emotion.common.files import ROOT
from emotion.common.help_text import describe
from emotion.common.javascript import LIBRARIES, check_libraries
from emotion.common.ranges import Range, speak_plainly

PAGE = ROOT / "docs" / "demo"


class Handler(SimpleHTTPRequestHandler):
    """Answers with files of three folders: the page's, and those that the first name of a path chooses."""

    # Python asks the system for these types, and some systems have wrong ones, with which no browser runs a script.
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *words, folders: dict[str, Path]):
        self.folders = folders
        super().__init__(*words, directory=str(PAGE))

    def translate_path(self, path):
        first, _, rest = path.lstrip("/").partition("/")
        self.directory = str(self.folders.get(first, PAGE))
        return super().translate_path(rest if first in self.folders else path)  # which leaves out every ".."

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
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--port", type=int, default=8000, choices=Range(0, 65535), help="port to listen at; 0 takes a free one"
    )
    parser.add_argument("--weights_dir", default=str(ROOT / "weights"), help="folder with a folder for each variant")
    speak_plainly(parser)
    describe(parser)
    arguments = parser.parse_args(argv)
    server = make_server(arguments.port, Path(arguments.weights_dir))
    print(f"the demo page: http://127.0.0.1:{server.server_port}/   (Ctrl+C ends it)", flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def make_server(port: int, weights: Path) -> ThreadingHTTPServer:
    """A server that listens already; see ``main`` for what it raises."""
    check_libraries(LIBRARIES)
    handler = partial(Handler, folders={"weights": weights, "node_modules": LIBRARIES})
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; choose another, or 0 for a free one") from error


if __name__ == "__main__":
    run(main)
