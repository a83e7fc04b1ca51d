"""The compute device: which one was asked for, GPUs that PyTorch can use or cannot, precisions, allocator, compiler.

PyTorch takes seconds to import, and is imported only where something hints at a GPU.
"""

import ctypes
import os
import re
import shutil
import sys
import sysconfig
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from cifar10 import UsageError

Choice = Literal["auto", "cuda", "cpu"]
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # in /proc/cpuinfo: bf16 matrix products on x86 (2) and ARM
CONTAINER_SIGN = "/proc/driver/nvidia"  # the host's, also seen in a container that was given no GPU
SIGNS = ("/dev/nvidiactl", CONTAINER_SIGN, "/dev/nvmap", "/dev/kfd", "/dev/dxg")  # NVIDIA (3: Jetson), AMD, Windows' Linux
ROOT = Path("/")  # below which they are looked for
AMD, OF_AMD = "/dev/kfd", ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # read beside CUDA_VISIBLE_DEVICES
OR_CPU = "or train on the CPU with --device cpu"
DOWNLOADS = "https://pytorch.org/get-started/locally"


# --- what was asked for ---------------------------------------------------------------------------------------------------


def selection() -> tuple[str, str] | None:
    """The environment variable that selects this process's GPUs, and its value; None if all are visible."""
    names = ("CUDA_VISIBLE_DEVICES", *(OF_AMD if sign_of_gpu() == AMD else ()))
    return next(((name, os.environ[name].strip()) for name in names if name in os.environ), None)


def _hides_all() -> bool:
    """Whether that variable asks for no GPU: it is empty, or begins with -1."""
    selected = selection()
    return selected is not None and selected[1].split(",")[0] in ("", "-1")


def choose(asked: Choice = "auto") -> str | None:
    """Settle the device of this process and its children: --device, else the environment's. Raises UsageError if it cannot be.

    It is kept in DS_ACCELERATOR, which DeepSpeed reads too. Returns a note if the environment asks for the CPU.
    """
    if sys.platform == "win32":
        raise UsageError("Windows is not supported, only its Linux: run the same command in WSL 2 (wsl --install)")
    if asked != "auto":
        os.environ["DS_ACCELERATOR"] = asked
    wanted = os.environ.get("DS_ACCELERATOR") or "auto"
    if wanted == "auto":
        os.environ.pop("DS_ACCELERATOR", None)  # DeepSpeed refuses an empty one
    elif wanted not in ("cuda", "cpu"):
        raise UsageError(f"DS_ACCELERATOR is {wanted!r}, expected cuda or cpu; unset it, or override it with --device cpu")
    if wanted == "cuda" and _hides_all():
        name, value = selection()
        raise UsageError(f"a GPU was asked for, and {name}={value} hides all of them; unset {name}, {OR_CPU}")
    if count_gpus() == 0 and wanted == "cuda":
        raise UsageError(f"a GPU was asked for, and there is no sign of one on this machine; install its driver, {OR_CPU}")
    if wanted == "auto" and sys.platform == "darwin":
        return "device: the CPU; this program does not use a Mac's GPU"
    if wanted == "auto" and _hides_all():
        return "device: the CPU, since {}={} hides all GPUs".format(*selection())
    if asked == "auto" and wanted == "cpu" and "RANK" not in os.environ and (sign := sign_of_gpu()):
        return f"device: the CPU, since DS_ACCELERATOR=cpu asks for it ({sign} is a sign of a GPU)"
    return None


def visible_names(count: int) -> list[str]:
    """The visible GPUs as CUDA_VISIBLE_DEVICES names them, in order: numbers, UUIDs or MIG names."""
    names = selection()[1].split(",") if selection() else []
    return names[:count] if len(names) >= count else [str(number) for number in range(count)]


# --- the GPUs there are ---------------------------------------------------------------------------------------------------


def _nvml() -> Any:
    """NVIDIA's management library, if it answers."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == 0 else None
    return None


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None if it does not answer."""
    text = ctypes.create_string_buffer(96)
    with suppress(AttributeError):  # no library, or not this function
        _nvml().nvmlSystemGetDriverVersion(text, len(text))
    return text.value.decode(errors="replace") or None


