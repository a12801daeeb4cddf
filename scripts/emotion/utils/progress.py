"""How far a command is: a bar on a terminal, which is gone when the work is done, and plain lines in a log."""

import sys
import time

from tqdm import tqdm

LINE_S = 30  # seconds between two lines of a log
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} to go"


class Bar(tqdm):
    """`tqdm` that leaves nothing behind, alone or inside another; where no terminal is, a line every half minute.

    What is printed while a bar stands is to be written by its ``write``, which keeps the two apart.
    """

    def __init__(self, *words, **options):
        self.on_terminal = sys.stderr.isatty()
        if not self.on_terminal:
            options |= {"position": 0, "bar_format": LINE}  # one below another would move the cursor
        self.next_line = time.monotonic() + LINE_S
        super().__init__(*words, leave=False, **options)

    def display(self, msg=None, pos=None):
        """Shows the bar, or ``msg`` in its place: what `tqdm` calls whenever it is time to."""
        if self.on_terminal:
            return super().display(msg, pos)
        if msg is None and time.monotonic() >= self.next_line:  # an empty one would wipe the bar away
            self.fp.write(f"{self}\n")
            self.next_line = time.monotonic() + LINE_S
        return False

    def clear(self, nolock=False):
        """Takes the bar from the screen for a moment."""
        if self.on_terminal:
            super().clear(nolock)


def close_bars() -> None:
    """Takes all bars from the screen, so that an error stands on a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
