"""What more ranks bring, and what the engine costs: `python -m cifar10 scaling`.

    ranks      the program itself, from its launcher to its summary, on 1, 2 and 4 ranks at one global batch: images per second
               of training, and the most memory that each rank held
    engine     one rank's step in this process beside plain PyTorch's (see bench_levels.py), at each ZeRO stage and precision

Both in rounds, in turns. On a CPU all ranks share its cores: efficiency is images per second over those of one rank, divided
by the cores that the ranks can use at most, so that four ranks on two cores count as two. On GPUs a rank has its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from cifar10 import UsageError
from cifar10.commands import bench_levels
from cifar10.commands.bench import measuring
from cifar10.commands.bench_levels import PLAIN
from cifar10.config import ds_config
from cifar10.config.recipe import PROJECT
from cifar10.distributed import device, world
from cifar10.distributed.world import World
from cifar10.plan import Plan
from cifar10.run import folder as run_folder
from cifar10_deepspeed import get_cifar10_dataloaders

STAGES = (0, 1, 2, 3)


# --- ranks ------------------------------------------------------------------------------------------------------------


def summary_of_run(flags: list[str], ranks: int) -> dict[str, Any]:
    """What a run of the program on this many ranks writes down at its end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "main.py", "--num-gpus", str(ranks), *flags, "--output-dir", f"{folder}/run"]
        variables = {**os.environ, "OMP_NUM_THREADS": flags[flags.index("--threads") + 1]}
        done = subprocess.run(command, cwd=PROJECT, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(f"{ranks} ranks ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return json.loads(Path(folder, "run", "summary.json").read_text(encoding="utf-8"))


def measure_ranks(flags: list[str], counts: tuple[int, ...], rounds: int, console: Console) -> dict[str, dict[str, Any]]:
    """A row for each number of ranks; speeds beside those of the first."""
    speeds: dict[int, list[float]] = {ranks: [] for ranks in counts}
    memory: dict[int, list[list[int]]] = {ranks: [] for ranks in counts}
    on_gpus = device.count_gpus() > 0
    for number in range(1, rounds + 1):
        for ranks in counts:
            summary = summary_of_run(flags, ranks)
            speeds[ranks].append(summary["images_per_second"])
            memory[ranks].append(summary["peak_gpu_memory_mib" if on_gpus else "peak_memory_mib"])
        console.print(f"round {number}/{rounds}: " + ", ".join(f"{ranks} ranks {speeds[ranks][-1]:,.0f}" for ranks in counts))
    rows, first = {}, counts[0]
    for ranks in counts:
        places = ranks / first if on_gpus else min(ranks, world.cores()) / min(first, world.cores())
        times = [this / one for this, one in zip(speeds[ranks], speeds[first], strict=True)]
        rows[str(ranks)] = {
            "images_per_second": speeds[ranks],
            "median": median(speeds[ranks]),
            "times": median(speeds[ranks]) / median(speeds[first]),
            "per_round": times,
            "efficiency": median(speeds[ranks]) / median(speeds[first]) / places,
            "peak_memory_mib": [max(rank) for rank in zip(*memory[ranks], strict=True)],
        }
    return rows


def show_ranks(rows: dict[str, dict[str, Any]], batch: int, console: Console) -> None:
    """How fast, how many times one rank, and in how much memory."""
    heads = ("images/s, median", "times the first", "min .. max of rounds", "efficiency", "peak MiB of each rank")
    table = Table("ranks", *heads, title=f"ranks, at a global batch of {batch} images")
    for ranks, row in rows.items():
        spread = f"{min(row['per_round']):.2f} .. {max(row['per_round']):.2f}"
        memory = " ".join(map(str, row["peak_memory_mib"]))
        table.add_row(ranks, f"{row['median']:,.0f}", f"{row['times']:.2f}", spread, f"{row['efficiency']:.2f}", memory)
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)


# --- the engine -------------------------------------------------------------------------------------------------------


def at_stage(plan: Plan, stage: int) -> Plan:
    """The same plan under ZeRO."""
    config = ds_config.with_precision(plan.given_config, plan.precision)
    config, batch, _ = ds_config.resolve({**config, "zero_optimization": {"stage": stage}}, 1)
    return replace(plan, ds_config=config, batch=batch)


def measure_engine(
    flags: dict[str, Any], here: World, batch: int, precisions: tuple[str, ...], **sizes: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Each ZeRO stage beside plain PyTorch, in each precision; fp32 first, since DeepSpeed never forgets that it was told of
    autocast."""
    cells = {}
    for precision in precisions:
        plan = bench_levels.plan_for(flags, precision, batch)
        loader, _ = get_cifar10_dataloaders(plan, here)
        ways = {PLAIN: bench_levels.plain_step(plan, here)}
        ways |= {f"ZeRO {stage}": bench_levels.engine_step(at_stage(plan, stage), here) for stage in STAGES}
        cells[precision] = bench_levels.take_turns(ways, loader, sizes["rounds"], sizes["warmup_steps"], sizes["steps"])
    return cells


# --- the command ------------------------------------------------------------------------------------------------------


def run(
    dataset: Literal["cifar10", "synthetic"] = "cifar10",
    data_dir: Path | None = None,
    recipe: str = bench_levels.RECIPE,
    ranks: tuple[int, ...] = (1, 2, 4),
    batch: int = 64,
    rounds: int = 5,
    run_steps: int = 700,
    steps: int = 100,
    warmup_steps: int = 10,
    threads: int = 1,
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16"),
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Images per second and memory on several ranks, and of one rank at each ZeRO stage beside plain PyTorch.

    Args:
        dataset: The images: the real data set, or synthetic ones that need no download.
        data_dir: Where CIFAR-10 lies, or is downloaded to (default: $CIFAR10_DIR, else data/).
        recipe: What is trained.
        ranks: Numbers of ranks, the first being what the others are compared with; with none, only the engine is measured.
        batch: Images per step over all ranks.
        rounds: How often each is measured, in turns.
        run_steps: Steps of a run on several ranks.
        steps: Steps of one rank's loop that are timed, per round.
        warmup_steps: Steps before them that are not.
        threads: CPU threads of each rank.
        precisions: Those in which one rank is measured.
        json_file: Where to write the numbers of every round.
    """
    if min(*ranks, batch, rounds, run_steps, steps, warmup_steps + 1, threads) < 1:
        raise UsageError("--ranks, --batch, --rounds, --run-steps, --steps and --threads must be whole numbers from 1 up")
    images = {"--recipe": recipe, "--dataset": dataset, "--data-dir": data_dir}
    of_run = {"--global-batch-size": batch, "--max-steps": run_steps, "--threads": threads, "--log-every-steps": 100}
    whole = {"--val-images": 0, "--test-images": 0, "--save-every-epochs": 0}
    flags = [str(word) for pair in {**images, **of_run, **whole}.items() if pair[1] is not None for word in pair]
    console, sizes = Console(highlight=False), {"rounds": rounds, "steps": steps, "warmup_steps": warmup_steps}
    with measuring(threads, console) as (here, environment):
        by_ranks = measure_ranks(flags, ranks, rounds, console) if ranks else {}
        cells = measure_engine(images, here, batch, precisions, **sizes)
    if ranks:
        show_ranks(by_ranks, batch, console)
    bench_levels.show(f"one rank's step, {batch} images, {threads} threads", cells, console)
    if json_file is not None:
        settings = {"recipe": recipe, "dataset": dataset, "batch_images": batch, "run_steps": run_steps, **sizes}
        result = {"environment": environment, "settings": settings, "ranks": by_ranks, "engine": cells}
        run_folder.write_json(json_file, result)
