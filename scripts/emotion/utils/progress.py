"""Progress: a bar on a terminal, which is removed when the work is done, and plain lines in a log."""

import sys
import time

from tqdm import tqdm

LINE_S = 30  # seconds between two lines of a log
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} to go"


class Bar(tqdm):
    """`tqdm` that leaves nothing behind, alone or nested; without a terminal, a line every half minute.

    Print with `Bar.write` while a bar is shown.
    """

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


def close_bars() -> None:
    """Removes all bars from the screen, so that an error has a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
