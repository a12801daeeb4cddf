"""The Hub: a folder goes up in one commit, tried again where that can help; a model comes down file by file.

`huggingface_hub` is imported when it is needed, and takes the token from the environment or the login store. What it
raises becomes one line that says what to do.
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

WAITS_S = (1, 3, 9)  # before the second, third and last attempt


@dataclass
class HubArguments:
    """What `--push_to_hub` needs; in a training these are fields of `TrainingArguments`."""

    push_to_hub: bool = field(default=False, metadata={"help": "Score the saved artifact, then publish it."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where to: user/name."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Create it for your eyes only."})
    results_dir: str = field(
        default=str(ROOT / "results"), metadata={"help": "With --push_to_hub: where the scores are written."}
    )

    def __post_init__(self):
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push_to_hub: name the repository with --hub_model_id user/name")
        if self.push_to_hub:
            try:
                check_can_publish(self.hub_model_id)
            except UserError as error:  # now, not after an hour of training
                raise ValueError(str(error)) from error


def check_can_publish(repo_id: str) -> None:
    """Raises `UserError` for what can be known without asking the Hub: a wrong name, no token."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"'{repo_id}' is no name for a repository: {str(error).splitlines()[0]}") from error
    if "/" not in repo_id:
        raise UserError(f"'{repo_id}' names no owner; write user/{repo_id}")
    if not get_token():
        raise UserError("no token for the Hub; run `hf auth login`, or set HF_TOKEN")


def score_and_publish(folder: Path, hub: HubArguments) -> None:
    """For `--push_to_hub`: scores every format of a saved artifact in a fresh process, then publishes it."""
    if not hub.push_to_hub:
        return
    steps = [("run_evaluation.py", "--format", format) for format in find_formats(folder)]
    steps.append(("run_publish.py", "--repo_id", hub.hub_model_id, "--private", bool(hub.hub_private_repo)))
    for name, *words in steps:
        done = run_script(name, folder, *words, "--results_dir", hub.results_dir)
        if done.returncode:  # it has said why
            raise UserError(f"{folder} is saved but not published; {name} failed")


def upload(files: dict[str, Path | bytes], repo_id: str, repo_type: str, private: bool, message: str) -> str:
    """Makes a repository hold these files and no others, by one commit, or by none if it does so already.

    Args:
        files: name in the repository -> a file, or its bytes.

    Returns:
        The commit's address.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_can_publish(repo_id)

    def attempt() -> str:
        api = HfApi()
        api.create_repo(
            repo_id,
            repo_type=repo_type,
            private=private or None,
            exist_ok=True,
            space_sdk="static" if repo_type == "space" else None,
        )
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise UserError(
                f"{repo_id} exists and everybody can read it; make it private first, or leave out --private"
            )
        stale = set(api.list_repo_files(repo_id, repo_type=repo_type)) - files.keys() - {".gitattributes"}
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        return api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type).commit_url

    return try_again(attempt, repo_id)


def fetch(repo_id: str, formats: list[str]) -> Path:
    """Downloads what one format of a published artifact needs, and nothing else; from the cache where it is there.

    Args:
        formats: the formats to look for; the first that the repository has is taken.

    Returns:
        The folder that holds the files.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def attempt() -> Path:
        folder = Path(hf_hub_download(repo_id, SHARED_FILES[0])).parent
        commit = folder.name  # all files of one commit, whatever is pushed meanwhile
        for name in SHARED_FILES[1:]:
            hf_hub_download(repo_id, name, revision=commit)
        absent = None
        for format in formats:
            for weights in WEIGHT_FILES[format]:
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
    """Calls ``attempt`` until it succeeds, waiting longer each time; an error that will stay is raised at once."""
    waits_s = iter(WAITS_S)
    while True:
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:
            passing, reason = explain(error, repo_id)
            if reason is None:
                raise
            wait_s = next(waits_s, None) if passing else None
            if wait_s is None:
                raise UserError(reason) from error
            print(f"{reason}; trying again in {wait_s:.0f} s", file=sys.stderr)
        time.sleep(wait_s)


def explain(error: BaseException, repo_id: str) -> tuple[bool, str | None]:
    """Whether an error may pass by itself, and what it says in one line; None for one that is not the Hub's."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

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
        if isinstance(one, json.JSONDecodeError):
            return True, "the Hub gave an answer that is not its own"
    if isinstance(error, ValueError) and "metadata" in str(error):
        return False, "the Hub refuses the card: " + " ".join(str(error).split())
    if isinstance(error, LocalEntryNotFoundError):
        return False, f"{repo_id} is not in the cache, and the Hub cannot be reached"
    return False, None


def explain_status(error, repo_id: str) -> tuple[bool, str]:
    """What a refusal of the Hub means; its own words are added where they say more."""
    status = error.response.status_code
    if status == 429 or status >= 500:
        return True, f"the Hub is busy or failing (status {status})"
    reasons = {
        401: f"the Hub does not know this token, or {repo_id} is not there; run `hf auth login` again",
        403: f"this token may not do that with {repo_id}; take one that may write there",
        404: f"no repository {repo_id} on the Hub, or no file of that name in it",
    }
    return False, reasons.get(status, f"the Hub refused (status {status}): {error.server_message or error}")
