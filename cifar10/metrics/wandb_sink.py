"""Weights & Biases, online or in files that `wandb sync` uploads later.

Every row has `step`, the x-axis of all charts; accuracies are fractions.

    step_loss  step_accuracy  gradient_norm  learning_rate  epoch  step     means over a log interval; epoch counts from 1
    epoch_avg_loss  epoch_accuracy  epoch_avg_grad_norm                    training over an epoch, named as in the documents
    best_loss  best_accuracy  patience                                     of validation, or of training without a validation
                                                                           split; epochs without improvement
    train/*  val/*  test/*                                                 loss, accuracy, throughput (images/s) by split
    final/*  and the summary                                               summary.json of the finished run
    report/*                                                               the report's plots, if there are any

A run keeps its id in wandb_run.json, so that a resume continues it and sends no row twice. It never prompts for an API key.
"""

import csv
import json
import math
import netrc
import os
import secrets
import select
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cifar10.metrics.sink import Context, EpochRow, Sink, StepRow
from cifar10.run.folder import title
from cifar10.run.summary import SplitResult

Mode = Literal["online", "offline", "off"]
PROJECT = "deepspeed-cifar10"
INIT_SECONDS, FINISH_SECONDS = 20.0, 30.0  # $WANDB_INIT_TIMEOUT and $WANDB_FINISH_TIMEOUT override them
NOT_FINISHED = 75  # the exit code that W&B shows for a run that was stopped or killed and can be resumed


def find_key(environment: Mapping[str, str]) -> tuple[str, str]:
    """The API key that wandb would use and where it was found (the environment, or the file of `wandb login`), or "", ""."""
    if key := environment.get("WANDB_API_KEY"):
        return key, "WANDB_API_KEY"
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    named = environment.get("NETRC")
    for file in map(Path, [named] if named else ["~/.netrc", "~/_netrc"]):
        with suppress(OSError, RuntimeError, netrc.NetrcParseError, UnicodeDecodeError):  # RuntimeError: no home
            if key := (netrc.netrc(file.expanduser()).authenticators(host) or ("", "", ""))[2]:
                return key, str(file)
    return "", ""


def has_login(environment: Mapping[str, str]) -> bool:
    """Whether wandb can log in without a prompt."""
    return bool(environment.get("WANDB_IDENTITY_TOKEN_FILE") or find_key(environment)[0])


def choose_mode(asked: str, environment: Mapping[str, str]) -> Mode:
    """The mode that --wandb and the environment resolve to, without importing wandb."""
    if asked != "auto":
        return asked  # type: ignore[return-value]
    mode = environment.get("WANDB_MODE", "").lower()
    if mode in ("disabled", "off") or environment.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "off"
    if mode in ("offline", "dryrun"):
        return "offline"
    return "online" if has_login(environment) or mode == "online" else "off"


# --- wandb's own process ------------------------------------------------------------------------------------------------

# wandb-core writes or uploads the rows. SIGTERM ends it at once and loses the rows it holds in memory (wandb 0.31,
# github.com/wandb/wandb/issues/9963), and DeepSpeed's launcher stops a run with SIGTERM to all descendants of its ranks. So
# wandb.setup() runs in a process that is not our descendant and ends wandb-core when we close its stdin or die.
KEEPER = f"""
import os, sys
if os.fork():
    os._exit(0)  # so that the child has no parent
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # wandb-core inherits no pipe
import wandb
wandb.setup()
print(os.environ["WANDB_SERVICE"], file=answer, flush=True)
sys.stdin.read()
wandb.teardown(exit_code={NOT_FINISHED})
"""


class _Keeper:
    """The process that starts and ends wandb-core for us."""

    def __init__(self, mode: Mode) -> None:
        environment = {**os.environ, "WANDB_MODE": mode}  # wandb.setup() starts nothing if it says disabled
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = None
        if "WANDB_SERVICE" not in os.environ:
            command = [sys.executable, "-c", KEEPER]
            self._process = subprocess.Popen(command, **pipes, text=True, env=environment, start_new_session=True)

    def connect(self) -> None:
        """Let wandb in this process use it; if it does not answer, wandb starts a wandb-core of its own."""
        answered = self._process and select.select([self._process.stdout], [], [], INIT_SECONDS)[0]
        if address := answered and self._process.stdout.readline().strip():
            os.environ["WANDB_SERVICE"] = address

    def end(self, wandb: Any) -> None:
        wandb.teardown()
        if self._process:
            os.environ.pop("WANDB_SERVICE", None)
            with self._process:  # closes both pipes
                pass


# --- the sink -----------------------------------------------------------------------------------------------------------


