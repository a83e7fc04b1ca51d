"""`python -m cifar10 gpu-check`: what to try first on a GPU, in stages; none of them has been run on one yet.

    doctor                         what the machine has
    eager, captured                20 steps of synthetic images
    tests_eager ... tests_compile  tests/engine/test_gpu.py at each level, whose failed capture could spoil what follows
    compare                        CPU against GPU: draws and crops to the bit, normalized images and logits to rounding
    bench                          every level beside plain PyTorch
    profile_...                    50 captured steps: kernels by time, channels last or not, cudnn.benchmark on and off
    bn_cnn_0 ... speedrun94_2      the real CIFAR-10 captured, seeds 0 up
    vgg19_fp16, vgg19_bf16         memory and images per second at 224x224

Each is a process with a deadline, and leaves STAGE.json and STAGE.log in --output-dir, whatever becomes of the others.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cifar10 import UsageError
from cifar10.commands.bench_levels import engine_step, network, steps_of
from cifar10.commands.common import DataDir, as_flags, number_table
from cifar10.config.recipe import PROJECT
from cifar10.data import augment, pixels
from cifar10.distributed import world as distributed
from cifar10.distributed.device import count_gpus
from cifar10.engine.engine import leave
from cifar10.plan import make_plan
from cifar10.run.folder import write_json
from cifar10_deepspeed import get_cifar10_dataloaders

SUMMARY = "images_per_second train_seconds capture_seconds test_accuracy test_accuracy_tta peak_gpu_memory_mib".split()
TOLERANCE = {"images": 1e-5, "logits": 1e-2}  # largest difference; of values near one


@dataclass(frozen=True)
class Stage:
    """A process: what Python runs, and how long it may take."""

    words: list[str]
    minutes: float
    results: Path | None = None  # the JSON that it writes; else it prints it


def stages(folder: Path, data_dir: Path | None, short: bool) -> dict[str, Stage]:
    """All of them in order; `short` is a trial of a few steps without the real data set."""
    given = [] if short else as_flags({"--data-dir": data_dir})
    trial = "--dataset synthetic --max-steps 3 --val-images 0 --test-images 100".split()
    twenty = trial if short else [*trial[:3], "20", *trial[4:]]

    def training(name: str, minutes: float, flags: str, size: list[str]) -> dict[str, Stage]:
        words = ["cifar10_deepspeed.py", *flags.split(), *size, "--wandb", "off", "--output-dir", str(folder / name)]
        return {name: Stage(words, minutes, folder / name / "summary.json")}

    def ours(call: str, minutes: float) -> Stage:
        return Stage(["-c", f"from cifar10.commands import gpu_check; gpu_check.{call}"], minutes)

    def captured(recipe: str, seeds: int, minutes: float) -> dict[str, Stage]:
        flags, size = f"--recipe {recipe} --engine-level captured --seed", trial if short else given
        runs = [training(f"{recipe}_{seed}", minutes, f"{flags} {seed}", size) for seed in range(1 if short else seeds)]
        return {name: stage for run in runs for name, stage in run.items()}

    tests, only = ["-m", "pytest", "-n0", "tests/engine/test_gpu.py", "-k"], " and synchronizes" if short else ""
    levels = ("eager", "graph", "captured") if short else ("eager or stage or sync_bn", "graph", "captured", "compile")
    bench = "-m cifar10 bench --gpu --json".split()
    of_bench = "--dataset synthetic --rounds 1 --steps 2 --warmup-steps 1".split() if short else given
    steps, vgg = 3 if short else 50, "--recipe vgg19 --weights none --precision"
    return {
        "doctor": Stage(["-m", "cifar10", "doctor", "--json"], 2),
        **training("eager", 3, "--engine-level eager", twenty),
        **training("captured", 3, "--engine-level captured", twenty),
        **{f"tests_{level.split()[0]}": Stage([*tests, f"({level}){only}"], 5) for level in levels},
        "compare": ours("compare()", 3),
        "bench": Stage([*bench, str(folder / "bench_levels.json"), *of_bench], 10, folder / "bench_levels.json"),
        **{f"profile_{name}": ours(f"profile({name!r}, {steps})", 4) for name in ("bn_cnn", "speedrun94")},
        **captured("bn_cnn", 2, 5),
        **captured("speedrun94", 3, 3),
        **training("vgg19_fp16", 4, f"{vgg} fp16", trial if short else [*trial[:3], "60", *trial[4:]]),
        **training("vgg19_bf16", 4, f"{vgg} bf16", trial if short else [*trial[:3], "60", *trial[4:]]),
    }


def carry_out(name: str, stage: Stage, folder: Path) -> dict[str, Any]:
    """Run a stage to its end or its deadline; returns what is in its JSON."""
    log, started = folder / f"{name}.log", time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        words = {"cwd": PROJECT, "stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([sys.executable, *stage.words], start_new_session=True, **words)
        try:
            ended = {0: "ok"}.get(code := process.wait(60 * stage.minutes), f"failed ({code})")
        except subprocess.TimeoutExpired:
            ended = f"not within {stage.minutes:g} minutes"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    written, found = stage.results or log, {}
    with suppress(OSError, ValueError):  # it has written none
        text = written.read_text(encoding="utf-8")
        found, _ = json.JSONDecoder(parse_constant=str).raw_decode(text, text.index("{"))
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    result = {"stage": name, "ended": ended, "seconds": time.monotonic() - started, "command": stage.words, "found": found}
    result["last_words"] = lines[-1][-500:] if lines else ""
    write_json(folder / f"{name}.json", result)
    return result


def in_short(found: dict[str, Any]) -> str:
    """The numbers of a stage that fit into a table."""
    if "cells" in found:
        found = {
            f"{cell}, {name}": round(row["ratio"], 2) for cell, rows in found["cells"].items() for name, row in rows.items()
        }
    elif "status" in found:
        found = {name: found[name] for name in SUMMARY if found.get(name) is not None}
    plain = {name: value for name, value in found.items() if isinstance(value, (int, float))}
    return "\n".join(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in plain.items())


# --- stages that are no command of their own ------------------------------------------------------------------------------


def compare(recipes: tuple[str, ...] = ("bn_cnn", "speedrun94")) -> None:
    """Print JSON: whether the GPU draws and crops as the CPU does, and how far its images and logits are from the CPU's."""
    world, found = distributed.join(), {}
    for recipe in recipes:
        plan = make_plan(
            ["--recipe", recipe, "--dataset", "synthetic", "--val-images", "40000", "--precision", "fp32"], 1, "gpu-check"
        )
        seen = []
        for device in (torch.device("cpu"), world.device):
            here = replace(world, device=device)
            loader, _ = get_cifar10_dataloaders(plan, here)
            indices = loader.rank_indices(9).flatten()[:500]
            positions, draws = indices.to(device), loader.draws(9, indices)
            cut = augment.crop_and_flip(loader.operations, loader.store, draws)
            images = loader.augmented(positions, draws)
            with torch.no_grad():
                logits = network(plan, here).eval()(images)
            seen.append([one.cpu() for one in (cut, pixels.gather(loader.store, positions, *cut), images, logits)])
        for name, ours, theirs in zip(("draws", "crops", "images", "logits"), *seen, strict=True):
            far = (ours.double() - theirs.double()).abs().max().item()
            found |= {f"{recipe} {name}": far, f"{recipe} {name} agree": far <= TOLERANCE.get(name, 0)}
    print(json.dumps(found))
    leave()
    sys.exit(not all(value for name, value in found.items() if name.endswith("agree")))


