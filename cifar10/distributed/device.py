"""What this machine computes on, in which precisions natively, and how its memory is kept.

Torch is asked only where there is a GPU driver.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import sysconfig
from contextlib import suppress
from functools import cache
from pathlib import Path

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of /proc/cpuinfo: matrix products in bf16 on x86, then on ARM


@cache
def count_gpus() -> int:
    """GPUs that torch can use; 0 where DS_ACCELERATOR=cpu hides them."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    if not (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists() or Path("/dev/kfd").exists()):
        return 0
    import torch  # takes seconds to import

    return torch.cuda.device_count()


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return set(next(found, []))


@cache
def native_precisions() -> tuple[str, ...]:
    """Of "fp32", "bf16" and "fp16", those that this machine's GPUs run fast, or its CPU if it has no GPU.

    fp16 is never among a CPU's, even if /proc/cpuinfo lists avx512_fp16: on such an Intel CPU torch 2.15 took 79.9 s for the
    forward and backward of one 64 -> 128 convolution at 112x112, against 0.204 s in fp32 and 0.053 s in bf16.
    """
    if count_gpus():
        import torch

        return ("fp32", "fp16", "bf16") if torch.cuda.get_device_capability() >= (8, 0) else ("fp32", "fp16")
    return ("fp32", "bf16") if _cpu_flags() & BF16_FLAGS else ("fp32",)


def name() -> str:
    """`GPU` or `CPU`, for messages."""
    return "GPU" if count_gpus() else "CPU"


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free, for those of the next step: for this whole process, and for good.

    glibc gives large blocks back to the kernel, which must clear every page of them when they are taken again: up to a
    quarter of a step of `speednet` in bf16 (records/LOG.md). Other C libraries are left as they are.
    """
    trim_threshold, top_pad, most_mapped = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_MAX of malloc.h
    with suppress(AttributeError, OSError, TypeError):  # no mallopt, no C library to ask
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(most_mapped, 0)
        mallopt(trim_threshold, -1)  # never
        mallopt(top_pad, 2**26)  # it grows by 64 MB at a time: an aligned block does not fit into the gap of an equal one


def missing_for_compiling() -> str | None:
    """What PyTorch's compiler would miss here, and the remedy; None if nothing."""
    gpu = count_gpus() > 0
    variable, usual = ("CC", ("gcc", "clang")) if gpu else ("CXX", ("clang++",) if sys.platform == "darwin" else ("g++",))
    compilers = (os.environ[variable],) if os.environ.get(variable) else usual
    if not any(shutil.which(word) for word in (compiler.split()[0] for compiler in compilers)):
        kind = "C" if gpu else "C++"
        return f"a {kind} compiler, and there is no {compilers[0]}: install one, or name it in {variable}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h: install Python's headers (python3-dev), or a Python that has them (uv python install)"
    return None
