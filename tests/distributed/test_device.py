"""Freed memory stays in the process. (Native precisions: tests/test_plan.py.)"""

from __future__ import annotations

import os
import platform
import sys

import pytest

from tests.launching import run

COUNT = """
import resource
import torch
from cifar10.run import trained
from cifar10.distributed import world

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(20_000_000)  # 80 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

HOW
faults(30)  # the heap finds its size
print(faults(20))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has the setting")
@pytest.mark.parametrize("how", ["world.join(1)", "trained.alone(1)", ""])
def test_a_step_takes_no_new_pages_for_what_the_last_one_freed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 times 80 MB are 800 huge pages of 2 MB, or more small ones: what a process takes without the setting."""
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name in ("LD_PRELOAD", "GLIBC_TUNABLES")]:
        monkeypatch.delenv(name)
    ended = run([sys.executable, "-c", COUNT.replace("HOW", how)], DS_ACCELERATOR="cpu")
    assert ended.returncode == 0, ended.stderr
    taken = int(ended.stdout.split()[-1])
    assert taken < 100 if how else taken >= 700
