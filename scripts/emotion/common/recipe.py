"""Recipes: the YAML file that a command reads, and the recipe.yaml that an artifact keeps of what made it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from emotion.common.errors import UserError

RECIPE_FILE = "recipe.yaml"
# What a script was called with that is no part of its recipe
PLACES = {"resume_from_checkpoint", "output_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "results_dir"}

# A mapping in a recipe -> the flag by whose value it replaces the rest
PER = {"per_model": "model_name_or_path", "per_bits": "bits"}


def read_recipe(path: Path) -> dict:
    """Reads a recipe: YAML whose keys are the names of the flags, or of `PER`."""
    import yaml

    if not path.is_file():
        raise UserError(f"no recipe at {path}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} must hold 'key: value' lines")
    return recipe


def resolve(values: dict, model: str | None, bits: int | None) -> dict:
    """The values of a recipe for one base model and so many bits a weight, without the mappings of `PER`."""
    chosen = {key: value for key, value in values.items() if key not in PER}
    chosen |= (values.get("per_model") or {}).get(model, {})
    return chosen | (values.get("per_bits") or {}).get(bits, {})


@dataclass(frozen=True)
class Recipe:
    """The recipe file of a run and every value that the file or a flag set."""

    path: Path
    values: dict

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def read_recipe_of(folder: Path) -> dict:
    """What made this folder; empty for a folder that another program made."""
    path = Path(folder) / RECIPE_FILE
    if not path.is_file():
        return {}
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def comparable(values: dict) -> dict:
    """What of a recipe's values decides the result; `bf16` is what the machine made of it."""
    free = PLACES | {"report_to", "disable_tqdm", "bf16"}
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
    return {key: str(value) for key, value in {**values, **numbers}.items() if key not in free}
