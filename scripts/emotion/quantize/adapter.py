"""QLoRA's adapter: which layers of a 4-bit base get one, and how both become one model again."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.errors import UserError
from emotion.model.pretrained import build_classifier
from emotion.quantize.nf4 import nf4_options, start_from_rounding_error
from emotion.task.dataset import TaskArguments
from emotion.task.source import BaseModel

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model

FORMATS = ("adapter", "nf4", "onnx")


@dataclass
class QloraArguments(TaskArguments):
    """The adapter; the base is always NF4 with double quantization."""

    lora_rank: int = field(default=16, metadata={"help": "Rank of the two matrices beside each layer."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter counts alpha / rank times."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of what enters the adapter."})
    target_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Ends of names of the layers that get an adapter; all of the encoder's if none are given."},
    )
    trained_whole: list[str] = field(
        default_factory=list,
        metadata={"help": "Ends of names of the layers outside the encoder that are trained whole; the head if none."},
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Count alpha / sqrt(rank) times instead (Kalajdzievski, 2023)."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "Learn length and direction of the weights apart (Liu et al., ICML 2024)."}
    )
    init_lora_weights: str = field(
        default="default", metadata={"help": "default, gaussian, or loftq (Li et al., ICLR 2024)."}
    )
    load_in_4bit: bool = field(default=True, metadata={"help": "False for LoRA on a float base, to compare with."})
    formats: list[str] = field(
        default_factory=lambda: list(FORMATS),
        metadata={"help": f"Which of {', '.join(FORMATS)} to save; the adapter is always saved."},
    )

    def __post_init__(self):
        if not set(self.formats) <= set(FORMATS):
            raise ValueError(f"--formats {' '.join(self.formats)}: it takes some of {', '.join(FORMATS)}")
        if self.init_lora_weights not in {"default", "gaussian", "loftq"}:
            raise ValueError(f"--init_lora_weights {self.init_lora_weights}: it takes default, gaussian or loftq")
        if self.init_lora_weights == "loftq" and not self.load_in_4bit:
            raise ValueError(
                "--init_lora_weights loftq makes up for rounding to 4 bits; take default for a float base"
            )


def build_qlora(base: str, labels: list[str], arguments: QloraArguments, bf16: bool) -> PeftModel:
    """The base in NF4, an adapter on each of its layers, and the head to be trained whole."""
    options = nf4_options(base, labels, bf16) if arguments.load_in_4bit else {}
    model = build_classifier(base, labels, arguments.attention_dropout, **options)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # evaluating would repack its weights, which ends the training
            if bf16:  # it answers in its input's FP32, and what follows would keep that for the way back
                layer.register_forward_hook(lambda layer, inputs, output: output.to(torch.bfloat16))
    encoder, head = model.base_model_prefix, [name for name, part in model.named_children() if list(part.parameters())]
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    inside = [name for name in linear if name.startswith(f"{encoder}.")]
    targets = named(arguments.target_modules, inside, "--target_modules") or inside
    whole = named(arguments.trained_whole, [name for name in linear if name not in targets], "--trained_whole")
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        modules_to_save=[name for name in head if name != encoder] + whole,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        init_lora_weights="gaussian" if arguments.init_lora_weights == "gaussian" else True,
    )
    model = get_peft_model(model, config)
    if arguments.init_lora_weights == "loftq":
        start_from_rounding_error(model, build_classifier(base, labels, None))
    return model


def named(endings: list[str], layers: list[str], flag: str) -> list[str]:
    """The layers whose names end so; an ending that fits none is an error that names what there is."""
    for ending in endings:
        if not any(f".{name}".endswith(f".{ending}") for name in layers):
            kinds = sorted({re.sub(r".*\.\d+\.", "", name) for name in layers})
            raise UserError(f"{flag} {ending}: no layer's name ends so; there are {', '.join(kinds)}")
    return [name for name in layers if any(f".{name}".endswith(f".{ending}") for ending in endings)]


def merge(model: PeftModel, base: BaseModel, labels: list[str], folder: Path, arguments, training):
    """Saves the adapter, and returns base and adapter in one, in FP32.

    The adapter learnt beside the rounded weights: it is added to those, not to the base as it was before.
    """
    model.peft_config["default"].base_model_name_or_path = base.name  # the Hub's name, not a path of this machine
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's, with gaps to fill in
    options = nf4_options(base.path, labels, training.bf16) if arguments.load_in_4bit else {}
    rounded = build_classifier(base.path, labels, None, **options)
    rounded = rounded.dequantize() if options else rounded
    return PeftModel.from_pretrained(rounded, folder / "adapter").merge_and_unload().float()
