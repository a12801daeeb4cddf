"""The Hub: uploads a folder in one commit and downloads a model file by file; retries where that can help.

`huggingface_hub` is imported when it is needed, and takes the token from the environment or the login store. Its
errors become one line that says what to do.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import ROOT
from emotion.common.machine import run_script
from emotion.model.artifact import SHARED_FILES, WEIGHT_FILES, files_beside, find_formats

WAITS_S = (1, 3, 9)  # seconds before the second, third and last attempt


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


def upload(files: dict[str, Path | bytes], repo_id: str, repo_type: str, private: bool, message: str) -> str:
    """Makes a repository hold these files and no others, with one commit, or with none if it holds them already.

    Args:
        files: name in the repository -> a file, or its bytes.
        repo_type: `model` or `space`.
        private: whether the repository must be one that only its owner sees.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        UserError: if the Hub refuses, or still fails at the last attempt.
    """
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
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise UserError(
                f"{repo_id} exists and everybody can read it; make it private first, or leave out --private"
            )
        # One commit for all: a reader never finds new weights beside an old card. The Hub makes none of no changes.
        operations = _operations(files, present=set(api.list_repo_files(repo_id, repo_type=repo_type)))
        return api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type).commit_url

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


def fetch(repo_id: str, formats: list[str]) -> Path:
    """Downloads the files that one format of a published artifact needs, or takes them from the cache.

    Args:
        formats: the formats to look for; the first that the repository has is taken.

    Returns:
        The folder that holds the files.

    Raises:
        UserError: if the repository has none of the formats, or the Hub refuses or still fails at the last attempt.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def attempt() -> Path:
        folder = Path(hf_hub_download(repo_id, SHARED_FILES[0])).parent
        # The cache names its folders by commit. All files come from this one, whatever is pushed meanwhile.
        commit = folder.name
        for name in SHARED_FILES[1:]:
            hf_hub_download(repo_id, name, revision=commit)
        absent = None
        for format in formats:
            for weights in WEIGHT_FILES[format]:
                # Tried one after the other: a list of files exists on the Hub only, not in the cache.
                try:
                    hf_hub_download(repo_id, weights, revision=commit)
                except EntryNotFoundError as error:
                    absent = error
                    continue
                for path in files_beside(folder / weights, format):
                    hf_hub_download(repo_id, path.relative_to(folder).as_posix(), revision=commit)
                return folder
        if isinstance(absent, LocalEntryNotFoundError):  # it may be there: nobody could be asked
            raise absent
        raise UserError(f"{repo_id} has no file for {' or '.join(formats)}")

    return try_again(attempt, repo_id)


def try_again(attempt, repo_id: str):
    """Calls ``attempt`` until it succeeds, and waits longer each time.

    Returns:
        The result of ``attempt``.

    Raises:
        UserError: for an error that will stay, at once; for one that may pass, after the last attempt.
    """
    waits_s = iter(WAITS_S)
    while True:
        try:
            return attempt()
        except UserError:  # in the user's words already
            raise
        except Exception as error:
            passing, reason = explain(error, repo_id)
            if reason is None:  # not the Hub's: an error of this program, whose traceback is needed
                raise
            wait_s = next(waits_s, None) if passing else None  # None: there is nothing more to wait for
            if wait_s is None:
                raise UserError(reason) from error
            print(f"{reason}; trying again in {wait_s:.0f} s", file=sys.stderr)
        time.sleep(wait_s)


def explain(error: BaseException, repo_id: str) -> tuple[bool, str | None]:
    """Whether an error may pass by itself, and its meaning in one line; None for one that is not the Hub's."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # The Hub's library wraps errors in errors: the first of the chain with a meaning of its own counts.
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    for one in chain:
        if isinstance(one, HfHubHTTPError) and one.response is not None:
            return explain_status(one, repo_id)
        if isinstance(one, HFValidationError):
            return False, f"'{repo_id}' is no name for a repository"
        if isinstance(one, OfflineModeIsEnabled):
            return False, f"{repo_id} is not in the cache, and HF_HUB_OFFLINE keeps this program from the Hub"
        # After a failed connection huggingface_hub goes on with a client that it has closed.
        if isinstance(one, httpx.ConnectError) or "client has been closed" in str(one):
            return False, f"the Hub ({constants.ENDPOINT}) cannot be reached"
        if isinstance(one, httpx.TransportError):
            return True, f"the connection to the Hub broke ({type(one).__name__})"
        if isinstance(one, json.JSONDecodeError):  # a proxy's page, for instance
            return True, "the Hub gave an answer that is not its own"
    # huggingface_hub has no class for a card that the Hub's check refuses.
    if isinstance(error, ValueError) and "metadata" in str(error):
        return False, "the Hub refuses the card: " + " ".join(str(error).split())
    if isinstance(error, LocalEntryNotFoundError):
        return False, f"{repo_id} is not in the cache, and the Hub cannot be reached"
    return False, None


def explain_status(error, repo_id: str) -> tuple[bool, str]:
    """Whether a refusal of the Hub may pass by itself, and its meaning in one line.

    Args:
        error: an `HfHubHTTPError` with a response.
    """
    status = error.response.status_code
    if status == 429 or status >= 500:  # too many requests, or a failure on the Hub's side
        return True, f"the Hub is busy or failing (status {status})"
    # 401 stands for a missing repository too: the Hub does not tell a stranger which private ones there are.
    reasons = {
        401: f"the Hub does not know this token, or {repo_id} is not there; run `hf auth login` again",
        403: f"this token may not do that with {repo_id}; take one that may write there",
        404: f"no repository {repo_id} on the Hub, or no file of that name in it",
    }
    return False, reasons.get(status, f"the Hub refused (status {status}): {error.server_message or error}")
