"""Small runs that several test files use: trained once per process, on data sets of 600 and 200 images."""

import json
from pathlib import Path

import torch

from cifar10.__main__ import main
from tests.helpers import WORKERS, launch

SMALL = "--val-images 100 --threads 1 --save-every-epochs 0"
RUNS = {
    "color": f"--recipe bn_cnn {SMALL} --dataset synthetic --global-batch-size 20 --epochs 10",
    "gray": f"--recipe mnist_synthetic {SMALL} --epochs 12 --precision fp32",
    "resized": f"--recipe bn_cnn {SMALL} --dataset synthetic --epochs 1 --resize 40 --image-size 32 --augment none",
    "all trained on": "--recipe lenet --threads 1 --dataset synthetic --max-steps 10 --test-images 50",
}


def train_all(base: Path, runs: dict[str, str]) -> str:
    """Train each of these runs in the folder of its name below `base`; returns what they printed."""
    starts = []
    for name, flags in runs.items():
        words = [*flags.split(), "--output-dir", str(base / name)]
        starts.append({"ranks": 1, "flags": words, "keep_summary": str(base / f"{name}.json")})
    (base / "starts.json").write_text(json.dumps(starts))
    return launch(1, WORKERS / "small_runs.py", str(base / "starts.json"))


def command(*words: object) -> int:
    """`python -m cifar10 WORDS`, in this process and on one thread; returns its exit code."""
    before = torch.get_num_threads()
    try:
        return main([str(word) for word in words])
    finally:
        torch.set_num_threads(before)
