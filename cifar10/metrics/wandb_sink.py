"""A run's metrics for Weights & Biases, online or in files that `wandb sync` uploads later.

Every row has `step`, which is the axis of all charts; accuracies are fractions (the documents' are percent).

    step_loss  step_accuracy  gradient_norm  learning_rate  epoch  step     means over a log interval; epoch counts from 1
    epoch_avg_loss  epoch_accuracy  epoch_avg_grad_norm                    training over an epoch, as the documents name it
    best_loss  best_accuracy  patience                                     of validation; of training where none is held out;
                                                                           epochs without improvement
    train/*  val/*  test/*                                                 loss, accuracy, throughput (images/s) by split
    final/*  and the summary                                               what summary.json says of the finished run
    report/*                                                               the pictures of the report, if there is one

A run keeps its id in wandb_run.json, and a resume goes on with it: rows that W&B has already are not sent again. Nobody is
ever asked for a key, and nothing waits for a network for longer than the seconds below.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import netrc
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cifar10.metrics.sink import EpochRow, Sink, StepRow, Steps
from cifar10.run.evaluation import SplitResult
from cifar10.run.folder import title

Mode = Literal["online", "offline", "off"]
PROJECT = "deepspeed-cifar10"
INIT_SECONDS, FINISH_SECONDS = 20.0, 30.0  # $WANDB_INIT_TIMEOUT and $WANDB_FINISH_TIMEOUT change them
IDLE = "30s"  # after which wandb's own process leaves when the run has died without a word
NOT_FINISHED = 75  # the exit code that W&B keeps of a run that has not come to its end: it can go on


# --- whether, where -----------------------------------------------------------------------------------------------------


def find_key(environment: Mapping[str, str]) -> tuple[str, str]:
    """The key that wandb would find by itself, and where: in the environment, or in the file of `wandb login`; else "", ""."""
    if key := environment.get("WANDB_API_KEY"):
        return key, "WANDB_API_KEY"
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    named = environment.get("NETRC")
    for file in map(Path, [named] if named else ["~/.netrc", "~/_netrc"]):
        with suppress(OSError, RuntimeError, netrc.NetrcParseError, UnicodeDecodeError):  # RuntimeError: there is no home
            if key := (netrc.netrc(file.expanduser()).authenticators(host) or ("", "", ""))[2]:
                return key, str(file)
    return "", ""


def has_login(environment: Mapping[str, str]) -> bool:
    """Whether wandb would know by itself who we are."""
    return bool(environment.get("WANDB_IDENTITY_TOKEN_FILE") or find_key(environment)[0])


def choose_mode(asked: str, environment: Mapping[str, str]) -> Mode:
    """What --wandb comes to. wandb itself is not imported for it."""
    if asked != "auto":
        return asked  # type: ignore[return-value]
    said = environment.get("WANDB_MODE", "").lower()
    if said in ("disabled", "off") or environment.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "off"
    if said in ("offline", "dryrun"):
        return "offline"
    return "online" if has_login(environment) or said == "online" else "off"


# --- the run's id, and how far it has come there ------------------------------------------------------------------------


class _Place:
    """wandb_run.json: the id that a run has at W&B, and the last step whose row was handed over."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._file = folder / "wandb_run.json"
        self.id, self.step = environment.get("WANDB_RUN_ID") or secrets.token_hex(4), -1  # a sweep's agent has chosen one
        with suppress(OSError, ValueError, TypeError, KeyError):
            saved = json.loads(self._file.read_text(encoding="utf-8"))
            self.id, self.step = str(saved["id"]), int(saved["step"])

    def keep(self, step: int) -> None:
        self.step = max(self.step, step)
        temporary = self._file.with_name(f".{self._file.name}.tmp")
        temporary.write_text(json.dumps({"id": self.id, "step": self.step}) + "\n", encoding="utf-8")
        os.replace(temporary, self._file)  # without waiting for the disk: a row too many or too few is all that is at stake


# --- wandb's own process ------------------------------------------------------------------------------------------------


class _Service:
    """The process that takes the rows and writes or uploads them, started as the child of nobody.

    Launchers that end a run send SIGTERM to all children of its ranks. As one of them it would die before the last rows.
    """

    def __init__(self) -> None:
        start = [sys.executable, "-m", "wandb", "beta", "core", "start", "--idle-timeout", IDLE]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._starting = None if "WANDB_SERVICE" in os.environ else subprocess.Popen(start, **pipes, text=True)

    def connect(self) -> None:
        """Let wandb use it. Where it could not be started, wandb starts one of its own."""
        if self._starting is None:
            return
        try:
            address = self._starting.communicate(timeout=INIT_SECONDS)[0].strip()
        except subprocess.TimeoutExpired:
            self._starting.kill()
            address = ""
        if address:
            os.environ["WANDB_SERVICE"] = address

    def end(self, wandb: Any) -> None:
        wandb.teardown()
        if self._starting is not None and "WANDB_SERVICE" in os.environ:
            from wandb.cli import beta_core

            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    beta_core.stop()
            finally:
                os.environ.pop("WANDB_SERVICE", None)


