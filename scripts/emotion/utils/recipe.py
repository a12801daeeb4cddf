"""The recipe of a run, and the recipe.yaml of a model folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from emotion.utils.checksums import SUMS_FILE, read_sums
from emotion.utils.errors import UserError, check_line, check_name
from emotion.utils.files import read_fields

RECIPE_FILE = "recipe.yaml"
# Flags that name where a result is written and do not change it, which recipe.yaml leaves out
PLACES = {"resume_from_checkpoint", "output_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "results_dir"}

# What is read of an artifact's recipe.yaml
TEXT, NUMBER = (str, type(None)), (int, type(None))
TASK_KINDS = {"dataset_name?": str, "dataset_config_name?": TEXT}
MADE_KINDS = {
    "variant": str,
    "recipe": {**TASK_KINDS, "baseline?": TASK_KINDS},  # a quantized artifact keeps its baseline's inside its own
    "seed": NUMBER,
    "provenance": {
        "base_model?": TEXT,
        "base_model_source?": TEXT,
        "dataset?": TEXT,
        "dataset_source?": TEXT,
        "train_rows?": NUMBER,
        "train_fingerprint?": TEXT,
        "git_commit?": TEXT,
    },
    "training": (dict, type(None)),
    "kept_in_float?": dict,
    "seconds?": dict,
    "forms?": dict,
    "fallbacks?": dict,
    "outlier_channels?": dict,
    "merged?": dict,
    "onnx?": dict,
}


@dataclass(frozen=True)
class Recipe:
    """What a run was asked to do.

    Attributes:
        path: the config that was read; None for none.
        values: flag -> value: all flags of this project that have one, and those of libraries that differ from their
            defaults.
    """

    path: Path | None
    values: dict

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the config's bytes, in hexadecimal: flags of the command line and defaults are not in it."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest() if self.path else None


def read_recipe_of(folder: Path) -> dict:
    """The recipe.yaml of a model folder; empty for a folder that another program made.

    Raises:
        UserError: if it is lost or cannot be read, or does not hold what `new_artifact` writes.
    """
    path = Path(folder) / RECIPE_FILE
    if not path.is_file():
        if RECIPE_FILE in (read_sums(folder) or {}):
            raise UserError(f"{folder} has lost its {RECIPE_FILE}, which {SUMS_FILE} names; make or download it again")
        return {}
    import yaml

    made = read_fields(path, yaml.safe_load, MADE_KINDS, max_bytes=300_000)
    # The folder may come from a stranger: the first names files of results, the others stand in cards and pages.
    check_name(made["variant"], path)
    for key in ("base_model", "dataset"):
        check_line(made["provenance"].get(key), path)
    return made


def base_model_of(folder: Path) -> str | None:
    """The Hub id of the base model that an artifact was made from; None if its folder does not tell."""
    return read_recipe_of(folder).get("provenance", {}).get("base_model")


def comparable(values: dict) -> dict[str, str]:
    """The values of a recipe that decide its result, as strings, so that two runs can be compared."""
    # None of these decides it. `bf16` is left out since the machine may have turned it off.
    free = PLACES | {"report_to", "disable_tqdm", "bf16"}
    compared = {}
    for key, value in values.items():
        if key not in free:
            # A recipe's 3 and a flag's 3.0 are the same number.
            compared[key] = str(float(value) if isinstance(value, int | float) else value)
    return compared
