"""The error that a user can fix, and checks of names that come from a file or a command line."""

import contextlib
import re
import sys
import traceback
import unicodedata
from pathlib import PureWindowsPath

LONGEST_REASON = 300  # characters; some libraries put a page into their message
# What the Hub takes; its own check lets a line break at the end pass.
REPO_ID = re.compile(r"(?!.*(--|\.\.))(\w([\w.-]*\w)?/)?\w([\w.-]{0,94}\w)?(?<!\.git)", re.ASCII)
# A folder's own name may become a variant's, so that letters of any language and blanks are allowed.
FILE_NAME = r"\w[\w .+=-]*"
TOKEN = r"hf_[A-Za-z0-9]{30,}"  # the format of the Hub's tokens
# Unicode's categories of characters that move the cursor, turn the writing, end a line, or are half a character;
# words of Persian and emoji need the joiners, which do none of that.
UNSEEN, JOINERS = {"Cc", "Cf", "Cs", "Zl", "Zp"}, "\u200c\u200d"


class UserError(Exception):
    """An error that the user can fix, printed as one line: it names the file, flag or row, and says what to do."""

    status = 1  # of the process

    def __str__(self) -> str:
        return printable(super().__str__(), longest=None)


class UsageError(UserError):
    """A wrong call: a flag that is unknown or lacks its value, or a value that it does not take."""

    status = 2  # as with argparse


def say_what_to_install(error: ModuleNotFoundError) -> str:
    """The message about a library that only the full environment has."""
    return f"{error}; pip install -r requirements.txt installs it"


def raised_by(error: BaseException) -> str:
    """The package in whose code an error was raised: 'transformers', 'json', 'emotion', ..."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").split(".")[0]


def visible(text: str) -> str:
    """A string of a stranger (a label, a name, a value) with an escape for each character that nobody sees."""
    safe = (letter in JOINERS or unicodedata.category(letter) not in UNSEEN for letter in text)
    pairs = zip(text, safe, strict=True)
    return "".join(letter if ok else letter.encode("unicode_escape").decode() for letter, ok in pairs)


def mask_token(text: str) -> str:
    """A text without tokens for the Hub: a server may send back what it was sent."""
    hub = sys.modules.get("huggingface_hub")  # which alone sends it
    token = hub and hub.get_token()
    return re.sub(TOKEN, "(a token)", text.replace(token, "(the token)") if token else text)


def printable(text: str, longest: int | None = LONGEST_REASON) -> str:
    """What a stranger or a server wrote, as one `visible` line of bounded length, without a token."""
    text = visible(" ".join(line.strip() for line in mask_token(text).splitlines()).strip())
    return text if longest is None or len(text) <= longest else f"{text[:longest]} ..."


@contextlib.contextmanager
def one_line(fault: str):
    """Turns whatever a library raises in the block into a `UserError` that begins with ``fault``."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # no two libraries have the same classes, and a panic of Rust is no `Exception`
        raise UserError(f"{fault}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """The message of a library's error, in one line."""
    if isinstance(error, OSError) and error.strerror:  # without the file, which the caller names
        return error.strerror
    # OpenVINO begins with the positions in its own source files; the reason is below them.
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Exception from ", "Check '"))]
    if not lines:
        return type(error).__name__
    # The second line says what another library found, or where PyYAML was.
    reason = " ".join(lines[:2]) if lines[0].endswith(":") or lines[0].startswith("while ") else lines[0]
    # Python's own errors name an object and no fault: "'model_type'" alone would say nothing.
    is_bare = isinstance(error, LookupError | AttributeError | TypeError)
    return (f"{type(error).__name__}: {reason}" if is_bare else reason)[:LONGEST_REASON]


def check_name(name, where) -> None:
    """Raises `UserError` unless a variant or a format, read from the file ``where``, can be part of a file's name."""
    if not isinstance(name, str) or not re.fullmatch(FILE_NAME, name):
        raise UserError(f"{where}: {name!r} is no name for a file; it takes letters, digits, blanks and '_.+=-'")


def check_line(name, where) -> None:
    """Raises `UserError` unless the name of a model or of a dataset is one line without markup, or None."""
    if name is not None and (not isinstance(name, str) or not name.isprintable() or set(name) & set('<>`|"')):
        raise UserError(f"{where}: {name!r} is no name of a model or a dataset; it takes one line without markup")


def check_label(label, where) -> None:
    """Raises `UserError` unless the name of a class is one line of text, all of which can be seen."""
    if not isinstance(label, str) or not label.strip() or visible(label) != label:
        raise UserError(f"{where} is {label!r:.40}, and not one line of text without control characters; rename it")


def check_repo_id(repo_id: str) -> None:
    """Raises `UserError` unless a string is 'name' or 'owner/name' as the Hub takes them."""
    if not REPO_ID.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is no name for a repository; it takes owner/name")


def check_revision(name: str, revision: str | None) -> None:
    """Raises `UserError` for a revision of something else than a repository."""
    if revision is not None:
        raise UserError(f"--model_revision {revision}: {name} is no repository of the Hub; leave it out")


def check_inside(name, where) -> None:
    """Raises `UserError` unless a name in a file leads to a file inside the model folder, on every system."""
    path = PureWindowsPath(name)  # a name with a drive or backslashes leads elsewhere on Windows alone
    if path.anchor or ".." in path.parts or not path.parts:
        raise UserError(f"{where}: {name!r} leads out of the model folder")
