"""The HTML report of a run, rendered when the run has finished."""

from pathlib import Path
from typing import Any

from cifar10.metrics.sink import Context, Sink


class ReportSink(Sink):
    """Renders the report of a finished run and prints its path."""

    def __init__(self, folder: Path, data_dir: Path) -> None:
        self._paths = folder, data_dir

    def finished(self, summary: dict[str, Any]) -> None:
        from cifar10.report.html import make_report

        print(f"report: {make_report(*self._paths)}", flush=True)


def open_sink(context: Context) -> ReportSink | None:
    options = context.plan.options
    return ReportSink(context.folder, options.data_dir) if options.report else None
