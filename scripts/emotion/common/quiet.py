"""Keeps the libraries from talking where they would bury what a command says."""

import contextlib
import logging
import os
import warnings

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
    """The quantizers report each layer that they pass; what was quantized is counted afterwards."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def quiet_libraries() -> None:
    """Sets what keeps progress bars and warnings of the libraries off the screen; some read it while they load."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "PYTHONWARNINGS" in os.environ:  # someone who sets it wants to see the libraries' warnings
        return
    warnings.filterwarnings("ignore")
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)
