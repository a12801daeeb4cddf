"""The command line of every command: turns a recipe and flags into dataclasses, and names what it does not know."""

import contextlib
import difflib
import json
import sys
from argparse import ArgumentError
from collections.abc import Container
from dataclasses import fields
from enum import Enum
from importlib.util import find_spec
from pathlib import Path

from emotion.common.errors import UserError, raised_by
from emotion.common.files import relative
from emotion.common.help_text import describe
from emotion.common.ranges import COUNT, DROPOUT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Range, speak_plainly
from emotion.common.recipe import PER, Recipe, read_recipe, resolve

# What `TrainingArguments` take. Their own checks are few: most of these would train something else, or end the
# training in the middle. A flag of ours has its range beside its help, as ``choices`` of its field.
TAKEN = {
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
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "eval_delay": NOT_NEGATIVE,
    "eval_steps": POSITIVE,
    "save_steps": POSITIVE,
    "logging_steps": POSITIVE,
    "save_total_limit": COUNT,
    "torch_empty_cache_steps": COUNT,
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": Range(0, 64),  # each is a process
    "dataloader_prefetch_factor": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    "resume_from_checkpoint": ("last",),
    # What the trainings compute on validation; the Trainer would miss another one after the first epoch.
    "metric_for_best_model": ("macro_f1", "accuracy", "loss", "eval_macro_f1", "eval_accuracy", "eval_loss"),
    "report_to": ("none", *filter(find_spec, ("tensorboard", "wandb", "mlflow", "trackio"))),  # those installed
}
# What the entries of a recipe's mappings are named by
NAMED_BY = {"per_model": (str, "name of a model"), "per_bits": (int, "number of bits")}
# Flags of `TrainingArguments` that hold a mapping, which a recipe may write out
DICTIONARIES = {
    "accelerator_config",
    "gradient_checkpointing_kwargs",
    "lr_scheduler_kwargs",
    "fsdp_config",
    "deepspeed",
}


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
    path = _name_recipe(leading, default)
    values = read_recipe(path)
    parser = _parser(classes, flags, path, values)
    known = {action.dest for action in parser._actions} - {"help", "help_all"}
    _check_keys(path, values, known)
    if values.get("per_model") and not find_model:
        raise UserError(f"{path}: per_model needs a flag that names a model, which this script does not have")
    values = _choose_values(parser, path, values, flags, find_model)
    parser.set_defaults(**_as_typed(parser, path, values))
    parsed = _into_dataclasses(parser, flags)
    return (*parsed, Recipe(path=path, values=_collect_used(parsed, values, flags)))


def parse_beside(classes, default: Path, argv=None) -> tuple:
    """Parses ``[recipe.yaml] [--flag value ...]`` where the recipe, and the flags it may hold, are another program's.

    Args:
        classes: dataclasses whose fields are this program's own flags, which the recipe does not hold.
        default: the recipe that is read when the command line names none.

    Returns:
        One instance of each class, then the other program's `Recipe` with its flags, and those of our own flags that
        were given: name -> value.

    Raises:
        UserError: naming the flag without a value, or the value that does not fit.
    """
    leading, flags = _split(argv)
    path = _name_recipe(leading, default)
    values = read_recipe(path)
    *parsed, rest = _parse_some(_parser(classes, flags), flags)
    rest = iter(rest)
    for flag in rest:
        name, equals, value = flag.partition("=")
        if not equals:
            value = next(rest, None)
        if not name.startswith("--") or value is None or value.startswith("--"):
            raise UserError(f"{flag}: expected flags with one value each, --flag value")
        values[name.removeprefix("--")] = _typed(value)
    return (*parsed, Recipe(path=path, values=values), _collect_used(parsed, {}, flags))


def parse_flags(classes, positional: str, argv=None) -> tuple:
    """Parses ``WORD [WORD ...] [--flag value ...]`` into dataclasses; the leading words belong to ``positional``.

    Raises:
        UserError: naming the flag that is unknown, or the value that does not fit.
    """
    leading, flags = _split(argv)
    # The words become the value of an ordinary flag, so `--help` shows it, and it may be written out as well.
    parser = _parser(classes, flags)
    return _into_dataclasses(parser, [f"--{positional}", *leading, *flags] if leading else flags)


def _check_keys(path: Path, values: dict, known: set[str], inside: tuple[str, ...] = ()) -> None:
    """Raises `UserError` for a key of the recipe, or of a mapping in it, that is no flag of this command.

    Args:
        inside: the mappings of `PER` that hold these values; none may hold itself again, nor per_bits a per_model.
    """
    for key, value in values.items():
        if key not in PER:
            if key not in known:
                raise UserError(f"{path}: unknown key '{key!s:.80}'.{_did_you_mean(str(key), known)}")
            continue
        if key in inside or "per_bits" in inside:
            raise UserError(f"{path}: {key} stands inside {inside[-1]}; write it beside it")
        if value is None:  # all its entries are commented out
            continue
        if not isinstance(value, dict) or not all(isinstance(part, dict) for part in value.values()):
            raise UserError(f"{path}: {key} must hold lines such as 'value: {{learning_rate: 1.0e-4}}'")
        kind, meaning = NAMED_BY[key]
        for name, part in value.items():
            if type(name) is not kind:  # it would never be chosen, since '8' is not 8
                raise UserError(f"{path}: {key} holds {name!r:.80}, which is no {meaning}")
            _check_keys(path, part, known, (*inside, key))
        if key == "per_bits" and "bits" not in known:
            raise UserError(f"{path}: per_bits needs the flag --bits, which this script does not have")


