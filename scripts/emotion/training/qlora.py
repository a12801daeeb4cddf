"""QLoRA's adapter: which layers of a 4-bit base get one, and how base and adapter become one model again.

The base's weights are NF4 and never change; two thin matrices beside each layer are trained (Dettmers et al., "QLoRA:
Efficient Finetuning of Quantized LLMs", NeurIPS 2023; Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
ICLR 2022).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model

from emotion.data.dataset import TaskArguments
from emotion.inference.pretrained import build_classifier
from emotion.quantization.nf4 import nf4_options, start_from_rounding_error
from emotion.utils.arguments import COUNT, DROPOUT, Range
from emotion.utils.base_model import BaseModel
from emotion.utils.errors import UserError

# What the artifact can hold: the adapter alone, for PEFT; base and adapter as one model, in 4 bits for Transformers
# and in INT8 for ONNX Runtime.
FORMATS = ("adapter", "nf4", "onnx")


@dataclass
class QloraArguments(TaskArguments):
    """The adapter; the base is always NF4 with double quantization."""

    lora_r: int = field(
        default=16, metadata={"help": "Rank of the two matrices beside each layer.", "choices": Range(1, 1024)}
    )
    lora_alpha: int = field(
        default=32, metadata={"help": "The adapter is multiplied by alpha / rank.", "choices": COUNT}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's inputs.", "choices": DROPOUT})
    target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Layers that get an adapter, by the ends of their names; all of the encoder's by default."},
    )
    modules_to_save: list[str] = field(
        default_factory=list,
        metadata={"help": "Layers without an adapter to train whole besides the head, by the ends of their names."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Multiply by alpha / sqrt(rank) instead (Kalajdzievski, 2023)."}
    )
    use_dora: bool = field(
        default=False,
        metadata={"help": "Learn length and direction of the weights separately (Liu et al., ICML 2024)."},
    )
    init_lora_weights: str = field(
        default="loftq",
        metadata={
            "help": "How the adapter starts: default, gaussian, or loftq (Li et al., ICLR 2024).",
            "choices": ("default", "gaussian", "loftq"),
        },
    )
    load_in_4bit: bool = field(default=True, metadata={"help": "False for LoRA on a float base, to compare with."})
    formats: list[str] = field(
        default_factory=lambda: list(FORMATS),
        metadata={"help": f"Which of {', '.join(FORMATS)} to save; the adapter is always saved.", "choices": FORMATS},
    )

    def __post_init__(self):
        # ValueError, as the dataclasses of Transformers raise it: the command line makes one line of either.
        if self.init_lora_weights == "loftq" and not self.load_in_4bit:
            raise ValueError(
                "--init_lora_weights loftq makes up for rounding to 4 bits; take default for a float base"
            )


def build_qlora(base: str, labels: list[str], arguments: QloraArguments, bf16: bool) -> PeftModel:
    """The base in NF4, an adapter on each chosen layer, and the head to be trained whole.

    Args:
        base: Hub id or folder of the base model.
        bf16: whether the training computes in bfloat16.

    Raises:
        UserError: if the base cannot be opened, or a flag names a layer that it does not have.
    """
    options = nf4_options(base, labels, bf16) if arguments.load_in_4bit else {}
    model = build_classifier(base, labels, arguments.attention_dropout, **options)
    if arguments.load_in_4bit:
        _let_go_of_file(model)
    _prepare_4bit_layers(model, bf16)
    model = get_peft_model(model, _configure_adapter(model, arguments))
    if arguments.init_lora_weights == "loftq":
        start_from_rounding_error(model, build_classifier(base, labels, None))
    return model


def _let_go_of_file(model) -> None:
    """Copies the parameters that are still parts of the opened file, in place.

    Transformers maps the file into memory. Embeddings and norms that are left in it keep all of it there, the FP32
    weights of the layers that have become NF4 included: 350 MB of a base-size encoder.
    """
    for parameter in model.parameters():
        if not isinstance(parameter, Params4bit):  # they have memory of their own
            parameter.data = parameter.data.clone()


def _prepare_4bit_layers(model, bf16: bool) -> None:
    """Makes bitsandbytes' layers fit for training on a processor, in place; a float base has none of them."""
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # evaluating would repack its weights, which ends the training
            if bf16:
                # The layer answers in FP32, as its inputs come, and all that follows would be kept for the backward
                # pass at twice the size.
                layer.register_forward_hook(lambda layer, inputs, output: output.to(torch.bfloat16))


def _configure_adapter(model, arguments: QloraArguments) -> LoraConfig:
    """PEFT's configuration: which layers get an adapter, and which are trained whole."""
    encoder, linear, inside = model.base_model_prefix, [], []
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear):
            linear.append(name)
            if name.startswith(f"{encoder}."):
                inside.append(name)
    targets = named(arguments.target_modules, inside, "--target_modules") or inside
    whole = named(arguments.modules_to_save, [name for name in linear if name not in targets], "--modules_to_save")
    # The head is all that lies beside the encoder and has weights, whatever it is called; it starts at random, and
    # an adapter on it would leave most of it random.
    head = []
    for name, part in model.named_children():
        if name != encoder and list(part.parameters()):
            head.append(name)
    return LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        modules_to_save=head + whole,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        # True is PEFT's default: A at random and B zero. LoftQ's start is written over it, by our own function.
        init_lora_weights="gaussian" if arguments.init_lora_weights == "gaussian" else True,
    )


def named(endings: list[str], layers: list[str], flag: str) -> list[str]:
    """The layers whose names end in one of ``endings``, in the order of the model.

    Raises:
        UserError: if an ending fits no layer; it names the kinds of layers that there are.
    """
    for ending in endings:
        if not any(f".{name}".endswith(f".{ending}") for name in layers):
            # "bert.encoder.layer.3.output.dense" -> "output.dense": once, not once per layer of the encoder.
            kinds = sorted({re.sub(r".*\.\d+\.", "", name) for name in layers})
            raise UserError(f"{flag} {ending}: no layer's name ends so; there are {', '.join(kinds)}")
    # The dots make an ending fit whole parts of a name: "dense" is no ending of "predense".
    suffixes = tuple(f".{ending}" for ending in endings)
    return [name for name in layers if f".{name}".endswith(suffixes)]


def merge(model: PeftModel, base: BaseModel, labels: list[str], folder: Path, arguments, training):
    """Saves the adapter in the folder `adapter`, and returns base and adapter as one model, in FP32.

    The adapter learnt beside the rounded weights, so it is added to those, not to the base as it was before.

    Args:
        model: the trained model.
        folder: the artifact's.
        arguments: `QloraArguments`.
        training: `TrainingArguments`.
    """
    model.peft_config["default"].base_model_name_or_path = base.name  # the Hub's name, not a path of this machine
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)  # no embedding was trained
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's, with gaps to fill in
    options = nf4_options(base.path, labels, training.bf16) if arguments.load_in_4bit else {}
    # Opened anew with the saved adapter, as its users do: the merged model is then the one that they get.
    rounded = build_classifier(base.path, labels, None, **options)
    rounded = rounded.dequantize() if options else rounded
    return PeftModel.from_pretrained(rounded, folder / "adapter").merge_and_unload().float()
