"""Which files an input means: a file, a folder, a pattern, or a split of a dataset on the Hub."""

import glob
from pathlib import Path

from emotion.utils.errors import UserError

# Ending -> how the file is read; another ending of `COMPRESSED` may stand behind it.
KINDS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "txt",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ON_THE_HUB = "hf://"


def kind_of(name: str) -> str | None:
    """How a file is read, by its ending; None for an ending that says nothing."""
    path = Path(name.lower())
    if path.suffix in COMPRESSED and KINDS.get(path.with_suffix("").suffix) != "parquet":  # which compresses itself
        path = path.with_suffix("")
    return KINDS.get(path.suffix)


def is_table(name: str) -> bool:
    """Whether the name is plainly not that of plain lines: their bytes would be taken for texts."""
    return kind_of(name) not in {None, "txt"} or name.lower().endswith(COMPRESSED)


def find_files(words: list[str], config: str | None, split: str) -> tuple[str, list[str]]:
    """The kind of the input, and its files in order.

    Args:
        words: files, folders, patterns, or one id of a dataset on the Hub.
        config: the dataset's configuration, for the Hub alone.
        split: the dataset's split, for the Hub alone.

    Raises:
        UserError: if there is no such file, or the files are not all of one kind.
    """
    names = []
    for word in words:
        found = _expand(word)
        # As the Hub names a dataset. Anything else was meant as a file, even if there is none.
        if not found and word.count("/") == 1 and not word.startswith((".", "/", "~")) and kind_of(word) is None:
            found = _files_on_the_hub(word, config, split)
        if not found:
            raise UserError(f"no input {word}: no such file, and no file that the folder or the pattern fits")
        names += found
    kinds = {kind_of(name) for name in names}
    if len(kinds) > 1:
        raise UserError(f"the input holds files of several kinds ({', '.join(sorted(kinds))}); name those of one kind")
    return kinds.pop(), names


def _expand(word: str) -> list[str]:
    """The files that a word means, sorted; of a folder those with an ending of `KINDS`, in folders below it too."""
    path = Path(word)
    if path.is_file():
        if kind_of(word) is None:
            raise UserError(f"{word}: its ending says not what it is; known are {', '.join(KINDS)}, also compressed")
        return [word]
    if path.is_dir():
        inside = [one for one in path.rglob("*") if one.is_file() and kind_of(one.name)]
        return sorted(str(one) for one in inside if not _is_hidden(one.relative_to(path)))
    found = glob.glob(word, recursive=True)  # noqa: PTH207 (that of Path takes no pattern from the root)
    return sorted(name for name in found if Path(name).is_file() and kind_of(name))


def _is_hidden(path: Path) -> bool:
    """Names that begin so are marks and unfinished files of programs, this one's own among them."""
    return any(part.startswith((".", "_")) for part in path.parts)


def _files_on_the_hub(name: str, config: str | None, split: str) -> list[str]:
    """The files of a split, each with the commit that it is of; they are fetched when they are read."""
    # Imported here: it takes seconds and a hundred megabytes, and local files do not need it.
    from datasets import load_dataset_builder

    try:
        files = load_dataset_builder(name, config).config.data_files
    except Exception as error:  # of the connection, the name, the configuration: the library has many
        raise UserError(f"no file {name}, and no dataset of this name on the Hub: {error}") from error
    if split not in files:
        raise UserError(f"{name} has no split '{split}'; it has {', '.join(map(str, files))}")
    return [str(one) for one in files[split]]


def local_path(name: str) -> Path:
    """Where a file lies on this machine; one of the Hub is fetched first, unless it is here already."""
    if not name.startswith(ON_THE_HUB):
        return Path(name)
    from huggingface_hub import hf_hub_download, parse_hf_uri

    from emotion.utils.hub_requests import ask_hub

    uri = parse_hf_uri(name)
    file = {"filename": uri.path_in_repo, "repo_type": uri.type, "revision": uri.revision}
    return Path(ask_hub(lambda: hf_hub_download(uri.id, **file), uri.id))
