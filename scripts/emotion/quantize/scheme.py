"""The scheme of a quantization: its arguments, their check, the scales, and the files of all runtimes."""

import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import check_replaceable
from emotion.common.recipe import RECIPE_FILE
from emotion.model.artifact import SHARED_FILES, find_formats, quantized_by, weights_of
from emotion.quantize.int8_onnx import quantize_onnx, quantize_onnx_static
from emotion.quantize.int8_openvino import quantize_openvino
from emotion.quantize.int8_torchao import quantize_torchao
from emotion.quantize.layers import Layers
from emotion.quantize.levels import LEVELS
from emotion.quantize.lowbit import Scales, check_group_size, choose_scales, write_lowbit_onnx
from emotion.quantize.onnx_graph import export_onnx
from emotion.task.tokens import TextEncoder

from tqdm import tqdm
from transformers import AutoTokenizer

FORMATS = ("torchao", "onnx", "openvino")


@dataclass
class SchemeArguments:
    """How a model is quantized, trained for it or not."""

    bits: int = field(default=8, metadata={"help": "Bits of a weight: 8, 4, 3 or 2; activations have 8."})
    embedding_bits: int | None = field(
        default=None, metadata={"help": "Bits of the embeddings' weights if they are others: 4, 3 or 2."}
    )
    group_size: int = field(
        default=32, metadata={"help": "Below 8 bits: so many weights of a row share a multiplier."}
    )
    formats: list[str] | None = field(
        default=None,
        metadata={"help": f"Which of {', '.join(FORMATS)} to make; all that can hold so few bits if none."},
    )
    keep_float: list[str] = field(
        default_factory=list, metadata={"help": "Layers that stay in float: what their names begin with."}
    )
    onnx_calibration: str = field(
        default="none",
        metadata={"help": "ONNX activations: 'none' (dynamic), or static ranges by 'minmax' or 'entropy'."},
    )
    reduce_range: bool = field(
        default=True,
        metadata={"help": "Weights of 7 bits, which no processor adds up wrongly; see quantize/int8_torchao.py."},
    )
    smooth_quant: bool = field(
        default=False,
        metadata={"help": "OpenVINO: move outliers of the activations into the weights (Xiao et al., ICML 2023)."},
    )
    calibration_rows: int = field(
        default=300, metadata={"help": "Rows of train, drawn class by class, that fix what is static."}
    )


def check(arguments: SchemeArguments, output_dir: str) -> None:
    """Raises `UserError` for what can be known before anything is loaded."""
    baseline, formats = Path(arguments.baseline), arguments.formats
    if arguments.bits not in {8, *LEVELS}:
        raise UserError(f"--bits {arguments.bits}: it takes 8, 4, 3 or 2")
    if arguments.embedding_bits not in {None, *LEVELS} or (arguments.embedding_bits and arguments.bits == 8):
        raise UserError(f"--embedding_bits {arguments.embedding_bits}: it takes 4, 3 or 2, where --bits is below 8")
    if formats is not None and (not formats or not set(formats) <= set(FORMATS)):
        raise UserError(f"--formats {' '.join(formats)}: it takes some of {', '.join(FORMATS)}")
    for format in formats or ():
        if format not in formats_of(arguments.bits):
            raise UserError(f"--formats {format}: it cannot hold {arguments.bits} bits; take onnx")
    if arguments.onnx_calibration not in {"none", "minmax", "entropy"}:
        raise UserError(f"--onnx_calibration {arguments.onnx_calibration}: it takes none, minmax or entropy")
    if arguments.bits < 8 and arguments.onnx_calibration != "none":
        raise UserError(f"--onnx_calibration {arguments.onnx_calibration}: with {arguments.bits} bits it takes none")
    find_formats(baseline)
    if quantizer := quantized_by(baseline):
        raise UserError(f"{baseline} is quantized already (by {quantizer}); name the folder it was made from")
    weights_of(baseline, "pytorch")
    check_replaceable(Path(output_dir), marker=RECIPE_FILE)


def name_variant(method: str, bits: int) -> str:
    return method if bits == 8 else f"{method}-int{bits}"


def formats_of(bits: int) -> tuple[str, ...]:
    """The formats that can hold weights of so many bits, truly packed."""
    return FORMATS if bits == 8 else ("onnx",)


def choose_all_scales(model, layers: Layers, arguments: SchemeArguments) -> dict[str, Scales]:
    """Below 8 bits, the scales of each layer that is quantized; none at 8, where each runtime chooses its own."""
    if arguments.bits == 8:
        return {}
    bits = dict.fromkeys(layers.linear, arguments.bits)
    bits |= dict.fromkeys(layers.embeddings, arguments.embedding_bits or arguments.bits)
    for name in bits:
        check_group_size(name, model.get_submodule(name).weight.shape[1], arguments.group_size)
    return {
        name: choose_scales(model.get_submodule(name).weight, bits[name], arguments.group_size) for name in tqdm(bits)
    }


def save_formats(
    baseline: Path,
    folder: Path,
    model,
    layers: Layers,
    scales: dict[str, Scales],
    encoder: TextEncoder,
    token_ids: list[list[int]],
    arguments: SchemeArguments,
) -> dict[str, float]:
    """Writes the float model of the folder ``baseline`` in each format; returns the seconds that each took."""
    seconds = {}
    for format in arguments.formats or formats_of(arguments.bits):
        start = time.monotonic()
        if format == "torchao":
            quantize_torchao(baseline, folder, layers, arguments.reduce_range)
        elif format == "onnx":
            save_onnx(baseline, folder / "onnx", model, layers, scales, encoder, token_ids, arguments)
        else:
            switches = {"reduce_range": arguments.reduce_range, "smooth_quant": arguments.smooth_quant}
            quantize_openvino(baseline, folder / "openvino", model, layers, encoder, token_ids, **switches)
        seconds[format] = round(time.monotonic() - start, 1)
        print(f"{format}: {seconds[format]} s")
    for name in SHARED_FILES:
        if not (folder / name).exists():  # torchao has written a config.json of its own
            shutil.copy(baseline / name, folder / name)
    return seconds


def save_onnx(baseline: Path, folder: Path, model, layers, scales, encoder, token_ids, arguments) -> None:
    """`model_quantized.onnx`, the name that transformers.js looks for; dynamic or static, INT8 or packed."""
    path = folder / "model_quantized.onnx"
    if scales:
        write_lowbit_onnx(model, weights_of(baseline, "onnx"), path, layers, scales)
        return
    if arguments.onnx_calibration == "none":
        quantize_onnx(model, weights_of(baseline, "onnx"), path, layers, arguments.reduce_range)
        return
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = Path(temporary) / "model.onnx"
        export_onnx(model, AutoTokenizer.from_pretrained(baseline), unpacked, pack=False)
        method = arguments.onnx_calibration
        quantize_onnx_static(model, unpacked, path, layers, encoder, token_ids, method, arguments.reduce_range)
