"""The error that a user can mend."""


class UserError(Exception):
    """Something the user can mend. The message names the file, flag or row, and says what to do."""
