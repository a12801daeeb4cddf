"""An artifact: a folder that `from_pretrained` opens, with the same model in other runtimes' formats beside it.

This file tells which formats a folder holds, which files each format needs and what made the folder. It saves a new
folder whole or not at all.
"""

import contextlib
import json
import re
from pathlib import Path

from emotion.data.dataset import Task, fingerprint
from emotion.utils.base_model import BaseModel
from emotion.utils.checksums import check_sums, write_sums
from emotion.utils.errors import UserError
from emotion.utils.files import FolderKind, atomic_folder, check_replaceable, output_lock, read_fields, write_text
from emotion.utils.machine import git_commit, is_main_process, package_versions
from emotion.utils.recipe import PLACES, RECIPE_FILE, Recipe

# What every format needs beside its weights
SHARED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
# Format -> names of its weights file, of which the first that the folder has is taken. Where no format is asked for,
# the first one in this order that the folder holds is opened.
WEIGHT_FILES = {
    "pytorch": ("model.safetensors",),
    # A baseline has a file of its own for this; another float model is rounded to bfloat16 as it is opened.
    "bf16": ("model.bf16.safetensors", "model.safetensors"),
    "torchao": ("model.safetensors",),
    "nf4": ("model.safetensors",),
    "onnx": ("onnx/model_quantized.onnx", "onnx/model.onnx"),
    "openvino": ("openvino/openvino_model.xml",),
    "adapter": ("adapter/adapter_model.safetensors",),
}
# What is read of config.json here; Transformers reads far more, and has errors of its own
CONFIG_KINDS = {"id2label?": (dict, type(None)), "quantization_config?": {"quant_method": str}, "vocab_size?": int}
# Three formats share the name `model.safetensors`; config.json tells which of them it is. Library that quantized the
# file, None for none -> the formats that it can then be opened as
FORMATS_OF_ROOT = {None: ("pytorch", "bf16"), "torchao": ("torchao",), "bitsandbytes": ("nf4",)}
# For every message that a model is missing; `hf` comes with huggingface_hub
HOW_TO_GET = (
    "take one that the repository holds (weights/qat-int4; others in README.md), "
    "train one with python scripts/run_baseline.py (a short run: make run), "
    "or fetch one with hf download user/name --local-dir FOLDER"
)
# A root that is a language model is no classifier by itself: its format is the adapter, on that root.
FORMATS_OF_LANGUAGE_MODEL = ("adapter",)

MADE_FIELDS = {
    "variant",
    "recipe",
    "recipe_sha256",
    "seed",
    "provenance",
    "training",
    "versions",
}  # of `describe_made`
INPUTS = ("model_name_or_path", "dataset_name")  # flags that name what a command reads


def _is_ours(folder: Path) -> bool:
    import yaml

    try:
        made = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(made, dict) and made.keys() >= MADE_FIELDS


# No README.md: no command writes one there, so it is the user's own.
ARTIFACT = FolderKind(
    "an artifact",
    _is_ours,
    re.compile(
        r"(config|tokenizer|tokenizer_config)\.json|recipe\.yaml|SHA256SUMS|LICENSE|model(\.bf16)?\.safetensors"
        r"|onnx(/model(_quantized)?\.onnx)?|openvino(/(openvino_model\.(xml|bin)|(openvino_)?config\.json))?"
        r"|adapter(/adapter_(config\.json|model\.safetensors))?"
        r"|generation_config\.json|chat_template\.jinja"  # of a language model
        r"|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"  # of other encoders' tokenizers
    ),
)


def find_formats(folder: Path) -> dict[str, Path]:
    """Each format that the folder holds -> its weights file.

    Raises:
        UserError: if there is no such folder, or it is no model folder, or it holds none of the formats.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; {HOW_TO_GET}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    of_root = FORMATS_OF_ROOT.get(quantized_by(folder), ())  # none for a library that this project does not know
    if is_language_model(folder):
        of_root = FORMATS_OF_LANGUAGE_MODEL
    of_any_root = sum(FORMATS_OF_ROOT.values(), FORMATS_OF_LANGUAGE_MODEL)
    found = {}
    for format, names in WEIGHT_FILES.items():
        if format in of_any_root and format not in of_root:
            continue
        for name in names:
            if format not in found and (folder / name).is_file():
                found[format] = folder / name
    if not found:
        raise UserError(f"{folder} has none of the formats {', '.join(WEIGHT_FILES)}")
    return found


def quantized_by(folder: Path) -> str | None:
    """The library that quantized `model.safetensors`, by its name in config.json; None for float weights."""
    return read_config(folder).get("quantization_config", {}).get("quant_method")


def is_language_model(folder: Path) -> bool:
    """Whether the folder's root generates text, by its config.json, and does not classify."""
    return any(name.endswith("ForCausalLM") for name in read_config(folder).get("architectures") or [])


def read_config(folder: Path) -> dict:
    """The folder's config.json; raises `UserError` if it is not one."""
    return read_fields(Path(folder) / "config.json", json.loads, CONFIG_KINDS)


def weights_of(folder: Path, format: str, verify: bool = True) -> Path:
    """The weights file of one format. Whatever opens a folder asks here, so that nothing unchecked is opened.

    Args:
        verify: whether the files of this format are compared with the folder's SHA256SUMS.

    Raises:
        UserError: naming the formats that there are, if the folder has no such format; or the file that differs.
    """
    folder, formats = Path(folder), find_formats(folder)
    if format not in formats:
        raise UserError(f"{folder} has no format '{format}'; it has {', '.join(formats)}")
    if verify:
        names = names_to_serve(folder, formats[format], format)
        # Read as well, wherever a folder is measured or made into another one; the Hub's cache may not hold it.
        check_sums(folder, [*names, RECIPE_FILE] if (folder / RECIPE_FILE).exists() else names)
    return formats[format]


