"""The command line of every command: turns a recipe and flags into dataclasses, and names what it does not know."""

import difflib
import sys
from enum import Enum
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.recipe import PER, Recipe, read_recipe, resolve


def parse_recipe(classes, default: Path, argv=None, find_model=None) -> tuple:
    """Parses ``[recipe.yaml] [--flag value ...]`` into dataclasses; a flag beats the recipe.

    The recipe may hold mappings of values that replace its own: ``per_model`` by base model id, since a learning rate
    that suits a small encoder ruins a large one, and ``per_bits`` by the bits of a weight.

    Args:
        classes: dataclasses whose fields are the flags, as `HfArgumentParser` reads them.
        default: the recipe that is read when the command line names none.
        argv: the words of the command line, without the program's name; `sys.argv` if not given.
        find_model: a function from the parsed flags to the base model's name, or None. A recipe with ``per_model``
            needs it, since a folder, a package or a baseline may stand for the name.

    Returns:
        One instance of each class, then the `Recipe`.

    Raises:
        UserError: naming the key or the flag that is unknown, or the value that does not fit.
    """
    leading, flags = _split(argv)
    if len(leading) > 1 or (leading and not leading[0].endswith((".yaml", ".yml"))):
        raise UserError(f"expected a recipe that ends in .yaml, then flags; got: {' '.join(leading)}")
    path = Path(leading[0]) if leading else default
    values = read_recipe(path)
    parser = _parser(classes)
    known = {action.dest for action in parser._actions}
    _check_keys(path, values, known)
    if values.get("per_model") and not find_model:
        raise UserError(f"{path}: per_model needs a flag that names a model, which this script does not have")
    values = _choose_values(parser, values, flags, find_model)
    parser.set_defaults(**_as_typed(values))
    parsed = _into_dataclasses(parser, flags)
    return (*parsed, Recipe(path=path, values=_collect_used(parsed, values, flags)))


def parse_flags(classes, positional: str, argv=None) -> tuple:
    """Parses ``WORD [WORD ...] [--flag value ...]`` into dataclasses; the leading words belong to ``positional``.

    Raises:
        UserError: naming the flag that is unknown, or the value that does not fit.
    """
    leading, flags = _split(argv)
    # The words become the value of an ordinary flag, so `--help` shows it, and it may be written out as well.
    return _into_dataclasses(_parser(classes), [f"--{positional}", *leading, *flags] if leading else flags)


def _check_keys(path: Path, values: dict, known: set[str]) -> None:
    """Raises `UserError` for a key of the recipe, or of a mapping in it, that is no flag of this command."""
    keys = [key for key in values if key not in PER]
    for name in PER:
        mapping = values.get(name) or {}
        if not isinstance(mapping, dict) or not all(isinstance(part, dict) for part in mapping.values()):
            raise UserError(f"{path}: {name} must hold lines such as 'value: {{learning_rate: 1.0e-4}}'")
        for part in mapping.values():
            _check_keys(path, part, known)
    if values.get("per_bits") and "bits" not in known:
        raise UserError(f"{path}: per_bits needs the flag --bits, which this script does not have")
    for key in keys:
        if key not in known:
            raise UserError(f"{path}: unknown key '{key}'.{_did_you_mean(key, known)}")


def _choose_values(parser, values: dict, flags: list[str], find_model) -> dict:
    """The recipe's values for the model and the bits that recipe and flags name together."""
    # Those two are flags like any other, so the flags are parsed here once before they are parsed for good: which
    # values replace the recipe's depends on them. The recipe's own values come first, for `--help` to show.
    own_values = {key: value for key, value in values.items() if key not in PER}
    parser.set_defaults(**_as_typed(own_values))
    first, _ = parser.parse_known_args(flags)
    model = find_model(first) if values.get("per_model") else None
    return resolve(values, model, getattr(first, "bits", None))


def _collect_used(parsed: tuple, values: dict, flags: list[str]) -> dict:
    """The values that the recipe or a flag has set, as the dataclasses hold them; defaults are left out."""
    # argparse takes `--flag=value` and, of HfArgumentParser, `--flag-name` too.
    flag_names = [flag[2:].split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]
    given, used = {*values, *flag_names}, {}
    for part in parsed:
        for name, value in vars(part).items():
            if name in given:
                # TrainingArguments make enums of some words, which YAML could not write down.
                used[name] = value.value if isinstance(value, Enum) else value
    return used


def _as_typed(values: dict) -> dict:
    """Numbers as words, so that a recipe's values are checked by the parser like those of the command line."""
    # argparse checks defaults that are strings and takes all others as they are.
    return {key: str(value) if isinstance(value, int | float) else value for key, value in values.items()}


def _split(argv) -> tuple[list[str], list[str]]:
    """The words before the first flag, and the rest."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for index, word in enumerate(argv):
        if word.startswith("-"):
            return argv[:index], argv[index:]
    return argv, []


def _parser(classes):
    # Imported here, since it takes a second: importing a command or a test of it should not cost that.
    from transformers import HfArgumentParser
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading and writing files; a training shows its own
    # No abbreviations: a misspelt flag must be an error, and not another flag. The parser's formatter shows each
    # flag's default in the help, which for a command with a recipe is the recipe's value.
    parser = HfArgumentParser(classes, allow_abbrev=False)
    parser.error = _raise_user_error  # argparse would print its usage, which is long, and exit
    return parser


def _into_dataclasses(parser, flags: list[str]) -> tuple:
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    except (ValueError, ImportError) as error:  # raised by the checks of the dataclasses themselves
        raise UserError(str(error)) from error
    if unknown:
        known = [action.dest for action in parser._actions]
        raise UserError(f"unknown flag {unknown[0]}.{_did_you_mean(unknown[0].lstrip('-'), known)}")
    return tuple(parsed)


def _did_you_mean(name: str, known) -> str:
    # One suggestion, if there is a name that is similar enough to be meant.
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _raise_user_error(message: str):
    raise UserError(message)
