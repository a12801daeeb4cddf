"""Recipes: the YAML file that a command reads, and the recipe.yaml that an artifact keeps of what made it."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.fields import read_fields
from emotion.common.names import check_line, check_name
from emotion.common.sums import SUMS_FILE, read_sums

RECIPE_FILE = "recipe.yaml"
# Flags that say where a result goes and not how it is made: an artifact's recipe.yaml leaves them out.
PLACES = {"resume_from_checkpoint", "output_dir", "push_to_hub", "hub_model_id", "hub_private_repo", "results_dir"}

LONGEST_RECIPE = 100_000  # bytes; ours have two thousand
# What is read of an artifact's recipe.yaml
TEXT, NUMBER = (str, type(None)), (int, type(None))
TASK_KINDS = {"dataset_name?": str, "dataset_config_name?": TEXT}
MADE_KINDS = {
    "variant": str,
    "recipe": {**TASK_KINDS, "baseline?": TASK_KINDS},  # a quantized artifact keeps its baseline's inside its own
    "seed": NUMBER,
    "made": {
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
    "remedies?": dict,
    "outliers?": dict,
    "merged?": dict,
    "onnx?": dict,
}

# Mappings in a recipe: by base model, and by the bits of a weight. The values of an entry replace the recipe's own. An
# entry of per_model may hold a per_bits of its own.
PER = ("per_model", "per_bits")


def read_recipe(path: Path) -> dict:
    """Reads a recipe: YAML whose keys are the names of the flags, or of `PER`.

    Raises:
        UserError: if there is no such file, or it is not YAML, or not a mapping, or holds what no recipe needs.
    """
    import yaml  # a Python that only answers texts does not have it

    class PlainLoader(yaml.SafeLoader):
        """YAML without aliases, by which a few lines can become endless, without tags, and with each key once."""

        def compose_node(self, parent, index):
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
                raise yaml.YAMLError(f"line {event.start_mark.line + 1}: a recipe takes no aliases and no tags")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for name, count in names.most_common(1):
                if count > 1:
                    raise yaml.YAMLError(f"line {node.start_mark.line + 1}: '{name:.80}' is there {count} times")
            return super().construct_mapping(node, deep)

    if not path.is_file():
        raise UserError(f"no recipe at {path}")
    if path.stat().st_size > LONGEST_RECIPE:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes and is no recipe; {LONGEST_RECIPE:,} is the most")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    # A number of 5,000 digits, a 13th month or bytes that are not UTF-8 are a ValueError, too many brackets the last.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} must hold 'key: value' lines")
    return recipe


def resolve(values: dict, model: str | None, bits: int | None) -> dict:
    """The values of a recipe for one base model and one number of bits per weight, without the mappings of `PER`."""
    # `or {}`: a mapping whose entries are all commented out is None in YAML.
    chosen = values | (values.get("per_model") or {}).get(model, {})
    chosen |= (chosen.get("per_bits") or {}).get(bits, {})
    return {key: value for key, value in chosen.items() if key not in PER}


@dataclass(frozen=True)
class Recipe:
    """The recipe of a run.

    Attributes:
        path: the file that was read.
        values: flag -> value, for every flag that the file or the command line has set.
    """

    path: Path
    values: dict

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def read_recipe_of(folder: Path) -> dict:
    """The recipe.yaml of an artifact; empty for a folder that another program made.

    Raises:
        UserError: if it is lost or cannot be read, or does not hold what `new_artifact` writes.
    """
    path = Path(folder) / RECIPE_FILE
    if not path.is_file():
        if RECIPE_FILE in (read_sums(folder) or {}):
            raise UserError(f"{folder} has lost its {RECIPE_FILE}, which {SUMS_FILE} names; make the artifact again")
        return {}
    import yaml

    made = read_fields(path, yaml.safe_load, MADE_KINDS, most_bytes=300_000)
    # The folder may come from a stranger: the first names files of results, the others stand in cards and pages.
    check_name(made["variant"], path)
    for key in ("base_model", "dataset"):
        check_line(made["made"].get(key), path)
    return made


def base_model_of(folder: Path) -> str | None:
    """The Hub id of the base model that an artifact was made from; None if its folder does not tell."""
    return read_recipe_of(folder).get("made", {}).get("base_model")


def comparable(values: dict) -> dict[str, str]:
    """The values of a recipe that decide its result, as words, so that two runs can be compared."""
    # None of these decides it. `bf16` is left out since the machine may have turned it off.
    free = PLACES | {"report_to", "disable_tqdm", "bf16"}
    compared = {}
    for key, value in values.items():
        if key not in free:
            # A recipe's 3 and a flag's 3.0 are the same number.
            compared[key] = str(float(value) if isinstance(value, int | float) else value)
    return compared
