"""A model folder, which `from_pretrained` opens, with the same model for other runtimes beside it.

This module finds the formats that a folder holds and the files that each needs, opens it with `from_pretrained`,
writes a new folder with its provenance, and names what is released.
"""

import contextlib
import json
import re
from pathlib import Path

from emotion.data.dataset import Task, fingerprint
from emotion.utils.arguments import PLACES, Recipe
from emotion.utils.base_model import RECIPE_FILE, BaseModel
from emotion.utils.errors import UserError, check_label, one_line
from emotion.utils.files import (
    FolderKind,
    atomic_folder,
    check_replaceable,
    check_sums,
    output_lock,
    read_fields,
    read_json,
    write_sums,
    write_text,
)
from emotion.utils.machine import git_commit, is_main_process, package_versions

# What every format needs beside its weights
SHARED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
# Float weights that Transformers opens, whole or in shards; the commands open the first one alone
SHARDS = ".index.json"
FLOAT_FILES = ("model.safetensors", f"model.safetensors{SHARDS}", "pytorch_model.bin", f"pytorch_model.bin{SHARDS}")
# Format -> file names of its weights, in the order of preference. The order of the formats is one of preference too.
WEIGHT_FILES = {
    "pytorch": ("model.safetensors",),
    # A float model without a bfloat16 file is rounded when it is opened.
    "bf16": ("model.bf16.safetensors", "model.safetensors"),
    "torchao": ("model.safetensors",),
    "nf4": ("model.safetensors",),
    "onnx": ("onnx/model_quantized.onnx", "onnx/model.onnx"),
    "openvino": ("openvino/openvino_model.xml",),
    "adapter": ("adapter/adapter_model.safetensors",),
}
# The fields of config.json that are read here
CONFIG_KINDS = {"id2label?": (dict, type(None)), "quantization_config?": {"quant_method": str}, "vocab_size?": int}
CONFIG_KINDS["architectures?"] = (list, type(None))
CONFIG_KINDS["problem_type?"] = (str, type(None))
MULTI_LABEL = "multi_label_classification"  # a `problem_type`: a text may have several labels, one sigmoid each
# Labels of models that compare two texts
PAIR_LABELS = {"entailment", "contradiction", "not_entailment", "paraphrase", "not_equivalent"}
# `quant_method` in config.json -> formats of `model.safetensors`; None for float weights. A language model classifies
# only with its adapter.
FORMATS_OF_ROOT = {None: ("pytorch", "bf16"), "torchao": ("torchao",), "bitsandbytes": ("nf4",)}
FORMATS_OF_LANGUAGE_MODEL = ("adapter",)
# Ends each message about a missing model
HOW_TO_GET = (
    "take one that the repository holds (weights/qat-int4; others in README.md), "
    "train one with python scripts/run_baseline.py (a short run: make run), "
    "or fetch one with hf download user/name --local-dir FOLDER"
)

# Bits of a quantized weight, and below 8 its levels: odd ones spend none on zero, which would leave one side fewer.
BITS = (8, 4, 2)
LEVELS = {2: range(-3, 4, 2), 4: range(-8, 8)}
# The seven-bit limit: a processor without VNNI adds two products with an 8-bit activation in 16 bits, where weights of
# the full range overflow (2 x 255 x 127 > 2^15) and these do not (2 x 255 x 64 < 2^15).
LARGEST_SAFE_WEIGHT = 64
BRANCH = "/outliers"  # part of the names of the nodes of an ONNX file that compute outlier channels in float

# Released variant -> its format: all formats would be 600 MB. ONNX is the fastest for one text, and the browser's; the
# baseline comes in half the bytes of FP32, and QLoRA as it was trained, in 4 bits with the adapter beside it.
RELEASED = {"baseline": "bf16", "ptq": "onnx", "qat": "onnx", "qat-int4": "onnx", "qat-int2": "onnx", "qlora": "nf4"}
# The baseline's file gets the name that `from_pretrained` opens. config.json makes it compute in float32: in bfloat16
# two labels of 2,000 differ on another processor, and macro F1 by 0.2 points.
RENAMED = {"model.bf16.safetensors": "model.safetensors"}
OPENED_AS = {"baseline": "pytorch"}
SCORES_OF_OPENED = "released"  # folder of the results with the record of what is opened in another format
LICENSE_FILE = "LICENSE"  # of the weights, which have their encoder's, not that of the code

