"""An artifact: a folder that `from_pretrained` opens, with the same model in other runtimes' formats beside it.

Says which formats a folder holds, which files each needs and what made it, and saves a new folder whole or not at all.
"""

import contextlib
import json
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import whole_folder, write_text
from emotion.common.machine import git_commit, package_versions
from emotion.common.recipe import PLACES, RECIPE_FILE, Recipe
from emotion.task.dataset import Task, fingerprint
from emotion.task.source import BaseModel

SHARED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
# Format -> its file of weights; of several names, the first that the folder has. The first format is the default.
WEIGHT_FILES = {
    "pytorch": ("model.safetensors",),
    "bf16": ("model.bf16.safetensors", "model.safetensors"),
    "torchao": ("model.safetensors",),
    "nf4": ("model.safetensors",),
    "onnx": ("onnx/model_quantized.onnx", "onnx/model.onnx"),
    "openvino": ("openvino/openvino_model.xml",),
}
# Who quantized `model.safetensors`, as config.json tells -> the formats which that file then is
FORMATS_OF_ROOT = {None: ("pytorch", "bf16"), "torchao": ("torchao",), "bitsandbytes": ("nf4",)}


def find_formats(folder: Path) -> dict[str, Path]:
    """Maps each format that the folder holds to its file of weights; raises `UserError` if it holds none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; make it first, for instance with python scripts/run_baseline.py")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    of_root, of_any_root = FORMATS_OF_ROOT.get(quantized_by(folder), ()), sum(FORMATS_OF_ROOT.values(), ())
    found = {}
    for name, files in WEIGHT_FILES.items():
        path = next((folder / file for file in files if (folder / file).is_file()), None)
        if path and (name in of_root or name not in of_any_root):
            found[name] = path
    if not found:
        raise UserError(f"{folder} has none of the formats {', '.join(WEIGHT_FILES)}")
    return found


def quantized_by(folder: Path) -> str | None:
    """The library that quantized `model.safetensors`, by its name in config.json; None for float weights."""
    return read_config(folder).get("quantization_config", {}).get("quant_method")


def read_config(folder: Path) -> dict:
    """The folder's config.json."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def weights_of(folder: Path, format: str) -> Path:
    """Returns the file of weights for the format, or says which formats there are."""
    formats = find_formats(folder)
    if format not in formats:
        raise UserError(f"{folder} has no format '{format}'; it has {', '.join(formats)}")
    return formats[format]


def files_to_serve(folder: Path, format: str) -> dict[str, int]:
    """All files that must be on disk to answer a text in this format, and the bytes of each."""
    folder = Path(folder)
    weights = weights_of(folder, format)
    paths = [folder / name for name in SHARED_FILES] + [weights, *files_beside(weights, format)]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def adapter_bytes(folder: Path) -> int | None:
    """Size of the weights of the adapter that lies beside the merged model; None where there is none."""
    path = Path(folder) / "adapter" / "adapter_model.safetensors"
    return path.stat().st_size if path.is_file() else None


def files_beside(weights: Path, format: str) -> list[Path]:
    """What a file of weights needs beside it: OpenVINO's graph the weights, and what optimum-intel reads."""
    return [weights.with_suffix(".bin"), weights.with_name("config.json")] if format == "openvino" else []


@contextlib.contextmanager
def new_artifact(folder: Path, made: dict):
    """Yields a temporary folder to save into; it becomes the artifact, recipe.yaml included, if all goes well."""
    import yaml

    with whole_folder(folder, marker=RECIPE_FILE) as partial:
        yield partial
        write_text(partial / RECIPE_FILE, yaml.safe_dump(made, sort_keys=False, allow_unicode=True))


def read_labels(folder: Path, weights: Path, width: int) -> list[str]:
    """The label names of a model folder, in the order of its logits; ``width`` is how many of those there are."""
    names = read_config(folder).get("id2label") or {}
    if width != len(names):
        raise UserError(f"{weights} gives {width} logits and config.json names {len(names)} labels")
    return [names[key] for key in sorted(names, key=int)]


def describe_made(variant: str, recipe: Recipe, seed: int | None, origin: dict, training: dict | None) -> dict:
    """What made an artifact, for its recipe.yaml and for every record of it.

    Args:
        origin: what `describe_origin` tells, or what a baseline's recipe.yaml told of it.
        training: what `summarize_training` tells; null for a folder that another program trained.
    """
    return {
        "variant": variant,
        "recipe": {key: value for key, value in recipe.values.items() if key not in PLACES},
        "recipe_sha256": recipe.sha256,
        "seed": seed,
        "made": origin | {"git_commit": git_commit()},
        "training": training,
        "versions": package_versions(),
    }


def describe_origin(base: BaseModel, task: Task, rows) -> dict:
    """Where the base model and the data came from; ``rows`` are those of train that are learnt from."""
    return {
        "base_model": base.name,
        "base_model_source": base.source,
        "dataset": task.name,
        "dataset_source": task.source,
        "train_rows": len(rows),
        "train_fingerprint": fingerprint(rows),
    }
