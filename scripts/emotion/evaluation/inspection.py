"""Counts the quantized layers of a saved model, and how they are quantized, in its files and not in its recipe."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from emotion.inference.model_folder import BRANCH, LEVELS

FLOATS = {"float32", "float16", "bfloat16"}
FLOAT8 = "float8_e4m3fn"  # torch's name: 4 bits of exponent, 3 of mantissa; it has no scales
SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": FLOAT8}
OPENVINO_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8"}
OPENVINO_DTYPES |= {"i4": "int4", "u4": "uint4"}
# ONNX Runtime's INT8 operators -> the input that has one entry per scale of the weights. MatMulInteger itself takes no
# scales, but its zero points have their shape.
INT8_OPERATORS = {"MatMulInteger": 3, "QAttention": 4, "DynamicQuantizeMatMul": 2, "MatMulIntegerToFloat": 3}
ACTIVATION_SCALES = {"QAttention": 3, "MatMulIntegerToFloat": 2}  # the input; a constant where ranges are fixed
WEIGHT_OPERATORS = {"Gather", "MatMul", "Gemm", "Attention", *INT8_OPERATORS}
DEQUANTIZING = {"Convert", "Multiply", "Subtract", "Reshape", "Transpose"}  # OpenVINO's, from integers to a weight
RESHAPING = {"Reshape", "Transpose", "Gather"}  # OpenVINO's, between a quantized activation and the layer


@dataclass(frozen=True)
class Matrix:
    """The weight of a linear layer or an embedding, as it is stored in the file."""

    name: str
    dtype: str
    granularity: str = "per-tensor"
    activations: str = "float32"  # the type that the layer's input is quantized to before the product
    largest: int | None = None  # largest absolute value of the integers; None for floats and NF4

    @property
    def quantized(self) -> bool:
        """Whether the file stores integers, NF4 codes or 8-bit floats instead of wider floats."""
        return self.dtype not in FLOATS

    @property
    def weights(self) -> str:
        """The type, and what shares a scale where there are scales: 'int8 per-channel'."""
        return f"{self.dtype} {self.granularity}" if self.quantized and self.dtype != FLOAT8 else self.dtype


def describe_scheme(runtime, weights: Path, format: str) -> dict:
    """Counts the linear layers and embeddings of an opened model, and how many of them are quantized.

    Args:
        runtime: the opened model; the formats of PyTorch are counted in its modules.
        weights: the weight file, in which the other formats are counted; it has the types of float weights.

    Returns:
        The field `scheme` of a record. If any layer is quantized, `weights` and `activations` describe the
        quantized layers only, and `kept_in_float` names all other layers and embeddings.
    """
    if format == "onnx":
        linear, embeddings = _onnx_matrices(weights)
    elif format == "openvino":
        linear, embeddings = _openvino_matrices(weights)
    else:
        linear, embeddings = _torch_matrices(runtime.model, _stored_dtypes(weights))
    quantized = [matrix for matrix in linear if matrix.quantized]
    tables = [table for table in embeddings if table.quantized]
    # A file that quantizes nothing keeps nothing back: the list is empty for FP32 and BF16.
    kept = [matrix.name for matrix in linear + embeddings if not matrix.quantized and (quantized or tables)]
    return {
        "weights": _join("weights", quantized or linear),
        # Float weights do not show in which type they are multiplied; the format bf16 does.
        "activations": "bfloat16" if format == "bf16" else _join("activations", quantized or linear),
        "quantized_layers": len(quantized),
        "linear_layers": len(linear),
        "largest_weight": max((matrix.largest for matrix in quantized if matrix.largest), default=None),
        "embeddings": _join("weights", tables or embeddings),
        "kept_in_float": kept,
    }


def describe_encoder(folder: Path) -> dict[str, int]:
    """Counts the layers, the width and the parameters of a model's encoder, without the classification head.

    Only config.json is read, since a quantized file stores scales beside the parameters.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.quantization_config = None  # the float model has the same shape, and needs no library to be built
    with torch.device("meta"):  # shapes without memory
        encoder = AutoModel.from_config(config)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return {"layers": config.num_hidden_layers, "width": config.hidden_size, "parameters": parameters}


def granularity(*scales) -> str:
    """'per-channel' if any of the shapes of the scales has several entries, else 'per-tensor'."""
    return "per-channel" if any(math.prod(shape) > 1 for shape in scales) else "per-tensor"


def _join(attribute: str, matrices: list[Matrix]) -> str:
    """The values that an attribute takes, each once: 'int8 per-channel', or 'float16 and float32'."""
    return " and ".join(sorted({getattr(matrix, attribute) for matrix in matrices}))


def _largest(integers: np.ndarray) -> int:
    """The largest absolute value; widened first, since -128 has no absolute value in 8 bits."""
    return int(np.abs(integers.astype(int)).max())


