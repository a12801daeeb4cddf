"""The command line: the fields of dataclasses are the flags, and a flat YAML file gives values that a flag overrides.

`HfArgumentParser` of Transformers reads the flags; the YAML file comes first, as with TRL's `TrlParser`. A value is
checked against the range or the choices in the metadata of its field, and what is wrong with it is said in one line.
"""

import argparse
import contextlib
import copy
import difflib
import inspect
import json
import math
import re
import sys
import textwrap
from argparse import ArgumentError
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

from emotion.utils.errors import UserError, raised_by
from emotion.utils.files import ROOT
from emotion.utils.recipe import Recipe

ENDLESS = 10**9  # for what has no bound of its own: the libraries cannot hold every number that Python can
LARGEST_CONFIG = 100_000  # bytes; ours have some hundred
MOST_CHOICES = 8  # that `--help` lists; the Trainer knows forty optimizers


@dataclass(frozen=True)
class Range:
    """The finite numbers from ``least`` to ``most``, as ``choices`` of a flag.

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
        """Yields the range itself: argparse lists the choices in `--help` and in its errors."""
        yield self

    def __repr__(self) -> str:
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

# What `TrainingArguments` take. Their own checks are few: most of these would train something else, or end the
# training in the middle. A flag of ours has its range in the metadata of its field.
RANGES = {
    "learning_rate": POSITIVE,
    "num_train_epochs": POSITIVE,
    "max_steps": Range(-1),  # -1: as many as the epochs have
    "warmup_steps": NOT_NEGATIVE,
    "warmup_ratio": SHARE,
    "weight_decay": SHARE,
    "max_grad_norm": NOT_NEGATIVE,
    "adam_beta1": DROPOUT,
    "adam_beta2": DROPOUT,
    "adam_epsilon": POSITIVE,
    "label_smoothing_factor": DROPOUT,
    "neftune_noise_alpha": NOT_NEGATIVE,
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), COUNT
    ),
    **dict.fromkeys(("eval_accumulation_steps", "save_total_limit", "torch_empty_cache_steps"), COUNT),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"), COUNT),
    "eval_delay": NOT_NEGATIVE,
    **dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), POSITIVE),
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": Range(0, 64),  # each is a process
    # What the trainings compute on validation; the Trainer would miss another one after the first epoch.
    "metric_for_best_model": ("macro_f1", "accuracy", "loss", "eval_macro_f1", "eval_accuracy", "eval_loss"),
    "report_to": ("none", *filter(find_spec, ("tensorboard", "wandb", "mlflow", "trackio"))),  # those installed
}
# Of the hundred flags of `TrainingArguments`, `--help` shows those whose default is ours, and these.
COMMON = {"max_steps", "push_to_hub", "hub_model_id", "hub_private_repo", "resume_from_checkpoint", "report_to"}
# Flags of `TrainingArguments` that hold a mapping, which a config may write out
MAPPINGS = {"accelerator_config", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs", "fsdp_config", "deepspeed"}


def parse_args(classes, positional: str, argv=None) -> tuple:
    """Parses ``WORD [WORD ...] [--flag value ...]`` into dataclasses; the leading words belong to ``positional``.

    Raises:
        UserError: naming the flag that is unknown, or the value that does not fit.
    """
    leading, flags = _split(argv)
    # The words become the value of an ordinary flag, so `--help` shows it, and it may be written out as well.
    parser = make_parser(classes, f"[{positional} ...] [--flag value ...]")
    namespace = _parse_all(parser, [f"--{positional}", *leading, *flags] if leading else flags)
    return _into_dataclasses(parser, namespace)


def parse_args_and_config(classes, argv=None, default: Path | None = None) -> tuple:
    """Parses ``[config.yaml] [--flag value ...]`` into dataclasses; a flag overrides the config.

    Args:
        classes: dataclasses whose fields are the flags.
        argv: the words of the command line, without the program's name; `sys.argv` if not given.
        default: the config that is read when the command line names none; None for none.

    Returns:
        One instance of each class, then the `Recipe`.

    Raises:
        UserError: naming the key or the flag that is unknown, or the value that does not fit.
    """
    parser, namespace, recipe = _resolve(classes, argv, default)
    return (*_into_dataclasses(parser, namespace), recipe)


def resolve_config(classes, argv, default: Path | None = None) -> Recipe:
    """The `Recipe` of a command line, without making the dataclasses, which change settings of this process."""
    return _resolve(classes, [str(word) for word in argv], default)[2]


def parse_with_other_flags(classes, default: Path, argv=None) -> tuple:
    """Parses ``[config.yaml] [--flag value ...]`` where the config, and the flags it may hold, are another program's.

    Args:
        classes: dataclasses whose fields are this program's own flags, which the config does not hold.
        default: the config that is read when the command line names none.

    Returns:
        One instance of each class, then the other program's `Recipe` with its flags, and those of our own flags that
        differ from their defaults: name -> value.

    Raises:
        UserError: naming the flag without a value, or the value that does not fit.
    """
    path, flags = _split_config(argv, default)
    values = read_config(path)
    parser = make_parser(classes, "[config.yaml] [--flag value ...]")
    namespace, rest = parser.parse_known_args(flags)
    rest = iter(rest)
    for flag in rest:
        name, equals, value = flag.partition("=")
        if not equals:
            value = next(rest, None)
        if not name.startswith("--") or value is None or value.startswith("--"):
            raise UserError(f"{flag}: expected flags with one value each, --flag value")
        values[name.removeprefix("--")] = _number_or_text(value)
    own = {name: value for name, value in vars(namespace).items() if value != parser.get_default(name)}
    return (*_into_dataclasses(parser, namespace), Recipe(path=path, values=values), own)


def _resolve(classes, argv, default: Path | None) -> tuple:
    """The parser, the namespace of all flags, and the `Recipe`: our own flags, and others that are not as usual."""
    path, flags = _split_config(argv, default)
    parser, own = make_parser(classes, "[config.yaml] [--flag value ...]"), _own_fields(classes)
    required = [action for action in parser._actions if action.required]
    for action in required:
        action.required = False
    usual = vars(_parse_all(parser, []))  # the defaults, as argparse converts them
    given = _typed_config(parser, path) if path else {}
    parser.set_defaults(**given)
    for action in required:
        action.required = action.dest not in given
    namespace = _parse_all(parser, flags)
    values = {}
    for name, value in vars(namespace).items():
        if value != usual[name] or (name in own and value is not None):
            values[name] = value.value if isinstance(value, Enum) else value
    return parser, namespace, Recipe(path=path, values=values)


def make_parser(classes, usage: str):
    """The `HfArgumentParser` of a command, whose errors are `UserError` and whose help is short."""
    # Imported here, since it takes a second: importing a command or a test of it should not cost that.
    from transformers import HfArgumentParser
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading and writing files; a training shows its own
    # No abbreviations: a misspelt flag must be an error, and not another flag.
    parser = make_plain(HfArgumentParser(classes, allow_abbrev=False, usage=f"%(prog)s {usage}"))
    inherited = {}  # the fields of all base classes, those of the farthest last
    for base in [base for one in classes for base in one.__mro__[1:]]:
        inherited |= getattr(base, "__dataclass_fields__", {})
    shown = _own_fields(classes) | COMMON
    for action in parser._actions:
        # A class that changes a default alone leaves the text of the flag to the class that it is based on.
        if not action.help and action.dest in inherited:
            action.help = (inherited[action.dest].metadata.get("help") or "").replace("%", "%%")
        action.choices = RANGES.get(action.dest, action.choices)
        if action.choices and len(list(action.choices)) > MOST_CHOICES:
            action.metavar = action.dest.upper()
        elif action.nargs == "?":
            action.metavar = "{true,false}"
        if action.dest not in shown | {"help"} or action.const is False:  # `--no_x`, beside `--x`
            action.help = argparse.SUPPRESS
    if inherited.keys() - shown:
        parser.epilog = "All other flags of transformers.TrainingArguments are accepted as well."
    return parser


def make_plain(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Makes a parser raise `UserError`, and begin its help with the docstring of the running script; returns it."""

    def fail(message: str):
        # "argument --top_k/--top-k: ...": one name is enough
        raise UserError(re.sub(r"^argument (--?\w+)(/--?[\w-]+)*", r"\1", message))

    parser.error = fail
    parser.formatter_class = PlainHelp
    parser.description = (sys.modules["__main__"].__doc__ or "").strip("\n")
    return parser


