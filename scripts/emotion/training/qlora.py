"""QLoRA around PEFT: which layers get an adapter, and how base and adapter are saved as one model.

The weights of the base are in NF4 and frozen; two low-rank matrices beside each layer are trained (Dettmers et al.,
"QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023; Hu et al., "LoRA: Low-Rank Adaptation of Large Language
Models", ICLR 2022).
"""

import re
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from transformers import BitsAndBytesConfig

from emotion.data.dataset import get_split
from emotion.data.metrics import score
from emotion.export.onnx_export import export_onnx
from emotion.inference.model_folder import build_classifier, load_trained_classifier, save_compact
from emotion.inference.runtimes import ModelInMemory, predict
from emotion.quantization.accuracy_aware import AccuracyAwareArguments, quantize_with_accuracy_control
from emotion.quantization.layers import CalibrationRows
from emotion.quantization.nf4 import open_in_float32, round_to_nf4
from emotion.quantization.scheme import Samples, load_samples, make_plan
from emotion.training.trainer import TrainingData
from emotion.utils.errors import UserError
from emotion.utils.files import scratch_folder

CALIBRATION_SAMPLES = 300


def prepare_4bit_layers(model, bf16: bool) -> None:
    """Makes a model in NF4 fit for training on a CPU, in place; with ``bf16`` it computes in bfloat16."""
    for parameter in model.parameters():
        # Transformers maps the file into memory: parameters that are left in it keep all of it there, also the FP32
        # weights of the layers that are in NF4 now, 350 MB of BERT-base.
        if not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.clone()
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # an evaluation would repack its weights, which ends the training
            if bf16:
                # The layer returns FP32, as its inputs come; the backward pass would keep all of it at twice the size.
                layer.register_forward_hook(lambda layer, inputs, output: output.to(torch.bfloat16))


def select_layers(model, target_modules: list[str], modules_to_save: list[str]) -> tuple[list[str], list[str]]:
    """Returns the full names of the layers for `LoraConfig`, with an adapter and to save; the latter with the head.

    Args:
        target_modules: ends of the names of layers with an adapter; empty for all linear layers of the encoder.
        modules_to_save: ends of the names of layers to train in full, besides the head.

    Raises:
        UserError: if one of them fits no layer.
    """
    encoder = model.base_model_prefix
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    inside = [name for name in linear if name.startswith(f"{encoder}.")]
    targets = _match(target_modules, inside, "--target_modules") or inside
    whole = _match(modules_to_save, [name for name in linear if name not in targets], "--modules_to_save")
    # The head is all that has weights outside the encoder, whatever its name. It starts at random, and an adapter
    # would leave most of it random.
    head = [name for name, module in model.named_children() if name != encoder and list(module.parameters())]
    return targets, head + whole


def _match(endings: list[str], layers: list[str], flag: str) -> list[str]:
    """Returns the layers whose names end in one of ``endings``; raises `UserError` if one fits none."""
    for ending in endings:
        if not any(f".{name}".endswith(f".{ending}") for name in layers):
            # "bert.encoder.layer.3.output.dense" -> "output.dense": once, not once per layer of the encoder
            kinds = sorted({re.sub(r".*\.\d+\.", "", name) for name in layers})
            raise UserError(f"{flag} {ending}: no layer's name ends so; there are {', '.join(kinds)}")
    suffixes = tuple(f".{ending}" for ending in endings)  # the dot: "dense" is no ending of "predense"
    return [name for name in layers if f".{name}".endswith(suffixes)]


def merge(model: PeftModel, data: TrainingData, folder: Path, config: BitsAndBytesConfig | None):
    """Saves the adapter in `folder`/adapter, merges it into the base, and returns the merged model in float32.

    The adapter was trained beside the quantized weights, so it is added to these and not to the original ones.

    Args:
        config: that of the base; None for a float base.
    """
    model.peft_config["default"].base_model_name_or_path = data.base.name  # its Hub id, not a path of this machine
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)  # no embedding was trained
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's template
    # Loaded again with the saved adapter, so that the merged model is what users of the adapter get.
    base = build_classifier(data.base.path, data.task.labels, None, quantization_config=config)
    base = base.dequantize() if config else base
    return PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().float()


def save_merged(merged, data: TrainingData, folder: Path, formats: list[str], seed: int, config) -> dict:
    """Writes the merged float model into ``folder``: `model.safetensors` for Transformers, INT8 for ONNX Runtime.

    Args:
        formats: 'nf4' for `model.safetensors`, 'onnx' for the ONNX file.
        seed: of the draw of calibration samples.
        config: `BitsAndBytesConfig` of `model.safetensors`.

    Returns:
        For recipe.yaml: the result of `quantize_with_accuracy_control`, and `merged`, that of `save_smallest`.
    """
    if not {"nf4", "onnx"} & set(formats):
        return {}
    data.tokenizer.save_pretrained(folder)
    merged.config.save_pretrained(folder)
    arguments, metadata = AccuracyAwareArguments(formats=["onnx"], allow_drop=True), {}
    count = min(CALIBRATION_SAMPLES, len(get_split(data.task, "train")))
    calibration, validation = load_samples(data.task, folder, count, seed, threads=torch.get_num_threads())
    with scratch_folder() as temporary:
        float_folder = Path(temporary) / "merged"
        merged.save_pretrained(float_folder)
        data.tokenizer.save_pretrained(float_folder)
        if "onnx" in formats:
            file = float_folder / "onnx" / "model.onnx"
            export_onnx(merged, data.tokenizer, file, texts=data.rows["text"])
            plan = make_plan(float_folder, merged, arguments, calibration)
            metadata |= quantize_with_accuracy_control(plan, folder, calibration, validation, arguments)
        if "nf4" in formats:
            drop = arguments.max_f1_drop / 100
            metadata["merged"] = save_smallest(float_folder, folder, config, calibration, validation, drop)
        return metadata


def save_smallest(
    float_folder: Path, folder: Path, config, calibration: CalibrationRows, validation: Samples, max_drop: float
) -> dict:
    """Writes `model.safetensors` in the smallest of NF4, BF16 and FP32 that keeps its macro F1 on validation.

    Args:
        config: `BitsAndBytesConfig`.
        max_drop: of macro F1, as a share.

    Returns:
        Validation macro F1 of each type that was tried, FP32 first; the last one was kept.
    """
    token_ids = calibration.encoder(validation.texts)

    def macro_f1(saved: Path) -> float:
        logits = predict(ModelInMemory(open_in_float32(saved), calibration.encoder), token_ids)
        return score(logits, validation.labels)["macro_f1"]

    tried = {"fp32": macro_f1(float_folder)}
    # The adapter has made up for rounding to NF4, but its sum with the base must be rounded again, which costs too
    # much on some encoders.
    for dtype in ("nf4", "bf16", "fp32 kept"):
        if dtype == "nf4":
            model = round_to_nf4(float_folder, calibration, config)
            # Only the word embeddings: newer releases of Transformers leave the weights of a 4-bit file in their own
            # types, and norms and head must be float32 like the sum with the position embeddings.
            model.get_input_embeddings().to(torch.bfloat16)
        else:
            model = load_trained_classifier(float_folder, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
        save_compact(model, folder)  # over the one before it
        tried[dtype] = macro_f1(folder)
        if tried[dtype] >= tried["fp32"] - max_drop:
            break
    return tried
