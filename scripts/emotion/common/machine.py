"""The machine: threads, memory, instruction sets, package versions, the commit, and other scripts as processes."""

import contextlib
import ctypes
import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

from emotion.common.errors import UserError
from emotion.common.files import ROOT

SCRIPTS = ROOT / "scripts"
PACKAGES = ("torch", "transformers", "datasets", "evaluate", "accelerate", "tokenizers", "numpy", "scikit-learn",
            "onnx", "onnxruntime", "torchao", "optimum-intel", "openvino", "nncf", "peft", "bitsandbytes")  # fmt: skip


def choose_threads(threads: int | None) -> int:
    """The threads asked for, or all that this process may use."""
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: it takes 1 or more")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return threads or available


def has_bf16(use_cpu: bool) -> bool:
    """Whether the device that will train multiplies in bfloat16; where it does not, bfloat16 is emulated and slow."""
    import torch

    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")
    return any(torch.cpu.get_capabilities().get(name) is True for name in names)


def describe_environment(threads: int, device: str = "cpu") -> dict:
    """What the figures were measured on: the processor and its instruction sets, Python and the packages."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    vector = ("avx", "amx", "sve", "neon", "asimd", "i8mm", "dotprod", "bf16")
    return {
        "cpu": capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        "instruction_sets": sorted(
            name for name, has in capabilities.items() if has is True and name.startswith(vector)
        ),
        "threads": threads,
        "device": device,
        "python": platform.python_version(),
        "packages": package_versions(),
    }


def describe_run(threads: int) -> dict:
    """When, from which commit and on what a study was measured: what each of them begins with."""
    return {
        "date": datetime.date.today().isoformat(),
        "git_commit": git_commit(),
        "environment": describe_environment(threads),
    }


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that a result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """The commit of the working tree, marked '-dirty' if its code or recipes differ; None outside a repository."""

    def git(*words) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "scripts", "configs", "metrics", "requirements.txt")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def run_script(name: str, *words, **options) -> subprocess.CompletedProcess:
    """Runs a command of this project in a fresh process, with this Python.

    Args:
        name: its file in scripts/.
        words: its flags and their values, of any type.
        options: those of `subprocess.run`; with ``check=True`` a failure, which has said why, ends this process too.
    """
    check = options.pop("check", False)
    done = subprocess.run([sys.executable, str(SCRIPTS / name), *map(str, words)], **options)
    if check and done.returncode:
        sys.exit(done.returncode)
    return done


def reset_peak_memory() -> None:
    """Lets `peak_memory_mb` count from here on, where the system can; elsewhere it counts from the process's start."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mb() -> int:
    """Most memory that was in use at once, in megabytes (1e6 bytes): the GPU's, or the process's on a CPU."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


def keep_freed_memory() -> None:
    """Tells glibc to reuse large buffers instead of returning them to the system after every step.

    The gradient of the word embeddings alone is 47 MB for MiniLM: fetching such pages anew cost a quarter of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)  # what loading the model has left over
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
