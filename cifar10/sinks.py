"""Which sinks a run's rows go to: decided once, on rank 0."""

from __future__ import annotations

from pathlib import Path

from cifar10.metrics import ConsoleSink, CsvSink, Metrics
from cifar10.pages import ReportSink
from cifar10.preflight import Plan
from cifar10.state import RunState


def open_sinks(plan: Plan, folder: Path, state: RunState, last_step: int, steps_per_epoch: int) -> Metrics:
    """All sinks of a run that stands at `state` and ends at `last_step`."""
    says_steps = "steps_per_print" in plan.ds_config
    console = ConsoleSink(last_step, steps_per_epoch, state.step, plan.batch.global_images, says_steps=says_steps)
    pages = [ReportSink(folder, plan.options.data_dir)] if plan.options.report else []
    return Metrics([console, CsvSink(folder, step=state.step, epoch=state.epoch), *pages])
