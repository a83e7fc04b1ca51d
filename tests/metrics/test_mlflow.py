"""MLflow as a sink, against a local SQLite store: a stopped and resumed run has every row once, under one id."""

import json
import sys
from pathlib import Path

import pytest

from cifar10.metrics.open import open_sinks
from cifar10.metrics.sink import EpochRow, StepRow
from cifar10.plan import make_plan
from cifar10.run.evaluation import SplitResult
from cifar10.run.state import RunState

LAST, PER_EPOCH = 40, 20


def part_of_a_run(folder: Path, *steps: int, finishes: bool = False) -> str:
    """Log the rows of these steps as a start of a run of 40 steps does; returns the notes."""
    plan = make_plan(["--dataset", "synthetic", "--no-tensorboard"], 1, "x")
    metrics = open_sinks(plan, folder, RunState(), LAST, PER_EPOCH)
    for step in steps:
        epoch, split = -(-step // PER_EPOCH), SplitResult(loss=1 / step, accuracy=0.5, images=100, seconds=2.0)
        metrics.step(StepRow(step, epoch, loss=1 / step, accuracy=0.5, grad_norm=1.0, lr=0.1, skipped=0))
        if step % PER_EPOCH == 0:
            metrics.epoch(EpochRow(epoch, split, split, 1.0, 0.1, 0))
    if finishes:
        metrics.test(epoch, split)
        metrics.finished({"status": "finished", "steps": LAST, "test_accuracy": 0.5, "quality": None})
    metrics.close()
    return " ".join(metrics.notes)


def test_a_resumed_run_has_every_row_once_under_one_id(tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (uv sync --extra mlflow)")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    client, folder = mlflow.MlflowClient(), tmp_path / "run"
    experiment = client.create_experiment("mine", artifact_location=str(tmp_path / "artifacts"))
    folder.mkdir()
    capsys.readouterr()  # what MLflow prints for a new database
    note = part_of_a_run(folder, 10, 20, 30)
    run_id = json.loads((folder / "mlflow_run.json").read_text())["id"]
    assert run_id in note
    assert client.get_run(run_id).info.status == "KILLED"

    (folder / "report.html").write_text("the report")
    part_of_a_run(folder, 20, 30, 40, finishes=True)  # from a checkpoint before the last rows
    (run,) = client.search_runs([experiment])
    assert (run.info.run_id, run.info.status, run.info.run_name) == (run_id, "FINISHED", "run")
    assert (run.data.params["model"], run.data.params["lr"]) == ("bn_cnn", "0.1")
    logged = {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in run.data.metrics}
    assert sorted(logged["step/loss"]) == [(step, pytest.approx(1 / step)) for step in (10, 20, 30, 40)]
    for name in ("train/loss", "val/loss"):
        assert sorted(logged[name]) == [(20, pytest.approx(1 / 20)), (40, pytest.approx(1 / 40))]
    assert logged["val/throughput"] == [(20, 50.0), (40, 50.0)]
    assert logged["test/accuracy"] == logged["final/test_accuracy"] == [(40, 0.5)]
    assert [item.path for item in client.list_artifacts(run_id)] == ["report.html"]
    assert capsys.readouterr().err == ""


def test_without_the_variable_it_is_off_and_without_the_package_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    part_of_a_run(tmp_path, 10)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    part_of_a_run(tmp_path, 10)
    (line,) = capsys.readouterr().err.splitlines()
    assert "`uv sync --extra mlflow`" in line
    assert not (tmp_path / "mlflow_run.json").exists()
