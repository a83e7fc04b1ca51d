"""python -m cifar10 bench and scaling: loops side by side, and ratios that fit them. Speed itself is not tested."""

import json
import re
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from rich.console import Console

from cifar10 import UsageError
from cifar10.commands import bench, bench_levels, scaling
from cifar10.distributed import cpus, device
from tests.helpers import one_rank

ROOT = Path(__file__).resolve().parents[2]
LOOPS = ["plain PyTorch", "stock DeepSpeed", "this program", "bn_cnn_fast", "this program, eager", "bn_cnn_fast, eager"]
if shutil.which("g++") is None:
    del LOOPS[4:]


@pytest.mark.slow
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
        assert row["steps"] == 2 * (2 + (2 if "fast" in name else 5))
        assert 0 < row["final_loss"] < 5
        assert re.search(rf"│ {name} +│ +{row['median']:,.0f} │", done.stdout)
    assert [LOOPS.index(ratio["of"]) for ratio in result["ratios"]] == [1, 2, 3, 2, 3][: len(LOOPS) - 1]
    assert [LOOPS.index(ratio["to"]) for ratio in result["ratios"]] == [0, 1, 1, 4, 5][: len(LOOPS) - 1]
    for ratio in result["ratios"]:
        above, below = rows[ratio["of"]], rows[ratio["to"]]
        assert ratio["ratio"] == above["median"] / below["median"]
        speeds = zip(above["images_per_second"], below["images_per_second"], strict=True)
        assert ratio["per_round"] == [this / that for this, that in speeds]
        assert re.search(rf"│ {ratio['of']} / {ratio['to']} +│ +{ratio['ratio']:.2f} │", done.stdout)
    assert result["environment"]["threads"] == 1
    assert result["settings"]["batch_images"] == 32


@pytest.mark.parametrize("command", [bench, scaling])
@pytest.mark.parametrize("invalid", [{"rounds": 0}, {"steps": 0}, {"warmup_steps": -1}, {"threads": 0}])
def test_invalid_sizes_are_refused(command: Any, invalid: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        command.run(dataset="synthetic", **invalid)


def test_flags_that_the_machine_or_the_program_cannot_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "count_gpus", lambda: 0)
    with pytest.raises(UsageError, match="--gpu needs a GPU"):
        bench.run(dataset="synthetic", gpu=True)
    with pytest.raises(UsageError, match="--ranks"):
        scaling.run(dataset="synthetic", ranks=(1, 0))


@pytest.mark.parametrize(
    ("gpus", "ranks", "kept"),
    [
        (0, (1, 2, 4), (1, 2, 4)),
        (1, (1, 2, 4), (1,)),
        (2, (1, 2, 4), (1, 2)),
        (8, (2, 8), (2, 8)),
        (3, (), ()),
        (3, (1, 3, 6), None),
        (1, (2, 4), None),
    ],
)
def test_scaling_stops_at_the_gpus_there_are_and_refuses_before_it_measures(monkeypatch, gpus, ranks, kept):
    monkeypatch.setattr(scaling, "count_gpus", lambda: gpus)
    if kept is not None:
        assert scaling.with_a_gpu_each(ranks, 64) == kept
    else:
        with pytest.raises(UsageError, match="--ranks"):
            scaling.with_a_gpu_each(ranks, 64)


def check(rows: dict[str, dict[str, Any]], names: list[str], rounds: int) -> None:
    """The ratios fit the measurements, and the losses show that all loops train the same network on the same images."""
    assert list(rows) == names
    plain = rows[names[0]]
    for row in rows.values():
        assert len(row["images_per_second"]) == rounds
        assert row["ratio"] == median(row["images_per_second"]) / median(plain["images_per_second"])
        quotients = zip(row["images_per_second"], plain["images_per_second"], strict=True)
        assert row["per_round"] == [this / that for this, that in quotients]
        computed = zip(plain["cpu_seconds"], row["cpu_seconds"], strict=True)
        assert row["cpu_per_round"] == [that / this for that, this in computed]
        assert row["cpu_ratio"] == median(row["cpu_per_round"])
        assert row["final_loss"] == pytest.approx(plain["final_loss"], abs=2e-3)
        assert row["waits_per_step"] is None


