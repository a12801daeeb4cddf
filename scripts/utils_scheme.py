"""What is quantized in an artifact, counted in the saved files and not taken from an intention."""

from pathlib import Path


def describe_scheme(classifier, weights: Path, format: str) -> dict:
    """Counts the linear layers of an opened artifact, and how many of them hold quantized weights."""
    linear, embeddings = _onnx_matrices(weights) if format == "onnx" else _torch_matrices(classifier.model)
    return {
        "weights": " and ".join(sorted(set(linear))),
        "activations": "bfloat16" if format == "bf16" else "float32",
        "quantized_layers": sum("float" not in dtype for dtype in linear),
        "linear_layers": len(linear),
        "embeddings": " and ".join(sorted(set(embeddings))),
    }


def _torch_matrices(model) -> tuple[list[str], list[str]]:
    """The dtypes of the weights of all linear layers, and of all embeddings."""
    from torch import nn

    def dtypes(kind):
        return [str(part.weight.dtype).removeprefix("torch.") for part in model.modules() if isinstance(part, kind)]

    return dtypes(nn.Linear), dtypes(nn.Embedding)


def _onnx_matrices(weights: Path) -> tuple[list[str], list[str]]:
    """The same for a graph: a linear layer multiplies with a constant matrix, an embedding looks rows up in one."""
    import onnx

    graph = onnx.load(weights).graph
    dtype_of = {
        tensor.name: onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        for tensor in graph.initializer
        if len(tensor.dims) == 2
    }
    used = [(node.op_type, dtype_of[name]) for node in graph.node for name in node.input if name in dtype_of]
    linear = [dtype for operator, dtype in used if operator in {"MatMul", "Gemm"}]
    return linear, [dtype for operator, dtype in used if operator == "Gather"]