# --- the sink -----------------------------------------------------------------------------------------------------------


class WandbSink(Sink):
    """One run at W&B. Raises whatever wandb does when it cannot begin; `note` says where the run is to be seen."""

    def __init__(self, folder: Path, steps: Steps, mode: Mode, project: str, name: str, config: dict[str, Any]) -> None:
        if mode == "online" and not has_login(os.environ):
            raise RuntimeError("there is no key: `wandb login` or WANDB_API_KEY gives one, --wandb offline needs none")
        os.environ.setdefault("WANDB_SILENT", "true")
        self._service = _Service()
        import wandb  # 0.7 s, which a run without it does not spend

        self._service.connect()
        self._wandb, self._steps, self._report = wandb, steps, folder / "report"
        self._place, self._has_finished = _Place(folder, os.environ), False
        place = {"dir": str(folder), "project": project, "name": name, "id": self._place.id, "resume": "allow"}
        settings = wandb.Settings(
            silent=True,
            console="off",
            login_timeout=1,  # should wandb ask after all
            init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_SECONDS),
            finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT") or FINISH_SECONDS),
        )
        try:
            self._run = wandb.init(**place, mode=mode, config=config, settings=settings, allow_val_change=True)
            self._place.keep(-1)
        except BaseException:
            self._service.end(wandb)
            raise
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        sync = f"`wandb sync {folder}/wandb/offline-run-*` uploads it"
        self.note = f"W&B: {self._run.url if mode == 'online' else sync}"

    def _is_there(self, step: int) -> bool:
        """Whether an earlier start has handed over the row of this step."""
        return step <= self._place.step

    def _log(self, step: int, values: Mapping[str, Any], *, is_whole: bool) -> None:
        """Add to the row of a step. A row that is whole is sent, and nothing can be added to it any more."""
        self._run.log({**values, "step": step}, step=step, commit=is_whole)
        if is_whole:
            self._place.keep(step)

    def step(self, row: StepRow) -> None:
        if self._is_there(row.step):
            return
        ends_epoch = row.step == self._steps.at_end_of(row.epoch)  # whose row comes after this one, at the same step
        means = {"step_loss": row.loss, "step_accuracy": row.accuracy, "gradient_norm": row.grad_norm}
        self._log(row.step, {**means, "learning_rate": row.lr, "epoch": row.epoch}, is_whole=not ends_epoch)

    def epoch(self, row: EpochRow) -> None:
        step = self._steps.at_end_of(row.epoch)
        if self._is_there(step):
            return
        train = {"epoch_avg_loss": row.train.loss, "epoch_accuracy": row.train.accuracy, "epoch_avg_grad_norm": row.grad_norm}
        best = {"best_loss": row.best_loss, "best_accuracy": row.best_accuracy, "patience": row.waited}
        splits = {**_by_split("train", row.train), **(_by_split("val", row.val) if row.val else {})}
        known = {name: value for name, value in {**train, **best, **splits}.items() if math.isfinite(value)}
        self._log(step, {**known, "epoch": row.epoch}, is_whole=True)

    def test(self, epoch: int, result: SplitResult) -> None:
        """After the last row, in one of its own."""
        self._run.log({**_by_split("test", result), "step": self._steps.at_end_of(epoch)}, commit=True)

    def finished(self, summary: dict[str, Any]) -> None:
        known = {name: value for name, value in summary.items() if isinstance(value, bool | int | float | str)}
        final = {f"final/{name}": value for name, value in known.items()}
        pictures = {f"report/{path.stem}": self._wandb.Image(str(path)) for path in sorted(self._report.glob("*.png"))}
        self._run.log({**final, **pictures, "step": summary["steps"]}, commit=True)
        self._run.summary.update(known)
        self._has_finished = True

    def close(self) -> None:
        """Hand over what is left, within FINISH_SECONDS, and end wandb's own process."""
        try:
            self._run.finish(exit_code=0 if self._has_finished else NOT_FINISHED)
        finally:
            self._service.end(self._wandb)


def _by_split(split: str, result: SplitResult) -> dict[str, float]:
    return {f"{split}/loss": result.loss, f"{split}/accuracy": result.accuracy, f"{split}/throughput": result.throughput}


def open_wandb(
    folder: Path, steps: Steps, mode: Mode, project: str | None, name: str | None, config: dict[str, Any]
) -> WandbSink | None:
    """The sink in the mode asked for, or offline where W&B cannot be reached, or none: said on stderr, and training goes on."""
    project = project or os.environ.get("WANDB_PROJECT") or PROJECT
    name = name or os.environ.get("WANDB_NAME") or title(folder)
    modes = ("online", "offline") if mode == "online" and has_login(os.environ) else (mode,)
    for number, one in enumerate(modes):
        try:
            return WandbSink(folder, steps, one, project, name, config)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            instead = "it is recorded offline instead" if number < len(modes) - 1 else "training goes on without it"
            print(f"W&B {one}: {reason}; {instead}", file=sys.stderr)
    return None
