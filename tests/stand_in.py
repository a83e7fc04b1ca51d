"""PyTorch's CUDA build on GPUs that compute nothing: a library that stands in for the CUDA runtime.

    python = StandIn.or_skip()
    python("main.py", "--num-gpus", "2", gpus=2)          # a CompletedProcess; its ranks find the GPUs, too
    python("-m", "cifar10", "doctor", FAKE_MEM_GB="16")

PyTorch's dispatcher, allocator and autograd, NCCL's process group and DeepSpeed are the real ones, and streams, captures and
waits follow CUDA's rules; values mean nothing. The tool is a folder of its own, in $CUDA_STAND_IN or beside the checkout.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from tests.launching import PROJECT, run

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cifar10_tests"


@dataclass(frozen=True)
class StandIn:
    """Calling it runs `python` with `words` on `gpus` GPUs, to its end, in the project's folder."""

    python: str
    tool: Path
    built: Path

    @classmethod
    def or_skip(cls, python: str = sys.executable) -> StandIn:
        """Skip the test where the tool is absent or does not build; fail it where CIFAR10_TESTS_NEED_STAND_IN is set."""
        try:
            return _built(python)
        except LookupError as error:
            if os.environ.get("CIFAR10_TESTS_NEED_STAND_IN"):
                pytest.fail(f"{error}; and CIFAR10_TESTS_NEED_STAND_IN is set")
            pytest.skip(str(error))

    def __call__(self, *words: str, gpus: int = 1, **more: str) -> subprocess.CompletedProcess[str]:
        variables = {"STAND_IN": str(self.built), "FAKE_GPUS": str(gpus), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
        command = ["env", "-u", "DS_ACCELERATOR", "sh", str(self.tool / "run.sh"), self.python, *words]
        return run(command, **{**variables, **more})


@functools.cache
def _built(python: str) -> StandIn:
    """Built once for each torch and each state of the tool. Raises LookupError, with the reason, where it cannot be."""
    tool = Path(os.environ.get("CUDA_STAND_IN") or PROJECT.parent / "shared" / "tools" / "cuda_stand_in")
    if not (tool / "build.sh").is_file():
        raise LookupError("needs the stand-in for CUDA: set CUDA_STAND_IN to the folder that holds its build.sh")
    where = subprocess.run([python, str(tool / "gen.py"), "where"], capture_output=True, text=True, check=False)
    if where.returncode:
        raise LookupError(where.stderr.strip())
    files = sorted(path for path in tool.rglob("*") if path.suffix in (".c", ".cpp", ".py", ".sh"))
    state = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
    built = CACHE / f"{Path(where.stdout.strip()).name}-{state}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{built}.lock"):
        if not (built / "bin" / "nvidia-smi").is_file():  # what is built last
            make = ["sh", str(tool / "build.sh"), python, str(built)]
            build = subprocess.run(make, capture_output=True, text=True, check=False)
            if build.returncode:
                raise LookupError(f"the stand-in for CUDA does not build: {build.stderr.strip()[-300:]}")
    return StandIn(python, tool, built)