class PlainHelp(argparse.RawDescriptionHelpFormatter):
    """Each flag by one name, with the values that it takes and its default, as a user would type it."""

    def _format_action_invocation(self, action):
        # `HfArgumentParser` gives a flag a second name with hyphens.
        action = copy.copy(action)
        action.option_strings = action.option_strings[:1]
        return super()._format_action_invocation(action)

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # so that a default can be copied

    def _get_help_string(self, action):
        if action.nargs == 0 or action.default in (None, "", [], argparse.SUPPRESS):
            return (action.help or "") + (" (required)" if action.required and action.option_strings else "")
        default = action.default if isinstance(action.default, list | tuple) else [action.default]
        words = [str(one.value if isinstance(one, Enum) else one).removeprefix(f"{ROOT}/") for one in default]
        words = [word.lower() if word in ("True", "False") else word for word in words]
        return f"{action.help or ''} (default: {' '.join(words)})".replace("%", "%%").replace("%%%%", "%%")


def read_config(path: Path) -> dict:
    """Reads a flat YAML file whose keys are the names of flags.

    Raises:
        UserError: if there is no such file, or it is not YAML, or no mapping, or holds a key twice, an alias or a tag.
    """
    import yaml  # a Python that only answers texts does not have it

    class PlainLoader(yaml.SafeLoader):
        """YAML without aliases, by which a few lines can become endless, without tags, and with each key once."""

        def compose_node(self, parent, index):
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                raise yaml.YAMLError(f"line {event.start_mark.line + 1}: a config takes no aliases and no tags")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for name, count in names.most_common(1):
                if count > 1:
                    raise yaml.YAMLError(f"line {node.start_mark.line + 1}: '{name:.80}' is there {count} times")
            return super().construct_mapping(node, deep)

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no config at {path}")
    if path.stat().st_size > LARGEST_CONFIG:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, and a config at most {LARGEST_CONFIG:,}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    # A number of 5,000 digits, a 13th month or bytes that are not UTF-8 are a ValueError, too many brackets the last.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'key: value' lines")
    return values


