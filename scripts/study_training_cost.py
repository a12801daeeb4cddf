"""What a step of each way to train costs: memory and time, on the same batches, interleaved in one run (A B C A B C).

Full fine-tuning, training with fake quantization (QAT), LoRA on a float base, and QLoRA each live in a process of
their own; a turn is a few steps on the same batches of real texts, the longest first, as a training begins. Peak
memory is that of the steps alone, and what the process held before it loaded a model (libraries) is told apart. With
gradient checkpointing a layer's inner values are computed again on the way back instead of kept (Chen et al.,
"Training Deep Nets with Sublinear Memory Cost", 2016). BERT-base's shape gets random weights: its cost does not depend
on them.

    python scripts/study_training_cost.py
"""

import multiprocessing
import time
from dataclasses import dataclass, field
from pathlib import Path

from emotion.common.command import run
from emotion.common.files import ROOT, write_json, write_text
from emotion.common.flags import parse_flags
from emotion.common.machine import (
    choose_threads,
    describe_run,
    has_bf16,
    keep_freed_memory,
    peak_memory_mb,
    reset_peak_memory,
)
from emotion.common.recipe import read_recipe
from emotion.measure.benchmark import spread
from emotion.model.pretrained import build_classifier
from emotion.quantize.adapter import QloraArguments, build_qlora
from emotion.quantize.fake_quantizers import prepare
from emotion.quantize.layers import find_layers
from emotion.quantize.scheme import SchemeArguments, choose_all_scales
from emotion.report.pages import render_cost
from emotion.task.dataset import DEFAULT_DATASET, load_task
from emotion.task.source import EMBEDDED_MODEL, find_base_model
from emotion.task.tokens import load_tokenizer, tokenize
from run_qlora import RECIPE

import numpy as np
import psutil
import torch
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding

BATCH_SIZE = 32
WARMUP_STEPS = 3
BITS = {"QAT, 8 bits": 8, "QAT, 2 bits": 2}
METHODS = ("full fine-tuning", *BITS, "LoRA", "QLoRA", "QLoRA, checkpointing")


@dataclass
class CostArguments:
    """What is measured, and how long."""

    model_name_or_path: str = field(default=EMBEDDED_MODEL, metadata={"help": "Base model: a Hub id or a folder."})
    dataset_name: str = field(default=DEFAULT_DATASET, metadata={"help": "Where the texts come from."})
    rounds: int = field(default=6, metadata={"help": "Turns that each method gets; the spread is over these."})
    steps: int = field(default=5, metadata={"help": "Steps a turn."})
    bert_base: bool = field(default=True, metadata={"help": "Measure BERT-base's shape, with random weights, too."})
    threads: int | None = field(default=None, metadata={"help": "Threads to compute with; all if not given."})
    work_dir: str = field(default=str(ROOT / "build" / "training_cost"), metadata={"help": "Where that is saved."})
    results_dir: str = field(default=str(ROOT / "results"), metadata={"help": "Where the results are written."})


def main(argv=None) -> None:
    (arguments,) = parse_flags((CostArguments,), positional="model_name_or_path", argv=argv)
    base, task = find_base_model(arguments.model_name_or_path), load_task(arguments.dataset_name)
    tokenizer = load_tokenizer(base.path, max_length=128)
    shapes = {base.name: base.path}
    if arguments.bert_base:
        torch.manual_seed(0)
        path = Path(arguments.work_dir) / "bert-base"
        BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer))).base_model.save_pretrained(path)
        shapes["BERT-base's shape, random weights"] = str(path)
    rows = task.splits["train"].select(range(BATCH_SIZE * arguments.steps))
    collate, ids = DataCollatorWithPadding(tokenizer), tokenize(rows, tokenizer, "train")
    batches = [
        {name: tensor.numpy() for name, tensor in collate([ids[row] for row in range(at, at + BATCH_SIZE)]).items()}
        for at in range(0, len(rows), BATCH_SIZE)
    ]
    batches.sort(key=lambda batch: -batch["input_ids"].shape[1])
    threads = choose_threads(arguments.threads)
    cost = describe_run(threads) | {
        "dataset": task.name,
        "dataset_source": task.source,
        "batch_size": BATCH_SIZE,
        "rounds": arguments.rounds,
        "steps_a_round": arguments.steps,
        "compared_with": METHODS[0],
        "shapes": {name: measure(path, task.labels, batches, arguments, threads) for name, path in shapes.items()},
    }
    results = Path(arguments.results_dir)
    write_json(results / "training_cost.json", cost)
    write_text(results / "training_cost.md", render_cost(cost))
    print((results / "training_cost.md").read_text(encoding="utf-8"))