def profile(recipe: str, steps: int) -> None:
    """Print milliseconds of a captured step in each way to run it as JSON, then a table of the usual one's kernels by time."""
    plan, world = (
        make_plan(["--recipe", recipe, "--dataset", "synthetic", "--engine-level", "captured"], 1, "gpu-check"),
        distributed.join(),
    )
    batches, found = (
        steps_of(
            get_cifar10_dataloaders(replace(plan, recipe=replace(plan.recipe, first_sizes=(), first_epochs=())), world)[0]
        ),
        {},
    )

    def timed(layout: torch.memory_format) -> tuple[float, Callable[[], None]]:
        step = engine_step(plan, world)
        (images, labels), *_ = next(batches)
        batch = [(images.contiguous(memory_format=layout), labels)]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def some() -> None:
            for _ in range(steps):
                step(batch)

        some()
        start.record()
        some()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / steps, some

    for layout in (torch.contiguous_format, torch.channels_last):
        for benchmark in (False, True):
            torch.backends.cudnn.benchmark = benchmark
            name = f"ms {str(layout).removeprefix('torch.')}{', benchmark' if benchmark else ''}"
            found[name], usual = timed(layout)
    print(json.dumps(found), flush=True)  # the profiler may fail where CUPTI does
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        usual()
        torch.cuda.synchronize()
    print(profiled.key_averages().table(sort_by="device_time_total", row_limit=60, max_name_column_width=80))
    leave()


def run(output_dir: Path = Path("gpu-check"), data_dir: DataDir = None, only: tuple[str, ...] = (), short: bool = False) -> int:
    """What to try first on a GPU, in stages of a process each, in about half an hour; the exit code is 1 if one fails.

    Args:
        output_dir: Where each stage leaves its JSON, its log and its runs.
        only: Stages to run, instead of all.
        short: A trial: a few steps of each stage, with synthetic images.
    """
    folder, console, ended = output_dir.expanduser().resolve(), Console(highlight=False), []
    planned = stages(folder, data_dir, short)
    if unknown := set(only) - planned.keys():
        raise UsageError(f"--only {' '.join(sorted(unknown))} is unknown; stages: {', '.join(planned)}")
    if not count_gpus():
        raise UsageError("gpu-check needs a GPU, and PyTorch sees none on this machine; python -m cifar10 doctor says more")
    folder.mkdir(parents=True, exist_ok=True)
    for name in only or planned:
        ended.append(carry_out(name, planned[name], folder))
        words = "" if ended[-1]["ended"] == "ok" else f"; its last words: {ended[-1]['last_words']}"
        console.print(f"{name}: {ended[-1]['ended']} after {ended[-1]['seconds']:.0f} seconds{words}", soft_wrap=True)
    table = number_table("stage", "ended", "found", "seconds", texts=3)
    for result in ended:
        table.add_row(result["stage"], result["ended"], in_short(result["found"]), f"{result['seconds']:.0f}")
    console.print(table, f"logs and results are in {folder}")
    return int(any(result["ended"] != "ok" for result in ended))