# PyTorch


def _stored_dtypes(weights: Path) -> dict[str, str]:
    """Name of a float tensor in a safetensors file -> the type in which the file stores it."""
    from safetensors import safe_open

    with safe_open(weights, framework="np") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in sorted(file.keys())}
    return {name: SAFETENSORS_DTYPES[dtype] for name, dtype in dtypes.items() if dtype in SAFETENSORS_DTYPES}


def _torch_matrices(model, stored: dict[str, str]) -> tuple[list[Matrix], list[Matrix]]:
    """The linear layers and the embeddings of a PyTorch model; ``stored`` is the result of `_stored_dtypes`."""
    from torch import nn

    linear, embeddings = [], []
    for name, module in model.named_modules():
        if ".lora_" in name:  # the adapter's matrices are not layers of their own
            continue
        name = name.removeprefix("base_model.model.").removesuffix(".base_layer")  # PEFT's, around the model's own
        if isinstance(module, nn.Linear):
            linear.append(_torch_matrix(name, module, stored))
        elif isinstance(module, nn.Embedding):
            embeddings.append(_torch_matrix(name, module, stored))
        elif type(module).__module__ == "torch.ao.nn.quantized.dynamic.modules.linear":  # of `quantize_dynamic`
            largest = _largest(module.weight().int_repr().numpy())
            linear.append(Matrix(name, "int8", activations="int8 dynamic per-tensor", largest=largest))
    return linear, embeddings


def _torch_matrix(name: str, module, stored: dict[str, str]) -> Matrix:
    """The weight of one module: bitsandbytes' NF4, torchao's INT8 or a plain tensor."""
    weight = module.weight
    state = getattr(weight, "quant_state", None)  # bitsandbytes'; the tensor itself stores packed bytes
    if state is not None:
        # bitsandbytes dequantizes the weights for each product, and multiplies in this float type; weights packed for
        # the processor's bfloat16 instructions are multiplied by these.
        packed = getattr(state, "packing_format_for_cpu", False)
        activations = "bfloat16" if packed else str(module.compute_dtype).removeprefix("torch.")
        return Matrix(name, state.quant_type, f"in blocks of {state.blocksize}", activations)
    integers = getattr(weight, "qdata", None)  # torchao's; the tensor itself still says float32
    if integers is None:
        # Opening a file may widen a table; an adapter's model has other names than its files.
        return Matrix(name, stored.get(f"{name}.weight", str(weight.dtype).removeprefix("torch.")))
    # Another program's file may quantize the activations too.
    dynamic = getattr(weight, "act_quant_kwargs", None) is not None
    activations = "int8 dynamic per-token" if dynamic else "float32"
    dtype = str(integers.dtype).removeprefix("torch.")
    return Matrix(name, dtype, granularity(weight.scale.shape), activations, _largest(integers.numpy()))


# ONNX


def _onnx_matrices(weights: Path) -> tuple[list[Matrix], list[Matrix]]:
    """The linear layers, which multiply with a constant matrix, and the embeddings, which look rows up in one.

    A file stores quantized weights in one of three ways. INT8 operators take the integers. Files in the QDQ form
    keep the float operators, and dequantize before them. Below 8 bits the weights are packed, and a few operators
    unpack them for INT8 operators.
    """
    graph = onnx.load(weights).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    # Static INT8: the float tensor -> the names of its integers and of their scales
    dequantized = {node.output[0]: node.input[:2] for node in graph.node if node.op_type == "DequantizeLinear"}
    packed = _packed_matrices(constants)
    linear, embeddings = [], []
    for node in graph.node:
        if unpacked := [source for source in node.input if source in packed]:
            found = {"name": _name_of(node), "activations": _activations_of(node, constants)}
            matrix = replace(packed.pop(unpacked[0]), **found)
        else:
            matrix = _stored_matrix(node, constants, dequantized)
        if matrix and node.op_type == "Gather":
            embeddings.append(matrix)
        elif matrix:
            linear += _split_product(node.op_type, matrix)
    # No layer multiplies with the remaining ones. They are embeddings: the file unpacks only the rows of a text.
    embeddings += [replace(table, name=name) for name, table in packed.items()]
    return linear, embeddings


def _name_of(node) -> str:
    """The module's name, without the suffixes of ONNX Runtime's quantizer."""
    return node.name.removesuffix("_quant").removesuffix("_MatMul")


def _activations_of(node, constants: dict) -> str:
    """How the input of an INT8 operator is quantized."""
    scale = ACTIVATION_SCALES.get(node.op_type)
    fixed = scale is not None and node.input[scale] in constants
    return f"int8 {'static' if fixed else 'dynamic'} per-tensor"


