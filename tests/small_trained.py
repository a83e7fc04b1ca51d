"""Small runs that several test files use: trained once for all, on data sets that are cut down here as they were there."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from cifar10.__main__ import main
from tests.helpers import WORKERS, launch

SMALL = "--val-images 100 --threads 1 --save-every-epochs 0"
RUNS = {
    "colour": f"--recipe bn_cnn {SMALL} --dataset synthetic --global-batch-size 20 --epochs 10",
    "grey": f"--recipe mnist_synthetic {SMALL} --epochs 12 --precision fp32",
    "resized": f"--recipe bn_cnn {SMALL} --dataset synthetic --epochs 1 --resize 40 --image-size 32 --augment none",
    "all trained on": "--recipe lenet --threads 1 --dataset synthetic --max-steps 10 --test-images 50",
}


def train_all(base: Path) -> Path:
    """Carry out all of RUNS, each in a folder of its name below `base`; returns `base`."""
    starts = []
    for name, flags in RUNS.items():
        words = [*flags.split(), "--output-dir", str(base / name)]
        starts.append({"ranks": 1, "flags": words, "keep_summary": str(base / f"{name}.json")})
    (base / "starts.json").write_text(json.dumps(starts))
    launch(1, WORKERS / "small_runs.py", str(base / "starts.json"))
    return base


def command(*words: object) -> int:
    """`python -m cifar10 WORDS`, in this process and on one thread; returns its exit code."""
    before = torch.get_num_threads()
    try:
        return main([str(word) for word in words])
    finally:
        torch.set_num_threads(before)
