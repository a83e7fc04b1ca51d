"""A run in progress, on one rank: what it works with, and what it writes down of itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cifar10.data.loader import EvaluationLoader, TrainLoader
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine
from cifar10.metrics.sink import Metrics
from cifar10.plan import Plan
from cifar10.run import checkpoint
from cifar10.run.chain import Chain
from cifar10.run.metric_buffer import MetricBuffer
from cifar10.run.state import RunState
from cifar10.run.stop import StopRequest
from cifar10.run.summary import Status, Summary, summarize


@dataclass(frozen=True)
class Run:
    """What a run in progress works with; nothing in it is replaced while the run lasts."""

    plan: Plan
    world: World
    folder: Path
    engine: Engine
    step: Callable[..., tuple[Tensor, Tensor]]  # the script's train_step, accelerated as --engine-level says
    train: TrainLoader
    val: EvaluationLoader
    model: nn.Module  # a plain fp32 copy for evaluation, whatever ZeRO and precision do to the trained one
    buffer: MetricBuffer
    metrics: Metrics
    chain: Chain
    stop: StopRequest
    total_steps: int  # of the schedule
    last_step: int  # where this run ends: the same, or --max-steps

    def save_portable(self, name: str, module: dict[str, Tensor], facts: dict[str, Any]) -> bool:
        """Write checkpoints/<name> on rank 0: weights with all that is needed to use them. False if writing failed."""
        folder, all_facts = self.folder / "checkpoints" / name, {**self.plan.about_the_model, **facts}
        if why_not := self.world.from_main(lambda: checkpoint.save_portable(folder, module, all_facts)):
            self.metrics.event(why_not)
        return not why_not

    def write_summary(self, state: RunState, status: Status, **known: Any) -> Summary:
        """Write summary.json on rank 0: how the run stands, and what it has measured so far."""
        known |= {"recipe": self.plan.options.recipe, "seed": self.plan.recipe.seed, "world_size": self.world.size}
        capture_seconds = self.engine.capture_seconds or None
        summary = summarize(state, self.train.steps_per_epoch, status, capture_seconds=capture_seconds, **known)
        self.chain.end(state, summary)
        if self.world.is_main:
            summary.write(self.folder)
        return summary

    def save(self, state: RunState, status: Status, is_due: bool = True) -> bool:
        """A link of the chain and, if due, a resumable checkpoint and a summary. False, and a line, if writing failed."""
        full_state = self.chain.add(status, state, self.engine.full_state())
        if not is_due:
            return True
        keep, pointers = self.plan.options.keep_checkpoints, checkpoint.names_for(state, self.plan.options.save_frequency)
        place = self.folder / "checkpoints", self.engine, state, self.world, self.plan.settings
        if why_not := checkpoint.save(*place, keep=keep, pointers=pointers, full_state=full_state):
            self.metrics.event(why_not)
        self.write_summary(state, status)
        return not why_not