@pytest.mark.slow
def test_the_levels_that_a_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code behind `bench --gpu`, with the levels of a CPU; compiled models are traced, but no machine code is made."""
    monkeypatch.setattr("deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED", False)  # and put back afterwards
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: torch_compile(model, **{**how, "backend": "eager"}))
    monkeypatch.setattr(device, "missing_for_compiling", lambda: None)
    flags = {"--dataset": "synthetic", "--model": "smooth_cnn"}
    sizes: dict[str, Any] = {"rounds": 2, "steps": 4, "warmup_steps": 1, "precisions": ("bf16",), "batches": (8,)}
    cells = bench_levels.measure(flags, one_rank(), **sizes)
    assert list(cells) == ["bf16, batch 8"]
    check(cells["bf16, batch 8"], ["plain PyTorch", "eager", "compile"], rounds=2)
    shown = StringIO()
    bench_levels.show("levels", cells, Console(file=shown, width=180))
    for name, row in cells["bf16, batch 8"].items():
        line = next(line for line in shown.getvalue().splitlines() if f"│ {name} " in line)
        assert all(word in line for word in (f"{row['median']:,.0f}", f"{row['ratio']:.2f}", f"{row['final_loss']:.4f}"))


@pytest.mark.slow
def test_what_the_engine_costs_at_each_zero_stage() -> None:
    flags = {"--recipe": "bn_cnn", "--dataset": "synthetic", "--model": "smooth_cnn"}
    cells = scaling.measure_engine(flags, one_rank(), 8, ("fp32",), rounds=1, steps=3, warmup_steps=0)
    check(cells["fp32"], ["plain PyTorch", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"], rounds=1)


def test_ranks_are_compared_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with two cores; the memory is each rank's peak over all rounds."""
    first_round = [(1, 100.0, [50]), (2, 150.0, [40, 41]), (4, 120.0, [30] * 4)]
    runs = iter([*first_round, (1, 80.0, [52]), (2, 160.0, [42, 40]), (4, 140.0, [31] * 4)])

    def summary_of_run(flags: list[str], ranks: int) -> dict[str, Any]:
        wanted, speed, memory = next(runs)
        assert (flags, ranks) == (["--flag"], wanted)
        return {"images_per_second": speed, "peak_memory_mib": memory}

    monkeypatch.setattr(scaling, "summary_of_run", summary_of_run)
    monkeypatch.setattr(device, "count_gpus", lambda: 0)
    monkeypatch.setattr(cpus, "cores", lambda: 2)
    rows = scaling.measure_ranks(["--flag"], (1, 2, 4), 2, Console(quiet=True))
    assert [row["median"] for row in rows.values()] == [90, 155, 130]
    assert [row["per_round"] for row in rows.values()] == [[1, 1], [1.5, 2.0], [1.2, 1.75]]
    assert [row["efficiency"] for row in rows.values()] == pytest.approx([1, 155 / 90 / 2, 130 / 90 / 2])
    assert [row["peak_memory_mib"] for row in rows.values()] == [[52], [42, 41], [31] * 4]


@pytest.mark.slow
def test_the_speed_and_memory_of_a_run_on_two_ranks() -> None:
    flags = "--dataset synthetic --max-steps 3 --threads 1 --val-images 0 --test-images 0".split()
    summary = scaling.summary_of_run(flags, 2)
    assert (summary["world_size"], summary["steps"]) == (2, 3)
    assert summary["images_per_second"] > 0
    assert len(summary["peak_memory_mib"]) == 2
    assert all(100 < rank < 100_000 for rank in summary["peak_memory_mib"])


def test_a_run_that_fails_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "much\nerror: the reason\n")
    monkeypatch.setattr(scaling.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UsageError, match="2 ranks ended with 1: error: the reason"):
        scaling.summary_of_run(["--threads", "1"], 2)


@pytest.mark.slow
def test_peak_memory_includes_what_was_freed_again() -> None:
    """In a process of its own, whose memory is known."""
    code = """
import mmap
from cifar10.distributed import world
world_of_one = world.join(1)
before = world_of_one.peak_memory["peak_memory_mib"]
held = mmap.mmap(-1, 700 << 20)
for page in range(0, len(held), mmap.PAGESIZE):
    held[page] = 1
held.close()
print(before + world_of_one.peak_memory["peak_memory_mib"])
world.leave()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    before, after = json.loads(done.stdout.splitlines()[0])
    assert 650 < after - before < 800
