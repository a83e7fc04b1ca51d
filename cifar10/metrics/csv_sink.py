"""metrics.csv (a row per epoch and split), steps.csv (a row per log interval), and experts.csv (a row per epoch) of networks
that have experts, flushed row by row."""

import csv
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import TextIO

from cifar10.files import written_whole
from cifar10.metrics.sink import Context, EpochRow, Sink, StepRow
from cifar10.run.summary import SplitResult

METRICS = ("epoch", "phase", "loss", "accuracy", "throughput")
STEPS = tuple(f.name for f in fields(StepRow))


def _reopened(path: Path, header: Sequence[str], last: int) -> TextIO:
    """The file for appending after the rows whose first column is at most `last`; a row torn by a crash is cut."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows = [line.split(",") for line in text.splitlines()[1:]]
    whole = (row for row in rows if len(row) == len(header) and row[0].isdecimal())
    kept = [row for row in whole if int(row[0]) <= last and row[1] != "test"]
    with written_whole(path) as file:
        file.write("".join(",".join(row) + "\r\n" for row in [header, *kept]).encode())
    return path.open("a", newline="", encoding="utf-8", buffering=1)


class CsvSink(Sink):
    """On a resume, rows after the checkpoint are cut and both files continue from there."""

    def __init__(self, folder: Path, *, step: int, epoch: int) -> None:
        self._files = [_reopened(folder / "metrics.csv", METRICS, epoch), _reopened(folder / "steps.csv", STEPS, step)]
        self._metrics, self._steps = map(csv.writer, self._files)
        self._experts, self._folder, self._epoch = None, folder, epoch

    def _split(self, epoch: int, phase: str, result: SplitResult) -> None:
        self._metrics.writerow((epoch, phase, f"{result.loss:.6f}", f"{result.accuracy:.6f}", f"{result.throughput:.1f}"))

    def step(self, row: StepRow) -> None:
        self._steps.writerow(f"{value:.7g}" if isinstance(value, float) else value for value in astuple(row))

    def epoch(self, row: EpochRow) -> None:
        self._split(row.epoch, "train", row.train)
        if row.val is not None:
            self._split(row.epoch, "val", row.val)
        if row.val_averaged is not None:
            self._split(row.epoch, "val_averaged", row.val_averaged)
        if row.routing is not None:
            measures = row.routing.measures
            if self._experts is None:
                self._files.append(_reopened(self._folder / "experts.csv", ("epoch", *measures), self._epoch))
                self._experts = csv.writer(self._files[-1])
            self._experts.writerow((row.epoch, *(f"{value:.6f}" for value in measures.values())))

    def test(self, epoch: int, result: SplitResult) -> None:
        self._split(epoch, "test", result)

    def close(self) -> None:
        for file in self._files:
            file.close()


def open_sink(context: Context) -> CsvSink:
    return CsvSink(context.folder, step=context.state.step, epoch=context.state.epoch)