def _typed_config(parser, path: Path) -> dict:
    """The values of a config, checked and converted by the parser like the words of the command line."""
    # The flags themselves, without `--no_x` and `--help`, whose names are not those of their values.
    actions = {action.dest: action for action in parser._actions if action.option_strings[0] == f"--{action.dest}"}
    typed = {}
    for key, value in read_config(path).items():
        if key not in actions:
            raise UserError(f"{path}: unknown key '{key!s:.80}'.{_did_you_mean(str(key), parser)}")
        try:
            typed[key] = _typed(parser, actions[key], value)
        except ArgumentError as error:
            raise UserError(f"{path}: --{key}: {error.message}") from error
    return typed


def _typed(parser, action, value):
    """One value of a config, or raises argparse's error if its flag does not take it."""
    if value is None and action.default is None:
        return None
    if action.nargs == "+":
        return [_typed_word(parser, action, one) for one in (value if isinstance(value, list) else [value])]
    return _typed_word(parser, action, value)


def _typed_word(parser, action, value):
    if isinstance(value, dict) and action.dest in MAPPINGS:
        value = json.dumps(value)  # as on the command line; `TrainingArguments` reads it back
    # YAML reads `no` as false and 2026-11-26 as a date: neither is what a flag with a word of its own means.
    if not isinstance(value, str | int | float) or (isinstance(value, bool) and action.type is str):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise ArgumentError(action, f"it takes a word or a number, and this is {kind}; quotes make a word of it")
    try:
        _check_word(str(value))
    except UserError as error:
        raise ArgumentError(action, str(error)) from error
    typed = parser._get_value(action, str(value))
    parser._check_value(action, typed)
    return typed


def _split_config(argv, default: Path | None) -> tuple[Path | None, list[str]]:
    """The config that the command line names, or the default, and the words from the first flag on."""
    leading, flags = _split(argv)
    if len(leading) > 1 or (leading and not leading[0].endswith((".yaml", ".yml"))):
        raise UserError(f"expected a config that ends in .yaml, then flags; got: {' '.join(leading)}")
    return (Path(leading[0]) if leading else default), flags


def _split(argv) -> tuple[list[str], list[str]]:
    """The words before the first flag, and the rest."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for word in argv:
        _check_word(word)
    first = next((index for index, word in enumerate(argv) if word.startswith("-")), len(argv))
    return argv[:first], argv[first:]


def _check_word(word: str) -> None:
    """Raises `UserError` for what can be no name of a file, and could not be written into a record either."""
    try:
        word.encode()  # Python keeps bytes that are not UTF-8 as halves of characters
    except UnicodeEncodeError as error:
        raise UserError(f"{word.encode(errors='backslashreplace').decode():.80} is not UTF-8; write it so") from error
    if "\0" in word:
        raise UserError(f"{word!r:.80} holds a character of value 0; leave it out")
    if word.endswith("=--"):  # argparse would make an empty list of it
        raise UserError(f"{word:.80}: '--' is no value")


def _parse_all(parser, flags: list[str]) -> argparse.Namespace:
    namespace, unknown = parser.parse_known_args(flags)
    if unknown:
        raise UserError(f"unknown flag {unknown[0]}.{_did_you_mean(unknown[0].lstrip('-'), parser)}")
    return namespace


def _into_dataclasses(parser, namespace: argparse.Namespace) -> tuple:
    try:
        return parser.parse_dict(vars(namespace), allow_extra_keys=True)
    except Exception as error:
        # The dataclasses check their own values. What a library raises there, of whatever kind, speaks of a flag; of
        # our own code a ValueError alone does.
        if raised_by(error) == "emotion" and not isinstance(error, ValueError):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{kind}{error}") from error


def _own_fields(classes) -> set[str]:
    """The names of the flags whose default is ours: all but those that only a class of Transformers declares."""
    bases = [base for one in classes for base in one.__mro__ if not base.__module__.startswith("transformers.")]
    return {name for base in bases for name in inspect.get_annotations(base)}


def _number_or_text(word: str) -> bool | int | float | str:
    """The value that a word of the command line stands for."""
    # Not by YAML, to which `no` is false and 1e-4 is a word.
    if word.lower() in {"true", "false"}:
        return word.lower() == "true"
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(word)
    return word


def _did_you_mean(name: str, parser) -> str:
    # One suggestion, if there is a name that is similar enough to be meant; of those in `--help` before all others.
    shown = [action.dest for action in parser._actions if action.help != argparse.SUPPRESS]
    close = difflib.get_close_matches(name, shown, n=1)
    close = close or difflib.get_close_matches(name, [action.dest for action in parser._actions], n=1)
    return f" Did you mean {close[0]}?" if close else ""
