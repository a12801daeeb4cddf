"""The boundary of every command: quiet libraries before they load, one clear line for an error after."""

import errno
import os
import sys
import traceback
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.quiet import quiet_libraries

quiet_libraries()  # here, since every command imports this file before the libraries that read these settings

TRACEBACK_VARIABLE = "EMOTION_TRACEBACK"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


def run(main) -> None:
    """Runs a script's ``main`` and ends the process: status 0, or one line on standard error and another status."""
    if int(os.environ.get("RANK", "0")) > 0:  # of several processes the first one speaks for all
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    try:
        main()
    except BrokenPipeError:  # the reader (`head`, say) went away: nothing is wrong here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (KeyboardInterrupt, Exception) as error:
        message = _explain(error)
        if message is None or os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exc()
        if message:
            print(f"error: {message}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _explain(error: BaseException) -> str | None:
    """What the user can do about an error; None for one that only a developer can mend."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; a training goes on where it stopped with --resume_from_checkpoint last"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        name = f" {error.filename}" if error.filename else ""
        return f"cannot write{name}: {error.strerror}; free some space or choose another folder"
    if isinstance(error, OSError) and error.errno in NOT_ALLOWED:
        return f"{error.filename}: {error.strerror}; choose another file or folder"
    if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):  # no OSError
        return f"cannot write the weights: {error}; free some space or choose another folder"
    if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):  # torch.save on a full disk
        return "cannot write a checkpoint: the disk is full or a limit was reached; free some space"
    if isinstance(error, RuntimeError) and "iostream error" in str(error):  # OpenVINO on a full disk
        return "cannot write the weights: the disk is full or a limit was reached; free some space"
    return None
