"""The machine: threads, memory, instruction sets, package versions, the commit, and processes."""

import contextlib
import ctypes
import datetime
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from emotion.utils.arguments import Range
from emotion.utils.errors import UserError
from emotion.utils.files import ROOT

SCRIPTS = ROOT / "scripts"  # in the clone, wherever the command is started
# Packages whose version a result may depend on, by their names on PyPI; each record lists them.
PACKAGES = (
    "torch transformers datasets evaluate accelerate tokenizers numpy scikit-learn onnx onnxruntime torchao "
    "optimum-intel openvino nncf peft bitsandbytes"
).split()
ARM = "arm64"
# Classes of processors, the highest first, by the instruction sets that decide how fast a model is -> their titles
PROCESSORS = {
    "amx": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
    ARM: "ARM64",
}
# Settings of PyTorch, oneDNN, MKL, CTranslate2, OpenBLAS and NumPy that make them compute without some instructions
HIDING = (
    "ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA MKL_ENABLE_INSTRUCTIONS MKL_CBWR CT2_FORCE_CPU_ISA "
    "OPENBLAS_CORETYPE NPY_DISABLE_CPU_FEATURES"
).split()
CPUINFO = Path("/proc/cpuinfo")  # Linux's


def integer_setting(name: str) -> int | None:
    """An environment variable as an integer, the first of a list with commas; None if it is not one."""
    try:
        return int(os.environ[name].split(",")[0])
    except (KeyError, ValueError):
        return None


def is_main_process() -> bool:
    """Whether this process prints and saves for all that were launched with it; True without a launcher."""
    # A cluster may set RANK and WORLD_SIZE for each of its machines. LOCAL_RANK comes from a launcher alone.
    launched = integer_setting("LOCAL_RANK") is not None and (integer_setting("WORLD_SIZE") or 1) > 1
    return not launched or (integer_setting("RANK") or 0) <= 0


def count_processors(root: Path = Path("/")) -> int:
    """The number of processors that this process may use; ``root`` holds `proc` and `sys`."""
    # macOS and Windows do not tell which processors a process may use.
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Of 1.5 processors one: a second thread would be stopped for half of the time, in the middle of an answer.
    return max(1, int(min(granted, read_cpu_quota(root))))


