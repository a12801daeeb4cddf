"""Pushes a saved model to the Hub in one commit, after it was scored; the token comes from the environment."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

from emotion.inference.model_folder import find_formats
from emotion.utils.arguments import flag
from emotion.utils.errors import UserError, printable
from emotion.utils.files import ROOT
from emotion.utils.hub_requests import ask_hub, check_can_publish, endpoint_answers
from emotion.utils.machine import run_script

MADE_BY_HUB = {".gitattributes", "README.md"}  # what may be in a repository that nobody has written to


@dataclass
class HubArguments:
    """The flags that `--push_to_hub` needs; in a training these are fields of `TrainingArguments`."""

    push_to_hub: bool = flag(False, "Score the saved model, then publish it.")
    hub_model_id: str | None = flag(None, "Repository to publish to: user/name.")
    hub_private_repo: bool | None = flag(None, "Create the repository as a private one.")
    results_dir: str = flag(str(ROOT / "results"), "With --push_to_hub: where the scores are written.")

    def __post_init__(self):
        if self.push_to_hub:
            check_can_publish(self.hub_model_id)


def push_to_hub(folder: str | Path, hub) -> None:
    """For `--push_to_hub`: scores every format of a saved model in a fresh process, then publishes it with its card.

    ``hub`` is `HubArguments`, or a training's arguments. Raises `UserError` if a process failed, which has said why.
    """
    if not (hub.push_to_hub or getattr(hub, "publish", False)):
        return
    # In processes of their own: a training leaves threads and memory behind, which would disturb the measurement.
    commands = [("run_evaluation.py", "--format", format) for format in find_formats(Path(folder))]
    commands.append(("run_publish.py", "--repo_id", hub.hub_model_id, "--private", bool(hub.hub_private_repo)))
    for name, *flags in commands:
        if run_script(name, folder, *flags, "--results_dir", hub.results_dir).returncode:
            raise UserError(f"{folder} is saved but not published; {name} failed")


def upload(
    files: dict[str, Path | bytes], repo_id: str, repo_type: str, private: bool, message: str, marker: str
) -> str:
    """Makes a repository hold these files and no others, with one commit, or none if it holds them already.

    Args:
        files: name in the repository -> a file, or its bytes.
        repo_type: `model` or `space`.
        private: whether only the owner may see the repository.
        message: of the commit, whose address is returned.
        marker: beginning of a name that a repository of this project holds; another's files are not replaced.

    Raises:
        UserError: if the Hub refuses or fails, or the repository holds something else.
    """
    check_can_publish(repo_id)
    if not endpoint_answers():
        raise UserError(f"the Hub ({constants.ENDPOINT}) cannot be reached")
    return ask_hub(lambda: _commit(files, repo_id, repo_type, private, message, marker), repo_id)


def _commit(files: dict, repo_id: str, repo_type: str, private: bool, message: str, marker: str) -> str:
    """One attempt of `upload`."""
    api = HfApi()
    api.create_repo(
        repo_id,
        repo_type=repo_type,
        private=private or None,  # None leaves it to the owner's own setting; False would make it public
        exist_ok=True,
        space_sdk="static" if repo_type == "space" else None,
    )
    info = api.repo_info(repo_id, repo_type=repo_type)
    if private and info.private is not True:  # it existed before
        raise UserError(f"{repo_id} exists and everybody can read it; make it private first, or leave out --private")
    present = {file.rfilename for file in info.siblings}
    if present - MADE_BY_HUB and not any(name.startswith(marker) for name in present):
        raise UserError(f"{repo_id} holds something else (no {marker} in it); name another repository")
    # One commit, so that nobody finds new weights beside an old card.
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(present - files.keys() - {".gitattributes"})]
    commit = api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type)
    # The Hub leaves out what a .gitignore in the repository names.
    found = {file.rfilename for file in api.repo_info(repo_id, repo_type=repo_type).siblings}
    if absent := files.keys() - found:
        raise UserError(f"{repo_id} did not take {', '.join(sorted(absent))}; look for a .gitignore there")
    return printable(commit.commit_url)
