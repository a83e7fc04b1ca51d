"""The compute device: GPU count, native precisions, memory allocator, compiler. Imports torch only if there is a GPU driver."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import sysconfig
from contextlib import suppress
from functools import cache
from pathlib import Path

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # in /proc/cpuinfo: bf16 matrix products on x86 (2) and ARM


@cache
def count_gpus() -> int:
    """GPUs that torch can use; 0 where DS_ACCELERATOR=cpu hides them."""
    driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists() or Path("/dev/kfd").exists()
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not driver:
        return 0
    import torch  # takes seconds to import

    return torch.cuda.device_count()


def _cpu_flags() -> set[str]:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return set(next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), ()))
    return set()


@cache
def native_precisions() -> tuple[str, ...]:
    """The precisions among "fp32", "bf16" and "fp16" that the GPUs, or without GPUs the CPU, support natively.

    Never fp16 on a CPU, even if /proc/cpuinfo lists avx512_fp16: on such an Intel CPU torch 2.15 took 79.9 s for the forward
    and backward of one 64 -> 128 convolution at 112x112, compared to 0.204 s in fp32 and 0.053 s in bf16.
    """
    if count_gpus():
        import torch

        return ("fp32", "fp16", "bf16") if torch.cuda.get_device_capability() >= (8, 0) else ("fp32", "fp16")
    return ("fp32", "bf16") if _cpu_flags() & BF16_FLAGS else ("fp32",)


def name() -> str:
    """`GPU` or `CPU`, for messages."""
    return "GPU" if count_gpus() else "CPU"


def keep_freed_memory() -> None:
    """Tell glibc's malloc to reuse freed memory instead of returning it to the kernel; does nothing with other C libraries.

    The kernel would zero the pages again at the next allocation: up to a quarter of a step of `speednet` in bf16.
    """
    trim_threshold, top_pad, most_mapped = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX in malloc.h
    with suppress(AttributeError, OSError, TypeError):  # no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(most_mapped, 0)
        mallopt(trim_threshold, -1)  # never
        mallopt(top_pad, 2**26)  # grow by 64 MB: an aligned block does not fit the gap that a block of its size left


def missing_for_compiling() -> str | None:
    """What torch.compile needs and this machine lacks, and how to install it; None if nothing."""
    gpu = count_gpus() > 0
    variable, usual = ("CC", ("gcc", "clang")) if gpu else ("CXX", ("clang++",) if sys.platform == "darwin" else ("g++",))
    compilers = (os.environ[variable],) if os.environ.get(variable) else usual
    if not any(shutil.which(compiler.split()[0]) for compiler in compilers):
        return f"a {'C' if gpu else 'C++'} compiler ({compilers[0]} was not found): install one, or set {variable}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h: install Python's headers (python3-dev), or a Python that has them (uv python install)"
    return None
