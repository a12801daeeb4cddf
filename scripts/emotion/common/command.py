"""The boundary of every command: keeps the libraries quiet, and turns an error into one clear line."""

import errno
import os
import sys
import traceback
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.quiet import quiet_libraries

# On import: libraries read these settings while they load, and every command imports this file before them.
quiet_libraries()

TRACEBACK_VARIABLE = "EMOTION_TRACEBACK"  # set to anything, it shows where an error came from
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def run(main) -> None:
    """Runs a script's ``main`` and ends the process: status 0, or one line on standard error and another status."""
    if int(os.environ.get("RANK", "0")) > 0:  # of several processes the first one speaks for all
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (stays open until the process ends)
    try:
        main()
    except BrokenPipeError:  # the reader (`head`, say) went away: nothing is wrong here
        # Python flushes standard output once more as it ends, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (KeyboardInterrupt, Exception) as error:
        message = _explain(error)
        if message is None or os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exc()
        if message:
            print(f"error: {message}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _explain(error: BaseException) -> str | None:
    """A message that says what the user can do about an error; None if only a developer can mend it."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; a training goes on where it stopped with --resume_from_checkpoint last"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        name = f" {error.filename}" if error.filename else ""
        return f"cannot write{name}: {error.strerror}; free some space or choose another folder"
    if isinstance(error, OSError) and error.errno in NOT_ALLOWED:
        return f"{error.filename}: {error.strerror}; choose another file or folder"
    # The libraries have exceptions of their own for a full disk; only their text tells.
    if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):
        return f"cannot write the weights: {error}; free some space or choose another folder"
    if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):  # torch.save
        return "cannot write a checkpoint: the disk is full or a limit was reached; free some space"
    if isinstance(error, RuntimeError) and "iostream error" in str(error):  # OpenVINO
        return "cannot write the weights: the disk is full or a limit was reached; free some space"
    return None
