"""How close each model comes to the machine's peak: Williams et al., "Roofline", CACM 2009.

A text takes at least as long as its matrix products take at the processor's peak, and at least as long as the weights
take to come from memory, once per batch. The share is the larger of both divided by the measured time. Weights that
stay in the processor's caches can beat the second bound.
"""

import re
import timeit
from pathlib import Path

import numpy as np

from emotion.utils.command import Bar
from emotion.utils.machine import has_bf16

SIZE = 2048  # of the square matrices that find the peaks: large enough that a product's start costs nothing
COPIED_BYTES = 2**29  # far more than any cache


def add_roofline(result: dict, work: tuple[float, int], threads: int) -> None:
    """Adds `peaks` to the result of run_benchmark.py, in place, and `roofline` to each of its models.

    Args:
        work: the result of `count_work`.
    """
    peaks = result["peaks"] = measure_peaks(threads)
    operations, weights = work
    for model in result["artifacts"].values():
        bits = int(re.search(r"\d+", model["scheme"]["weights"])[0])  # 'float32', 'int8 per-channel', 'nf4 in ...'
        peak = peaks[f"{model['precision']}_gop_per_s"]
        if peak is None:  # computed in a type for which the processor has no instructions
            model["roofline"] = None
            continue
        model["roofline"], compute_ms = {}, operations / peak / 1e6  # milliseconds per text
        for size, measured in ((1, model["latency_ms"]["mean"]), (32, 1000 / model["throughput_per_s"]["median"])):
            # Each weight is fetched once for the whole batch, and its texts share that time.
            memory_ms = weights * bits / 8 / size / peaks["memory_gb_per_s"] / 1e6
            model["roofline"][f"batch_{size}"] = {
                "least_ms": round(max(compute_ms, memory_ms), 4),
                "bound_by": "compute" if compute_ms > memory_ms else "memory",
                "share": round(max(compute_ms, memory_ms) / measured, 4),
            }


def count_work(folder: Path, texts: list[str]) -> tuple[float, int]:
    """Returns the mean number of operations per text, and the number of weights in linear layers.

    A multiplication with its addition counts as two operations. ``folder`` is any of the models: all must have the
    same architecture.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from emotion.data.tokenization import TextEncoder

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.quantization_config = None  # the float model has the same products, and needs no library to be built
    # Texts of the same length take the same operations, so that each length is run once.
    lengths, counts = np.unique([len(ids) for ids in TextEncoder(folder)(texts)], return_counts=True)
    # Eager: the counter misses products inside some fused attention kernels, and counts all plain ones. Not on tensors
    # without memory, with which MPNet cannot compute its relative positions.
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    operations = []
    with torch.inference_mode():
        for length in lengths.tolist():
            with FlopCounterMode(display=False) as counter:
                model(input_ids=torch.zeros(1, length, dtype=torch.long))
            operations.append(counter.get_total_flops())
    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear))
    return float(np.average(operations, weights=counts)), weights


def measure_peaks(threads: int) -> dict:
    """Measures the peaks: 10^9 operations per second of matrix products by type, and 10^9 bytes per second of memory.

    The peak of bfloat16 is None where the processor has no instructions for it: it would be that of an emulation.
    """
    import torch

    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    floats = rng.random((SIZE, SIZE), dtype=np.float32)
    tensor = torch.from_numpy(floats)
    halved = tensor.bfloat16()
    # 7 bits, as in our files: without VNNI, integers of the full range would overflow (see `LARGEST_SAFE_WEIGHT`).
    weights = rng.integers(-64, 65, size=(SIZE, SIZE), dtype=np.int8)
    activations = rng.integers(0, 256, size=(SIZE, SIZE), dtype=np.uint8)
    products = {
        # By both libraries: PyTorch's products come from MKL, which leaves half of an AMD processor unused.
        "float32": [lambda: tensor @ tensor, onnx_product("MatMul", floats, floats, threads)],
        "bfloat16": [lambda: halved @ halved] if has_bf16(use_cpu=True) else [],  # ONNX Runtime has none
        "int8": [onnx_product("MatMulInteger", activations, weights, threads)],  # as our files compute
    }
    peaks = {}
    for name, candidates in Bar(products.items(), desc="peaks"):
        seconds = min((least_seconds(product) for product in candidates), default=None)
        peaks[f"{name}_gop_per_s"] = seconds and round(2 * SIZE**3 / 1e9 / seconds, 1)
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = least_seconds(lambda: target.copy_(source))
    peaks["memory_gb_per_s"] = round(2 * COPIED_BYTES / 1e9 / seconds, 1)  # read and written, as STREAM counts
    return peaks


def onnx_product(operator: str, left: np.ndarray, right: np.ndarray, threads: int):
    """Returns a function that multiplies two matrices with an operator of ONNX Runtime."""
    import onnxruntime
    from onnx import numpy_helper, parser

    types = ("float", "float") if left.dtype == np.float32 else ("uint8", "int32")
    graph = f"multiply ({types[0]}[m, k] left) => ({types[1]}[m, n] product) {{ product = {operator}(left, right) }}"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
    # The right matrix is a constant like a layer's weights, so that the session may pack it once.
    model.graph.initializer.append(numpy_helper.from_array(right, "right"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"left": left})


def least_seconds(function, runs: int = 8) -> float:
    """Returns the shortest time of several runs: a peak is reached when nothing else disturbs the machine."""
    return min(timeit.repeat(function, number=1, repeat=runs))
