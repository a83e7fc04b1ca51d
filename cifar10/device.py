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

# Words of /proc/cpuinfo that mean matrix products in this precision: x86's, then ARM's.
CPU_FLAGS = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"}}


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
    """Of "fp32", "bf16" and "fp16", those that the GPUs of this machine compute in themselves, or its CPU if it has none."""
    if count_gpus():
        import torch

        return ("fp32", "fp16", "bf16") if torch.cuda.get_device_capability() >= (8, 0) else ("fp32", "fp16")
    flags = _cpu_flags()
    return ("fp32", *(name for name, words in CPU_FLAGS.items() if flags & words))


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