def _stored_matrix(node, constants: dict, dequantized: dict) -> Matrix | None:
    """The constant matrix that a node takes, directly or through DequantizeLinear; None if it takes none."""
    # The table of levels that bytes are looked up in is not an embedding, and the outlier channels of a layer are
    # counted with the layer's own node.
    if node.op_type not in WEIGHT_OPERATORS or "/unpack" in node.name or BRANCH in node.name:
        return None
    for source in node.input:
        stored, scales = dequantized.get(source, (source, None))
        # Biases have one dimension, and the constants that only shape tensors have at most that.
        if stored in constants and len(constants[stored].dims) == 2:
            break
    else:
        return None
    activations = "float32"
    if node.op_type in INT8_OPERATORS:
        scales, activations = node.input[INT8_OPERATORS[node.op_type]], _activations_of(node, constants)
    elif scales and node.input[0] in dequantized:  # its input is quantized too, by a range that the file fixes
        activations = "int8 static per-tensor"
    array = numpy_helper.to_array(constants[stored])
    shared = granularity(constants[scales].dims) if scales else "per-tensor"
    largest = _largest(array) if array.dtype == np.int8 else None
    return Matrix(_name_of(node), array.dtype.name, shared, activations, largest)


def _split_product(operator: str, matrix: Matrix) -> list[Matrix]:
    """One matrix per linear layer: a product may hold several, side by side, and is then named after all of them."""
    names = [name for name in matrix.name.split() if not name.startswith("#")]  # the number of a shared layer
    if "Attention" in operator and len(names) != 3:
        names = [matrix.name] * 3  # another exporter's graph: query, key and value without their names
    return [replace(matrix, name=name) for name in names or [""]]


def _packed_matrices(constants: dict) -> dict[str, Matrix]:
    """The matrices that quantization/lowbit.py packed, each by the name of the tensor that it unpacks to.

    A file does not name its bits and groups. Both follow from the shapes of the arrays.
    """
    found = {}
    for full, tensor in constants.items():
        name, _, kind = full.rpartition("/")
        if kind != "multipliers":
            continue
        # (rows, pairs of groups, pair, eighths of a group, bits): eight weights fill as many bytes as each has bits.
        _, _, pair, eighths, bits = constants[f"{name}/codes0"].dims
        # A multiplier is stored less one, in 4 bits where two share a byte and in 8 where a row has odd groups.
        stored = numpy_helper.to_array(tensor)
        multiplier = 1 + int(np.max((stored & 15, stored >> 4) if pair == 2 else stored))
        largest = multiplier * abs(LEVELS[bits][0])  # no level lies farther from zero than the lowest
        found[name] = Matrix(name, f"int{bits}", f"in groups of {8 * eighths}", largest=largest)
    return found


# OpenVINO


def _openvino_matrices(weights: Path) -> tuple[list[Matrix], list[Matrix]]:
    """As `_onnx_matrices`; integers are in a constant that a Convert and a Multiply with the scales dequantize."""
    import openvino

    linear, embeddings = [], []
    for node in openvino.Core().read_model(weights).get_ordered_ops():
        operator = node.get_type_name()
        if operator not in {"MatMul", "Gather"}:
            continue
        *steps, constant = _chain_to_constant(node, 1 if operator == "MatMul" else 0, DEQUANTIZING)
        # Attention multiplies two activations; and indices, of type i64, are looked up too. Neither is a layer.
        dtype = constant.get_element_type().get_type_name() if constant.get_type_name() == "Constant" else ""
        if dtype not in OPENVINO_DTYPES:
            continue
        # A FakeQuantize before a layer makes the compiler quantize the layer's input to INT8, by its range.
        static = operator == "MatMul" and _chain_to_constant(node, 0, RESHAPING)[-1].get_type_name() == "FakeQuantize"
        scales = [step.input_value(1).get_shape() for step in steps if step.get_type_name() == "Multiply"]
        # 'bert.pooler.dense/WithoutBiases' -> 'bert.pooler.dense'; OpenVINO's own export puts '__module.' before it.
        name = node.get_friendly_name().removeprefix("__module.").split("/")[0]
        activations = "int8 static per-tensor" if static else "float32"
        largest = _largest(constant.get_data()) if dtype == "i8" else None
        matrix = Matrix(name, OPENVINO_DTYPES[dtype], granularity(*scales), activations, largest)
        if operator == "MatMul":
            linear += _split_product(operator, matrix)
        else:
            embeddings.append(matrix)
    return linear, embeddings


def _chain_to_constant(node, index: int, passed: set[str]) -> list:
    """The nodes from one of a node's inputs up along the first inputs, as long as they are of the types ``passed``."""
    chain = [node.input_value(index).get_node()]
    while chain[-1].get_type_name() in passed:
        chain.append(chain[-1].input_value(0).get_node())
    return chain
