"""The command line: dataclasses give the flags, a flat YAML file gives values, and a flag overrides the file.

`HfArgumentParser` of Transformers reads the flags; the file comes first, as with TRL's `TrlParser`. A value is checked
against the range or the choices in the metadata of its field. Commands without a config need no Transformers.
"""

import argparse
import difflib
import inspect
import json
import math
import sys
from collections import Counter
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from emotion.utils.errors import UsageError, UserError, raised_by
from emotion.utils.files import ROOT, sha256

UNBOUNDED = 10**9  # the largest number a flag takes: the libraries cannot hold every integer that Python can
MAX_CONFIG_BYTES = 100_000
MAX_CHOICES_IN_HELP = 8  # the Trainer has forty optimizers
USAGE = "[config.yaml] [--flag value ...]"


@dataclass(frozen=True)
class Range:
    """The finite numbers from ``least`` to ``most``, as ``choices`` of a flag; ``above``, ``below``: without them."""

    least: float
    most: float = UNBOUNDED
    above: bool = False
    below: bool = False

    def __contains__(self, number) -> bool:
        # NaN is in no range, since it compares false with everything.
        high_enough = number > self.least if self.above else number >= self.least
        return high_enough and (number < self.most if self.below else number <= self.most)

    def __iter__(self):
        yield self  # argparse lists the choices in `--help` and in its errors

    def __repr__(self) -> str:
        start = f"above {self.least}" if self.above else str(self.least)
        if self.most in (UNBOUNDED, math.inf):
            return start if self.above else f"{start} or more"
        return f"{start} {'to below' if self.below else 'to'} {self.most}"


COUNT = Range(1)
POSITIVE = Range(0, math.inf, above=True, below=True)
NOT_NEGATIVE = Range(0, math.inf, below=True)
SHARE = Range(0, 1)
DROPOUT = Range(0, 1, below=True)  # a dropout of 1 leaves nothing
SEED = Range(0, 2**32 - 1)  # NumPy takes no other

