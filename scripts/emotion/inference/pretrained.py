"""Loads classifiers with `from_pretrained`: a base model with a new head, or a fine-tuned model."""

from pathlib import Path

from emotion.inference.model_folder import read_config
from emotion.utils.errors import UserError, one_line
from emotion.utils.files import check_sums

# Sizes in config.json that are a dimension of some weight, of BERT and its descendants, and of DistilBERT
SIZES = ("vocab_size", "hidden_size", "dim", "intermediate_size", "hidden_dim", "max_position_embeddings")
CLASSIFIER = "AutoModelForSequenceClassification"
LAYERS = ("num_hidden_layers", "n_layers")
# Weights that a file may hold in excess: older libraries saved position ids, and the pooler of an encoder whose head
# has none.
UNUSED = ("position_ids", "pooler.dense.weight", "pooler.dense.bias")


def open_model(auto_class: str, folder, **options):
    """Calls `from_pretrained` of an auto class, by its name, from safetensors and without remote code.

    Args:
        folder: a local folder or a Hub id.
        options: further arguments of `from_pretrained`.

    Returns:
        The model and its loading info, which names missing, unexpected and mismatched weights.

    Raises:
        UserError: if the files cannot be read.
    """
    import transformers  # here: ONNX files do not need it

    # A pickle or Python code from a repository could run anything on this machine.
    options |= {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    # For a wrong value in config.json, Transformers may raise any kind of error.
    with one_line(f"{folder} cannot be opened"):
        return getattr(transformers, auto_class).from_pretrained(folder, **options)


def build_config(path: str, labels: list[str], attention_dropout: float | None):
    """The configuration of a base model with these labels; arguments and errors as of `build_classifier`."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    # Transformers would replace a head of another size by a random one.
    trained = any("SequenceClassification" in name for name in config.architectures or [])
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
    """Loads the encoder with a new classification head, or with its own if that has as many classes.

    Args:
        path: a local folder or a Hub id.
        labels: the names of the classes, in the order of the logits.
        attention_dropout: dropout of the attention weights; None keeps the base model's own.
        options: further arguments of `from_pretrained`, for instance `quantization_config`.

    Returns:
        The model; its float weights are float32.

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
    """Loads a fine-tuned classifier, after its files were compared with SHA256SUMS unless ``verify`` is False.

    Raises:
        UserError: if weights are damaged, missing or unused, do not fit the configuration, or cannot be read.
    """
    name = f"model.{options['variant']}.safetensors" if options.get("variant") else "model.safetensors"
    if verify:
        check_sums(folder, ["config.json", name])
    check_sizes(Path(folder) / name)
    model, report = open_model(CLASSIFIER, folder, ignore_mismatched_sizes=True, **options)
    if report["mismatched_keys"]:  # (name, shape in the file, shape by config.json)
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise UserError(f"{folder}: {name} is {list(found)} in the weights and {list(expected)} by config.json")
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"{folder} is not a trained classifier: it has no weights for {missing}; fine-tune it first")
    unused = sorted(name for name in report["unexpected_keys"] if not name.endswith(UNUSED))
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
    config = read_config(weights.parent)
    largest = max((max(shape, default=1) for shape in shapes), default=0)
    for key in SIZES + LAYERS:
        most = len(shapes) if key in LAYERS else largest
        if isinstance(config.get(key), int) and config[key] > most:
            raise UserError(f"{weights.parent}: config.json asks for {key} {config[key]}, and the weights have less")
