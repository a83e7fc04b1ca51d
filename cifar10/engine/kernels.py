"""DeepSpeed's own kernels, which it compiles when they are first used: what that needs is checked before any rank starts."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cifar10 import UsageError
from cifar10.config.ds_check import look_up
from cifar10.distributed import device


def kernel_of(config: dict[str, Any]) -> str | None:
    """The kernel that a resolved config's optimizer needs; None if it is PyTorch's or this program's.

    Offloaded, DeepSpeed has kernels for the CPU of its own; Adam and AdamW use PyTorch's unless torch_adam is false.
    """
    name, params = config["optimizer"]["type"].lower(), config["optimizer"].get("params", {})
    offloads = look_up(config, "zero_optimization.offload_optimizer.device", "none") != "none"
    if name in ("adam", "adamw"):
        return None if params.get("torch_adam") else "cpu_adam" if offloads else "fused_adam"
    if offloads and name in ("adagrad", "lion"):
        return f"cpu_{name}"
    return {"lamb": "fused_lamb", "lion": "fused_lion"}.get(name)


def build_locks(kernel: str) -> list[Path]:
    """The lock files of a kernel's builds. PyTorch waits until they are gone, and a build that was killed leaves its own."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(chosen or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return sorted(root.glob(f"{kernel}/lock" if chosen else f"torch_extensions/*/{kernel}/lock"))


def refuse_missing_kernel(config: dict[str, Any]) -> None:
    """Raise UsageError if the optimizer's kernel cannot be compiled here, or is locked by another build."""
    kernel = kernel_of(config)
    if kernel is None:
        return
    optimizer = config["optimizer"]["type"]
    if kernel in ("fused_lamb", "fused_lion") and not device.count_gpus():
        raise UsageError(f"optimizer.type {optimizer} is for GPUs only in DeepSpeed; use AdamW")
    missing = device.missing_for_compiling()
    if not missing and not (shutil.which("ninja") or find_spec("ninja")):
        missing = "ninja: pip install ninja"
    if not missing and device.count_gpus() and not (os.environ.get("CUDA_HOME") or shutil.which("nvcc")):
        missing = "CUDA's compiler (nvcc was not found): install it, or set CUDA_HOME"
    adam = " (or leave out torch_adam, for PyTorch's)" if optimizer.lower().startswith("adam") else ""
    if missing:
        raise UsageError(f"optimizer.type {optimizer} compiles DeepSpeed's {kernel}, which needs {missing}{adam}")
    if locks := build_locks(kernel):
        raise UsageError(f"DeepSpeed's {kernel} is being compiled by another process; if there is none, delete {locks[0]}")
