"""Measures peak memory and time of a training step with each method, interleaved in one run (A B C A B C).

The methods are full fine-tuning, QAT, LoRA, and QLoRA without and with gradient checkpointing (Chen et al., "Training
Deep Nets with Sublinear Memory Cost", 2016), each in a process of its own, on the same batches of real texts.

    python studies/training_cost_study.py
"""

import multiprocessing
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DataCollatorWithPadding

import run_qlora
from emotion.data.dataset import DEFAULT_DATASET, Task, load_task
from emotion.data.tokenization import load_tokenizer, tokenize
from emotion.evaluation.benchmark import NOISE_LIMIT, list_noisy, noise_of, spread
from emotion.inference.model_folder import build_classifier
from emotion.quantization.fake_quantizers import prepare
from emotion.quantization.layers import Plan, find_layers, find_stack
from emotion.quantization.scheme import SchemeArguments, update_plan
from emotion.utils.arguments import COUNT, parse_args
from emotion.utils.base_model import BASE_SIZE_MODEL, EMBEDDED_MODEL, find_base_model
from emotion.utils.command import Bar, run
from emotion.utils.files import ROOT, write_json
from emotion.utils.machine import (
    THREADS,
    choose_threads,
    describe_run,
    has_bf16,
    keep_freed_memory,
    peak_memory_mb,
    reset_peak_memory,
)

BATCH_SIZE = 32
BITS = {"QAT, 8 bits": 8, "QAT, 2 bits": 2}
# The first one is the reference of all ratios.
METHODS = ("full fine-tuning", *BITS, "LoRA", "QLoRA", "QLoRA, checkpointing")


@dataclass
class CostArguments:
    """The models to measure, and for how long."""

    models: list[str] = field(
        default_factory=lambda: [EMBEDDED_MODEL, BASE_SIZE_MODEL],
        metadata={"help": "Base models: Hub ids or folders."},
    )
    dataset_name: str = field(default=DEFAULT_DATASET, metadata={"help": "Dataset of the texts."})
    rounds: int = field(
        default=6, metadata={"help": "Turns that each method gets; the spread is over these.", "choices": COUNT}
    )
    steps: int = field(default=5, metadata={"help": "Steps per turn.", "choices": COUNT})
    threads: int | None = field(
        default=None, metadata={"help": "Threads to compute with; all if not given.", "choices": THREADS}
    )
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    (arguments,) = parse_args((CostArguments,), positional="models", argv=argv)
    bases = [find_base_model(name) for name in arguments.models]  # all: a missing one stops the study at once
    task, threads = load_task(arguments.dataset_name), choose_threads(arguments.threads)
    measured = {}
    for base in bases:
        batches = make_batches(task, load_tokenizer(base.path, max_length=128), arguments.steps)
        measured[base.name] = measure(base.path, task.labels, batches, arguments.rounds, threads)
    cost = describe_run(threads) | {
        "dataset": task.name,
        "dataset_source": task.source,
        "batch_size": BATCH_SIZE,
        "rounds": arguments.rounds,
        "steps_a_round": arguments.steps,
        "compared_with": METHODS[0],
        "noise_limit": NOISE_LIMIT,
        "too_noisy": {model: list_noisy(methods) for model, methods in measured.items()},
        "shapes": measured,
    }
    results = Path(arguments.results_dir)
    write_json(results / "training_cost.json", cost)
    print(f"wrote the study to {results}; make report renders it")


def make_batches(task: Task, tokenizer, count: int) -> list[dict[str, np.ndarray]]:
    """Returns the first rows of train as ``count`` padded batches, int64 (32, tokens) each, the longest first."""
    rows = task.splits["train"].select(range(BATCH_SIZE * count))
    ids, collate = tokenize(rows, tokenizer, "train"), DataCollatorWithPadding(tokenizer)
    batches = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = collate([ids[row] for row in range(start, start + BATCH_SIZE)])
        # NumPy, since PyTorch passes tensors to other processes in shared memory
        batches.append({name: tensor.numpy() for name, tensor in batch.items()})
    return sorted(batches, key=lambda batch: -batch["input_ids"].shape[1])


