"""Where the JavaScript libraries lie that npm installs: transformers.js, for the demo page and for Node.js."""

from pathlib import Path

from emotion.utils.errors import UserError
from emotion.utils.files import ROOT

WEB = ROOT / "tests" / "web"  # with the list of the libraries that npm reads
LIBRARIES = WEB / "node_modules"


def check_libraries(libraries: Path) -> None:
    """Raises `UserError` if transformers.js is not installed in the folder."""
    if not (libraries / "@huggingface" / "transformers").is_dir():
        raise UserError(f"no transformers.js in {libraries}; 'make demo' installs it")
