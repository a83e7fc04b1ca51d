"""MLflow, on when $MLFLOW_TRACKING_URI, MLflow's own variable, is set.

Metrics have the names and x-axis that they have in TensorBoard; the settings are the MLflow run's params. Its id is kept in
mlflow_run.json, so that a resume continues it; the store is asked which rows it has, so that none is logged twice.
"""

import os
import time
from typing import Any

from cifar10.metrics.sink import Context, ScalarSink
from cifar10.metrics.wandb_sink import PROJECT
from cifar10.run.folder import read_json, title, write_json

# MLflow's own settings, unless the user has set them: by default it waits minutes for a server that does not answer.
SETTINGS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


class MlflowSink(ScalarSink):
    """One run at MLflow. Raises whatever MLflow raises when it cannot start."""

    def __init__(self, context: Context) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient, entities  # 2.5 s, which a run without it saves
        except ImportError as error:
            raise RuntimeError(f"{error}; `uv sync --extra mlflow` installs it") from None
        self._client, self._entities, self._status = MlflowClient(), entities, "KILLED"
        self._folder, self.steps = context.folder, context.steps
        self._logged: dict[str, int] = {}  # the last step of each metric in the store
        if saved := read_json(self._folder / "mlflow_run.json"):
            self._id = saved["id"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            known = self._client.get_experiment_by_name(experiment)
            experiment_id = known.experiment_id if known else self._client.create_experiment(experiment)
            self._id = self._client.create_run(experiment_id, run_name=title(self._folder)).info.run_id
            write_json(self._folder / "mlflow_run.json", {"id": self._id})
            self._client.log_batch(self._id, params=[entities.Param(k, str(v)) for k, v in context.settings.items()])
        self.note = f"MLflow: run {self._id}"

    def log(self, prefix: str, step: int, **values: float) -> None:
        """Log those values of a step that the store does not have yet."""
        named = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        for name in named.keys() - self._logged.keys():
            history = self._client.get_metric_history(self._id, name)
            self._logged[name] = max((metric.step for metric in history), default=-1)
        new = {name: value for name, value in named.items() if step > self._logged[name]}
        metrics = [self._entities.Metric(name, value, int(time.time() * 1000), step) for name, value in new.items()]
        self._client.log_batch(self._id, metrics=metrics)
        self._logged |= dict.fromkeys(new, step)

    def finished(self, summary: dict[str, Any]) -> None:
        super().finished(summary)
        self._status = "FINISHED"
        if (page := self._folder / "report.html").exists():
            self._client.log_artifact(self._id, str(page))

    def close(self) -> None:
        self._client.set_terminated(self._id, self._status)


def open_sink(context: Context) -> MlflowSink | None:
    return MlflowSink(context) if os.environ.get("MLFLOW_TRACKING_URI") else None
