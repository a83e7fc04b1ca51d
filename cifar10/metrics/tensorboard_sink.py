"""TensorBoard: `tensorboard --logdir runs` compares all runs.

The x-axis is the run's step; accuracies are fractions. `step/*` are means over a log interval, `train/*` over an epoch
(augmented images, changing weights), `val/*` is measured after it, and `test/*` belongs to the best model.
"""

from pathlib import Path
from typing import Any

from cifar10.metrics.sink import Context, ScalarSink, Steps

FLUSH_SECONDS = 10  # what a viewer shows is at most this old


class TensorBoardSink(ScalarSink):
    """Event files in `folder`. On a resume, what was written after the checkpoint's step is hidden from viewers."""

    def __init__(self, folder: Path, steps: Steps, first_step: int, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 0.15 s, which a run without it saves

        purge = first_step + 1 if folder.exists() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=FLUSH_SECONDS)
        self._folder, self.steps, self._settings = folder, steps, settings

    def log(self, prefix: str, step: int, **values: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def finished(self, summary: dict[str, Any]) -> None:
        """The settings and results for the HPARAMS tab, and the report's plots, if there are any."""
        import numpy as np
        from PIL import Image
        from torch.utils.tensorboard.summary import hparams

        super().finished(summary)
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self._settings.items()}
        results = {f"final/{k}": v for k, v in summary.items() if isinstance(v, float | int) and not isinstance(v, bool)}
        for record in hparams(plain, results):
            self._writer._get_file_writer().add_summary(record)  # add_hparams would start another folder for them
        for path in sorted((self._folder.parent / "report").glob("*.png")):
            with Image.open(path) as plot:
                pixels = np.asarray(plot.convert("RGB"))
            self._writer.add_image(f"report/{path.stem}", pixels, summary["steps"], dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def open_sink(context: Context) -> TensorBoardSink | None:
    if not context.plan.options.tensorboard:
        return None
    return TensorBoardSink(context.folder / "tensorboard", context.steps, context.state.step, context.settings)