# Sizes in config.json that are a dimension of some weight, of BERT and its descendants, and of DistilBERT
SIZES = ("vocab_size", "hidden_size", "dim", "intermediate_size", "hidden_dim", "max_position_embeddings")
CLASSIFIER = "AutoModelForSequenceClassification"
LAYERS = ("num_hidden_layers", "n_layers")
# Weights that a file may hold in excess: older libraries saved position ids, and a pooler that the head does not use.
UNUSED = ("position_ids", "pooler.dense.weight", "pooler.dense.bias")
# Heads of pretraining, by the beginnings of their weights' names
PRETRAINING_HEADS = ("cls.", "lm_head.", "mlm.", "vocab_", "predictions.", "generator_", "discriminator_")

METADATA_FIELDS = {"variant", "recipe", "recipe_sha256", "seed", "provenance", "training", "versions"}
RUN_FILE = "training_run.json"  # beside the checkpoints of a training: its recipe, its rows and its processes
ROWS_FIELD = "train_fingerprint"  # of RUN_FILE
INPUTS = ("model_name_or_path", "dataset_name")  # flags that name what a command reads


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a model of this project, or the checkpoints of a training that was interrupted."""
    import yaml

    with contextlib.suppress(UserError):
        if ROWS_FIELD in read_json(folder / RUN_FILE):
            return True
    with contextlib.suppress(UserError):
        return read_fields(folder / RECIPE_FILE, yaml.safe_load, {}).keys() >= METADATA_FIELDS
    return False


# Without README.md: no command writes one, so that it belongs to the user.
ARTIFACT = FolderKind(
    "a model folder",
    _is_ours,
    re.compile(
        r"(config|tokenizer|tokenizer_config)\.json|recipe\.yaml|SHA256SUMS|LICENSE|model(\.bf16)?\.safetensors"
        r"|onnx(/model(_quantized)?\.onnx)?|openvino(/(openvino_model\.(xml|bin)|(openvino_)?config\.json))?"
        r"|adapter(/adapter_(config\.json|model\.safetensors))?"
        r"|generation_config\.json|chat_template\.jinja"  # of a language model
        r"|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"  # of other tokenizers
        # What the Trainer and PEFT write while a training runs
        r"|\.?training_run\.json(\.lock|\.partial)?"
        r"|checkpoint-\d+(/(config\.json|(adapter_)?model\.safetensors|adapter_config\.json|README\.md|tokenizer\.json"
        r"|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
        r"|training_args\.bin|optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth|trainer_state\.json"
        r"|\.?checksums\.json(\.lock|\.partial)?))?"
    ),
)


def find_formats(folder: Path) -> dict[str, Path]:
    """Finds the formats of a folder: format -> its weights file; raises `UserError` if it has none or is no model."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; {HOW_TO_GET}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    of_root = FORMATS_OF_ROOT.get(quantized_by(folder), ())
    if any(name.endswith("ForCausalLM") for name in read_config(folder).get("architectures") or []):
        of_root = FORMATS_OF_LANGUAGE_MODEL
    of_any_root = sum(FORMATS_OF_ROOT.values(), FORMATS_OF_LANGUAGE_MODEL)
    found = {}
    for format, names in WEIGHT_FILES.items():
        files = [folder / name for name in names if (folder / name).is_file()]
        if files and (format in of_root or format not in of_any_root):
            found[format] = files[0]
    if not found:
        raise UserError(f"{folder} has none of the formats {', '.join(WEIGHT_FILES)}")
    return found


def quantized_by(folder: Path) -> str | None:
    """Returns the `quant_method` in config.json; None for float weights."""
    return read_config(folder).get("quantization_config", {}).get("quant_method")


def read_config(folder: Path) -> dict:
    """Reads config.json; raises `UserError` if it is missing or malformed."""
    path = Path(folder) / "config.json"
    config = read_fields(path, json.loads, CONFIG_KINDS)
    if not all(isinstance(name, str) for name in config.get("architectures") or []):
        raise UserError(f"{path}: 'architectures' holds something else than names; download it again")
    return config


