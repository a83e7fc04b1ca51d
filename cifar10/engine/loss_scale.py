"""fp16 loss scaling: the loss is multiplied before backward so that small gradients do not underflow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class LossScale:
    """Dynamic loss scale, the same at every ZeRO stage: a step that overflows is skipped and halves the scale; `window` good
    steps in a row double it. A static `loss_scale` is the initial value and never doubles.

    It has the attributes and methods of DeepSpeed's loss scalers, which ZeRO calls. Both that DeepSpeed 0.19.8 would use with
    `torch_autocast` under ZeRO are broken: GradScaler is never notified of an overflow, and its gradients are clipped before
    they are unscaled; DynamicLossScaler doubles the scale between a step's backward and its update.
    """

    cur_scale: float
    window: float  # good steps; infinite for a static scale
    good_steps: int = 0
    dynamic: bool = True

    @classmethod
    def from_json(cls, fp16: dict[str, Any]) -> LossScale:
        """From the `fp16` section of DeepSpeed's JSON; hysteresis and min_loss_scale are ignored."""
        if fp16.get("loss_scale"):
            return cls(float(fp16["loss_scale"]), float("inf"))
        return cls(2.0 ** fp16.get("initial_scale_power", 16), fp16.get("loss_scale_window", 1000))

    @property
    def loss_scale(self) -> float:
        return self.cur_scale

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The scaled loss for backward; a due doubling happens here, before a step's first micro-batch."""
        if self.good_steps >= self.window:
            self.cur_scale, self.good_steps = self.cur_scale * 2, 0
        return loss * self.cur_scale

    def update_scale(self, overflow: bool) -> None:
        """Count a good step, or halve the scale after an `overflow`."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.cur_scale /= 2

    def state_dict(self) -> dict[str, float]:
        """The state in the format of PyTorch's GradScaler, which is used without ZeRO.

        GradScaler doubles right after the last step of a window, not at the next backward, so a due doubling is included.
        """
        if self.good_steps >= self.window:
            return {"scale": self.cur_scale * 2, "_growth_tracker": 0}
        return {"scale": self.cur_scale, "_growth_tracker": self.good_steps}

    def load_state_dict(self, saved: dict[str, float]) -> None:
        """Restore a `state_dict`; the window stays the JSON's."""
        self.cur_scale, self.good_steps = saved["scale"], saved["_growth_tracker"]
