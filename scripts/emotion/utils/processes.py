"""This process among others: whether it is the main one of a distributed launch, and whether it was forked.

A forked process has a copy of all memory and none of the other threads: a runtime that was opened before the fork
waits for threads that are not there, at its next call and when it is destroyed. What was opened under another number
of `forks` is therefore opened anew.
"""

import ctypes
import os
import threading

forks = 0  # how often the process that imported this module was forked until this one came to be
opening = threading.Lock()  # held while something is opened anew


def _after_fork() -> None:
    global forks, opening
    forks += 1
    opening = threading.Lock()  # the old one may be held by a thread that is not here
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of a user who wants it: `tokenizers` would wait for its threads


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_after_fork)


def never_destroy(value) -> None:
    """Keeps an object from being destroyed, even when the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def integer_setting(name: str) -> int | None:
    """An environment variable as a whole number, the first of a list with commas; None if it is not one."""
    try:
        return int(os.environ[name].split(",")[0])
    except (KeyError, ValueError):
        return None


def is_main_process() -> bool:
    """Whether this process speaks and saves for all that were launched with it; one that was not launched does."""
    # A cluster may set RANK and WORLD_SIZE for each of its machines. LOCAL_RANK comes from a launcher alone.
    launched = integer_setting("LOCAL_RANK") is not None and (integer_setting("WORLD_SIZE") or 1) > 1
    return not launched or (integer_setting("RANK") or 0) <= 0
