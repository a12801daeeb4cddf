"""Which layers of an artifact are quantized, and how: counted in the saved files, whatever the recipe says."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from emotion.utils.levels import BRANCH, LEVELS

FLOATS = {"float32", "float16", "bfloat16"}
FLOAT8 = "float8_e4m3fn"  # torch's name: 4 bits of exponent, 3 of mantissa; it has no scales
SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": FLOAT8}
# ONNX Runtime's INT8 operators -> the input that has one entry per scale of the weights. MatMulInteger itself takes no
# scales, but its zero points have their shape.
INT8_OPERATORS = {"MatMulInteger": 3, "QAttention": 4, "DynamicQuantizeMatMul": 2, "MatMulIntegerToFloat": 3}
SCALE_OF_ACTIVATIONS = {"QAttention": 3, "MatMulIntegerToFloat": 2}  # the input; a constant where ranges are fixed
FLOAT_OPERATORS = {"MatMul", "Gemm", "Attention"}
RESTORING = {"Convert", "Multiply", "Subtract", "Reshape", "Transpose"}  # OpenVINO's, from integers to a weight
MOVING = {"Reshape", "Transpose", "Gather"}  # what may stand between a rounded activation and the layer
OPENVINO_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i8": "int8",
    "u8": "uint8",
    "i4": "int4",
    "u4": "uint4",
}


@dataclass(frozen=True)
class Matrix:
    """The weights of one linear layer or embedding, as they lie in the file."""

    name: str
    dtype: str
    granularity: str = "per-tensor"
    activations: str = "float32"  # the type that the layer's input is rounded to before it is multiplied
    largest: int | None = None  # largest absolute value of the integers; None for floats and NF4

    @property
    def quantized(self) -> bool:
        """Whether the file holds integers, NF4's codes or floats of 8 bits in the place of wider floats."""
        return self.dtype not in FLOATS

    @property
    def weights(self) -> str:
        """The type, and what shares a scale where there are scales: 'int8 per-channel'."""
        return f"{self.dtype} {self.granularity}" if self.quantized and self.dtype != FLOAT8 else self.dtype


def describe_scheme(classifier, weights: Path, format: str) -> dict:
    """Counts the linear layers and embeddings of an opened artifact, and how many of them hold quantized weights.

    Args:
        classifier: the opened artifact; the formats of PyTorch are counted in its model.
        weights: the artifact's file, in which the other formats are counted; it tells the types of float weights.
        format: the format's name, as in `find_formats`.

    Returns:
        The field `scheme` of a record. Where any layer is quantized, `weights` and `activations` describe the
        quantized layers alone, and `kept_in_float` names all other layers and embeddings.
    """
    if format == "onnx":
        linear, embeddings = _onnx_matrices(weights)
    elif format == "openvino":
        linear, embeddings = _openvino_matrices(weights)
    else:
        linear, embeddings = _torch_matrices(classifier.model, _stored_dtypes(weights))
    return summarize_matrices(linear, embeddings, format)


