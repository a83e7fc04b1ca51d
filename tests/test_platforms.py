"""Machines that this program does not train on, or not on all of: one line says so. Their names are hidden from Python here."""

import sys

import pytest

from cifar10.distributed import device
from tests.launching import PROJECT, run

WINDOWS = """
import signal, sys
from filelock import FileLock, SoftFileLock, Timeout
import asyncio, jinja2, numpy, psutil, rich.progress, tyro, {third}
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGALRM", "SIGTSTP", "SIGCONT"):
    if hasattr(signal, name):
        delattr(signal, name)
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
sys.platform = "win32"
sys.argv = ["x", "--dataset", "synthetic"]
import {program}
sys.exit({program}.main({arguments}))
"""


@pytest.mark.parametrize(
    ("program", "arguments", "third"), [("main", "sys.argv[1:]", "hjson"), ("cifar10_deepspeed", "", "torch.distributed")]
)
def test_windows_is_refused_in_one_line(tmp_path, program, arguments, third):
    code = WINDOWS.format(program=program, arguments=arguments, third=third)
    process = run([sys.executable, "-c", code], PYTHONPATH=str(PROJECT), DS_ACCELERATOR="cpu")
    assert (process.returncode, process.stdout) == (2, ""), process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: Windows is not supported")
    assert "WSL" in line


@pytest.mark.parametrize(("asked", "says"), [("auto", True), ("cpu", False)])
def test_a_macs_gpu_is_not_used_and_a_line_says_so(monkeypatch, asked, says):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(device, "count_gpus", lambda: 0)
    note = device.choose(asked)
    assert ("Mac's GPU" in (note or "")) == says
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # choose has set or removed it
