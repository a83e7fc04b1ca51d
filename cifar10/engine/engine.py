"""DeepSpeed's engine with its quirks fixed; with full_state.py and cuda_graphs.py, all that knows its internals.

Everything goes through DeepSpeed's forward, backward and step. What this file adds, and why:

- `prepare()` keeps DeepSpeed from compiling its CPU communication op (it needs a C++ compiler, and training never uses
  it), and from printing a greeting.
- The true gradient norm, before clipping and averaged over ranks, at every step and without synchronizing with the device.
  DeepSpeed 0.19.8 throws it away at ZeRO stage 0; its clipping also synchronizes twice a step.
- A step whose loss or gradient is not finite on any rank is skipped on all. At stage 0 DeepSpeed would apply it; here the
  fused optimizer skips it on the device (`found_inf`) and BatchNorm's statistics are restored. ZeRO does its own check.
- fp16's loss scale under ZeRO, where DeepSpeed clips gradients that are still scaled (see loss_scale.py).
- At world size 1 there is nothing to reduce, so the flatten, all-reduce and copy back of every gradient are left out.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

from cifar10.distributed.world import World
from cifar10.engine import full_state, muon
from cifar10.engine.loss_scale import LossScale
from cifar10.engine.muon import MuonWithSGD


def prepare() -> Any:
    """Import DeepSpeed quietly and without building anything; returns the module. Call before `deepspeed.initialize`."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # detecting it prints a warning
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    return deepspeed


