"""What a flag takes: ranges of numbers for argparse's ``choices``, which `--help` shows, and errors in one line."""

import math
from dataclasses import dataclass

from emotion.common.errors import UserError

ENDLESS = 10**9  # for what has no bound of its own: the libraries cannot hold every number that Python can


@dataclass(frozen=True)
class Range:
    """The finite numbers from ``least`` to ``most``.

    Attributes:
        above: whether ``least`` itself is left out.
        below: whether ``most`` itself is left out.
    """

    least: float
    most: float = ENDLESS
    above: bool = False
    below: bool = False

    def __contains__(self, number) -> bool:
        # NaN is in no range, since it compares false with everything.
        high_enough = number > self.least if self.above else number >= self.least
        return high_enough and (number < self.most if self.below else number <= self.most)

    def __iter__(self):
        """Yields the range itself: argparse lists the choices in `--help`."""
        yield self

    def __str__(self) -> str:
        start = f"above {self.least}" if self.above else str(self.least)
        if self.most in (ENDLESS, math.inf):
            return start if self.above else f"{start} or more"
        return f"{start} {'to below' if self.below else 'to'} {self.most}"


COUNT = Range(1)
POSITIVE = Range(0, math.inf, above=True, below=True)
NOT_NEGATIVE = Range(0, math.inf, below=True)
SHARE = Range(0, 1)
DROPOUT = Range(0, 1, below=True)  # a dropout of 1 leaves nothing
SEED = Range(0, 2**32 - 1)  # NumPy takes no other


def speak_plainly(parser) -> None:
    """Makes an argparse parser raise `UserError` where it would print its usage, which is long, and exit."""
    parser.error = _raise_user_error
    parser._check_value = check_choice


def check_choice(action, value) -> None:
    """Raises `UserError`, naming flag and value, if the flag takes others; in the place of argparse's own check."""
    choices = action.choices
    if choices is None or value in choices:
        return
    *first, last = map(str, choices)
    takes = f"{', '.join(first)} or {last}" if first else last
    if isinstance(choices, Range) and value > choices.most:
        takes = f"at most {choices.most}"  # an endless range does not say so in its own words
    raise UserError(f"{action.option_strings[0]} {value!s:.80}: it takes {takes}")


def _raise_user_error(message: str):
    raise UserError(message.removeprefix("argument "))
