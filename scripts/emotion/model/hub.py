"""The Hub: uploads a folder in one commit and downloads a model file by file.

`huggingface_hub` is imported when it is needed, and takes the token from the environment or the login store. Its
errors become one line that says what to do.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import ROOT
from emotion.common.machine import run_script
from emotion.common.names import check_repo_id
from emotion.common.sums import SUMS_FILE, check_sums
from emotion.model.artifact import SHARED_FILES, WEIGHT_FILES, find_formats, names_to_serve

MADE_BY_HUB = {".gitattributes", "README.md"}  # what may be in a repository that nobody has written to


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
    from emotion.common.hub_requests import ask_hub, endpoint_answers, one_line

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    check_can_publish(repo_id)
    if not endpoint_answers():
        raise UserError(f"the Hub ({constants.ENDPOINT}) cannot be reached")

    def attempt() -> str:
        api = HfApi()
        api.create_repo(
            repo_id,
            repo_type=repo_type,
            private=private or None,  # None leaves it to the owner's own setting; False would make it public
            exist_ok=True,
            space_sdk="static" if repo_type == "space" else None,
        )
        info = api.repo_info(repo_id, repo_type=repo_type)
        # Creating a repository that exists changes nothing, so a public one would stay public.
        if private and info.private is not True:
            raise UserError(
                f"{repo_id} exists and everybody can read it; make it private first, or leave out --private"
            )
        present = {file.rfilename for file in info.siblings}
        if present - MADE_BY_HUB and not any(name.startswith(marker) for name in present):
            raise UserError(f"{repo_id} holds something else (no {marker} in it); name another repository")
        # One commit for all: a reader never finds new weights beside an old card. The Hub makes none of no changes.
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        # The Hub writes .gitattributes itself, and large files need it.
        operations += [CommitOperationDelete(name) for name in sorted(present - files.keys() - {".gitattributes"})]
        commit = api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type)
        # The Hub leaves out, without a word, what a .gitignore in the repository names.
        taken = {file.rfilename for file in api.repo_info(repo_id, repo_type=repo_type).siblings}
        if absent := files.keys() - taken:
            raise UserError(f"{repo_id} did not take {', '.join(sorted(absent))}; look for a .gitignore there")
        return one_line(commit.commit_url)

    return ask_hub(attempt, repo_id)


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
    from emotion.common.hub_requests import ask_hub, endpoint_answers

    check_repo_id(repo_id)
    offline = not endpoint_answers()  # then the cache alone is read
    folder, names = ask_hub(lambda: _download(repo_id, formats, (SUMS_FILE, *optional), offline), repo_id)
    if verify:
        try:
            check_sums(folder, names)
        except UserError as error:  # the cache would give the same file again
            raise UserError(f"{error}. To fetch it anew, first run `hf cache rm model/{repo_id}`") from error
    return folder


def _download(repo_id: str, formats: list[str], optional: tuple[str, ...], offline: bool) -> tuple[Path, list[str]]:
    """One attempt of `fetch`; returns the folder and the names of the files that the format needs."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RemoteEntryNotFoundError

    download = partial(hf_hub_download, repo_id, local_files_only=offline)
    # Offline, nobody knows whether the repository lacks a file that the cache lacks.
    absent = EntryNotFoundError if offline else RemoteEntryNotFoundError
    folder = Path(download(SHARED_FILES[0])).parent
    # The cache names its folders by commit. All files come from this one, whatever is pushed meanwhile.
    download = partial(download, revision=folder.name)
    for name in SHARED_FILES[1:]:
        download(name)
    for name in optional:
        with suppress(absent):  # most repositories have none
            download(name)
    for format in formats:
        for weights in WEIGHT_FILES[format]:
            # Tried one after the other: a list of files exists on the Hub only, not in the cache.
            try:
                download(weights)
            except absent:
                continue
            names = names_to_serve(folder, folder / weights, format)
            for name in names:
                download(name)
            return folder, names
    if offline:
        raise LocalEntryNotFoundError(f"no file for {' or '.join(formats)}")
    raise UserError(f"{repo_id} has no file for {' or '.join(formats)}")