def is_multi_label(folder: Path) -> bool:
    """Whether a text may have several of the labels, by the `problem_type` in config.json."""
    return read_config(folder).get("problem_type") == MULTI_LABEL


def check_problem(name: str | Path, labels: list[str], problem_type: str | None, training: bool = False) -> None:
    """Raises `UserError` for a model of a problem that this project does not solve, or, in ``training``, not train."""
    if problem_type == "regression" or len(labels) == 1:
        raise UserError(f"{name} predicts a number (regression); take a classifier with two or more labels")
    if training and problem_type == MULTI_LABEL:
        raise UserError(f"{name} gives a text several labels ({MULTI_LABEL}), which run_ptq.py takes and no training")
    if PAIR_LABELS & {str(label).lower() for label in labels}:
        raise UserError(f"{name} compares two texts ({', '.join(labels)}); take a model that classifies single ones")


def weights_of(folder: Path, format: str, verify: bool = True) -> Path:
    """Returns the weights file of one format, and checks its files unless ``verify`` is False; raises `UserError`."""
    folder, formats = Path(folder), find_formats(folder)
    if format not in formats:
        raise UserError(f"{folder} has no format '{format}'; it has {', '.join(formats)}")
    names = names_to_serve(folder, formats[format], format)
    # The Hub's cache may lack recipe.yaml.
    check_sums(folder, [*names, RECIPE_FILE] if (folder / RECIPE_FILE).exists() else names, verify)
    return formats[format]


def files_to_serve(folder: Path, format: str) -> dict[str, int]:
    """The files that inference in this format needs: name -> bytes; raises `UserError` as `weights_of` does."""
    folder = Path(folder)
    names = names_to_serve(folder, weights_of(folder, format, verify=False), format)
    return {name: (folder / name).stat().st_size for name in names}


def names_to_serve(folder: Path, weights: Path, format: str) -> list[str]:
    """Lists the names of all files that a format needs, relative to the folder."""
    names = [*SHARED_FILES, weights.relative_to(folder).as_posix()]
    if format == "openvino":  # the graph is in .xml and the weights in .bin; optimum-intel reads config.json
        names += ["openvino/openvino_model.bin", "openvino/config.json"]
    if format == "adapter":  # on the language model
        names += ["adapter/adapter_config.json", "model.safetensors", "chat_template.jinja"]
    return names


def names_to_release(folder: Path, variant: str) -> dict[str, str]:
    """The released files of a model folder, but for the license: name there -> name in the released folder."""
    folder, format = Path(folder), RELEASED[variant]
    formats = find_formats(folder)
    names = names_to_serve(folder, formats[format], format)
    if "torchao" in formats:  # config.json names its weights, so `from_pretrained` looks for them
        names += WEIGHT_FILES["torchao"]
    names += [f"adapter/{path.name}" for path in sorted((folder / "adapter").glob("adapter_*"))]  # QLoRA's
    return {name: RENAMED.get(name, name) for name in [*names, RECIPE_FILE]}


def adapter_bytes(folder: Path) -> int | None:
    """Returns the size of the adapter's weights in bytes; None if there is no adapter."""
    path = Path(folder) / "adapter" / "adapter_model.safetensors"
    return path.stat().st_size if path.is_file() else None


def open_model(auto_class: str, folder, **options):
    """Calls `from_pretrained` of an auto class, by its name, with a local folder or a Hub id and further ``options``.

    Returns:
        The model and its loading info, which names missing, unexpected and mismatched weights.
    """
    import transformers  # here: ONNX files do not need it

    if (Path(folder) / "adapter_config.json").is_file():  # by which Transformers would open another model
        raise UserError(f"{folder} holds an adapter; merge it into its model, or move adapter_config.json away")
    # A pickle or Python code from a repository could run anything on this machine.
    options = {"use_safetensors": True, **options, "trust_remote_code": False, "output_loading_info": True}
    # For a wrong value in config.json, Transformers may raise any kind of error.
    with one_line(f"{folder} cannot be opened"):
        return getattr(transformers, auto_class).from_pretrained(folder, **options)