def files_to_serve(folder: Path, format: str) -> dict[str, int]:
    """Name -> bytes of every file that must be on disk to answer a text in this format.

    Raises:
        UserError: if the folder has no such format.
    """
    folder = Path(folder)
    names = names_to_serve(folder, weights_of(folder, format, verify=False), format)
    return {name: (folder / name).stat().st_size for name in names}


def names_to_serve(folder: Path, weights: Path, format: str) -> list[str]:
    """The names of all files that a format needs, relative to the folder."""
    beside = [path.relative_to(folder).as_posix() for path in [weights, *files_beside(weights, format)]]
    return [*SHARED_FILES, *beside]


def adapter_bytes(folder: Path) -> int | None:
    """Bytes of the adapter's weights, which lie beside the merged model (QLoRA); None where there is no adapter."""
    path = Path(folder) / "adapter" / "adapter_model.safetensors"
    return path.stat().st_size if path.is_file() else None


def files_beside(weights: Path, format: str) -> list[Path]:
    """The files that a weights file cannot do without."""
    # OpenVINO's .xml is the graph alone: the weights lie in the .bin. optimum-intel reads the config.json.
    if format == "openvino":
        return [weights.with_suffix(".bin"), weights.with_name("config.json")]
    if format == "adapter":  # it lies one folder below its base and the template of the prompt
        root = weights.parent.parent
        return [weights.with_name("adapter_config.json"), root / "model.safetensors", root / "chat_template.jinja"]
    return []


def inputs_of(arguments, recipe: Recipe) -> list[Path]:
    """The files and folders that a command reads, by its flags: a name on the Hub is none."""
    named = [getattr(arguments, flag, None) for flag in INPUTS]
    config = [recipe.path] if recipe.path else []
    return [*config, *(Path(name) for name in named if name and Path(name).exists())]


@contextlib.contextmanager
def own_place(folder: Path, arguments, recipe: Recipe):
    """Holds the place of an artifact while the block runs, so that no other process writes there.

    Raises:
        UserError: before any work, if an artifact there would destroy something, or another process holds the place.
    """
    if not is_main_process():  # of several that train together, and of which the main one saves
        yield
        return
    check_replaceable(folder, ARTIFACT, inputs_of(arguments, recipe))
    with output_lock(folder):
        yield


@contextlib.contextmanager
def new_artifact(folder: Path, made: dict):
    """Yields a temporary folder to save into; if the block succeeds, it becomes the artifact.

    It gets its recipe.yaml and its SHA256SUMS here.

    Args:
        folder: the artifact's place. One that stands there stays untouched until the new one is whole.
        made: the content of recipe.yaml, of `describe_made`. The block may still add to it: it is written at the end.

    Raises:
        UserError: if the folder cannot be written, or holds something else than an artifact.
    """
    import yaml

    # By the recipe a later run knows that it may replace the folder.
    with atomic_folder(folder, ARTIFACT) as partial:
        yield partial
        write_text(partial / RECIPE_FILE, yaml.safe_dump(made, sort_keys=False, allow_unicode=True))
        write_sums(partial)


def read_labels(folder: Path, weights: Path, width: int) -> list[str]:
    """The label names of a model folder, in the order of its logits.

    Args:
        weights: the file that was opened, for the message.
        width: the number of logits that it gives per text.

    Raises:
        UserError: if config.json names another number of labels, or names that cannot be told apart.
    """
    config = Path(folder) / "config.json"
    names = read_config(folder).get("id2label") or {}
    if width != len(names):
        raise UserError(f"{weights} gives {width} logits and config.json names {len(names)} labels")
    labels = {}  # in order; each is there once
    for number in range(width):  # JSON's keys are words
        label = names.get(str(number))
        # Answers are lines: a label of two lines would look like two answers.
        if not isinstance(label, str) or len(label.splitlines()) != 1 or not label.strip():
            raise UserError(f"{config}: the name of label {number} is {label!r:.40}, and not one line of text")
        if labels.setdefault(label, number) != number:
            raise UserError(f"{config} names two labels {label!r:.40}")
    return list(labels)


def describe_made(variant: str, recipe: Recipe, seed: int | None, origin: dict, training: dict | None) -> dict:
    """The content of an artifact's recipe.yaml, from which every record of the artifact takes what made it.

    Args:
        seed: of the training; None for a folder that another program trained.
        origin: of `describe_origin`, or from a baseline's recipe.yaml.
        training: of `summarize_training`, or from a baseline's recipe.yaml; None as for the seed.
    """
    # Without output folders and the like: the same recipe in another place gives the same artifact.
    recipe_values = {key: value for key, value in recipe.values.items() if key not in PLACES}
    return {
        "variant": variant,
        "recipe": recipe_values,
        "recipe_sha256": recipe.sha256,
        "seed": seed,
        "provenance": origin | {"git_commit": git_commit()},
        "training": training,
        # Of the packages: another release may train or quantize otherwise.
        "versions": package_versions(),
    }


def describe_origin(base: BaseModel, task: Task, rows) -> dict:
    """Where the base model and the data came from.

    Args:
        rows: the rows of train that are learnt from; their number and fingerprint are recorded.
    """
    return {
        "base_model": base.name,
        "base_model_source": base.source,
        "dataset": task.name,
        "dataset_source": task.source,
        # After rows have been left out or drawn: the dataset's name alone does not tell which were learnt from.
        "train_rows": len(rows),
        "train_fingerprint": fingerprint(rows),
    }