def measure(path: str, labels: list[str], batches: list[dict], arguments: CostArguments, threads: int) -> dict:
    """Method -> trained parameters, peak memory, seconds a step, and both against the first method."""
    spawn = multiprocessing.get_context("spawn")
    pools = {name: spawn.Pool(1, start, (name, path, labels, threads)) for name in METHODS}
    turns = {name: [] for name in METHODS}
    for _ in tqdm(range(arguments.rounds), desc="interleaved rounds"):
        for name, pool in pools.items():
            turns[name].append(pool.apply(take_steps, (batches,)))
    about = {name: pool.apply(describe) for name, pool in pools.items()}
    for pool in pools.values():
        pool.terminate()
    first = METHODS[0]
    return {
        name: about[name]
        | {
            "peak_memory_ratio": round(about[name]["peak_memory_mb"] / about[first]["peak_memory_mb"], 3),
            "seconds_a_step": spread(turns[name]),
            "times_slower": spread(np.divide(turns[name], turns[first])),
        }
        for name in METHODS
    }


def start(method: str, path: str, labels: list[str], threads: int) -> None:
    """The process of one method: builds its model and optimizer as its script would, and warms up."""
    global state
    torch.set_num_threads(threads)
    bf16 = has_bf16(use_cpu=not torch.cuda.is_available())
    before = psutil.Process().memory_info().rss
    recipe = {key: value for key, value in read_recipe(RECIPE).items() if key in vars(QloraArguments())}
    if method == METHODS[0] or method in BITS:
        model = build_classifier(path, labels, recipe["attention_dropout"])  # the same for all
        if method in BITS:
            layers = find_layers(model)
            prepare(model, layers, choose_all_scales(model, layers, SchemeArguments(bits=BITS[method])))
    else:
        recipe |= {"load_in_4bit": method.startswith("QLoRA"), "init_lora_weights": "default"}
        model = build_qlora(path, labels, QloraArguments(**recipe), bf16)
        if "checkpointing" in method:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        model.set_attn_implementation("eager")  # as `train` does
    model.to(device).train()
    keep_freed_memory()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = {
        "model": model,
        "optimizer": torch.optim.AdamW(trained, lr=1e-5, fused=True),
        "precision": torch.autocast(device, torch.bfloat16, enabled=bf16),
        "device": device,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "before": before,
        "fresh": True,
    }


def take_steps(batches: list[dict]) -> float:
    """Seconds a step over the batches; the first turn warms up."""
    if state["fresh"]:
        state["fresh"] = False
        take_steps(batches[:WARMUP_STEPS])
        reset_peak_memory()
    begin = time.perf_counter()
    for batch in batches:
        inputs = {name: torch.from_numpy(array).to(state["device"]) for name, array in batch.items()}
        with state["precision"]:
            loss = state["model"](**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state["model"].parameters(), 1.0)
        state["optimizer"].step()
        state["optimizer"].zero_grad()
    float(loss)  # waits for a GPU
    return (time.perf_counter() - begin) / len(batches)


def describe() -> dict:
    return {
        "trained_parameters": state["trained_parameters"],
        "peak_memory_mb": peak_memory_mb(),
        "before_loading_mb": round(state["before"] / 1e6),
    }


if __name__ == "__main__":
    run(main)