def head_labels(path: str | Path, fine_tuned: bool = False) -> list[str] | None:
    """The names of the classes in the order of the logits, by the configuration of a model.

    Args:
        path: a local folder or a Hub id.
        fine_tuned: whether the model must have a head; otherwise None is returned for an encoder without one.
    """
    from transformers import AutoConfig

    with one_line(f"{path} cannot be opened"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if fine_tuned or any("SequenceClassification" in name for name in config.architectures or []):
            return [str(config.id2label[index]) for index in range(config.num_labels)]
    return None


def build_config(path: str, labels: list[str], attention_dropout: float | None):
    """The configuration of a base model with these labels; arguments and errors as of `build_classifier`."""
    from transformers import AutoConfig

    with one_line(f"{path} cannot be opened"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    # Transformers would replace a head of another size by a random one.
    trained = "SequenceClassification" in str(config.architectures)  # of any type, in a stranger's file
    if trained and config.num_labels != len(labels):
        raise UserError(f"{path} is a classifier of {config.num_labels} classes and the dataset has {len(labels)}")
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    if attention_dropout is not None:
        for name in ("attention_probs_dropout_prob", "attention_dropout"):  # of BERT and of DistilBERT
            if name in vars(config):
                setattr(config, name, attention_dropout)
    return config


def build_classifier(path: str, labels: list[str], attention_dropout: float | None, **options):
    """Loads the encoder, in float32, with a new classification head, or with its own if that has as many classes.

    Args:
        path: a local folder or a Hub id.
        labels: the names of the classes, in the order of the logits.
        attention_dropout: dropout of the attention weights; None keeps the base model's own.
        options: further arguments of `from_pretrained`, for instance `quantization_config`.

    Raises:
        UserError: if it cannot be opened, its encoder has no pretrained weights, or it has another number of classes.
    """
    config = build_config(path, labels, attention_dropout)
    # Also if the file is in half precision, whose rounding would swallow small updates.
    model, report = open_model(CLASSIFIER, path, config=config, dtype="float32", **options)
    encoder = f"{model.base_model_prefix}."
    # Missing weights would be random: those of head and pooler are trained, those of the encoder should not be.
    absent = sorted(key for key in report["missing_keys"] if key.startswith(encoder) and "pooler" not in key)
    if absent:
        raise UserError(f"{path} holds no pretrained weights for {absent[0]} and {len(absent) - 1} more")
    return model


def load_trained_classifier(folder: Path, verify: bool = True, **options):
    """Loads a fine-tuned classifier; raises `UserError` if weights are damaged, missing or unused, or do not fit.

    Its files are compared with SHA256SUMS unless ``verify`` is False.
    """
    name = f"model.{options['variant']}.safetensors" if options.get("variant") else "model.safetensors"
    check_sums(folder, ["config.json", name], verify)
    check_sizes(Path(folder) / name)
    return open_trained(folder, **options)


def open_trained(folder: Path, **options):
    """Opens a fine-tuned classifier through Transformers; raises `UserError` as `load_trained_classifier`."""
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in FLOAT_FILES[:2]):
        options["use_safetensors"] = False  # a pickle, of which Transformers reads tensors alone (`weights_only`)
    model, report = open_model(CLASSIFIER, folder, ignore_mismatched_sizes=True, **options)
    if report["mismatched_keys"]:  # (name, shape in the file, shape by config.json)
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise UserError(f"{folder}: {name} is {list(found)} in the weights and {list(expected)} by config.json")
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"{folder} is not a trained classifier: it has no weights for {missing}; fine-tune it first")
    unused = sorted(name for name in report["unexpected_keys"] if not name.endswith(UNUSED))
    unused = [name for name in unused if not name.startswith(PRETRAINING_HEADS)]
    if unused:  # fewer layers, say: the rest would answer something
        raise UserError(f"{folder}: its weights hold {unused[0]}, which the model of config.json does not have")
    return model


def save_compact(model, folder: Path) -> None:
    """Saves a model in the types of its weights, which `from_pretrained` opens in float32 by default.

    bfloat16 takes 4 to 7 times as long on processors without its instructions.
    """
    # Not under legacy names (`LayerNorm.gamma`): Transformers does not convert the type of tensors that it renames.
    model.save_pretrained(folder, save_original_format=False)
    model.config.dtype = "float32"  # not that of the first weight
    model.config.save_pretrained(folder)