def _choose_values(parser, path: Path, values: dict, flags: list[str], find_model) -> dict:
    """The recipe's values for the model and the bits that recipe and flags name together."""
    # Those two are flags like any other, so the flags are parsed here once before they are parsed for good: which
    # values replace the recipe's depends on them. The recipe's own values come first, for `--help` to show.
    own_values = {key: value for key, value in values.items() if key not in PER}
    parser.set_defaults(**_as_typed(parser, path, own_values))
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


def _as_typed(parser, path: Path, values: dict) -> dict:
    """The values of a recipe, checked and converted by the parser like the words of the command line.

    Raises:
        UserError: naming the recipe, the key and what it takes.
    """
    # Of several actions for one name (`--no_x` beside `--x`) the first is the one that takes a value.
    actions = {action.dest: action for action in reversed(parser._actions)}
    typed = {}
    for key, value in values.items():
        try:
            typed[key] = _as_typed_value(parser, actions[key], value)
        except (UserError, ArgumentError) as error:
            raise UserError(f"{path}: {str(error).removeprefix('argument ')}") from error
    return typed


def _as_typed_value(parser, action, value):
    """One value of a recipe; raises `UserError` or argparse's error if its flag does not take it."""
    if value is None and action.default is None:
        return None
    if action.nargs == "+":
        return [_as_typed_word(parser, action, one) for one in (value if isinstance(value, list) else [value])]
    if isinstance(value, dict) and action.dest in DICTIONARIES:
        value = json.dumps(value)  # as on the command line; `TrainingArguments` reads it back
    return _as_typed_word(parser, action, value)


def _as_typed_word(parser, action, value):
    # YAML reads `no` as false and 2026-11-26 as a date: neither is what a flag with a word of its own means.
    is_word = isinstance(value, str | int | float) and not (isinstance(value, bool) and action.type is str)
    if not is_word:
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise UserError(f"--{action.dest} takes a word or a number, and this is {kind}; quotes make a word of it")
    _check_word(str(value))
    typed = parser._get_value(action, str(value))
    parser._check_value(action, typed)
    return typed


def _typed(word: str) -> bool | int | float | str:
    """The value that a word of the command line stands for."""
    # Not by YAML, to which `no` is false and 1e-4 is a word.
    if word.lower() in {"true", "false"}:
        return word.lower() == "true"
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(word)
    return word


def _split(argv) -> tuple[list[str], list[str]]:
    """The words before the first flag, and the rest."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for word in argv:
        _check_word(word)
    for index, word in enumerate(argv):
        if word.startswith("-"):
            return argv[:index], argv[index:]
    return argv, []


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


def _name_recipe(leading: list[str], default: Path) -> Path:
    """The recipe that the words before the first flag name, or the default."""
    if len(leading) > 1 or (leading and not leading[0].endswith((".yaml", ".yml"))):
        raise UserError(f"expected a recipe that ends in .yaml, then flags; got: {' '.join(leading)}")
    return Path(leading[0]) if leading else default


def _parser(classes, flags: Container[str] = (), path: Path | None = None, values: Container[str] = ()):
    """The parser of a command; of the Trainer's flags `--help` shows those that the recipe sets.

    Args:
        path: the recipe, if the command has one.
        values: its keys.
    """
    # Imported here, since it takes a second: importing a command or a test of it should not cost that.
    from transformers import HfArgumentParser
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading and writing files; a training shows its own
    # No abbreviations: a misspelt flag must be an error, and not another flag.
    parser = HfArgumentParser(classes, allow_abbrev=False)
    speak_plainly(parser)
    for action in parser._actions:
        action.choices = TAKEN.get(action.dest, action.choices)
    of_trainer, note = _inherited(classes), ""
    if of_trainer:
        parser.add_argument("--help_all", action="help", help="show all flags of the Trainer as well, and exit")
    if path:
        note = f"The defaults are those of the recipe {relative(path)}. Another recipe may be named before all flags."
    describe(parser, note, hidden=() if "--help_all" in flags else of_trainer - set(values))
    return parser


def _inherited(classes) -> set[str]:
    """The names of the flags that a class of Transformers has, and not one of ours."""
    # By the module's name, since most commands do not import `TrainingArguments`, which would load torch.
    bases = [base for one in classes for base in one.__mro__ if base.__module__.startswith("transformers.")]
    return {field.name for base in bases for field in fields(base)}


def _parse_some(parser, flags: list[str]) -> tuple:
    """The dataclasses, and a list of the words that belong to none of them."""
    try:
        return parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    except Exception as error:
        # The dataclasses check their own values. What a library raises there, of whatever kind, speaks of a flag; of
        # our own code a ValueError alone does.
        if raised_by(error) == "emotion" and not isinstance(error, ValueError):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{kind}{error}") from error


def _into_dataclasses(parser, flags: list[str]) -> tuple:
    *parsed, unknown = _parse_some(parser, flags)
    if unknown:
        known = [action.dest for action in parser._actions]
        raise UserError(f"unknown flag {unknown[0]}.{_did_you_mean(unknown[0].lstrip('-'), known)}")
    return tuple(parsed)


def _did_you_mean(name: str, known) -> str:
    # One suggestion, if there is a name that is similar enough to be meant.
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
