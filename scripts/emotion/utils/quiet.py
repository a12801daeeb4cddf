"""Keeps progress bars and warnings of the libraries away, which would bury the lines that a command prints."""

import contextlib
import logging
import os
import sys
import warnings

# Loggers that report every layer, operator or process that they pass
NOISY = ("torch.onnx", "onnxscript", "torch.distributed.elastic")
VERBOSITY = {
    "transformers": "TRANSFORMERS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "datasets": "DATASETS_VERBOSITY",
}


@contextlib.contextmanager
def quiet_logging():
    """Silences all logging below errors for a block: quantizers report each layer, and it is counted afterwards."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def quiet_libraries() -> None:
    """Sets the libraries' own switches for fewer messages, whether they are loaded already or not."""
    # As defaults: a user who has set one of these keeps the choice.
    for library, variable in VERBOSITY.items():
        if os.environ.setdefault(variable, "error") == "error":
            logging.getLogger(library).setLevel(logging.ERROR)
    for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(variable, "1")
    for library in ("huggingface_hub.utils", "datasets"):
        if library in sys.modules:
            sys.modules[library].disable_progress_bars()
    # Xet, through which the Hub gives large files, is silent for minutes where it fails; plain HTTP gives them too.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    if constants := sys.modules.get("huggingface_hub.constants"):
        constants.HF_HUB_DISABLE_XET = os.environ["HF_HUB_DISABLE_XET"] == "1"
    if "PYTHONWARNINGS" in os.environ:  # someone who sets it wants to see the libraries' warnings
        return
    warnings.filterwarnings("ignore")
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)