# The values that flags of `TrainingArguments` take; a flag of this project has its range in the metadata of its field.
FLAGS_BY_RANGE = {
    POSITIVE: "learning_rate num_train_epochs adam_epsilon eval_steps save_steps logging_steps",
    NOT_NEGATIVE: "warmup_steps max_grad_norm neftune_noise_alpha eval_delay",
    SHARE: "warmup_ratio weight_decay",
    DROPOUT: "adam_beta1 adam_beta2 label_smoothing_factor",
    COUNT: "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
    "eval_accumulation_steps torch_empty_cache_steps dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout",
    SEED: "seed data_seed",
    Range(-1): "max_steps",  # -1: as many as the epochs have
    Range(0, 64): "dataloader_num_workers",  # each is a process
    # What is computed on validation; the Trainer would miss any other metric after the first epoch
    ("macro_f1", "accuracy", "loss", "eval_macro_f1", "eval_accuracy", "eval_loss"): "metric_for_best_model",
    ("none", *filter(find_spec, ("tensorboard", "wandb", "mlflow", "trackio"))): "report_to",  # those installed
}
RANGES: dict[str, Any] = {name: allowed for allowed, names in FLAGS_BY_RANGE.items() for name in names.split()}
# Of the hundred flags of `TrainingArguments`, `--help` shows those whose default is set here, and these.
COMMON = {"max_steps", "push_to_hub", "hub_model_id", "hub_private_repo", "resume_from_checkpoint", "report_to"}
# Flags of `TrainingArguments` that take a mapping
MAPPINGS = {"accelerator_config", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs", "fsdp_config", "deepspeed"}
# Flags that name where a result is written and do not change it, which recipe.yaml leaves out
PLACES = {"resume_from_checkpoint", "output_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "results_dir"}


def flag(default=MISSING, help: str = "", choices=None, **options):
    """A field of a dataclass that is a flag, as `HfArg` of Transformers; ``options`` are those of `field`."""
    options |= {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**options, metadata={"help": help} | ({"choices": choices} if choices else {}))


@dataclass(frozen=True)
class Recipe:
    """What a run was asked to do."""

    path: Path | None  # the config that was read
    values: dict  # all flags of this project that have a value, and those of libraries that differ from their defaults

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the config's bytes, in hexadecimal: flags of the command line and defaults are not in it."""
        return sha256(self.path) if self.path else None


def comparable(values: dict) -> dict[str, str]:
    """The values of a recipe that decide its result, as strings, so that two runs can be compared."""
    compared = {}
    for key, value in values.items():
        if key not in PLACES | {"report_to", "disable_tqdm", "bf16"}:  # the machine may have turned off bf16
            # A recipe's 3 and a flag's 3.0 are the same number.
            compared[key] = str(float(value) if isinstance(value, int | float) else value)
    return compared


def parse_args(classes, positional: str, argv=None) -> tuple:
    """Parses ``VALUE [VALUE ...] [--flag value ...]`` into dataclasses, without loading another library.

    Args:
        classes: dataclasses whose fields are the flags: strings, numbers, booleans, choices and lists.
        positional: the flag that takes the values before the first flag.
        argv: the command line without the program's name; `sys.argv[1:]` if not given.

    Raises:
        UsageError: naming the flag that is unknown, or whose value does not fit.
    """
    values, flags = _split(argv)
    # An ordinary flag, so that `--help` shows it and it may be written out as well
    parser = configure_parser(argparse.ArgumentParser(usage=f"%(prog)s [{positional} ...] [--flag value ...]"))
    for one in classes:
        _add_fields(parser, one)
    given = vars(parse_plain(parser, [f"--{positional}", *values, *flags] if values else flags))
    try:
        return tuple(one(**{item.name: given[item.name] for item in fields(one)}) for one in classes)
    except ValueError as error:
        raise UsageError(str(error)) from error


def parse_plain(parser, argv=None) -> argparse.Namespace:
    """Parses with `argparse`; `--top-k` is `--top_k`, and an unknown flag a `UsageError` that names a similar one."""
    for name, action in list(parser._option_string_actions.items()):
        parser._option_string_actions.setdefault(name.replace("_", "-"), action)
    return _parse_known(parser, list(sys.argv[1:] if argv is None else argv))


def _add_fields(parser, arguments) -> None:
    """Adds the flags that `HfArgumentParser` makes of a dataclass."""
    hints = get_type_hints(arguments)
    for one in fields(arguments):
        kind, options = hints[one.name], {"choices": None, **one.metadata}
        if isinstance(kind, UnionType):
            kind = get_args(kind)[0]  # the other is None
        if get_origin(kind) is Literal:
            kind, options["choices"] = str, get_args(kind)
        elif get_origin(kind) is list:
            kind, options["nargs"] = get_args(kind)[0], "+"
        elif kind is bool:
            kind = _to_bool
            options |= {"nargs": "?", "const": True, "metavar": "{true,false}"}
        if options["choices"] and len(list(options["choices"])) > MAX_CHOICES_IN_HELP:
            options["metavar"] = one.name.upper()
        default = one.default if one.default_factory is MISSING else one.default_factory()
        options |= {"required": True} if default is MISSING else {"default": default}
        parser.add_argument(f"--{one.name}", type=kind, **options)


def _to_bool(text: str) -> bool:
    if text.lower() not in {"true", "false"}:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def parse_args_and_config(classes, argv=None, default: Path | None = None) -> tuple:
    """Parses ``[config.yaml] [--flag value ...]`` into dataclasses, as `parse_args`; a flag overrides the config.

    Returns one instance of each class, then the `Recipe`. Without a config on the command line, ``default`` is read.
    """
    parser, namespace, recipe = _resolve(classes, argv, default)
    return (*_into_dataclasses(parser, namespace), recipe)


def resolve_config(classes, argv, default: Path | None = None) -> Recipe:
    """The `Recipe` of a command line, without making the dataclasses, which change settings of this process."""
    return _resolve(classes, [str(word) for word in argv], default)[2]


def _resolve(classes, argv, default: Path | None) -> tuple:
    """The parser, the namespace of all flags, and the `Recipe`."""
    path, flags = _split_config(argv, default)
    parser = make_parser(classes, USAGE)
    # Before the config, and converted as argparse does it
    defaults = {action.dest: action.default for action in reversed(parser._actions)}
    for action in parser._actions:
        if isinstance(action.default, str):
            defaults[action.dest] = parser._get_value(action, action.default)
    config = _convert_config(parser, path) if path else {}
    parser.set_defaults(**config)
    for action in parser._actions:
        action.required &= action.dest not in config
    namespace = _parse_known(parser, flags)
    values, own = {}, _own_fields(classes)
    for name, value in vars(namespace).items():
        if value != defaults[name] or (name in own and value is not None):
            values[name] = value.value if isinstance(value, Enum) else value
    return parser, namespace, Recipe(path=path, values=values)


def parse_with_other_flags(classes, default: Path, argv=None) -> tuple:
    """As `parse_args_and_config`, where the config and all flags but those of the classes are another program's.

    Returns one instance of each class; the other program's `Recipe`, with its flags; and this program's flags that
    differ from their defaults, name -> value.
    """
    path, flags = _split_config(argv, default)
    values = read_config(path or default)
    parser = make_parser(classes, USAGE)
    namespace, rest = parser.parse_known_args(flags)
    rest = iter(rest)
    for flag in rest:
        name, equals, value = flag.partition("=")
        if not equals:
            value = next(rest, None)
        if not name.startswith("--") or value is None or value.startswith("--"):
            raise UsageError(f"{flag}: expected flags with one value each, --flag value")
        try:
            number = json.loads(value.lower())  # not by YAML, which reads `no` as false and 1e-4 as a string
            value = number if isinstance(number, int | float) else value
        except ValueError:
            pass
        values[name.removeprefix("--")] = value
    own = {name: value for name, value in vars(namespace).items() if value != parser.get_default(name)}
    return (*_into_dataclasses(parser, namespace), Recipe(path=path, values=values), own)


def make_parser(classes, usage: str):
    """The `HfArgumentParser` of a command, with a short `--help`, whose errors are `UserError`."""
    from transformers import HfArgumentParser  # here: it takes a second
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading and writing files; a training shows its own
    parser = configure_parser(HfArgumentParser(classes, usage=f"%(prog)s {usage}"))
    inherited: dict[str, Field] = {}
    for base in chain.from_iterable(one.__mro__[1:] for one in classes):
        inherited |= getattr(base, "__dataclass_fields__", {})
    shown = _own_fields(classes) | COMMON | {"help"}
    for action in parser._actions:
        action.option_strings = action.option_strings[:1]  # `--top_k`, which is also parsed as `--top-k`
        # A class that changes a default alone leaves the text of the flag to its base class.
        if not action.help and action.dest in inherited:
            action.help = (inherited[action.dest].metadata.get("help") or "").replace("%", "%%")
        action.choices = RANGES.get(action.dest, action.choices)
        if action.choices and len(list(action.choices)) > MAX_CHOICES_IN_HELP:
            action.metavar = action.dest.upper()
        elif action.nargs == "?":
            action.metavar = "{true,false}"
        if action.dest not in shown or action.const is False:  # `--no_x`, beside `--x`
            action.help = argparse.SUPPRESS
    if inherited.keys() - shown:
        parser.epilog = "All other flags of transformers.TrainingArguments are accepted as well."
    return parser


def configure_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Makes a parser raise `UsageError` and begin its help with the docstring of the running script; returns it."""

    def fail(message: str):
        raise UsageError(message.removeprefix("argument "))

    parser.error = fail  # type: ignore[method-assign]  # another program's class of parser is configured too
    parser.allow_abbrev = False  # a misspelt flag must be an error, and not another flag
    parser.formatter_class = HelpFormatter
    parser.description = (sys.modules["__main__"].__doc__ or parser.description or "").strip("\n")
    return parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag as a user would type it."""

    def _get_help_string(self, action):
        if action.nargs == 0 or action.default in (None, "", [], argparse.SUPPRESS):
            return (action.help or "") + (" (required)" if action.required and action.option_strings else "")
        defaults = []
        for value in action.default if isinstance(action.default, list | tuple) else [action.default]:
            shown = str(value.value if isinstance(value, Enum) else value).removeprefix(f"{ROOT}/")
            defaults.append(shown.lower() if isinstance(value, bool) else shown)
        return f"{action.help or ''} (default: {' '.join(defaults)})".replace("%", "%%").replace("%%%%", "%%")


def read_config(path: Path) -> dict:
    """Reads a flat YAML file whose keys are the names of flags; raises `UserError` for anything else."""
    import yaml  # here: classifying texts must not wait for it

    class PlainLoader(yaml.SafeLoader):
        """YAML with each key once, without tags, and without aliases, by which a few lines can become endless."""

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
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, and a config at most {MAX_CONFIG_BYTES:,}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    # A number of 5,000 digits, a 13th month or bytes that are not UTF-8 are a ValueError, too many brackets the last.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold 'key: value' lines")
    return values


def _convert_config(parser, path: Path) -> dict:
    """The values of a config, checked and converted by the parser as if they came from the command line."""
    # The flags themselves, without `--no_x` and `--help`, whose names are not those of their values.
    actions = {action.dest: action for action in parser._actions if action.option_strings[0] == f"--{action.dest}"}
    converted: dict[str, Any] = {}
    for key, value in read_config(path).items():
        if key not in actions:
            raise UserError(f"{path}: unknown key '{key!s:.80}'.{_did_you_mean(str(key), parser)}")
        action = actions[key]
        values = value if isinstance(value, list) and action.nargs == "+" else [value]
        try:
            if value is None and action.default is None:
                converted[key] = None
            else:
                converted[key] = parser._get_values(action, [_config_value(action, one) for one in values])
        except (argparse.ArgumentError, UserError) as error:
            raise UserError(f"{path}: --{key}: {getattr(error, 'message', error)}") from error
    return converted


def _config_value(action, value) -> str:
    """A value of a config as it would be written on the command line."""
    if isinstance(value, dict) and action.dest in MAPPINGS:
        return json.dumps(value)  # `TrainingArguments` reads it back
    # YAML reads `no` as false and 2026-11-26 as a date, which a flag that takes a string does not mean.
    is_plain = isinstance(value, str | int | float) and value != "--"
    if not is_plain or (isinstance(value, bool) and action.type is str and action.dest != "resume_from_checkpoint"):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise UserError(f"it takes a string or a number, and this is {kind}; quotes make a string of it")
    _check_string(str(value))
    return str(value)


def _split_config(argv, default: Path | None) -> tuple[Path | None, list[str]]:
    """The config that the command line names, or the default, and the rest of the command line."""
    values, flags = _split(argv)
    if len(values) > 1 or (values and not values[0].endswith((".yaml", ".yml"))):
        raise UsageError(f"expected a config that ends in .yaml, then flags; got: {' '.join(values)}")
    return (Path(values[0]) if values else default), flags


def _split(argv) -> tuple[list[str], list[str]]:
    """The command line before its first flag, and from there on."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for value in argv:
        _check_string(value)
    first = next((index for index, value in enumerate(argv) if value.startswith("-")), len(argv))
    return argv[:first], argv[first:]


def _check_string(value: str) -> None:
    """Raises `UserError` for a string that cannot name a file or be written into a record."""
    try:
        value.encode()  # Python keeps bytes that are not UTF-8 as surrogates
    except UnicodeEncodeError as error:
        shown = value.encode(errors="backslashreplace").decode()
        raise UsageError(f"{shown:.80} is not UTF-8; write it so") from error
    if "\0" in value:
        raise UsageError(f"{value!r:.80} holds a character of value 0; leave it out")
    if value.endswith("=--"):  # argparse would make an empty list of it
        raise UsageError(f"{value:.80}: '--' is no value")


def _parse_known(parser, flags: list[str]) -> argparse.Namespace:
    namespace, unknown = parser.parse_known_args(flags)
    if unknown:
        raise UsageError(f"unknown flag {unknown[0]}.{_did_you_mean(unknown[0].lstrip('-'), parser)}")
    return namespace


def _into_dataclasses(parser, namespace: argparse.Namespace) -> tuple:
    try:
        return parser.parse_dict(vars(namespace), allow_extra_keys=True)
    except Exception as error:
        # Any error of a library is about the value of a flag; of this package's own code only a ValueError is.
        if raised_by(error) == "emotion" and not isinstance(error, ValueError):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UsageError(f"{kind}{error}") from error


def _own_fields(classes) -> set[str]:
    """The names of the flags whose default is set here: all but those that only a class of Transformers declares."""
    names: set[str] = set()
    for base in chain.from_iterable(one.__mro__ for one in classes):
        if not base.__module__.startswith("transformers."):
            names |= inspect.get_annotations(base).keys()
    return names


def _did_you_mean(name: str, parser) -> str:
    """The most similar flag, of those in `--help` before all others; empty if none is similar enough."""
    shown = [action.dest for action in parser._actions if action.help != argparse.SUPPRESS]
    for names in (shown, [action.dest for action in parser._actions]):
        if close := difflib.get_close_matches(name, names, n=1):
            return f" Did you mean {close[0]}?"
    return ""
