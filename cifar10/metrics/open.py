"""Which sinks a run's rows go to: decided once, on rank 0."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from cifar10.metrics.console import ConsoleSink
from cifar10.metrics.csv_sink import CsvSink
from cifar10.metrics.report_sink import ReportSink
from cifar10.metrics.sink import Metrics, Sink, Steps
from cifar10.metrics.tensorboard_sink import TensorBoardSink
from cifar10.metrics.wandb_sink import choose_mode, open_wandb
from cifar10.plan import Plan
from cifar10.run.state import RunState


def flat_settings(plan: Plan) -> dict[str, Any]:
    """The settings as people compare runs by them: the recipe's fields, and what they change most often in the JSON."""
    optimizer = plan.ds_config.get("optimizer", {})
    batch = {"global_batch_size": plan.batch.global_images, "world_size": plan.batch.world_size}
    lr = optimizer.get("params", {}).get("lr")
    return {"recipe": plan.options.recipe, **plan.settings["recipe"], **batch, "lr": lr, "optimizer": optimizer.get("type")}


def open_sinks(plan: Plan, folder: Path, state: RunState, last_step: int, steps_per_epoch: int) -> Metrics:
    """All sinks of a run that stands at `state` and ends at `last_step`. What cannot be opened is named, and left out."""
    options, steps = plan.options, Steps(steps_per_epoch, last_step)
    says_steps = "steps_per_print" in plan.ds_config
    console = ConsoleSink(last_step, steps_per_epoch, state.step, plan.batch.global_images, says_steps=says_steps)
    sinks: list[Sink] = [console, CsvSink(folder, step=state.step, epoch=state.epoch)]
    if options.report:  # before those that take its pictures along
        sinks.append(ReportSink(folder, options.data_dir))
    notes = []
    if options.tensorboard:
        try:
            sinks.append(TensorBoardSink(folder / "tensorboard", steps, state.step, flat_settings(plan)))
        except Exception as error:
            print(f"TensorBoard: {error}; training goes on without it", file=sys.stderr)
    if (mode := choose_mode(options.wandb, os.environ)) != "off":
        config = {**flat_settings(plan), "deepspeed": plan.ds_config}
        wandb = open_wandb(folder, steps, mode, options.wandb_project, options.wandb_name, config)
        sinks += [wandb] if wandb else []
        notes += [wandb.note] if wandb else []
    return Metrics(sinks, notes)