def check_sizes(weights: Path) -> None:
    """Raises `UserError` if config.json asks for a larger model than a safetensors file holds, or that is damaged.

    Transformers builds the model before it reads the weights: a million layers would take all memory.
    """
    from safetensors import safe_open

    with one_line(f"{weights} cannot be read"), safe_open(weights, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (it is no mapping)
        has_positions = any("position" in name for name in file.keys())  # noqa: SIM118
    config = read_config(weights.parent)
    largest = max((max(shape, default=1) for shape in shapes), default=0)
    for key in SIZES + LAYERS:
        if key == "max_position_embeddings" and not has_positions:  # relative ones have no table
            continue
        most = len(shapes) if key in LAYERS else largest
        if isinstance(config.get(key), int) and config[key] > most:
            raise UserError(f"{weights.parent}: config.json asks for {key} {config[key]}, and the weights have less")


@contextlib.contextmanager
def lock_output_dir(folder: Path, arguments, recipe: Recipe):
    """Holds the output lock of a model folder; raises `UserError` if saving there would destroy something."""
    if not is_main_process():  # of several that train together, the main one saves
        yield
        return
    named = [getattr(arguments, flag, None) for flag in INPUTS] + [recipe.path]
    check_replaceable(folder, ARTIFACT, [Path(name) for name in named if name and Path(name).exists()])
    with output_lock(folder):
        yield


@contextlib.contextmanager
def new_artifact(folder: Path, metadata: dict):
    """Yields a temporary folder; if the block succeeds, it replaces ``folder`` and its checkpoints atomically.

    ``metadata``, of `artifact_metadata`, is written to recipe.yaml last, so that the block may add to it. Raises
    `UserError` if the folder cannot be written, or holds something else than a model folder.
    """
    import yaml

    with atomic_folder(folder, ARTIFACT) as partial:
        yield partial
        write_text(partial / RECIPE_FILE, yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True))
        write_sums(partial)
    print(f"saved {folder}")


def read_labels(folder: Path, weights: Path, width: int) -> list[str]:
    """Reads the labels, in the order of the ``width`` logits of ``weights``; raises `UserError` for a wrong one."""
    config = Path(folder) / "config.json"
    found = read_config(folder)
    names = found.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # which Transformers does not store
    check_problem(folder, [""] if width == 1 else [*names.values(), ""], found.get("problem_type"))
    if width != len(names):
        raise UserError(f"{weights} gives {width} logits and config.json names {len(names)} labels")
    labels: dict = {}  # in order; each is there once
    for number in range(width):  # the keys of JSON are strings
        label = names.get(str(number))
        check_label(label, f"{config}: the name of label {number}")
        if labels.setdefault(label, number) != number:
            raise UserError(f"{config} names two labels {label!r:.40}")
    return list(labels)


def artifact_metadata(variant: str, recipe: Recipe, seed: int | None, provenance: dict, training: dict | None) -> dict:
    """Returns the content of recipe.yaml, from which every record takes the provenance of a model.

    Args:
        seed: of the training; None for a folder that another program trained.
        provenance: of `data_provenance`, or from the baseline's recipe.yaml.
        training: of `ClassificationTrainer.summarize`, or from the baseline's recipe.yaml; None if unknown.
    """
    return {
        "variant": variant,
        # The same recipe in another output folder gives the same model.
        "recipe": {key: value for key, value in recipe.values.items() if key not in PLACES},
        "recipe_sha256": recipe.sha256,
        "seed": seed,
        "provenance": provenance | {"git_commit": git_commit()},
        "training": training,
        "versions": package_versions(),
    }


def data_provenance(base: BaseModel, task: Task, rows) -> dict:
    """Returns the source of the base model and of the data, with the number and fingerprint of the training rows."""
    return {
        "base_model": base.name,
        "base_model_source": base.source,
        "dataset": task.name,
        "dataset_source": task.source,
        "train_rows": len(rows),
        "train_fingerprint": fingerprint(rows),
    }
