"""--dry-run: what a run would do, and how long it would take; nothing is written."""

import json
import math

import torch

from cifar10.metrics import text
from cifar10.run import probe
from cifar10.run.summary import read_summary
from cifar10.trainer.run import Run


def describe(run: Run) -> None:
    """Say what `run` would do, and measure some of its steps on random images. Collective."""
    plan, world = run.plan, run.world
    first = world.from_main(lambda: getattr(read_summary(run.folder), "steps", 0))
    images, steps = (len(run.train.labels), len(run.val)), (first, run.last_step, run.total_steps)
    run.metrics.say(text.opening_lines(plan, run.folder, world.description, run.model, images, steps))
    run.metrics.event(f"dry run: nothing is written; DeepSpeed's JSON: {json.dumps(plan.ds_config, indent=2)}")
    run.engine.train()
    run.engine.set_lr(0.0)  # random images must not drive the weights to values that are slow to compute with
    smoothing = plan.recipe.label_smoothing
    step_seconds = probe.seconds_each(run.train.epoch(0), lambda batch: run.step(run.engine, batch, smoothing), world)
    with torch.no_grad():
        batch_seconds = probe.seconds_each(run.val, lambda batch: run.model.eval()(batch[0]), world)
    passes, left = math.ceil(run.last_step / run.train.steps_per_epoch), max(0, run.last_step - first)
    evaluation_seconds = batch_seconds * sum(1 for _ in run.val)
    run.metrics.event(probe.estimate(step_seconds, left, evaluation_seconds, passes if len(run.val) else 0))
    run.metrics.close()
