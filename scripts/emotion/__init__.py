"""What the commands share. A folder imports only those before it: utils, data, inference, evaluation, export,
quantization, training, hub.

`from emotion import EmotionClassifier` gives the class that classifies texts.
"""

import logging
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

__version__ = "0.1.0"

# Libraries read these while they load, so commands import this package before any of them. A value that the user has
# set stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # its thread would also keep a forked process from ending
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # TextEncoder divides the texts among its threads
for _name in ("torch.utils._pytree", "torch.utils.cpp_extension", "bitsandbytes"):  # they log while they load
    logging.getLogger(_name).setLevel(logging.ERROR)
_endpoint = os.environ.get("HF_ENDPOINT", "")
try:
    urlsplit(_endpoint)
except ValueError as _error:  # huggingface_hub would end with a traceback while it loads
    raise SystemExit(f"error: HF_ENDPOINT {_endpoint}: {_error}; write https://host, or unset it") from None


def _print_uncaught(kind, error, trace) -> None:
    """Prints in one line which library a command lacks: most import theirs at the top, where `run` catches nothing."""
    if kind is ModuleNotFoundError and error.name.split(".")[0] != "emotion":
        from emotion.utils.errors import say_what_to_install

        print(f"error: {say_what_to_install(error)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Of this project's commands alone, not of other programs that import the package
if Path(getattr(sys.modules["__main__"], "__file__", None) or ".").resolve().parent == Path(__file__).parent.parent:
    sys.excepthook = _print_uncaught


def __getattr__(name: str):
    # Imported on first use: every command imports this package, and most must not wait for NumPy.
    if name == "EmotionClassifier":
        from emotion.inference.emotion_classifier import EmotionClassifier

        return EmotionClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
