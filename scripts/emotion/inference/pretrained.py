"""Models as `from_pretrained` opens them: from a base model without a head, or trained."""

from pathlib import Path

from emotion.inference.model_folder import read_config
from emotion.utils.checksums import check_sums
from emotion.utils.errors import UserError, one_line

# Sizes in config.json that are a dimension of some weight; those of BERT and its descendants, and DistilBERT's
SIZES = ("vocab_size", "hidden_size", "dim", "intermediate_size", "hidden_dim", "max_position_embeddings")
LAYERS = ("num_hidden_layers", "n_layers")
# Weights that a file may hold and a classifier leaves out: older libraries saved the numbers of the positions, and the
# pooler of an encoder whose head does without.
UNUSED = ("position_ids", "pooler.dense.weight", "pooler.dense.bias")


def open_classifier(folder, **options):
    """`open_model` with `AutoModelForSequenceClassification`."""
    return open_model("AutoModelForSequenceClassification", folder, **options)


def open_model(auto_class: str, folder, **options):
    """Calls `from_pretrained` of one of Transformers' auto classes, from safetensors and without remote code.

    Args:
        auto_class: its name; the class itself would load Transformers where this file is imported.
        folder: a local folder or a Hub id.
        options: more options of `from_pretrained`; those on trust cannot be overridden.

    Returns:
        The model and the loading report, which names the weights that were missing or did not fit.

    Raises:
        UserError: if the files cannot be read, in one line.
    """
    import transformers

    # A pickle or a file of Python code from a stranger's repository could run anything on this machine.
    options |= {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    # For a wrong value in config.json, Transformers may raise whatever Python or PyTorch has.
    with one_line(f"{folder} cannot be opened"):
        return getattr(transformers, auto_class).from_pretrained(folder, **options)


def build_config(path: str, labels: list[str], attention_dropout: float | None):
    """The configuration of a base model as a classifier of these labels.

    Args:
        path: a local folder or a Hub id.
        labels: the names of the classes, in the order of the logits.
        attention_dropout: dropout of the attention weights; None keeps the base model's own.

    Raises:
        UserError: if the model is a trained classifier already, of another number of classes.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    # A trained head of another size would be thrown away without a word, and a random one trained in its place.
    trained = any("SequenceClassification" in name for name in config.architectures or [])
    if trained and config.num_labels != len(labels):
        raise UserError(f"{path} is a classifier of {config.num_labels} classes and the dataset has {len(labels)}")
    config.num_labels = len(labels)
    # These two are saved with the model: a client that knows nothing of the dataset answers with names.
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    if attention_dropout is not None:
        for name in ("attention_probs_dropout_prob", "attention_dropout"):  # BERT's and its descendants', DistilBERT's
            if name in vars(config):
                setattr(config, name, attention_dropout)
    return config


def build_classifier(path: str, labels: list[str], attention_dropout: float | None, **options):
    """The encoder with a fresh classification head, or with its own if it was trained for as many classes.

    Args:
        options: more options of `from_pretrained`, for instance those of `nf4_options`.

    Returns:
        The model; its float weights are float32.

    Raises:
        UserError: if it cannot be opened, or its encoder has no pretrained weights.
    """
    config = build_config(path, labels, attention_dropout)
    # In float32 even if the file holds half precision: a small learning rate would vanish in its rounding.
    model, report = open_classifier(path, config=config, dtype="float32", **options)
    encoder = f"{model.base_model_prefix}."
    # Missing weights of the encoder would be random numbers, and only Transformers' own warning would say so. The head
    # is always missing, and encoders trained without a pooler get a fresh one: both are trained.
    absent = []
    for key in sorted(report["missing_keys"]):
        if key.startswith(encoder) and "pooler" not in key:
            absent.append(key)
    if absent:
        raise UserError(f"{path} holds no pretrained weights for {absent[0]} and {len(absent) - 1} more")
    return model


def load_trained_classifier(folder: Path, verify: bool = True, **options):
    """Opens a classifier and refuses a folder without a trained head.

    Args:
        verify: whether the files are compared with the folder's SHA256SUMS.
        options: more options of `from_pretrained`.

    Raises:
        UserError: if weights are damaged, missing or unused, do not fit the configuration, or cannot be read.
    """
    name = f"model.{options['variant']}.safetensors" if options.get("variant") else "model.safetensors"
    if verify:
        check_sums(folder, ["config.json", name])
    check_sizes(Path(folder) / name)
    # Transformers would stop at sizes that do not fit, with a page of text; the line below names the first of them.
    model, report = open_classifier(folder, ignore_mismatched_sizes=True, **options)
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
    """Saves a model whose weights are stored in smaller types than it computes in, which is float32 unless told.

    `from_pretrained` opens the folder in float32, or in the ``dtype`` that it is given. Processors without the
    instructions for bfloat16 take 4 to 7 times as long in it.
    """
    # Not in a checkpoint's legacy names (`LayerNorm.gamma`): of a quantized file, Transformers leaves tensors that it
    # renames in the type in which they are stored, and the norms would not fit the activations.
    model.save_pretrained(folder, save_original_format=False)
    model.config.dtype = "float32"  # Transformers wrote that of the first weight
    model.config.save_pretrained(folder)


def check_sizes(weights: Path) -> None:
    """Raises `UserError` if config.json asks for a far larger model than the weights hold.

    Transformers builds the model before it looks for its weights: a million layers would take all memory first.
    """
    config, shapes = read_config(weights.parent), read_shapes(weights)
    largest = max((max(shape, default=1) for shape in shapes), default=0)
    for key in SIZES + LAYERS:
        # Each layer has several weights, so that their number is more than enough.
        most = len(shapes) if key in LAYERS else largest
        if isinstance(config.get(key), int) and config[key] > most:
            raise UserError(f"{weights.parent}: config.json asks for {key} {config[key]}, and the weights have less")


def read_shapes(weights: Path) -> list[list[int]]:
    """The shapes of all tensors, from the header of a safetensors file; raises `UserError` if it cannot be read."""
    from safetensors import safe_open

    with one_line(f"{weights} cannot be read"), safe_open(weights, framework="pt") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (it is no mapping)
