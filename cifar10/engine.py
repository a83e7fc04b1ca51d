"""DeepSpeed's engine with its quirks settled: the only file, beside the story's own `deepspeed.initialize`, that knows them.

Everything goes through DeepSpeed's forward, backward and step. What this file adds, and why:

- `prepare()` keeps DeepSpeed from compiling its CPU communication op (it needs a C++ compiler, and training never uses
  it), and from greeting the console.
- The true gradient norm, before clipping and averaged over ranks, at every step and without waiting for the device.
  DeepSpeed 0.19.8 throws it away at ZeRO stage 0; its clipping also waits for the device twice a step.
- A step whose loss or gradient is not finite on any rank is skipped on all. At stage 0 DeepSpeed would apply it; here the
  fused optimizer is told on the device (`found_inf`) and BatchNorm's statistics are put back. ZeRO does its own check.
- fp16's loss scale under ZeRO, where DeepSpeed clips gradients that are still scaled (see loss_scale.py).
- At world size 1 there is nothing to reduce, so the flatten, all-reduce and copy back of every gradient are left out.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar10.loss_scale import LossScale
from cifar10.world import World


def prepare() -> Any:
    """Import DeepSpeed quietly and without building anything; returns the module. Call before `deepspeed.initialize`."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # detecting it prints a warning
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    return deepspeed


