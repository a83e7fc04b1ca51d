"""cifar10/device.py: what the C library is told about memory. (What a machine computes in: tests/test_preflight.py.)"""

from __future__ import annotations

import platform
import sys

import pytest

from tests.launching import run

COUNT = """
import resource
import torch
from cifar10.device import keep_freed_memory

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(20_000_000)  # 80 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if KEEPS:
    keep_freed_memory()
faults(30)  # the heap finds its size
print(faults(20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
def test_a_step_takes_no_new_pages_for_what_the_last_one_freed() -> None:
    """Even in huge pages of 2 MB, 20 times 80 MB are 800 of them."""
    given_back, kept = (
        int(run([sys.executable, "-c", COUNT.replace("KEEPS", keeps)]).stdout.split()[-1]) for keeps in ("False", "True")
    )
    assert given_back >= 700
    assert kept < 100
