"""The error that a user can mend, which `emotion.utils.command` prints as one line, and whose code raised another."""

import contextlib
import sys

LONGEST_REASON = 300  # characters; some libraries put a page into their message


class UserError(Exception):
    """Something the user can mend. The message names the file, flag or row, and says what to do."""


def raised_by(error: BaseException) -> str:
    """The name of the package in whose code an error was raised: 'transformers', 'json', 'emotion', ..."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").split(".")[0]


def mask_token(text: str) -> str:
    """A text without the user's token for the Hub: a server may send back what it was sent."""
    hub = sys.modules.get("huggingface_hub")  # which alone sends it
    token = hub and hub.get_token()
    return text.replace(token, "(the token)") if token else text


@contextlib.contextmanager
def one_line(fault: str):
    """Makes one `UserError` of whatever a library raises in the block; ``fault`` begins its message."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # no two libraries have the same classes, and a panic of Rust is no `Exception`
        raise UserError(f"{fault}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What a library's error says, in one line."""
    if isinstance(error, OSError) and error.strerror:  # without the file, which the caller names
        return error.strerror
    kind, lines = type(error).__name__, []
    for line in map(str.strip, str(error).splitlines()):
        # OpenVINO begins with the places in its own source files; the reason stands below them.
        if line and not line.startswith(("Exception from ", "Check '")):
            lines.append(line)
    if not lines:
        return kind
    # What another library found, and where PyYAML stood, is told in the second line.
    reason = " ".join(lines[:2]) if lines[0].endswith(":") or lines[0].startswith("while ") else lines[0]
    # Python's own errors name an object and no fault: "'model_type'" alone would say nothing.
    named = isinstance(error, LookupError | AttributeError | TypeError)
    return (f"{kind}: {reason}" if named else reason)[:LONGEST_REASON]
