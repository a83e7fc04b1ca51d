"""The loss scale of fp16: small gradients are scaled into fp16's range before backward, and back before the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class LossScale:
    """DeepSpeed's `fp16` block, with one rule at every ZeRO stage: a step that overflows is skipped and halves the scale;
    after `window` good steps in a row it doubles. A static `loss_scale` is where it starts, and never doubles.

    It has the attributes and methods of DeepSpeed's own loss scalers, which ZeRO uses. DeepSpeed 0.19.8 offers two of
    its own, and both go wrong with `torch_autocast` under ZeRO: a GradScaler, which never learns of an overflow and whose
    scaled gradients are clipped, and its DynamicLossScaler, which doubles the scale between a step's backward and its update.
    """

    cur_scale: float
    window: float  # good steps; infinite for a static scale
    good_steps: int = 0
    dynamic: bool = True

    @classmethod
    def from_json(cls, fp16: dict[str, Any]) -> LossScale:
        """From the `fp16` section of DeepSpeed's JSON; its hysteresis and min_loss_scale have no part in the rule."""
        if fp16.get("loss_scale"):
            return cls(float(fp16["loss_scale"]), float("inf"))
        return cls(2.0 ** fp16.get("initial_scale_power", 16), fp16.get("loss_scale_window", 1000))

    @property
    def loss_scale(self) -> float:
        return self.cur_scale

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss as backward is to see it; the first of a step's micro-batches may find the scale doubled."""
        if self.good_steps >= self.window:
            self.cur_scale, self.good_steps = self.cur_scale * 2, 0
        return loss * self.cur_scale

    def update_scale(self, overflow: bool) -> None:
        """Count a step that is about to be applied, or was not because of `overflow`."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.cur_scale /= 2

    def state_dict(self) -> dict[str, float]:
        """Where the scale stands, in the format of PyTorch's GradScaler, which keeps the same rule without ZeRO.

        It doubles at once, where this one waits for the next backward, and would never double after a full window.
        """
        if self.good_steps >= self.window:
            return {"scale": self.cur_scale * 2, "_growth_tracker": 0}
        return {"scale": self.cur_scale, "_growth_tracker": self.good_steps}

    def load_state_dict(self, saved: dict[str, float]) -> None:
        """Continue from what `state_dict` returned; the window stays the JSON's."""
        self.cur_scale, self.good_steps = saved["scale"], saved["_growth_tracker"]
