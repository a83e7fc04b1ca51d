"""A scheduler of DeepSpeed's JSON, tried out before training: DeepSpeed steps it after every step, whatever it was made for."""

import warnings
from typing import Any

import torch

from cifar10 import UsageError, reason


def learning_rates(deepspeed_engine: Any, steps: int) -> list[float]:
    """The learning rate at each of the first `steps` steps. Raises UsageError if the scheduler fails on the way."""
    name, lr = deepspeed_engine.scheduler_name(), deepspeed_engine.optimizer_params()["lr"]
    group = {"params": [torch.zeros(1, requires_grad=True)], "betas": (0.9, 0.999)}  # a scheduler may set momenta too
    optimizer, found = torch.optim.SGD([group], lr, momentum=0.9), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer takes no step
        scheduler = deepspeed_engine._scheduler_from_config(optimizer)
        for step in range(steps):
            found.append(float(optimizer.param_groups[0]["lr"]))
            try:
                scheduler.step()
            except Exception as error:
                why = f"fails at step {step + 1:,} of {steps:,}: {reason(error)}"
                raise UsageError(f"the JSON's scheduler {name} {why}; give it the run's {steps:,} steps") from error
    return found


def describe(name: str, rates: list[float]) -> str:
    """The course of a learning rate in one line, and where it has faded long before the end."""
    top = max(rates)
    faded = next((n for n in range(len(rates), 0, -1) if rates[n - 1] > top / 1000), 0)  # the last step that is not
    line = f"learning rate of {name}: {rates[0]:.3g} at step 1, {top:.3g} at step {rates.index(top) + 1:,}, the highest"
    line += f", {rates[-1]:.3g} at the last of {len(rates):,} steps"
    return f"{line}; below a thousandth of the highest from step {faded + 1:,} on" if faded < 0.9 * len(rates) else line
