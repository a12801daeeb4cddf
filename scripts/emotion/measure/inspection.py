"""What is quantized in an artifact, counted in the saved files and not taken from an intention."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from emotion.quantize.levels import LEVELS

import numpy as np

FLOATS = {"float32", "float16", "bfloat16"}
DYNAMIC_OPERATORS = {"MatMulInteger": 3, "QAttention": 4}  # ONNX Runtime's, and their input with an entry a scale
FLOAT_OPERATORS = {"MatMul", "Gemm", "Attention"}
RESTORING = {"Convert", "Multiply", "Subtract", "Reshape", "Transpose"}  # OpenVINO's, from integers to a weight
MOVING = {"Reshape", "Transpose", "Gather"}  # what may stand between a rounded activation and the layer
OPENVINO_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8", "i4": "int4",
                   "u4": "uint4"}  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """The weights of one linear layer or embedding, as they lie in the file."""

    name: str
    dtype: str
    granularity: str = "per-tensor"
    activations: str = "float32"  # what the layer's input becomes
    largest: int | None = None  # of the integers, without their sign

    @property
    def quantized(self) -> bool:
        return self.dtype not in FLOATS

    @property
    def weights(self) -> str:
        return f"{self.dtype} {self.granularity}" if self.quantized else self.dtype


def describe_scheme(classifier, weights: Path, format: str) -> dict:
    """Counts the linear layers and embeddings of an opened artifact, and how many of them hold quantized weights."""
    if format == "onnx":
        linear, embeddings = _onnx_matrices(weights)
    elif format == "openvino":
        linear, embeddings = _openvino_matrices(weights)
    else:
        linear, embeddings = _torch_matrices(classifier.model)
    quantized = [matrix for matrix in linear if matrix.quantized]
    tables = [table for table in embeddings if table.quantized]
    both = linear + embeddings

    def joined(words) -> str:
        return " and ".join(sorted(set(words)))

    return {
        "weights": joined(matrix.weights for matrix in quantized or linear),
        "activations": "bfloat16"
        if format == "bf16"
        else joined(matrix.activations for matrix in quantized or linear),
        "quantized_layers": len(quantized),
        "linear_layers": len(linear),
        "largest_weight": max((matrix.largest for matrix in quantized if matrix.largest), default=None),
        "embeddings": joined(table.weights for table in tables or embeddings),
        "kept_in_float": [matrix.name for matrix in both if not matrix.quantized] if quantized or tables else [],
    }


def granularity(*scales) -> str:
    """By the shapes of the scales: one for the whole tensor, or one a channel."""
    return "per-channel" if any(math.prod(shape) > 1 for shape in scales) else "per-tensor"


def _torch_matrices(model) -> tuple[list[Matrix], list[Matrix]]:
    from torch import nn

    def matrix(name, part) -> Matrix:
        weight = part.weight
        state = getattr(weight, "quant_state", None)  # bitsandbytes'; the tensor itself holds packed bytes
        if state is not None:
            activations = str(part.compute_dtype).removeprefix("torch.")
            return Matrix(name, state.quant_type, f"in blocks of {state.blocksize}", activations)
        integers = getattr(weight, "qdata", None)  # torchao's; the tensor itself goes on saying float32
        if integers is None:
            return Matrix(name, str(weight.dtype).removeprefix("torch."))
        dtype = str(integers.dtype).removeprefix("torch.")
        dynamic = getattr(weight, "act_quant_kwargs", None) is not None
        activations = "int8 dynamic per-token" if dynamic else "float32"
        return Matrix(name, dtype, granularity(weight.scale.shape), activations, int(integers.int().abs().max()))

    def matrices(kind) -> list[Matrix]:
        return [matrix(name, part) for name, part in model.named_modules() if isinstance(part, kind)]

    return matrices(nn.Linear), matrices(nn.Embedding)


def _onnx_matrices(weights: Path) -> tuple[list[Matrix], list[Matrix]]:
    """A linear layer multiplies with a constant matrix, an embedding looks rows up in one."""
    import onnx

    graph = onnx.load(weights).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    # The static form restores floats before each operator: from a constant, or from a rounded activation.
    restored = {node.output[0]: node.input for node in graph.node if node.op_type == "DequantizeLinear"}
    packed = _packed_matrices(constants)  # below 8 bits: by the tensor that a layer's weights unpack to
    linear, embeddings = [], []
    for node in graph.node:
        name = node.name.removesuffix("_quant").removesuffix("_MatMul")
        below_int8 = next((packed.pop(source) for source in node.input if source in packed), None)
        if below_int8:
            matrix = replace(below_int8, name=name, activations="int8 dynamic per-tensor")
        elif "/unpack" in name or node.op_type not in {"Gather", *FLOAT_OPERATORS, *DYNAMIC_OPERATORS}:
            continue
        else:
            sources = [restored.get(source, [source]) for source in node.input]
            matrices = [one for one in sources if one[0] in constants and len(constants[one[0]].dims) == 2]
            if not matrices:
                continue
            tensor, scale, activations = constants[matrices[0][0]], matrices[0][1:2], "float32"
            if node.op_type in DYNAMIC_OPERATORS:
                scale, activations = [node.input[DYNAMIC_OPERATORS[node.op_type]]], "int8 dynamic per-tensor"
            elif scale and node.input[0] in restored:
                activations = "int8 static per-tensor"
            array = onnx.numpy_helper.to_array(tensor)
            matrix = Matrix(
                name=name,
                dtype=array.dtype.name,
                granularity=granularity(constants[scale[0]].dims) if scale else "per-tensor",
                activations=activations,
                largest=int(np.abs(array.astype(int)).max()) if array.dtype == np.int8 else None,
            )
        if node.op_type == "Gather":
            embeddings.append(matrix)
        elif "Attention" in node.op_type:  # query, key and value in one
            names = matrix.name.split() if matrix.name.count(" ") == 2 else [matrix.name] * 3
            linear += [replace(matrix, name=name) for name in names]
        else:
            linear.append(matrix)
    return linear, embeddings + [replace(matrix, name=name) for name, matrix in packed.items()]


def _packed_matrices(constants: dict) -> dict[str, Matrix]:
    """The matrices that quantize/lowbit.py packed, by name; bits and groups follow from how large their arrays are."""
    import onnx

    found = {}
    for full, tensor in constants.items():
        name, _, kind = full.rpartition("/")
        if kind != "multipliers":
            continue
        planes = [one for other, one in constants.items() if other.startswith(f"{name}/codes")]
        rows, pairs, pair, eighths, _ = planes[0].dims  # groups are rows x pairs x pair, of 8 x eighths weights each
        weights = 8 * rows * pairs * pair * eighths
        bits = 8 * sum(math.prod(plane.dims) for plane in planes) // weights
        codes = onnx.numpy_helper.to_array(tensor)
        multiplier = 1 + int(max((codes & 15).max(), (codes >> 4).max()) if pair == 2 else codes.max())
        largest = multiplier * max(map(abs, LEVELS[bits]))
        found[name] = Matrix(name, f"int{bits}", f"in groups of {8 * eighths}", largest=largest)
    return found


def _openvino_matrices(weights: Path) -> tuple[list[Matrix], list[Matrix]]:
    """As for ONNX; integers lie in a constant that a Convert and a Multiply with the scales restore."""
    import openvino

    linear, embeddings = [], []
    for node in openvino.Core().read_model(weights).get_ordered_ops():
        kind, name = node.get_type_name(), node.get_friendly_name().removeprefix("__module.").split("/")[0]
        if kind == "MatMul":
            chain = _chain_to_constant(node.input_value(1).get_node(), RESTORING)
            static = _chain_to_constant(node.input_value(0).get_node(), MOVING)[-1].get_type_name() == "FakeQuantize"
        elif kind == "Gather":
            chain, static = _chain_to_constant(node.input_value(0).get_node(), RESTORING), False
        else:
            continue
        *restoring, constant = chain
        dtype = constant.get_element_type().get_type_name() if constant.get_type_name() == "Constant" else ""
        if dtype not in OPENVINO_DTYPES:
            continue
        scales = [step.input_value(1).get_shape() for step in restoring if step.get_type_name() == "Multiply"]
        activations = "int8 static per-tensor" if static else "float32"
        largest = int(np.abs(constant.get_data().astype(int)).max()) if dtype == "i8" else None
        matrix = Matrix(name, OPENVINO_DTYPES[dtype], granularity(*scales), activations, largest)
        (linear if kind == "MatMul" else embeddings).append(matrix)
    return linear, embeddings


def _chain_to_constant(node, passed: set[str]) -> list:
    """The nodes from this one up along the first inputs, as long as they are of the types ``passed``."""
    chain = [node]
    while chain[-1].get_type_name() in passed:
        chain.append(chain[-1].input_value(0).get_node())
    return chain
