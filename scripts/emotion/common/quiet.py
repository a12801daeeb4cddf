"""Keeps progress bars and warnings of the libraries away, which would bury the lines that a command prints."""

import contextlib
import logging
import os
import warnings

# Loggers that report every layer, operator or process that they pass
NOISY = (
    "torch.utils._pytree",
    "torch.utils.cpp_extension",
    "torch.onnx",
    "onnxscript",
    "torch.distributed.elastic",
    "bitsandbytes",
)


@contextlib.contextmanager
def quiet_logging():
    """Silences all logging below errors for a block: quantizers report each layer, and it is counted afterwards."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def quiet_libraries() -> None:
    """Sets the libraries' own switches for fewer messages; to be called before they load."""
    # As defaults: a user who has set one of these keeps the choice.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Xet, through which the Hub gives large files, is silent for minutes where it fails; plain HTTP gives them too.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    if "PYTHONWARNINGS" in os.environ:  # someone who sets it wants to see the libraries' warnings
        return
    warnings.filterwarnings("ignore")
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)
