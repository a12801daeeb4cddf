"""The Hub: uploads a folder in one commit and downloads a model file by file; retries where that can help.

`huggingface_hub` is imported when it is needed, and takes the token from the environment or the login store. Its
errors become one line that says what to do.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import ROOT
from emotion.common.machine import run_script
from emotion.common.names import check_repo_id
from emotion.common.sums import SUMS_FILE, check_sums
from emotion.model.artifact import SHARED_FILES, WEIGHT_FILES, find_formats, names_to_serve

WAITS_S = (1, 3, 9)  # seconds before the second, third and last attempt
MADE_BY_HUB = {".gitattributes", "README.md"}  # what may be in a repository that nobody has written to
LONGEST_WAIT_S = 120  # between two attempts, whatever the Hub asks for


@dataclass
class HubArguments:
    """The flags that `--push_to_hub` needs; in a training these are fields of `TrainingArguments`."""

    push_to_hub: bool = field(default=False, metadata={"help": "Score the saved artifact, then publish it."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository to publish to: user/name."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Create the repository as a private one."})
    results_dir: str = field(
        default=str(ROOT / "results"), metadata={"help": "With --push_to_hub: where the scores are written."}
    )

    def __post_init__(self):
        # ValueError, as the dataclasses of Transformers raise it: the command line makes one line of either.
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push_to_hub: name the repository with --hub_model_id user/name")
        if self.push_to_hub:
            try:
                check_can_publish(self.hub_model_id)
            except UserError as error:  # now, not after an hour of training
                raise ValueError(str(error)) from error


def check_can_publish(repo_id: str) -> None:
    """Raises `UserError` for the mistakes that show without asking the Hub: a wrong name, no token."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    check_repo_id(repo_id)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"'{repo_id}' is no name for a repository: {str(error).splitlines()[0]}") from error
    if "/" not in repo_id:  # valid for the Hub, where some old models have no owner; none can be made
        raise UserError(f"'{repo_id}' names no owner; write user/{repo_id}")
    if not get_token():
        raise UserError("no token for the Hub; run `hf auth login`, or set HF_TOKEN")


def score_and_publish(folder: Path, hub: HubArguments) -> None:
    """For `--push_to_hub`: scores every format of a saved artifact in a fresh process, then publishes it.

    Raises:
        UserError: if one of these processes failed; it has printed why.
    """
    if not hub.push_to_hub:
        return
    # Processes of their own: the ruler times nothing in one where a training has left its threads and its memory.
    steps = [("run_evaluation.py", "--format", format) for format in find_formats(folder)]
    steps.append(("run_publish.py", "--repo_id", hub.hub_model_id, "--private", bool(hub.hub_private_repo)))
    for name, *words in steps:
        done = run_script(name, folder, *words, "--results_dir", hub.results_dir)
        if done.returncode:  # it has said why
            raise UserError(f"{folder} is saved but not published; {name} failed")


def upload(
    files: dict[str, Path | bytes], repo_id: str, repo_type: str, private: bool, message: str, marker: str
) -> str:
    """Makes a repository hold these files and no others, with one commit, or with none if it holds them already.

    Args:
        files: name in the repository -> a file, or its bytes.
        repo_type: `model` or `space`.
        private: whether the repository must be one that only its owner sees.
        message: of the commit.
        marker: the beginning of a name that a repository of this project holds; another's files are not replaced.

    Returns:
        The commit's address.

    Raises:
        UserError: if the Hub refuses, or still fails at the last attempt, or the repository holds something else.
    """
    from emotion.model.hub_answers import one_line

    from huggingface_hub import HfApi

    check_can_publish(repo_id)

    def attempt() -> str:
        api = HfApi()
        api.create_repo(
            repo_id,
            repo_type=repo_type,
            private=private or None,  # None leaves it to the owner's own setting; False would make it public
            exist_ok=True,
            space_sdk="static" if repo_type == "space" else None,
        )
        # Creating a repository that exists changes nothing, so a public one would stay public.
        if private and api.repo_info(repo_id, repo_type=repo_type).private is not True:
            raise UserError(
                f"{repo_id} exists and everybody can read it; make it private first, or leave out --private"
            )
        present = set(api.list_repo_files(repo_id, repo_type=repo_type))
        if present - MADE_BY_HUB and not any(name.startswith(marker) for name in present):
            raise UserError(f"{repo_id} holds something else (no {marker} in it); name another repository")
        # One commit for all: a reader never finds new weights beside an old card. The Hub makes none of no changes.
        operations = _operations(files, present)
        commit = api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type)
        # The Hub leaves out, without a word, what a .gitignore in the repository names.
        if absent := files.keys() - set(api.list_repo_files(repo_id, repo_type=repo_type)):
            raise UserError(f"{repo_id} did not take {', '.join(sorted(absent))}; look for a .gitignore there")
        return one_line(commit.commit_url)

    return try_again(attempt, repo_id)


