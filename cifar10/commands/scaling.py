"""`python -m cifar10 scaling`: the gain of more ranks, and the cost of the engine.

    ranks      the program itself, from its launcher to its summary, on 1, 2 and 4 ranks at one global batch: images per second
               of training, and the peak memory of each rank
    engine     one rank's step in this process beside plain PyTorch's (see bench_levels.py), at each ZeRO stage and precision

Both in rounds, in turns. On a CPU all ranks share its cores: efficiency is images per second relative to one rank, divided by
the number of cores that the ranks can use, so four ranks on two cores count as two. On GPUs every rank has its own.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich.console import Console

from cifar10 import UsageError
from cifar10.commands import bench_levels
from cifar10.commands.bench import measuring
from cifar10.commands.bench_levels import PLAIN
from cifar10.commands.common import DataDir, Device, JsonFile, as_flags, number_table, quotients, settle, span
from cifar10.config import ds_config
from cifar10.config.recipe import PROJECT, invalid
from cifar10.distributed import cpus
from cifar10.distributed.device import count_gpus
from cifar10.distributed.world import World
from cifar10.plan import Plan
from cifar10.run import folder as run_folder
from cifar10_deepspeed import get_cifar10_dataloaders

STAGES = (0, 1, 2, 3)


def with_a_gpu_each(ranks: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """Those numbers of ranks that this machine has the GPUs for; without GPUs, all. Raises UsageError if a run would."""
    gpus = count_gpus() or max(ranks, default=0)
    kept = tuple(number for number in ranks if number <= gpus)
    given = " ".join(map(str, ranks))
    if ranks and not kept:
        raise invalid("--ranks", given, f"numbers from 1 to {gpus}, the GPUs of this machine", gpus)
    if any(batch % number for number in kept):
        raise invalid("--ranks", given, f"divisors of --batch {batch}", 1)
    return kept


def summary_of_run(flags: list[str], ranks: int) -> dict[str, Any]:
    """summary.json of a run of the program on this many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "main.py", "--num-gpus", str(ranks), *flags, "--output-dir", f"{folder}/run"]
        variables = {**os.environ, "OMP_NUM_THREADS": flags[flags.index("--threads") + 1]}
        done = subprocess.run(command, cwd=PROJECT, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(f"{ranks} ranks ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return json.loads(Path(folder, "run", "summary.json").read_text(encoding="utf-8"))


def measure_ranks(flags: list[str], counts: tuple[int, ...], rounds: int, console: Console) -> dict[str, dict[str, Any]]:
    """A row for each number of ranks, with its speed relative to the first."""
    speeds: dict[int, list[float]] = {ranks: [] for ranks in counts}
    memory: dict[int, list[list[int]]] = {ranks: [] for ranks in counts}
    on_gpus = count_gpus() > 0
    for number in range(1, rounds + 1):
        for ranks in counts:
            summary = summary_of_run(flags, ranks)
            speeds[ranks].append(summary["images_per_second"])
            memory[ranks].append(summary["peak_gpu_memory_mib" if on_gpus else "peak_memory_mib"])
        console.print(f"round {number}/{rounds}: " + ", ".join(f"{ranks} ranks {speeds[ranks][-1]:,.0f}" for ranks in counts))
    rows, first = {}, counts[0]
    for ranks in counts:
        places = ranks / first if on_gpus else min(ranks, cpus.cores()) / min(first, cpus.cores())
        times = median(speeds[ranks]) / median(speeds[first])
        rows[str(ranks)] = {
            "images_per_second": speeds[ranks],
            "median": median(speeds[ranks]),
            "times": times,
            "per_round": quotients(speeds[ranks], speeds[first]),
            "efficiency": times / places,
            "peak_memory_mib": [max(rank) for rank in zip(*memory[ranks], strict=True)],
        }
    return rows


def show_ranks(rows: dict[str, dict[str, Any]], batch: int, console: Console) -> None:
    heads = ("images/s, median", "times the first", "min .. max of rounds", "efficiency", "peak MiB of each rank")
    table = number_table("ranks", *heads, title=f"ranks, at a global batch of {batch} images")
    for ranks, row in rows.items():
        times = f"{row['times']:.2f}", span(row["per_round"]), f"{row['efficiency']:.2f}"
        table.add_row(ranks, f"{row['median']:,.0f}", *times, " ".join(map(str, row["peak_memory_mib"])))
    console.print(table)


def at_stage(plan: Plan, stage: int) -> Plan:
    """The same plan under ZeRO."""
    config = ds_config.with_precision(plan.given_config, plan.precision)
    config, batch, _ = ds_config.resolve({**config, "zero_optimization": {"stage": stage}}, 1)
    return replace(plan, ds_config=config, batch=batch)


def measure_engine(
    flags: dict[str, Any], world: World, batch: int, precisions: tuple[str, ...], **sizes: int
) -> dict[str, bench_levels.Rows]:
    """Each ZeRO stage beside plain PyTorch, in each precision; fp32 first, since DeepSpeed 0.19.8 never turns autocast off."""
    cells = {}
    for precision in precisions:
        plan = bench_levels.plan_for(flags, precision, batch)
        loader, _ = get_cifar10_dataloaders(plan, world)
        ways = {PLAIN: bench_levels.plain_step(plan, world)}
        ways |= {f"ZeRO {stage}": bench_levels.engine_step(at_stage(plan, stage), world) for stage in STAGES}
        cells[precision] = bench_levels.take_turns(ways, loader, **sizes)
    return cells


def run(
    dataset: Literal["cifar10", "synthetic"] = "cifar10",
    data_dir: DataDir = None,
    recipe: str = bench_levels.RECIPE,
    ranks: tuple[int, ...] = (1, 2, 4),
    batch: int = 64,
    rounds: int = 5,
    run_steps: int = 700,
    steps: int = 100,
    warmup_steps: int = 10,
    threads: int = 1,
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16"),
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """Images per second and memory on several ranks, and of one rank at each ZeRO stage beside plain PyTorch.

    Args:
        dataset: The images: the real data set, or synthetic ones that need no download.
        recipe: What is trained.
        ranks: Numbers of ranks, compared with the first; with none, only the engine is measured.
        batch: Images per step over all ranks.
        rounds: How often each is measured, in turns.
        run_steps: Steps of a run on several ranks.
        steps: Steps of one rank's loop that are timed, per round.
        warmup_steps: Steps before them that are not timed.
        threads: CPU threads of each rank.
        precisions: The precisions in which one rank is measured.
    """
    if min(*ranks, batch, rounds, run_steps, steps, warmup_steps + 1, threads) < 1:
        raise UsageError("--ranks, --batch, --rounds, --run-steps, --steps and --threads must be whole numbers from 1 up")
    settle(device)
    wanted, ranks = ranks, with_a_gpu_each(ranks, batch)
    images = {"--recipe": recipe, "--dataset": dataset, "--data-dir": data_dir}
    of_run = {"--global-batch-size": batch, "--max-steps": run_steps, "--threads": threads, "--log-every-steps": 100}
    whole = {"--val-images": 0, "--test-images": 0, "--save-every-epochs": 0}
    flags = as_flags({**images, **of_run, **whole})
    console, sizes = Console(highlight=False), {"rounds": rounds, "steps": steps, "warmup_steps": warmup_steps}
    if left_out := [str(number) for number in wanted if number not in ranks]:
        console.print(f"left out, more ranks than GPUs ({count_gpus()}): {', '.join(left_out)}")
    with measuring(threads, console) as (world_of_one, environment):
        by_ranks = measure_ranks(flags, ranks, rounds, console) if ranks else {}
        cells = measure_engine(images, world_of_one, batch, precisions, **sizes)
    if ranks:
        show_ranks(by_ranks, batch, console)
    bench_levels.show(f"one rank's step, {batch} images, {threads} threads", cells, console)
    if json_file is not None:
        settings = {"recipe": recipe, "dataset": dataset, "batch_images": batch, "run_steps": run_steps, **sizes}
        measured = {"ranks": by_ranks, "engine": cells}
        run_folder.write_json(json_file, {"environment": environment, "settings": settings, **measured})