def describe_encoder(folder: Path) -> dict[str, int]:
    """The number of layers, their width and the number of parameters of an artifact's encoder, without the head.

    Args:
        folder: the artifact; its config.json alone is read, since a quantized file holds scales beside the parameters.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.quantization_config = None  # the float model has the same shape, and needs no library to be built
    with torch.device("meta"):  # shapes without memory
        encoder = AutoModel.from_config(config)
    return {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "parameters": sum(one.numel() for one in encoder.parameters()),
    }


def summarize_matrices(linear: list[Matrix], embeddings: list[Matrix], format: str) -> dict:
    """The result of `describe_scheme`, from what was counted."""
    quantized = [matrix for matrix in linear if matrix.quantized]
    tables = [table for table in embeddings if table.quantized]
    kept_in_float, largest = [], None
    for matrix in linear + embeddings:
        # A file that quantizes nothing keeps nothing back: the list is empty for FP32 and BF16.
        if not matrix.quantized and (quantized or tables):
            kept_in_float.append(matrix.name)
    for matrix in quantized:
        if matrix.largest:
            largest = max(matrix.largest, largest or 0)
    return {
        "weights": _join("weights", quantized or linear),
        # Float weights do not tell in which type they are multiplied; the format bf16 does.
        "activations": "bfloat16" if format == "bf16" else _join("activations", quantized or linear),
        "quantized_layers": len(quantized),
        "linear_layers": len(linear),
        "largest_weight": largest,
        "embeddings": _join("weights", tables or embeddings),
        "kept_in_float": kept_in_float,
    }


def granularity(*scales) -> str:
    """'per-channel' if any of the shapes of the scales has several entries, else 'per-tensor'."""
    return "per-channel" if any(math.prod(shape) > 1 for shape in scales) else "per-tensor"


def _join(attribute: str, matrices: list[Matrix]) -> str:
    """The values that an attribute takes, each once: 'int8 per-channel', or 'float16 and float32'."""
    return " and ".join(sorted({getattr(matrix, attribute) for matrix in matrices}))


def _largest(integers: np.ndarray) -> int:
    """The largest absolute value; widened first, since -128 has no absolute value in 8 bits."""
    return int(np.abs(integers.astype(int)).max())


def _stored_dtypes(weights: Path) -> dict[str, str]:
    """Name of a float tensor in a safetensors file -> the type in which the file holds it."""
    from safetensors import safe_open

    found = {}
    with safe_open(weights, framework="np") as file:
        for name in sorted(file.keys()):
            dtype = file.get_slice(name).get_dtype()
            if dtype in SAFETENSORS_DTYPES:
                found[name] = SAFETENSORS_DTYPES[dtype]
    return found


def _torch_matrices(model, stored: dict[str, str]) -> tuple[list[Matrix], list[Matrix]]:
    """The linear layers and the embeddings of a PyTorch model; ``stored`` is that of `_stored_dtypes`."""
    from torch import nn

    linear, embeddings = [], []
    for name, part in model.named_modules():
        if ".lora_" in name:  # an adapter's thin matrices are no layers of their own
            continue
        name = name.removeprefix("base_model.model.").removesuffix(".base_layer")  # PEFT's, around the model's own
        if isinstance(part, nn.Linear):
            linear.append(_torch_matrix(name, part, stored))
        elif isinstance(part, nn.Embedding):
            embeddings.append(_torch_matrix(name, part, stored))
        elif type(part).__module__ == "torch.ao.nn.quantized.dynamic.modules.linear":  # of `quantize_dynamic`
            integers, activations = part.weight().int_repr().numpy(), "int8 dynamic per-tensor"
            linear.append(Matrix(name, "int8", activations=activations, largest=_largest(integers)))
    return linear, embeddings


def _torch_matrix(name: str, part, stored: dict[str, str]) -> Matrix:
    """The weight of one module: bitsandbytes' NF4, torchao's INT8 or a plain tensor."""
    weight = part.weight
    state = getattr(weight, "quant_state", None)  # bitsandbytes'; the tensor itself holds packed bytes
    if state is not None:
        # bitsandbytes restores the weights for each product, and multiplies in this float type; weights that it has
        # packed for the processor's bfloat16 instructions are multiplied by these.
        packed = getattr(state, "packing_format_for_cpu", False)
        activations = "bfloat16" if packed else str(part.compute_dtype).removeprefix("torch.")
        return Matrix(name, state.quant_type, f"in blocks of {state.blocksize}", activations)
    integers = getattr(weight, "qdata", None)  # torchao's; the tensor itself goes on saying float32
    if integers is None:
        # Opening a file may widen a table; an adapter's model has other names than its files.
        return Matrix(name, stored.get(f"{name}.weight", str(weight.dtype).removeprefix("torch.")))
    dtype = str(integers.dtype).removeprefix("torch.")
    # Another program's file may have options by which torchao rounds the activations too.
    dynamic = getattr(weight, "act_quant_kwargs", None) is not None
    activations = "int8 dynamic per-token" if dynamic else "float32"
    return Matrix(name, dtype, granularity(weight.scale.shape), activations, _largest(integers.numpy()))


def _onnx_matrices(weights: Path) -> tuple[list[Matrix], list[Matrix]]:
    """The linear layers, which multiply with a constant matrix, and the embeddings, which look rows up in one.

    Quantized weights lie in a file in one of three forms. Our INT8 files have operators that take the integers. The
    files of other programs may keep the float operators, and restore floats before them. Below 8 bits the weights are
    packed, and a few operators unpack them to what INT8 operators take.
    """
    import onnx

    graph = onnx.load(weights).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    restored = {}  # static form: the float tensor -> the names of the integers and of the scales that restore it
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            restored[node.output[0]] = node.input[0], node.input[1]
    packed = _packed_matrices(constants)
    linear, embeddings = [], []
    for node in graph.node:
        matrix = _take_packed(node, packed, constants) or _stored_matrix(node, constants, restored)
        if matrix is None:
            continue
        if node.op_type == "Gather":
            embeddings.append(matrix)
        else:
            linear += _split_product(node.op_type, matrix)
    # No layer multiplies with the remaining ones. They are embeddings: the file unpacks only the rows of a text.
    for name, table in packed.items():
        embeddings.append(replace(table, name=name))
    return linear, embeddings


def _name_of(node) -> str:
    """The module's name, without the endings that ONNX Runtime's quantizer appends."""
    return node.name.removesuffix("_quant").removesuffix("_MatMul")


def _activations_of(node, constants: dict) -> str:
    """How the input of an INT8 operator is rounded."""
    scale = SCALE_OF_ACTIVATIONS.get(node.op_type)
    fixed = scale is not None and node.input[scale] in constants
    return f"int8 {'static' if fixed else 'dynamic'} per-tensor"


def _take_packed(node, packed: dict[str, Matrix], constants: dict) -> Matrix | None:
    """Removes from ``packed`` the matrix that the node multiplies with, and returns it; None if there is none."""
    for source in node.input:
        if source in packed:
            return replace(packed.pop(source), name=_name_of(node), activations=_activations_of(node, constants))
    return None


def _stored_matrix(node, constants: dict, restored: dict) -> Matrix | None:
    """The matrix of a node that takes it as it is stored, or restored by DequantizeLinear; None for other nodes."""
    from onnx import numpy_helper

    if node.op_type not in {"Gather", *FLOAT_OPERATORS, *INT8_OPERATORS}:
        return None
    if "/unpack" in node.name:  # it looks bytes up in a table of levels, which is no embedding
        return None
    if BRANCH in node.name:  # outlier units of a layer, which is counted by its own node
        return None
    stored, scales = _matrix_input(node, constants, restored)
    if stored is None:
        return None
    activations = "float32"
    if node.op_type in INT8_OPERATORS:
        scales, activations = node.input[INT8_OPERATORS[node.op_type]], _activations_of(node, constants)
    elif scales and node.input[0] in restored:  # its input was rounded too, by a range that the file fixes
        activations = "int8 static per-tensor"
    array = numpy_helper.to_array(constants[stored])
    return Matrix(
        name=_name_of(node),
        dtype=array.dtype.name,
        granularity=granularity(constants[scales].dims) if scales else "per-tensor",
        activations=activations,
        largest=_largest(array) if array.dtype == np.int8 else None,
    )


def _matrix_input(node, constants: dict, restored: dict) -> tuple[str | None, str | None]:
    """The names of the constant matrix that a node takes and of the scales that restore it; None where it has none."""
    for source in node.input:
        stored, scales = restored.get(source, (source, None))
        # Biases have one dimension, and the constants that only shape tensors have at most that.
        if stored in constants and len(constants[stored].dims) == 2:
            return stored, scales
    return None, None


def _split_product(kind: str, matrix: Matrix) -> list[Matrix]:
    """One matrix per linear layer: a product may hold several, side by side, and is then named after all of them."""
    names = matrix.name.split()
    if "Attention" in kind and len(names) != 3:
        names = [matrix.name] * 3  # another exporter's graph: query, key and value all the same, without their names
    return [replace(matrix, name=name) for name in names or [""]]


def _packed_matrices(constants: dict) -> dict[str, Matrix]:
    """The matrices that quantize/lowbit.py packed, each by the name of the tensor that it unpacks to.

    A file does not name its bits and groups. Both follow from the shapes of the arrays.
    """
    from onnx import numpy_helper

    found = {}
    for full, tensor in constants.items():
        name, _, kind = full.rpartition("/")
        if kind != "multipliers":
            continue
        # (rows, pairs of groups, pair, eighths of a group, bits): eight weights fill as many bytes as each has bits.
        _, _, pair, eighths, bits = constants[f"{name}/codes0"].dims
        # A multiplier is stored less one, in 4 bits where two share a byte and in 8 where a row has odd groups.
        stored = numpy_helper.to_array(tensor)
        halves = (stored & 15, stored >> 4) if pair == 2 else (stored,)
        multiplier = 1 + int(np.max(halves))
        largest = multiplier * abs(LEVELS[bits][0])  # no level lies farther from zero than the lowest
        found[name] = Matrix(name, f"int{bits}", f"in groups of {8 * eighths}", largest=largest)
    return found


def _openvino_matrices(weights: Path) -> tuple[list[Matrix], list[Matrix]]:
    """As for ONNX; integers lie in a constant that a Convert and a Multiply with the scales restore."""
    import openvino

    linear, embeddings = [], []
    for node in openvino.Core().read_model(weights).get_ordered_ops():
        kind = node.get_type_name()
        # 'bert.pooler.dense/WithoutBiases' -> 'bert.pooler.dense'; OpenVINO's own export puts '__module.' before it.
        name = node.get_friendly_name().removeprefix("__module.").split("/")[0]
        if kind == "MatMul":
            chain = _chain_to_constant(node.input_value(1).get_node(), RESTORING)
            # A FakeQuantize before a layer tells the compiler to round the layer's input to INT8, and by which range.
            static = _chain_to_constant(node.input_value(0).get_node(), MOVING)[-1].get_type_name() == "FakeQuantize"
        elif kind == "Gather":
            chain, static = _chain_to_constant(node.input_value(0).get_node(), RESTORING), False
        else:
            continue
        *restoring, constant = chain
        # Attention multiplies two activations; and indices, of type i64, are looked up too. Neither is a layer.
        dtype = constant.get_element_type().get_type_name() if constant.get_type_name() == "Constant" else ""
        if dtype not in OPENVINO_DTYPES:
            continue
        scales = [step.input_value(1).get_shape() for step in restoring if step.get_type_name() == "Multiply"]
        activations = "int8 static per-tensor" if static else "float32"
        largest = _largest(constant.get_data()) if dtype == "i8" else None
        matrix = Matrix(name, OPENVINO_DTYPES[dtype], granularity(*scales), activations, largest)
        if kind == "MatMul":
            linear += _split_product(kind, matrix)
        else:
            embeddings.append(matrix)
    return linear, embeddings


def _chain_to_constant(node, passed: set[str]) -> list:
    """The nodes from this one up along the first inputs, as long as they are of the types ``passed``."""
    chain = [node]
    while chain[-1].get_type_name() in passed:
        chain.append(chain[-1].input_value(0).get_node())
    return chain