def _operations(files: dict[str, Path | bytes], present: set[str]) -> list:
    """The operations of a commit after which a repository that holds the files ``present`` holds ``files`` alone."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations = []
    for name, content in files.items():
        operations.append(CommitOperationAdd(name, content))
    # The Hub writes .gitattributes itself, and large files need it.
    for name in sorted(present - files.keys() - {".gitattributes"}):
        operations.append(CommitOperationDelete(name))
    return operations


def fetch(repo_id: str, formats: list[str], verify: bool = True, optional: tuple[str, ...] = ()) -> Path:
    """Downloads the files that one format of a published artifact needs, or takes them from the cache.

    Args:
        formats: the formats to look for; the first that the repository has is taken.
        verify: whether the files are compared with the repository's SHA256SUMS, where it has one.
        optional: other files to download, if the repository has them.

    Returns:
        The folder that holds the files.

    Raises:
        UserError: if the repository has none of the formats, a file is not the one that was published, or the Hub
            refuses or still fails at the last attempt.
    """
    check_repo_id(repo_id)
    folder, names = try_again(lambda: _download(repo_id, formats, (SUMS_FILE, *optional)), repo_id)
    if verify:
        try:
            check_sums(folder, names)
        except UserError as error:  # the cache would give the same file again
            raise UserError(f"{error}. To fetch it anew, first run `hf cache rm model/{repo_id}`") from error
    return folder


def _download(repo_id: str, formats: list[str], optional: tuple[str, ...]) -> tuple[Path, list[str]]:
    """One attempt of `fetch`; returns the folder and the names of the files that the format needs."""
    from emotion.model.hub_answers import explain

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folder = Path(hf_hub_download(repo_id, SHARED_FILES[0])).parent
    # The cache names its folders by commit. All files come from this one, whatever is pushed meanwhile.
    commit = folder.name
    for name in SHARED_FILES[1:]:
        hf_hub_download(repo_id, name, revision=commit)
    for name in optional:
        try:
            hf_hub_download(repo_id, name, revision=commit)
        except EntryNotFoundError as error:  # most repositories have none
            if explain(error, repo_id)[0]:  # it may have one: the Hub gave no answer
                raise
    absent = None
    for format in formats:
        for weights in WEIGHT_FILES[format]:
            # Tried one after the other: a list of files exists on the Hub only, not in the cache.
            try:
                hf_hub_download(repo_id, weights, revision=commit)
            except EntryNotFoundError as error:
                absent = error
                continue
            names = names_to_serve(folder, folder / weights, format)
            for name in names:
                hf_hub_download(repo_id, name, revision=commit)
            return folder, names
    if isinstance(absent, LocalEntryNotFoundError):  # it may be there: nobody could be asked
        raise absent
    raise UserError(f"{repo_id} has no file for {' or '.join(formats)}")


def try_again(attempt, repo_id: str):
    """Calls ``attempt`` until it succeeds, and waits longer each time.

    Returns:
        The result of ``attempt``.

    Raises:
        UserError: for an error that will stay, at once; for one that may pass, after the last attempt.
    """
    from emotion.model.hub_answers import explain, watched_requests

    waits_s = iter(WAITS_S)
    while True:
        try:
            with watched_requests():
                return attempt()
        except UserError:  # in the user's words already
            raise
        except Exception as error:
            passing, reason, asked_s = explain(error, repo_id)
            if reason is None:  # not the Hub's: an error of this program, whose traceback is needed
                raise
            wait_s = next(waits_s, None) if passing else None  # None: there is nothing more to wait for
            if wait_s is None:
                raise UserError(reason) from error
            wait_s = max(wait_s, min(asked_s, LONGEST_WAIT_S))
            asks = f", though it asks for {asked_s:.0f} s" if asked_s > LONGEST_WAIT_S else ""
            print(f"{reason}; trying again in {wait_s:.0f} s{asks}", file=sys.stderr)
        time.sleep(wait_s)