def measure(path: str, labels: list[str], batches: list[dict], rounds: int, threads: int) -> dict:
    """Returns per method: trained parameters, peak memory, seconds per step, and ratios of both to the first one."""
    spawn = multiprocessing.get_context("spawn")  # a forked process would begin with the memory of this one
    pools = {method: spawn.Pool(1, start, (method, path, labels, threads)) for method in METHODS}
    turns = {method: [] for method in METHODS}
    # All methods warm up before one is timed.
    for pool in pools.values():
        pool.apply(take_steps, (batches,))
        pool.apply(reset_peak_memory)
    for _ in Bar(range(rounds), desc="interleaved rounds"):
        for method, pool in pools.items():
            turns[method].append(pool.apply(take_steps, (batches,)))
    first, measured = METHODS[0], {}
    for method, pool in pools.items():
        measured[method] = pool.apply(describe)
        pool.terminate()
        peak_memory_ratio = measured[method]["peak_memory_mb"] / measured[first]["peak_memory_mb"]
        measured[method] |= {
            "peak_memory_ratio": round(peak_memory_ratio, 3),
            "seconds_a_step": spread(turns[method]),
            "times_slower": spread(np.divide(turns[method], turns[first])),  # round by round
            "noise": {"seconds_a_step": noise_of(turns[method])},
        }
    return measured


@dataclass
class Training:
    """A method's model, ready to train."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    device: str
    bf16: bool
    before: int  # bytes that the process held before it loaded the model


training: Training | None = None  # of this process; a pool keeps no other state between two calls


def start(method: str, path: str, labels: list[str], threads: int) -> None:
    """Initializes the process of a method with model and optimizer."""
    global training
    torch.set_num_threads(threads)
    on_gpu = torch.cuda.is_available()
    device, bf16 = "cuda" if on_gpu else "cpu", has_bf16(use_cpu=not on_gpu)
    before = psutil.Process().memory_info().rss
    model = build_model(method, path, labels, bf16)
    if not on_gpu:
        model.set_attn_implementation("eager")  # as `ClassificationTrainer.train` does
    model.to(device).train()  # with dropout, whose masks take memory
    keep_freed_memory()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = Training(model, torch.optim.AdamW(trained, lr=1e-5, fused=True), device, bf16, before)


def build_model(method: str, path: str, labels: list[str], bf16: bool):
    """Builds the model of one of `METHODS`."""
    arguments = run_qlora.QloraArguments(
        model_name_or_path=path, load_in_4bit=method.startswith("QLoRA"), init_lora_weights="default"
    )
    if method == METHODS[0] or method in BITS:
        model = build_classifier(path, labels, arguments.attention_dropout)  # the same dropout for all methods
        if method in BITS:
            scheme = SchemeArguments(bits=BITS[method])
            prepare(update_plan(Plan(Path(path), model, find_layers(model, scheme.modules_to_not_convert)), scheme))
        return model
    model = run_qlora.build_model(path, labels, arguments, bf16)
    if "checkpointing" in method:
        # Transformers has no gradient checkpointing for MPNet.
        for layer in model.get_submodule(find_stack(model)):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def take_steps(batches: list[dict]) -> float:
    """Trains one step on each batch; returns seconds per step."""
    begin = time.perf_counter()
    for batch in batches:
        inputs = {name: torch.from_numpy(array).to(training.device) for name, array in batch.items()}
        with torch.autocast(training.device, torch.bfloat16, enabled=training.bf16):
            loss = training.model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        training.optimizer.step()
        training.optimizer.zero_grad()
    float(loss)  # waits for a GPU, which may still be computing
    return (time.perf_counter() - begin) / len(batches)


def describe() -> dict:
    """Returns the trained parameters, and the memory of this process in MB: peak, and before loading the model."""
    trained = sum(parameter.numel() for parameter in training.model.parameters() if parameter.requires_grad)
    return {
        "trained_parameters": trained,
        "peak_memory_mb": peak_memory_mb(),
        "before_loading_mb": round(training.before / 1e6),
    }


if __name__ == "__main__":
    run(main)