class WandbSink(Sink):
    """One run at W&B. Raises whatever wandb raises when it cannot start."""

    def __init__(self, context: Context, mode: Mode) -> None:
        if mode == "online" and not has_login(os.environ):
            raise RuntimeError("no API key: run `wandb login`, set WANDB_API_KEY, or use --wandb offline, which needs none")
        os.environ.setdefault("WANDB_SILENT", "true")
        self._keeper = _Keeper(mode)
        import wandb  # 0.7 s, which a run without it saves

        self._keeper.connect()
        folder, options = context.folder, context.plan.options
        self._wandb, self._steps, self._report, self._has_finished = wandb, context.steps, folder / "report", False
        self._file = folder / "wandb_run.json"
        self._id, self._step = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), -1  # a sweep's agent chooses one
        was_closed = True
        with suppress(OSError, ValueError, TypeError, KeyError):
            saved = json.loads(self._file.read_text(encoding="utf-8"))
            self._id, self._step, was_closed = str(saved["id"]), int(saved["step"]), bool(saved.get("closed", True))
        init_seconds = float(os.environ.get("WANDB_INIT_TIMEOUT") or INIT_SECONDS)
        finish_seconds = float(os.environ.get("WANDB_FINISH_TIMEOUT") or FINISH_SECONDS)
        timeouts = {"login_timeout": 1, "init_timeout": init_seconds, "finish_timeout": finish_seconds}  # a login may prompt
        settings = wandb.Settings(silent=True, console="off", **timeouts)
        try:
            self._run = wandb.init(
                dir=str(folder),
                project=options.wandb_project or os.environ.get("WANDB_PROJECT") or PROJECT,
                name=options.wandb_name or os.environ.get("WANDB_NAME") or title(folder),
                id=self._id,
                resume="allow",
                mode=mode,
                config={**context.settings, "deepspeed": context.plan.ds_config},
                settings=settings,
                allow_val_change=True,
            )
            self._keep(self._step)
        except BaseException:
            self._keeper.end(wandb)
            raise
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        sync = f"`wandb sync {folder}/wandb/offline-run-*` uploads it"
        self.note = f"W&B: {self._run.url if mode == 'online' else sync}"
        if mode == "online":
            self._step = min(self._step, self._run.starting_step - 1)  # what has arrived of what was sent
            self._send_again(folder / "steps.csv", context.state.step)
        elif not was_closed:
            self.note += f"; an earlier start was killed, and its last rows up to step {self._step} may be in steps.csv only"

    def _send_again(self, steps_csv: Path, last: int) -> None:
        """Send the rows up to the checkpoint that W&B did not get from a start that was killed."""
        with suppress(FileNotFoundError), steps_csv.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                whole = {name: int(row[name]) for name in ("step", "epoch", "skipped")}
                if whole["step"] <= last:
                    self.step(StepRow(**whole, **{name: float(row[name]) for name in row.keys() - whole.keys()}))

    def _keep(self, step: int, *, closed: bool = False) -> None:
        """Save the run's id and the last step whose row was sent."""
        self._step = step
        temporary = self._file.with_name(f".{self._file.name}.tmp")
        temporary.write_text(json.dumps({"id": self._id, "step": step, "closed": closed}) + "\n", encoding="utf-8")
        os.replace(temporary, self._file)  # no fsync: a lost write costs one row at most

    def _log(self, step: int, values: Mapping[str, Any], *, is_whole: bool = True) -> None:
        """Add values to the row of a step, unless an earlier start of this run has sent it; send it if it is whole."""
        if step <= self._step:
            return
        self._run.log({**values, "step": step}, step=step, commit=is_whole)
        if is_whole:
            self._keep(step)

    def step(self, row: StepRow) -> None:
        means = {"step_loss": row.loss, "step_accuracy": row.accuracy, "gradient_norm": row.grad_norm}
        ends_epoch = row.step == self._steps.at_end_of(row.epoch)  # whose row follows, at the same step
        self._log(row.step, {**means, "learning_rate": row.lr, "epoch": row.epoch}, is_whole=not ends_epoch)

    def epoch(self, row: EpochRow) -> None:
        train = {"epoch_avg_loss": row.train.loss, "epoch_accuracy": row.train.accuracy, "epoch_avg_grad_norm": row.grad_norm}
        best = {"best_loss": row.best_loss, "best_accuracy": row.best_accuracy, "patience": row.waited}
        splits = {**_by_split("train", row.train), **(_by_split("val", row.val) if row.val else {})}
        experts = {f"experts/{name}": value for name, value in row.routing.measures.items()} if row.routing else {}
        known = {name: value for name, value in {**train, **best, **splits, **experts}.items() if math.isfinite(value)}
        self._log(self._steps.at_end_of(row.epoch), {**known, "epoch": row.epoch})

    def test(self, epoch: int, result: SplitResult) -> None:
        """After the last row, in a row of its own."""
        self._run.log({**_by_split("test", result), "step": self._steps.at_end_of(epoch)}, commit=True)

    def finished(self, summary: dict[str, Any]) -> None:
        known = {name: value for name, value in summary.items() if isinstance(value, bool | int | float | str)}
        final = {f"final/{name}": value for name, value in known.items()}
        plots = {f"report/{path.stem}": self._wandb.Image(str(path)) for path in sorted(self._report.glob("*.png"))}
        self._run.log({**final, **plots, "step": summary["steps"]}, commit=True)
        self._run.summary.update(known)
        self._has_finished = True

    def close(self) -> None:
        """Send the remaining rows, within FINISH_SECONDS, and end wandb's own process."""
        try:
            self._run.finish(exit_code=0 if self._has_finished else NOT_FINISHED)
            self._keep(self._step, closed=True)
        finally:
            self._keeper.end(self._wandb)


def _by_split(split: str, result: SplitResult) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in result.measures.items()}


def open_sink(context: Context) -> WandbSink | None:
    """The sink in the mode asked for, or recording offline where W&B cannot be reached."""
    mode = choose_mode(context.plan.options.wandb, os.environ)
    if mode == "online" and has_login(os.environ):
        try:
            return WandbSink(context, "online")
        except Exception as error:
            print(f"W&B online failed ({' '.join(str(error).split())}); the run is recorded offline", file=sys.stderr)
            mode = "offline"
    return None if mode == "off" else WandbSink(context, mode)
