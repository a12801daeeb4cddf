"""The class of the processor, by the instruction sets that decide how fast a model is."""

import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

from emotion.utils.errors import UserError

# Class of processors, the highest first -> the instruction set that defines it, by PyTorch's name
CLASSES = {
    "amx": "amx_int8",
    "avx512_vnni": "avx512_vnni",
    "avx512": "avx512_bw",
    "avx_vnni": "avx_vnni",
    "avx2": "avx2",
}
ARM = "arm64"
TITLES = {
    "amx": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
    ARM: "ARM64",
}
# Settings of PyTorch, oneDNN, MKL, CTranslate2, OpenBLAS and NumPy that make them compute without some instructions
HIDING = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "CT2_FORCE_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "NPY_DISABLE_CPU_FEATURES",
)
CPUINFO = Path("/proc/cpuinfo")  # Linux's


def class_of(instruction_sets: Iterable[str]) -> str | None:
    """The highest class whose instructions are among these, in PyTorch's or Linux's names; None for an older one."""
    found = {name.replace("_", "") for name in instruction_sets}  # Linux writes avx512bw, PyTorch avx512_bw
    for name, needed in CLASSES.items():
        if needed.replace("_", "") in found:
            return name
    return None


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
        raise UserError(f"this processor has none of {', '.join(CLASSES.values())}: its times are not recorded")
    return seen


def is_arm() -> bool:
    """Whether this is a 64-bit ARM processor."""
    return platform.machine().lower() in ("arm64", "aarch64")


def instruction_sets_of_libraries() -> list[str]:
    """The instruction sets that PyTorch detects, as the other libraries do."""
    import torch  # here: rendering pages does not need it

    return [name for name, has in torch.cpu.get_capabilities().items() if has is True]


def instruction_sets_of_kernel() -> list[str] | None:
    """The instruction sets that Linux lists; None on another system."""
    if not CPUINFO.is_file():
        return None
    flags = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return flags and flags[1].split()