class Engine:
    """One model in training: forward, backward, step, and the weights as anyone can load them.

    `deepspeed_engine` is what `deepspeed.initialize` returned for a config that `ds_json.resolve` made; `seed` is dropout's.
    """

    def __init__(self, deepspeed_engine: Any, world: World, seed: int = 0) -> None:
        self.deepspeed = deepspeed_engine
        self.module: nn.Module = deepspeed_engine.module
        self.optimizer = deepspeed_engine.basic_optimizer
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._world = world
        self._zero = bool(deepspeed_engine.zero_optimization())
        self._accumulation = deepspeed_engine.gradient_accumulation_steps()
        self._micro_batch = 0  # of the step under way
        self._seed = seed
        self._has_dropout = any(isinstance(module, nn.modules.dropout._DropoutNd) for module in self.module.modules())
        self._buffers = list(self.module.buffers())
        self._kept_buffers = [torch.empty_like(b) for b in self._buffers]
        self._grad_norm = torch.zeros((), device=world.device)
        self._skipped = torch.zeros((), device=world.device)
        if deepspeed_engine.torch_autocast_enabled() and deepspeed_engine.torch_autocast_dtype() == torch.float16:
            self._take_over_loss_scale()
        if not self._zero:
            self._take_over_clipping()
            self._start_momentum_at_zero()
            if world.size == 1:
                deepspeed_engine.enable_backward_allreduce = False

    def _take_over_loss_scale(self) -> None:
        scale = LossScale.from_json(self.deepspeed.config.get("fp16", {}))
        if self._zero:
            zero = self.deepspeed.optimizer
            zero.torch_autocast_gradscaler, zero.loss_scaler, zero.dynamic_loss_scale = None, scale, True
        else:  # the same rule, kept on the device
            interval = int(min(scale.window, 2**31 - 1))
            self.deepspeed.torch_autocast_z0_gradscaler = torch.amp.GradScaler(
                self._world.device.type, init_scale=scale.cur_scale, growth_interval=interval
            )

    def _take_over_clipping(self) -> None:
        replaced = self.deepspeed.clip_fp32_gradients
        if inspect.signature(replaced).parameters:
            raise RuntimeError("this DeepSpeed clips in another way; cifar10/engine.py must be read again before it is used")
        self.deepspeed.clip_fp32_gradients = self._measure_and_clip

    def _start_momentum_at_zero(self) -> None:
        """PyTorch makes fused SGD's momentum at the first step, uninitialised; were that step skipped, it would stay so.

        From zero the first step is the same: momentum * 0 + gradient. (Not so with dampening, which is left alone.)
        """
        for group in self.optimizer.param_groups:
            if group.get("momentum") and not group.get("dampening") and group.get("fused"):
                for parameter in group["params"]:
                    self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @property
    def _skips_on_device(self) -> bool:
        """Whether the optimizer's kernel itself can leave a bad step out: PyTorch's fused ones, but for SGD with dampening."""
        return getattr(self.optimizer, "_step_supports_amp_scaling", False) and not self.optimizer.defaults.get("dampening")

    # --- one step, in the order it happens -------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, C, S, S] -> logits [B, classes], through DeepSpeed's forward."""
        if self._micro_batch == 0:
            self._remember_buffers()
        if self._has_dropout:
            self._seed_dropout()
        return self.deepspeed(images)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss; at the last micro-batch of a step, average them over ranks."""
        value = loss.detach()  # the hook must not hold the loss itself: that would be a cycle, and keep every graph alive
        loss.register_hook(lambda gradient: self._poison(gradient, value))
        self.deepspeed.backward(loss, scale_wrt_gas=self._accumulation > 1)
        self._micro_batch += 1

    def step(self, lr_multiplier: float) -> None:
        """Update the weights once the last micro-batch of the step is in; until then, do nothing but count.

        Afterwards `grad_norm` and `skipped` hold this step's.
        """
        last = self._micro_batch == self._accumulation
        if last:
            if self.deepspeed.lr_scheduler is None:  # else the learning rate is the JSON's scheduler's
                for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                    group["lr"] = base * lr_multiplier
            if not self._zero and not self.deepspeed.gradient_clipping():
                self._measure_and_clip()
        self.deepspeed.step()
        if last:
            self._micro_batch = 0
            if self._zero:
                self._ask_zero()
            self._restore_buffers_if_skipped()

    @property
    def lr(self) -> float:
        """The learning rate of the last step (of the first parameter group)."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def grad_norm(self) -> Tensor:
        """The last step's gradient norm, before clipping, over all ranks: 0-dim on the device."""
        return self._grad_norm

    @property
    def skipped(self) -> Tensor:
        """1.0 if the last step was skipped, else 0.0: 0-dim on the device."""
        return self._skipped

    # --- what happens inside ----------------------------------------------------------------------------------------

    def _seed_dropout(self) -> None:
        """Make dropout a function of (seed, step, micro-batch, rank): nothing has to be saved, and ranks differ."""
        number = self._seed
        for part in (self.deepspeed.global_steps, self._micro_batch, self._world.rank):
            number = (number * 1_000_003 + part + 1) % 2**63
        torch.manual_seed(number)

    def _poison(self, gradient: Tensor, loss: Tensor) -> Tensor:
        """The gradient as it is where the loss is finite, else NaN.

        A NaN survives averaging, so a bad loss on one rank reaches every rank with the gradients themselves.
        """
        return gradient + loss * 0

    def _measure_and_clip(self) -> None:
        """Stage 0, gradients already averaged: their norm, clipping, and the switch for a bad step. No host sync."""
        limit, scaler = self.deepspeed.gradient_clipping(), self.deepspeed.torch_autocast_z0_gradscaler
        if scaler is not None and not limit:
            scaler.unscale_(self.optimizer)  # with clipping DeepSpeed has done it; it also looks for bad gradients
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
        if limit:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
        self._grad_norm = norm
        self._flag_bad_step(norm)

    def _flag_bad_step(self, norm: Tensor) -> None:
        self._skipped = torch.isfinite(norm).logical_not().to(torch.float32)
        if self._skips_on_device:
            self.optimizer.found_inf = self._skipped
        elif self._skipped.item():  # other optimizers pass over parameters without a gradient; finding out costs a sync
            for parameter in self.module.parameters():
                parameter.grad = None

    def _ask_zero(self) -> None:
        """ZeRO measures, clips and skips by itself, and waits for the device to do so."""
        norm = self.deepspeed.get_global_grad_norm()
        self._grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self._world.device)
        self._skipped.fill_(0.0 if self.deepspeed.was_step_applied() else 1.0)

    def _remember_buffers(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._kept_buffers, self._buffers)

    def _restore_buffers_if_skipped(self) -> None:
        skipped = self._skipped.bool()
        for buffer, kept in zip(self._buffers, self._kept_buffers, strict=True):
            torch.where(skipped, kept, buffer, out=buffer)

    # --- the weights, for evaluation, for people, for resuming --------------------------------------------------------

    def portable_state(self) -> dict[str, Tensor]:
        """The whole model as a plain fp32 state dict on the CPU; every rank must call it, and gets the same.

        Weights are the fp32 masters, gathered where ZeRO has split them. BatchNorm statistics, which each rank keeps of
        its own images, are averaged over ranks, on a copy: the run itself goes on with its own.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        state = {}
        for name, parameter in self.module.named_parameters():
            full = safe_get_full_fp32_param(parameter) if self._zero else parameter.detach()
            state[name] = full.to("cpu", torch.float32, copy=True).contiguous()
        for name, buffer in self.module.named_buffers():
            mean = buffer.detach().clone()
            if mean.is_floating_point():
                mean = self._world.total(mean.to(torch.float32)) / self._world.size
            state[name] = mean.cpu()
        return {name: state[name] for name in self.module.state_dict() if name in state}

    def save(self, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        """Write a resumable checkpoint folder/tag: DeepSpeed's own files, and each rank's own buffers. All ranks call it."""
        self.deepspeed.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
        scaler = self.deepspeed.torch_autocast_z0_gradscaler
        own = {
            "buffers": {name: buffer.cpu() for name, buffer in self.module.named_buffers()},
            "loss_scaler": scaler.state_dict() if scaler is not None else None,
        }
        torch.save(own, folder / tag / f"rank_{self._world.rank}_of_{self._world.size}.pt")

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Go on from folder/tag; returns the client_state that was saved. All ranks call it.

        A checkpoint of another world size starts each rank from rank 0's buffers.
        """
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        path, client_state = self.deepspeed.load_checkpoint(str(folder), tag=tag)
        if self.deepspeed.lr_scheduler is None:  # momentum and the like are the JSON's, as recorded, not the checkpoint's
            for group, ours in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(ours)
        if path is None:
            raise FileNotFoundError(f"no checkpoint in {folder / tag}")
        own_file = folder / tag / f"rank_{self._world.rank}_of_{self._world.size}.pt"
        if own_file.exists():
            own = torch.load(own_file, map_location=self._world.device, weights_only=True)
            for name, buffer in self.module.named_buffers():
                buffer.copy_(own["buffers"][name])
            if own["loss_scaler"] is not None:
                self.deepspeed.torch_autocast_z0_gradscaler.load_state_dict(own["loss_scaler"])
        return client_state


def weights_sha256(state: dict[str, Tensor]) -> str:
    """A fingerprint of a state dict: names, types, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
