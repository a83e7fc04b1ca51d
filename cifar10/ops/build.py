"""The C++ of this folder, compiled once for this machine with g++ and kept in the user's cache."""

import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from cifar10 import UsageError

SOURCE = Path(__file__).with_name("norm_pool.cpp")
COMPILE = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]


def _machine() -> str:
    """What -march=native depends on: a cache may be shared by machines that differ."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@cache
def library() -> Path:
    """The shared library; compiled, in about two seconds, unless it has been. Raises UsageError, with what it needs.

    It is linked without OpenMP's library, to use the one that PyTorch has loaded: two would have two pools of threads.
    """
    if not sys.platform.startswith("linux"):
        raise UsageError("Linux")
    compiler = os.environ.get("CXX") or "g++"
    what = "\n".join([SOURCE.read_text(encoding="utf-8"), compiler, *COMPILE, _machine()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cifar10-deepspeed" / "ops"
    found = folder / f"{SOURCE.stem}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if found.exists():
        return found
    if not shutil.which(compiler.split()[0]):
        raise UsageError(f"a C++ compiler ({compiler} was not found): install g++, or set CXX")
    built, command = found.with_suffix(f".{os.getpid()}"), compiler.split()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for step in ([*COMPILE, "-c", str(SOURCE), "-o", f"{built}.o"], ["-shared", f"{built}.o", "-o", str(built)]):
            subprocess.run([*command, *step], check=True, capture_output=True, text=True)
        built.replace(found)  # complete, or not there
    except OSError as error:
        raise UsageError(f"a cache that is writable ({folder}: {error.strerror})") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[0]
        raise UsageError(f"g++, which {compiler} does not replace ({said[:200]})") from None
    finally:
        for left in (Path(f"{built}.o"), built):
            left.unlink(missing_ok=True)
    return found
