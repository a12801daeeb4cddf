"""Classifiers as `from_pretrained` opens them: from a base model without a head, or trained."""

from pathlib import Path

from emotion.common.errors import UserError


def open_classifier(folder, **options):
    """`AutoModelForSequenceClassification.from_pretrained`, from safetensors and without remote code.

    Returns:
        The model and the loading report, which names the weights that were missing or did not fit.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    options |= {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
    try:
        return AutoModelForSequenceClassification.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be opened: {str(error).strip().splitlines()[0]}") from error


def build_config(path: str, labels: list[str], attention_dropout: float | None):
    """The configuration of a base model as a classifier of these labels."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    trained = any("SequenceClassification" in name for name in config.architectures or [])
    if trained and config.num_labels != len(labels):
        raise UserError(f"{path} is a classifier of {config.num_labels} classes and the dataset has {len(labels)}")
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    if attention_dropout is not None:
        for name in {"attention_probs_dropout_prob", "attention_dropout"} & vars(
            config
        ).keys():  # BERT's, DistilBERT's
            setattr(config, name, attention_dropout)
    return config


def build_classifier(path: str, labels: list[str], attention_dropout: float | None, **options):
    """The encoder with a fresh classification head, or with its own where it was trained for as many classes."""
    config = build_config(path, labels, attention_dropout)
    model, report = open_classifier(path, config=config, dtype="float32", **options)
    encoder = f"{model.base_model_prefix}."
    absent = sorted(key for key in report["missing_keys"] if key.startswith(encoder) and "pooler" not in key)
    if absent:
        raise UserError(f"{path} holds no pretrained weights for {absent[0]} and {len(absent) - 1} more")
    return model


def load_trained_classifier(folder: Path, **options):
    """Opens a classifier and refuses a folder without a trained head.

    Raises:
        UserError: if weights are missing, do not fit the configuration, or cannot be read.
    """
    model, report = open_classifier(folder, ignore_mismatched_sizes=True, **options)  # what does not fit is named here
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise UserError(f"{folder}: {name} is {list(found)} in the weights and {list(expected)} by config.json")
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"{folder} is not a trained classifier: it has no weights for {missing}; fine-tune it first")
    return model