def own_optimizer(model: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer | None:
    """The optimizer to pass to DeepSpeed, if the JSON names one that it does not have; None for DeepSpeed's own."""
    optimizer = config["optimizer"]
    return MuonWithSGD(muon.parameter_groups(model, optimizer["params"])) if optimizer["type"] == muon.NAME else None


class Engine:
    """One model in training: learning rate, forward, backward, step; and its weights and state, whole on every rank.

    `deepspeed_engine` is what `deepspeed.initialize` returned for a config that `ds_config.resolve` made; `seed` is dropout's.
    """

    def __init__(self, deepspeed_engine: Any, world: World, seed: int = 0) -> None:
        self.deepspeed = deepspeed_engine
        self.module: nn.Module = deepspeed_engine.module
        self.world = world
        self.stage: int = deepspeed_engine.zero_optimization_stage()
        # ZeRO makes a new Adagrad in place of the one in the JSON, which remains as basic_optimizer
        self.optimizer = deepspeed_engine.optimizer.optimizer if self.stage else deepspeed_engine.basic_optimizer
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.lrs = list(self.base_lrs)  # as last set, while no scheduler of the JSON moves them
        self.grad_norm = torch.zeros((), device=world.device)  # of the last step, over all ranks, before clipping
        self.skipped = torch.zeros((), device=world.device)  # 1.0 if the last step was skipped, else 0.0
        self.seeds_dropout = any(isinstance(module, nn.modules.dropout._DropoutNd) for module in self.module.modules())
        self._accumulation = deepspeed_engine.gradient_accumulation_steps()
        self._micro_batch = 0  # of the current step
        self._seed = seed
        self._buffers = list(self.module.buffers())
        self._saved_buffers = [torch.empty_like(b) for b in self._buffers]
        if deepspeed_engine.torch_autocast_enabled() and deepspeed_engine.torch_autocast_dtype() == torch.float16:
            self._replace_loss_scaler()
        if not self.stage:
            self._replace_clipping()
            self._start_momentum_at_zero()
            if world.size == 1:
                deepspeed_engine.enable_backward_allreduce = False

    def _replace_loss_scaler(self) -> None:
        scale = LossScale.from_json(self.deepspeed.config.get("fp16", {}))
        if self.stage:
            zero = self.deepspeed.optimizer
            zero.torch_autocast_gradscaler, zero.loss_scaler, zero.dynamic_loss_scale = None, scale, True
        else:  # the same rule, kept on the device
            interval = int(min(scale.window, 2**31 - 1))
            self.deepspeed.torch_autocast_z0_gradscaler = torch.amp.GradScaler(
                self.world.device.type, init_scale=scale.cur_scale, growth_interval=interval
            )

    def _replace_clipping(self) -> None:
        if inspect.signature(self.deepspeed.clip_fp32_gradients).parameters:
            raise RuntimeError("this DeepSpeed version clips in another way: cifar10/engine/engine.py must be adapted to it")
        self.deepspeed.clip_fp32_gradients = self._measure_and_clip

    def _start_momentum_at_zero(self) -> None:
        """PyTorch makes fused SGD's momentum at the first step, uninitialized; were that step skipped, it would stay so.

        From zero the first step is the same: momentum * 0 + gradient. (Not so with dampening, which is left alone.)
        """
        for group in self.optimizer.param_groups:
            if group.get("momentum") and not group.get("dampening") and group.get("fused"):
                for parameter in group["params"]:
                    self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    # --- one step, in the order it happens -------------------------------------------------------------------------

    def set_lr(self, multiplier: float) -> None:
        """Each parameter group's base learning rate times `multiplier`, from the next step on.

        A scheduler in DeepSpeed's JSON sets the learning rate by itself; then this does nothing.
        """
        if self.deepspeed.lr_scheduler is not None:
            return
        self.lrs = [base * multiplier for base in self.base_lrs]
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            if isinstance(group["lr"], Tensor):  # on the device, where a captured step reads it
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, C, S, S] -> logits [B, classes], through DeepSpeed's forward."""
        if self._micro_batch == 0:
            self._remember_buffers()
        if self.seeds_dropout:
            self.seed_dropout()
        return self.deepspeed(images)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss; at the last micro-batch of a step, average them over ranks."""
        value = loss.detach()  # the hook must not hold the loss itself: that would be a cycle, and keep every graph alive
        loss.register_hook(lambda gradient: self._poison(gradient, value))
        self.deepspeed.backward(loss, scale_wrt_gas=self._accumulation > 1)
        self._micro_batch += 1

    def step(self) -> None:
        """Update the weights after the last micro-batch of a step; before that, only count.

        Afterwards `grad_norm` and `skipped` hold this step's: 0-dim, on the device.
        """
        last = self._micro_batch == self._accumulation
        if last and not self.stage and not self.deepspeed.gradient_clipping():
            self._measure_and_clip()
        self.deepspeed.step()
        if last:
            self._micro_batch = 0
            if self.stage:
                self._ask_zero()
            self._restore_buffers_if_skipped()

    @property
    def lr(self) -> float:
        """The learning rate of the last step (of the first parameter group)."""
        return self.lrs[0] if self.deepspeed.lr_scheduler is None else self.optimizer.param_groups[0]["lr"]

    # --- what happens inside ----------------------------------------------------------------------------------------

    def seed_dropout(self) -> None:
        """Make dropout a function of (seed, step, micro-batch, rank): nothing has to be saved, and ranks differ."""
        number = self._seed
        for part in (self.deepspeed.global_steps, self._micro_batch, self.world.rank):
            number = (number * 1_000_003 + part + 1) % 2**63
        torch.manual_seed(number)

    def _poison(self, gradient: Tensor, loss: Tensor) -> Tensor:
        """The gradient as it is where the loss is finite, else NaN.

        A NaN survives averaging, so a bad loss on one rank reaches every rank with the gradients themselves.
        """
        return gradient + loss * 0

    def _measure_and_clip(self) -> None:
        """Stage 0, gradients already averaged: their norm, clipping, and the flag of a bad step. Never synchronizes."""
        limit, scaler = self.deepspeed.gradient_clipping(), self.deepspeed.torch_autocast_z0_gradscaler
        if scaler is not None and not limit:
            scaler.unscale_(self.optimizer)  # with clipping DeepSpeed has done it; it also looks for bad gradients
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
        if limit:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
        self.grad_norm = norm
        self._flag_bad_step(norm)

    def _flag_bad_step(self, norm: Tensor) -> None:
        self.skipped = torch.isfinite(norm).logical_not().to(torch.float32)
        # PyTorch's fused optimizers skip a step in their own kernel, except for SGD with dampening
        if getattr(self.optimizer, "_step_supports_amp_scaling", False) and not self.optimizer.defaults.get("dampening"):
            self.optimizer.found_inf = self.skipped
        elif self.skipped.item():  # other optimizers pass over parameters without a gradient; finding out synchronizes
            for parameter in self.module.parameters():
                parameter.grad = None

    def _ask_zero(self) -> None:
        """ZeRO measures, clips and skips by itself, and synchronizes to do so."""
        norm = self.deepspeed.get_global_grad_norm()
        self.grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.world.device)
        self.skipped.fill_(0.0 if self.deepspeed.was_step_applied() else 1.0)

    def _remember_buffers(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._saved_buffers, self._buffers)

    def _restore_buffers_if_skipped(self) -> None:
        skipped = self.skipped.bool()
        for buffer, saved in zip(self._buffers, self._saved_buffers, strict=True):
            torch.where(skipped, saved, buffer, out=buffer)

    # --- weights and state, whole, whatever ZeRO has split: full_state.py --------------------------------------------

    def portable_state(self) -> dict[str, Tensor]:
        """The model as a plain fp32 state dict on the CPU, the same on every rank; every rank must call it."""
        return full_state.portable_state(self)

    def full_state(self) -> dict[str, Any]:
        """All that training continues from, on the CPU, for any number of ranks and ZeRO stage; every rank must call it."""
        return full_state.full_state(self)

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from what `full_state` returned; every rank must call it. Raises UsageError if it does not fit."""
        full_state.restore(self, saved)
