"""The edge of every command: quiet libraries, recipe and flags -> dataclasses, one clear line for an error.

Imported before the heavy libraries, because some of them read these settings while they are imported.
"""

import difflib
import errno
import hashlib
import logging
import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRACEBACK_VARIABLE = "EMOTION_TRACEBACK"

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
os.environ.setdefault("DATASETS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTHONWARNINGS" not in os.environ:  # someone who sets it wants to see the libraries' warnings
    warnings.filterwarnings("ignore")
    for noisy in (
        "torch.utils._pytree",
        "torch.utils.cpp_extension",
        "torch.onnx",
        "onnxscript",
        "torch.distributed.elastic",
        "bitsandbytes",
    ):
        logging.getLogger(noisy).setLevel(logging.ERROR)


class UserError(Exception):
    """Something the user can mend. The message names the file, flag or row, and says what to do."""


def run(main) -> None:
    """Runs a script's ``main`` and ends the process: status 0, or one line on standard error and another status."""
    if int(os.environ.get("RANK", "0")) > 0:  # of several processes the first one speaks for all
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    try:
        main()
    except BrokenPipeError:  # the reader (`head`, say) went away: nothing is wrong here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (KeyboardInterrupt, Exception) as error:
        message = _explain(error)
        if message is None or os.environ.get(TRACEBACK_VARIABLE):
            traceback.print_exc()
        if message:
            print(f"error: {message}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _explain(error: BaseException) -> str | None:
    """What the user can do about an error; None for one that only a developer can mend."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; a training goes on where it stopped with --resume_from_checkpoint last"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        name = f" {error.filename}" if error.filename else ""
        return f"cannot write{name}: {error.strerror}; free some space or choose another folder"
    if isinstance(error, OSError) and error.errno in NOT_ALLOWED:
        return f"{error.filename}: {error.strerror}; choose another file or folder"
    if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):  # no OSError
        return f"cannot write the weights: {error}; free some space or choose another folder"
    if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):  # torch.save on a full disk
        return "cannot write a checkpoint: the disk is full or a limit was reached; free some space"
    if isinstance(error, RuntimeError) and "iostream error" in str(error):  # OpenVINO on a full disk
        return "cannot write the weights: the disk is full or a limit was reached; free some space"
    return None


def read_recipe(path: Path) -> dict:
    """Reads a recipe: YAML whose keys are the names of the flags, or one of PER."""
    import yaml

    if not path.is_file():
        raise UserError(f"no recipe at {path}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} must hold 'key: value' lines")
    return recipe


PER = (("per_model", "model_name_or_path"), ("per_bits", "bits"))  # by the value of a flag, what replaces the rest


@dataclass(frozen=True)
class Recipe:
    """The recipe file of a run and every value that the file or a flag set."""

    path: Path
    values: dict

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def parse_recipe(classes, default: Path, argv=None) -> tuple:
    """Parses ``[recipe.yaml] [--flag value ...]`` into dataclasses; a flag beats the recipe.

    The recipe may have mappings of values that replace its own: ``per_model`` by base model id, since a learning rate
    that suits a small encoder ruins a large one, and ``per_bits`` by the bits of a weight.

    Args:
        classes: dataclasses whose fields are the flags, as `HfArgumentParser` reads them.
        default: the recipe that is read when the command line names none.
        argv: the words of the command line, without the program's name; `sys.argv` if none are given.

    Returns:
        One instance of each class, then the `Recipe`.
    """
    leading, flags = _split(argv)
    if len(leading) > 1 or (leading and not leading[0].endswith((".yaml", ".yml"))):
        raise UserError(f"expected a recipe that ends in .yaml, then flags; got: {' '.join(leading)}")
    path = Path(leading[0]) if leading else default
    values = read_recipe(path)
    parser = _parser(classes)
    known = {action.dest for action in parser._actions}
    per_model, per_bits = (_mapping(path, values, *names, known) for names in PER)
    for part in (values, *per_model.values(), *per_bits.values()):
        for key in part:
            if key not in known:
                raise UserError(f"{path}: unknown key '{key}'.{_did_you_mean(key, known)}")
    parser.set_defaults(**_as_typed(values))
    if per_model:
        from utils_task import find_base_model

        model = find_base_model(parser.parse_known_args(flags)[0].model_name_or_path)
        values |= per_model.get(model.name, {})
    if per_bits:
        values |= per_bits.get(parser.parse_known_args(flags)[0].bits, {})
    parser.set_defaults(**_as_typed(values))
    parsed = _into_dataclasses(parser, flags)
    given = set(values) | {flag[2:].split("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    used = {name: value for part in parsed for name, value in vars(part).items() if name in given}
    used = {name: value.value if isinstance(value, Enum) else value for name, value in used.items()}
    return (*parsed, Recipe(path=path, values=used))


def _mapping(path: Path, values: dict, name: str, flag: str, known: set[str]) -> dict:
    """Takes ``per_<something>`` out of a recipe: a value of that flag -> values that replace the recipe's."""
    mapping = values.pop(name, None) or {}
    if mapping and flag not in known:
        raise UserError(f"{path}: {name} needs the flag --{flag}, which this script does not have")
    if not isinstance(mapping, dict) or not all(isinstance(part, dict) for part in mapping.values()):
        raise UserError(f"{path}: {name} must hold lines such as 'value: {{learning_rate: 1.0e-4}}'")
    return mapping


def parse_flags(classes, positional: str, argv=None) -> tuple:
    """Parses ``WORD [WORD ...] [--flag value ...]`` into dataclasses; the leading words belong to ``positional``."""
    leading, flags = _split(argv)
    return _into_dataclasses(_parser(classes), [f"--{positional}", *leading, *flags] if leading else flags)


def _as_typed(values: dict) -> dict:
    """Numbers as words, so that a recipe's values are checked by the parser like those of the command line."""
    return {key: str(value) if isinstance(value, int | float) else value for key, value in values.items()}


def _split(argv) -> tuple[list[str], list[str]]:
    argv = list(sys.argv[1:] if argv is None else argv)
    first_flag = next((index for index, word in enumerate(argv) if word.startswith("-")), len(argv))
    return argv[:first_flag], argv[first_flag:]


def _parser(classes):
    from transformers import HfArgumentParser
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading and writing files; a training shows its own
    parser = HfArgumentParser(classes, allow_abbrev=False)
    parser.error = _raise_user_error
    return parser


def _into_dataclasses(parser, flags: list[str]) -> tuple:
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
    except (ValueError, ImportError) as error:  # what the dataclasses themselves refuse
        raise UserError(str(error)) from error
    if unknown:
        known = [action.dest for action in parser._actions]
        raise UserError(f"unknown flag {unknown[0]}.{_did_you_mean(unknown[0].lstrip('-'), known)}")
    return tuple(parsed)


def _did_you_mean(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _raise_user_error(message: str):
    raise UserError(message)