def facts() -> dict[str, Any]:
    """What environment.json says of the GPUs and of what drives them; empty if there are none to use."""
    if not count_gpus():
        return {}
    import torch

    indices = range(torch.cuda.device_count())
    nccl = torch.distributed.is_nccl_available() and ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "driver": driver_version(),
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "cudnn": torch.backends.cudnn.version(),
        "nccl": nccl or None,
        "gpus": [torch.cuda.get_device_name(index) for index in indices],
        "capability": ["{}.{}".format(*torch.cuda.get_device_capability(index)) for index in indices],
    }


def sign_of_gpu() -> str | None:
    """What hints at a GPU of NVIDIA or AMD, whether or not PyTorch can use it; None if nothing does."""
    if shutil.which("nvidia-smi"):
        return "nvidia-smi"
    return next((sign for sign in SIGNS if Path(ROOT, sign[1:]).exists()), None) or ("NVIDIA's driver" if _nvml() else None)


def count_gpus() -> int:
    """GPUs that this process may use; 0 if the CPU was asked for, or if there is no sign of any.

    Raises UsageError, with the ways out, if there is a sign of GPUs that PyTorch cannot use: it never falls back to the CPU.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or _hides_all():
        return 0
    sign = sign_of_gpu()
    return _count_usable(sign) if sign else 0


def _count_usable(sign: str) -> int:
    import torch

    cuda, hip, is_amd = torch.version.cuda, torch.version.hip, sign == AMD
    built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPUs only"
    fault = None
    if not (hip if is_amd else cuda):
        fault, cure = f"it is built for {built}", f"install its build for {'ROCm' if is_amd else 'CUDA'} ({DOWNLOADS})"
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say at length what is said here
            try:
                torch.cuda.init()
            except Exception as error:  # of several types
                fault, cure = re.split(r"\. [A-Z]|\n", str(error))[0].rstrip("."), _cure(str(error), sign)
    if fault:
        raise UsageError(
            f"found {sign}, a sign of a GPU, but PyTorch {torch.__version__} ({built}) can use none: {fault}; {cure}, {OR_CPU}"
        )
    _refuse_unsupported(torch)
    return torch.cuda.device_count()


def _cure(error: str, sign: str) -> str:
    """What may help where CUDA does not start."""
    selected = selection()
    if selected and selected[1] == "NoDevFiles":
        return "SLURM gave this job no GPU: request one (sbatch --gres=gpu:1)"
    if selected and "No CUDA GPUs" in error:
        return "{0}={1} selects none: correct or unset {0}".format(*selected)
    if sign == CONTAINER_SIGN and "too old" not in error:  # and no nvidia-smi, nor /dev/nvidiactl
        return "give the container the GPUs (docker run --gpus all)"
    return f"update the driver, or install a PyTorch built for an older CUDA ({DOWNLOADS})"


def _is_supported(torch: Any, index: int) -> bool:
    """Whether this PyTorch has kernels for that GPU: its first kernel would fail otherwise."""
    built = [name.split(":")[0] for name in torch.cuda.get_arch_list()]
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0] in built
    major, minor = torch.cuda.get_device_capability(index)
    for kind, *least in re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(built)):
        least_major, least_minor = map(int, least)  # machine code runs on its own major version, PTX on all that are newer
        if (least_major == major and least_minor <= minor) or (kind == "compute" and least_major < major):
            return True
    return False


def _refuse_unsupported(torch: Any) -> None:
    count = torch.cuda.device_count()
    usable = [index for index in range(count) if _is_supported(torch, index)]
    if bad := sorted(set(range(count)) - set(usable)):
        names = visible_names(count)
        others = f"use the others (CUDA_VISIBLE_DEVICES={','.join(names[i] for i in usable)}), " if usable else ""
        raise UsageError(
            f"PyTorch {torch.__version__} has no kernels for GPU {bad[0]}, {torch.cuda.get_device_name(bad[0])} (sm_"
            f"{'{}{}'.format(*torch.cuda.get_device_capability(bad[0]))}), only for {', '.join(torch.cuda.get_arch_list())};"
            f" {others}install a PyTorch that has them ({DOWNLOADS}), {OR_CPU}"
        )


# --- precisions, memory, compiler -----------------------------------------------------------------------------------------


def _cpu_flags() -> set[str]:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return set(next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), ()))
    return set()


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