def read_cpu_quota(root: Path) -> float:
    """The CPU quota of the control groups (cgroup v1 or v2), in processors; infinite where none limits it."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return math.inf
    quota = math.inf
    for group in groups:
        _, controllers, name = group.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):  # v2 names none
            continue
        for hierarchy in {controllers, controllers and "cpu"}:  # v1 mounts "cpu,cpuacct", "cpu", or both
            # Each parent group limits it too. Of a name that is the machine's, a container sees only the root.
            for path in (PurePosixPath(name), *PurePosixPath(name).parents):
                quota = min(quota, _quota_of(root / "sys/fs/cgroup" / hierarchy / path.relative_to("/")))
    return quota


def _quota_of(folder: Path) -> float:
    """The quota of one control group, in processors; infinite without a limit."""
    with contextlib.suppress(OSError, ValueError):  # no such file; or "max", which is no limit
        quota, period = map(int, (folder / "cpu.max").read_text(encoding="utf-8").split())
        return quota / period
    with contextlib.suppress(OSError, ValueError):
        quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        if quota > 0:  # -1: no limit
            return quota / int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))
    return math.inf


# More threads than processors only wait for each other, and each takes memory; some more are allowed to compare.
THREADS = Range(1, max(64, 8 * count_processors()))


def choose_threads(threads: int | None, root: Path = Path("/")) -> int:
    """``threads`` if given and allowed, else `OMP_NUM_THREADS`, at most ``count_processors(root)``."""
    if threads is not None:
        if not isinstance(threads, int) or isinstance(threads, bool) or threads not in THREADS:
            raise UserError(f"threads {threads!r:.40}: it takes {THREADS}")
        return threads
    processors, wanted = count_processors(root), integer_setting("OMP_NUM_THREADS")
    return min(processors, wanted) if wanted and wanted > 0 else processors


def has_bf16(use_cpu: bool) -> bool:
    """Whether the device multiplies in bfloat16; where it does not, bfloat16 is emulated and slow."""
    import torch  # here, as everywhere in this file: classifying a text must not wait for torch

    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # PyTorch lists many instruction sets; these are the bfloat16 products of x86 and ARM.
    return bool({"avx512_bf16", "amx_bf16", "arm_bf16", "bf16"} & {*instruction_sets_of_libraries()})


def class_of(instruction_sets: Iterable[str]) -> str | None:
    """The highest class whose instructions are among these, in PyTorch's or Linux's names; None for an older one."""
    found = {name.replace("_", "") for name in instruction_sets}  # Linux writes avx512bw, PyTorch avx512_bw
    needed = {"amx": "amxint8", "avx512": "avx512bw"}  # all others are named as their class
    return next((name for name in PROCESSORS if needed.get(name, name.replace("_", "")) in found), None)


def find_processor_class() -> str:
    """The class of this processor; raises `UserError` if instructions are hidden, or it is older than all classes."""
    for name in HIDING:
        if os.environ.get(name):
            raise UserError(f"{name} is set and hides instructions: no processor has these times; unset it")
    if is_arm():
        return ARM
    seen, listed = class_of(instruction_sets_of_libraries()), instruction_sets_of_kernel()
    if listed is not None and class_of(listed) != seen:
        raise UserError(
            f"the libraries see {seen or 'an older processor'}, and {CPUINFO} lists {class_of(listed) or 'one'}: "
            "instructions are hidden, and no processor has these times"
        )
    if seen is None:
        raise UserError(f"this processor is in none of {', '.join(PROCESSORS)}: its times are not recorded")
    return seen


def is_arm() -> bool:
    """Whether this is a 64-bit ARM processor."""
    return platform.machine().lower() in ("arm64", "aarch64")


def instruction_sets_of_libraries() -> list[str]:
    """The instruction sets that PyTorch detects, as the other libraries do."""
    import torch

    return [name for name, has in torch.cpu.get_capabilities().items() if has is True]


def instruction_sets_of_kernel() -> list[str] | None:
    """The instruction sets that Linux lists; None on another system."""
    if not CPUINFO.is_file():
        return None
    flags = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return flags and flags[1].split()


def describe_environment(threads: int, device: str = "cpu") -> dict:
    """The environment of a measurement: processor, instruction sets, threads, device, Python and packages."""
    import torch

    # Of a long list, the instruction sets that decide how fast matrices are multiplied, by the beginnings of names.
    vector = ("avx", "amx", "sve", "neon", "asimd", "i8mm", "dotprod", "bf16")
    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine(),
        "instruction_sets": sorted(name for name in instruction_sets_of_libraries() if name.startswith(vector)),
        "threads": threads,
        "device": device,
        "python": platform.python_version(),
        "packages": package_versions(),
    }


def describe_run(threads: int) -> dict:
    """The date, the commit and the environment, for the results of a study."""
    date = datetime.date.today().isoformat()
    return {"date": date, "git_commit": git_commit(), "environment": describe_environment(threads)}


def package_versions() -> dict[str, str]:
    """Name -> version, of each of `PACKAGES` that is installed: optimum-intel needs an old Transformers."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def git_commit() -> str | None:
    """The commit of the working tree, marked '-dirty' if its code or recipes differ; None outside a repository."""
    # Only files that decide a result: a results file that was just written makes no commit dirty.
    places = ("scripts", "configs", "metrics", "requirements.txt", "requirements-inference.txt")
    commit = _git("rev-parse", "HEAD")
    return commit and commit + ("-dirty" if _git("status", "--porcelain", "--", *places) else "")


def code_url() -> str | None:
    """The page of the GitHub repository that this working tree was cloned from; None for any other origin."""
    # Nothing but owner and name is taken: the rest may be a machine of this user's, or hold a password.
    origin = _git("remote", "get-url", "origin") or ""
    found = re.search(r"(?:^|[/@.])github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$", origin)
    return f"https://github.com/{found[1]}" if found else None


def _git(*args: str) -> str | None:
    """The output of a git command in the repository of this code; None without git, or outside a repository."""
    try:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run_script(name: str, *args, **options) -> subprocess.CompletedProcess:
    """Runs a command, by its file in scripts/, in a fresh process of the same Python, with ``args`` of any type.

    ``options`` are those of `subprocess.run`. With ``check=True`` a failure ends this process with the same status and
    no message of its own, since the command has printed one.
    """
    check = options.pop("check", False)
    # sys.executable: `python` alone may be another one than that of the virtual environment.
    done = subprocess.run([sys.executable, str(SCRIPTS / name), *map(str, args)], **options)
    if check and done.returncode:
        sys.exit(done.returncode)
    return done


def reset_peak_memory() -> None:
    """Resets `peak_memory_mb` where the system can; elsewhere it counts from the start of the process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Linux: writing 5 sets the peak of this process's memory back to what it holds now.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mb() -> int | None:
    """The peak memory in megabytes (1e6 bytes): the GPU's, or the process's on a CPU; None on Windows."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes, Linux blocks of 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


def keep_freed_memory() -> None:
    """Makes glibc reuse large buffers; fetching their pages anew took a quarter of a training step of MiniLM."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)  # gives back what loading the model has left over, before nothing is given back any more
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: buffers below 1 GB come from the heap, not from fresh pages
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: the end of the heap is never given back
