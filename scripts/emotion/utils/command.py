"""The entry point of every command: quiets the libraries, shows progress, and prints an error as one line."""

import contextlib
import errno
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

from emotion.utils.errors import UserError, mask_token, printable, raised_by, say_what_to_install, visible
from emotion.utils.machine import is_main_process

try:
    from tqdm import tqdm
except ImportError:  # the demo's server runs with Python alone, and draws no bar
    tqdm = object

TRACEBACK_VARIABLE = "EMOTION_TRACEBACK"  # set to anything, it shows where an error came from
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# A full disk in the words of safetensors, torch.save (two) and OpenVINO, whose exceptions have no `errno`
DISK_FULL_MESSAGES = ("I/O error", "PytorchStreamWriter", "unexpected pos", "iostream error")
# Libraries that check what flags ask for when they come to use it, with errors that are written for their users
CHECKING = {"transformers", "accelerate", "peft", "datasets", "huggingface_hub"}
MAX_MESSAGE = 2000  # characters of an error: a value of a megabyte must not bury what is said of it
# Loggers that report every layer, operator or process
NOISY = ("torch.onnx", "onnxscript", "torch.distributed.elastic")
LAST_LINES: list[str] = []  # printed once more when the command ends
LINE_S = 30  # seconds between two lines of a log
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} to go"


class Bar(tqdm):
    """`tqdm` that leaves nothing behind; without a terminal, a line every half minute. Print with `Bar.write`."""

    def __init__(self, *args, **options):
        self.on_terminal = sys.stderr.isatty()
        if not self.on_terminal:
            options |= {"position": 0, "bar_format": LINE}  # one below another would move the cursor
        self.next_line = time.monotonic() + LINE_S
        super().__init__(*args, leave=False, **options)

    def display(self, msg=None, pos=None):
        """Shows the bar, or ``msg`` instead; called by `tqdm`."""
        if self.on_terminal:
            return super().display(msg, pos)
        if msg is None and time.monotonic() >= self.next_line:  # an empty one would wipe the bar away
            self.fp.write(f"{self}\n")
            self.next_line = time.monotonic() + LINE_S
        return False

    def clear(self, nolock=False):
        """Removes the bar from the screen for a moment; called by `tqdm`."""
        if self.on_terminal:
            super().clear(nolock)


def warn_first_and_last(message: str) -> None:
    """Prints a warning on standard error, now and when the command ends, in the main process alone."""
    if is_main_process() and message not in LAST_LINES:
        print(f"WARNING: {message}", file=sys.stderr)
        LAST_LINES.append(message)


def run(main) -> None:
    """Runs a script's ``main`` and ends the process: status 0, or one line on standard error and another status."""
    if not is_main_process():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (stays open until the process ends)
    _prepare_streams()
    quiet_libraries()
    try:
        main()
        for line in LAST_LINES:
            print(f"WARNING: {line}", file=sys.stderr)
    except BrokenPipeError:  # the reader (`head`, say) went away: nothing is wrong here
        # Python flushes standard output once more as it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (KeyboardInterrupt, Exception) as error:
        message = _message_of(error)
        for bar in list(getattr(tqdm, "_instances", ())):  # so that the error has a line of its own
            bar.close()
        if message is None or os.environ.get(TRACEBACK_VARIABLE):
            print(*map(visible, mask_token(traceback.format_exc()).splitlines()), sep="\n", file=sys.stderr)
        if message:
            print(f"error: {shorten(message)}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else getattr(error, "status", 1))


def _prepare_streams() -> None:
    """Makes every character printable, and replaces the streams that the caller has closed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # a file that is opened next would take its number, and be written into
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (open to the end)
        # A pipe may take Latin-1 alone, and a name from the command line may be no text: shown as \u2603, say.
        getattr(sys, name).reconfigure(errors="backslashreplace")


def shorten(message: str) -> str:
    """A message as one `printable` line, without its middle if it is very long."""
    line = printable(" ".join(message.split()), longest=None)
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE // 2]} ... {line[-MAX_MESSAGE // 2 :]}"


def _message_of(error: BaseException) -> str | None:
    """What the user can do about an error; None if it is a bug."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return text or "interrupted; a training goes on where it stopped with --resume_from_checkpoint true"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"cannot write {error.filename or 'the output'}: {error.strerror}; free some space or name another"
    if isinstance(error, OSError) and error.strerror:  # it is missing, a folder, not ours to read, ...
        return f"{error.filename or 'input or output'}: {error.strerror}; choose another file or folder"
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return "the memory is not enough; take smaller batches, shorter texts or a smaller model"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] != "emotion":
        return say_what_to_install(error)
    if isinstance(error, ValueError | ImportError | NotImplementedError) and raised_by(error) in CHECKING:
        return f"{text} ({TRACEBACK_VARIABLE}=1 shows where)"
    is_of_writing = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    if is_of_writing and any(part in text for part in DISK_FULL_MESSAGES):
        return f"cannot write the weights: the disk is full or a limit was reached; free some space ({shorten(text)})"
    return None


@contextlib.contextmanager
def quiet_logging():
    """Silences all logging below errors for a block: quantizers report each layer, which is counted afterwards."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def quiet_libraries() -> None:
    """Sets the libraries' own switches for fewer messages, whether they are loaded already or not."""
    # As defaults: a user who has set one of these keeps the choice.
    for prefix, library in (("TRANSFORMERS", "transformers"), ("HF_HUB", "huggingface_hub"), ("DATASETS", "datasets")):
        if os.environ.setdefault(f"{prefix}_VERBOSITY", "error") == "error":
            logging.getLogger(library).setLevel(logging.ERROR)
    for variable in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(variable, "1")
    for library in ("huggingface_hub.utils", "datasets"):
        if library in sys.modules:
            sys.modules[library].disable_progress_bars()
    # Xet, through which the Hub gives large files, is silent for minutes where it fails; plain HTTP gives them too.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    if constants := sys.modules.get("huggingface_hub.constants"):
        vars(constants)["HF_HUB_DISABLE_XET"] = os.environ["HF_HUB_DISABLE_XET"] == "1"
    if "PYTHONWARNINGS" in os.environ:  # someone who sets it wants to see the libraries' warnings
        return
    warnings.filterwarnings("ignore")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
