"""The report of a run, made when it has finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar10.metrics.sink import Sink
from cifar10.report.html import make_report


class ReportSink(Sink):
    """Makes the report of a run when it has finished, and says where it is."""

    def __init__(self, folder: Path, data_dir: Path) -> None:
        self._folder, self._data_dir = folder, data_dir

    def finished(self, summary: dict[str, Any]) -> None:
        print(f"report: {make_report(self._folder, self._data_dir)}", flush=True)
