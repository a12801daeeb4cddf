"""Downloads a published model from the Hub, or finds it in the cache.

`huggingface_hub` is imported when it is needed, and takes the token from the environment or the login store.
"""

from contextlib import suppress
from functools import partial
from pathlib import Path

from emotion.inference.model_folder import SHARED_FILES, WEIGHT_FILES, names_to_serve
from emotion.utils.checksums import SUMS_FILE, check_sums
from emotion.utils.errors import UserError
from emotion.utils.names import check_repo_id


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
    from emotion.utils.hub_requests import ask_hub, endpoint_answers

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
