"""Opens a run's sinks, once, on rank 0. A new sink is a file in this package and a name in SINKS."""

from importlib import import_module
from pathlib import Path

from cifar10.metrics.sink import Context, Metrics, Steps, report_failure
from cifar10.plan import Plan
from cifar10.run.state import RunState

# Modules with `open_sink(context) -> Sink | None`, in the order in which they get rows: the report before the sinks that
# upload its plots. A library is imported only by a sink in use.
SINKS = ("console", "csv_sink", "report_sink", "tensorboard_sink", "wandb_sink", "mlflow_sink")


def open_sinks(plan: Plan, folder: Path, state: RunState, last_step: int, steps_per_epoch: int) -> Metrics:
    """The sinks of a run that starts at `state`. A sink that cannot be opened is reported on stderr."""
    context, sinks = Context(plan, folder, state, Steps(steps_per_epoch, last_step)), []
    for name in SINKS[:1] if plan.options.dry_run else SINKS:
        try:
            sinks.append(import_module(f"cifar10.metrics.{name}").open_sink(context))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            report_failure(name, error)
    return Metrics([sink for sink in sinks if sink is not None])
