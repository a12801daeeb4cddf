"""The error that a user can mend, which `emotion.common.command` prints as one line, and whose code raised another."""


class UserError(Exception):
    """Something the user can mend. The message names the file, flag or row, and says what to do."""


def raised_by(error: BaseException) -> str:
    """The name of the package in whose code an error was raised: 'transformers', 'json', 'emotion', ..."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").split(".")[0]
