"""A run's metrics for TensorBoard: `tensorboard --logdir runs` compares all runs.

The x-axis is always the run's step. Accuracies are fractions. `step/*` are means over a log interval, `train/*` over an
epoch (augmented images, weights still changing), `val/*` are measured after it, `test/*` belong to the best model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cifar10.metrics.sink import Context, EpochRow, Sink, StepRow, Steps
from cifar10.run.summary import SplitResult

FLUSH_SECONDS = 10  # what a viewer sees is at most this old


class TensorBoardSink(Sink):
    """Event files in `folder`. On a resume, what was written after the checkpoint's step is hidden from viewers."""

    def __init__(self, folder: Path, steps: Steps, first_step: int, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 0.15 s, which a run without it saves

        purge = first_step + 1 if folder.exists() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=FLUSH_SECONDS)
        self._folder, self._steps, self._settings = folder, steps, settings
        self._last_step = first_step

    def _write(self, prefix: str, step: int, **values: float) -> None:
        self._last_step = max(self._last_step, step)
        for name, value in values.items():
            self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def _split(self, split: str, step: int, result: SplitResult) -> None:
        self._write(split, step, loss=result.loss, accuracy=result.accuracy, throughput=result.throughput)

    def step(self, row: StepRow) -> None:
        measured = {"loss": row.loss, "accuracy": row.accuracy, "gradient_norm": row.grad_norm}
        self._write("step", row.step, **measured, learning_rate=row.lr, skipped=row.skipped)

    def epoch(self, row: EpochRow) -> None:
        step = self._steps.at_end_of(row.epoch)
        self._split("train", step, row.train)
        self._write("train", step, gradient_norm=row.grad_norm, epoch=row.epoch)
        if row.val is not None:
            self._split("val", step, row.val)

    def test(self, epoch: int, result: SplitResult) -> None:
        self._split("test", self._steps.at_end_of(epoch), result)

    def finished(self, summary: dict[str, Any]) -> None:
        """The settings and results for the HPARAMS tab, and the report's plots, if there is one."""
        import numpy as np
        from PIL import Image
        from torch.utils.tensorboard.summary import hparams

        results = {f"final/{k}": v for k, v in summary.items() if isinstance(v, float | int) and not isinstance(v, bool)}
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self._settings.items()}
        for record in hparams(plain, results):  # add_hparams would start another folder for them
            self._writer._get_file_writer().add_summary(record)
        self._write("final", self._last_step, **{name.removeprefix("final/"): value for name, value in results.items()})
        for path in sorted((self._folder.parent / "report").glob("*.png")):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(f"report/{path.stem}", pixels, self._last_step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def open_sink(context: Context) -> TensorBoardSink | None:
    if not context.plan.options.tensorboard:
        return None
    return TensorBoardSink(context.folder / "tensorboard", context.steps, context.state.step, context.settings)
