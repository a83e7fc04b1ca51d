"""python -m cifar10 bench: three loops side by side, and quotients that fit them. Nothing here is about speed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from cifar10 import UsageError, bench

ROOT = Path(__file__).resolve().parent.parent
LOOPS = ["plain PyTorch", "stock DeepSpeed", "this program"]


def test_the_tables_and_the_numbers_behind_them(tmp_path: Path) -> None:
    written = tmp_path / "bench.json"
    flags = "--dataset synthetic --rounds 2 --steps 5 --warmup-steps 2 --threads 1 --json".split()
    command = [sys.executable, "-m", "cifar10", "bench", *flags, str(written)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    result = json.loads(written.read_text())
    rows = result["rows"]
    assert list(rows) == LOOPS
    for name, row in rows.items():
        assert len(row["images_per_second"]) == 2
        assert row["median"] == median(row["images_per_second"])
        assert row["steps"] == 2 * (2 + 5)
        assert 0 < row["final_loss"] < 5
        assert re.search(rf"│ {name} +│ +{row['median']:,.0f} │", done.stdout)
    assert [(ratio["of"], ratio["to"]) for ratio in result["ratios"]] == [(LOOPS[1], LOOPS[0]), (LOOPS[2], LOOPS[1])]
    for ratio in result["ratios"]:
        above, below = rows[ratio["of"]], rows[ratio["to"]]
        assert ratio["ratio"] == above["median"] / below["median"]
        speeds = zip(above["images_per_second"], below["images_per_second"], strict=True)
        assert ratio["per_round"] == [this / that for this, that in speeds]
        assert re.search(rf"│ {ratio['of']} / {ratio['to']} +│ +{ratio['ratio']:.2f} │", done.stdout)
    assert result["environment"]["threads"] == 1
    assert result["settings"]["batch_images"] == 32


@pytest.mark.parametrize("impossible", [{"rounds": 0}, {"steps": 0}, {"warmup_steps": -1}, {"threads": 0}])
def test_what_cannot_be_measured_is_refused(impossible: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        bench.run(dataset="synthetic", **impossible)


def test_importing_it_starts_nothing() -> None:
    look = "import sys, cifar10.bench; print('deepspeed' in sys.modules, 'torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False", "False"], done.stderr
