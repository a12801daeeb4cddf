"""The error that a user can mend; `emotion.common.command` prints it as one line, without a traceback."""


class UserError(Exception):
    """Something the user can mend. The message names the file, flag or row, and says what to do."""
