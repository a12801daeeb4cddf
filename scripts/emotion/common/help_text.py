"""What `--help` shows: what the command does, an example, its flags, and then the rest of its docstring."""

import argparse
import sys
import textwrap
from collections.abc import Container
from enum import Enum
from pathlib import Path

from emotion.common.files import ROOT

# A word for the value of a flag, by the name of its type; a flag with choices shows those
VALUES = {"int": "INTEGER", "float": "NUMBER", "string_to_bool": "{true,false}"}
MOST_CHOICES = 8  # that are listed; the Trainer knows forty optimizers


class PlainHelp(argparse.HelpFormatter):
    """Each flag once, by one name, with the values that it takes and its default; examples keep their lines."""

    def _split_lines(self, text, width):
        # Whole, so that it can be copied: a default with a hyphen
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text, width, indent):
        paragraphs = []
        for paragraph in text.split("\n\n"):
            kept = paragraph.startswith(" ")  # commands and lists of files
            paragraphs.append(paragraph if kept else "\n".join(self._split_lines(paragraph, width)))
        return "\n\n".join(paragraphs)

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        # Not `--no_x` and `--results-dir` as well: `HfArgumentParser` gives a flag up to four names.
        word = VALUES.get(getattr(action.type, "__name__", None), "TEXT")
        if not action.choices or len(list(action.choices)) <= MOST_CHOICES:
            word = self._metavar_formatter(action, word)(1)[0]
        return f"{action.option_strings[0]} {word}{' ...' if action.nargs == '+' else ''}"

    def _get_help_string(self, action):
        told = action.help or ""
        if action.required and action.option_strings:
            return f"{told} (required)"
        if action.nargs == 0 or action.default in (None, "", [], argparse.SUPPRESS):
            return told
        return f"{told} (default: {_as_typed(action.default).replace('%', '%%')})"


def describe(parser: argparse.ArgumentParser, note: str = "", hidden: Container[str] = ()) -> None:
    """Makes `--help` begin with the first paragraph and the examples of the running script's docstring.

    Args:
        note: a paragraph on the flags, which follows them.
        hidden: names of flags that are not shown.
    """
    # argparse takes the name of a program from there, too.
    paragraphs = (sys.modules["__main__"].__doc__ or "").strip("\n").split("\n\n")
    examples = [paragraph for paragraph in paragraphs if paragraph.startswith(" ") and "scripts/" in paragraph]
    first, *rest = [paragraph for paragraph in paragraphs if paragraph not in examples]
    parser.description = "\n\n".join([first, *examples])
    parser.epilog = "\n\n".join(filter(None, [note, *rest]))
    parser.usage = argparse.SUPPRESS  # a list of all flags, before a word on what they are for
    parser.formatter_class = PlainHelp
    parser._positionals.title, parser._optionals.title = "words", "flags"
    for action in parser._actions:
        if action.dest in hidden or action.const is False:  # `--no_x`, beside `--x {true,false}`
            action.help = argparse.SUPPRESS


def _as_typed(default) -> str:
    """A default as a user would type it."""
    if isinstance(default, list | tuple):
        return " ".join(map(_as_typed, default))
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, Enum):
        return str(default.value)
    path = Path(str(default))
    # Folders of the repository, from its root on
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(default)
