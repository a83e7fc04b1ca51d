"""Opens the sinks that a run's rows go to, once, on rank 0. A new sink is a file in this package and a line in SINKS."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from cifar10.metrics.sink import Context, Metrics, Steps, report_failure
from cifar10.plan import Plan
from cifar10.run.state import RunState

# Modules with `open_sink(context) -> Sink | None`; rows reach them in this order. A library is imported only by a sink in use.
SINKS = (
    "console",
    "csv_sink",
    "report_sink",  # before the sinks that upload its plots
    "tensorboard_sink",
    "wandb_sink",
    "mlflow_sink",
)


def open_sinks(plan: Plan, folder: Path, state: RunState, last_step: int, steps_per_epoch: int) -> Metrics:
    """The sinks that want the rows of a run which starts at `state`. One that cannot be opened is named on stderr."""
    context, sinks = Context(plan, folder, state, Steps(steps_per_epoch, last_step)), []
    for name in SINKS:
        try:
            sinks.append(import_module(f"cifar10.metrics.{name}").open_sink(context))
        except Exception as error:
            report_failure(name, error)
    return Metrics([sink for sink in sinks if sink is not None])
