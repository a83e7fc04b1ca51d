"""Starts the program on request; a start costs about a second, since the slow imports are done once.

Each line on stdin is a start: {"flags": [...], "folder": where it runs, "environment": {...}, "cifar10": {"files": their known
md5, "archive": [bytes, md5]}}; its result is a line on stdout: {"code": ..., "stdout": ..., "stderr": ...}.
A start is one forked rank, on the images of small_runs.py.
"""

import json
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import small_runs

from cifar10.data.download import Archive
from cifar10.data.registry import DATASETS
from cifar10.engine.engine import prepare

DEADLINE_SECONDS = 120  # a start that takes longer hangs: SIGALRM ends it


def be_the_program(asked: dict[str, Any], out: Path, err: Path) -> int:
    signal.alarm(DEADLINE_SECONDS)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(asked["folder"])
    os.environ.update(asked.get("environment", {}))
    if "cifar10" in asked:
        known, archive = asked["cifar10"], Archive(DATASETS["cifar10"].archive, *asked["cifar10"]["archive"])
        DATASETS["cifar10"] = replace(DATASETS["cifar10"], files=known["files"], archives=(archive,), sources=())
    sys.argv = [str(Path(small_runs.script.__file__)), *asked["flags"]]
    return small_runs.script.main()


def carry_out(asked: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch) / "out", Path(scratch) / "err"
        (code,) = small_runs.ended([small_runs.forked(be_the_program, asked, out, err)])
        printed = {"stdout": out, "stderr": err}
        return {"code": code, **{name: path.read_text(errors="replace") for name, path in printed.items()}}


if __name__ == "__main__":
    small_runs.shrink_the_data_sets()
    prepare()
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # for its first optimizer PyTorch imports its compiler
    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line))), flush=True)
