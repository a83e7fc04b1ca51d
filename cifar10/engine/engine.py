"""DeepSpeed's engine with its bugs fixed; only this folder knows DeepSpeed's internals.

Training goes through DeepSpeed's forward, backward and step. What this file adds to DeepSpeed 0.19.8:

- `prepare()` keeps it from compiling its CPU communication op, which needs a C++ compiler and is never used.
- The true gradient norm, before clipping and averaged over ranks, at every step and without synchronizing with the device.
  DeepSpeed discards it at ZeRO stage 0, where its clipping also synchronizes twice a step.
- A step whose loss or gradient is not finite on any rank is skipped on all. DeepSpeed applies it at stage 0, so the fused
  optimizer skips it on the device (`found_inf`), and BatchNorm's statistics are restored. ZeRO does its own check.
- fp16's loss scale under ZeRO, where DeepSpeed clips gradients that are still scaled (see loss_scale.py).
- With one rank, no flattening, all-reduce and copying back of gradients.
"""

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from cifar10 import UsageError
from cifar10.distributed.device import count_gpus
from cifar10.distributed.world import World
from cifar10.engine import full_state, muon
from cifar10.engine.average import WeightAverage
from cifar10.engine.buffers import KeptBuffers
from cifar10.engine.experts import Experts
from cifar10.engine.loss_scale import LossScale
from cifar10.engine.muon import MuonWithSGD


def prepare() -> Any:
    """Import DeepSpeed without warnings or compilation, before `deepspeed.initialize`; returns the module."""
    if not count_gpus():
        os.environ["DS_ACCELERATOR"] = "cpu"  # detecting it prints a warning
    with _hidden("mlflow"):  # DeepSpeed's autotuner would import it, for 2 s
        import deepspeed
    for method in vars(torch.optim.Optimizer).values():  # see _step_without_dynamo
        if inspect.isfunction(method) and hasattr(method, "__wrapped__"):
            method.__wrapped__.__dynamo_disable = method.__wrapped__
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    return deepspeed


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Within, importing `module` raises ImportError as if it were not installed, unless it has been imported before."""
    hides = sys.modules.setdefault(module, None) is None
    try:
        yield
    finally:
        if hides:
            del sys.modules[module]


def _step_without_dynamo(optimizer: torch.optim.Optimizer) -> None:
    """Take the step itself out of what torch wraps it in, which imports torch._dynamo, for 2 s, to tell it not to compile.

    Nothing here compiles an optimizer. A step that a scheduler has wrapped stays as it is.
    """
    if "step" not in vars(optimizer):
        optimizer.step = MethodType(torch.no_grad()(inspect.unwrap(type(optimizer).step)), optimizer)


def leave() -> None:
    """Destroy the process groups, DeepSpeed's references to them included, or it cannot start again in this process."""
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    elif dist.is_initialized():
        dist.destroy_process_group()


def own_optimizer(model: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer | None:
    """The optimizer to pass to DeepSpeed if the config names one that DeepSpeed lacks, else None."""
    optimizer = config["optimizer"]
    return MuonWithSGD(muon.parameter_groups(model, optimizer["params"])) if optimizer["type"] == muon.NAME else None


def _takes_color(model: nn.Module) -> bool:
    """Whether the first convolution has several input channels: to images of one channel, layouts are all the same."""
    return next((p.shape[1] > 1 for p in model.parameters() if p.dim() == 4), False)


def synchronize_batch_norm(model: nn.Module) -> None:
    """Let every BatchNorm use the statistics of all ranks.

    In place: torch's convert_sync_batchnorm fails where the scale is a buffer instead of a parameter, as speednet's is.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__, module.process_group = nn.SyncBatchNorm, None


def _is_random(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training: dropout, stochastic depth, and layers that call dropout themselves."""
    rates = (getattr(module, name, 0.0) for name in ("dropout", "drop_rate"))
    drops = "Drop" in type(module).__name__ or type(module).__name__ == "StochasticDepth"
    return drops or any(isinstance(rate, float) and rate > 0 for rate in rates)


def checkpoint_blocks(model: nn.Module, model_name: str, section: Mapping[str, Any] | None = None) -> None:
    """Let a model's blocks keep only their inputs, and compute the rest again in backward. Raises UsageError if it has none.

    A block is a member of a Sequential or ModuleList that has layers of its own. In the second pass dropout draws the same
    numbers, and BatchNorm leaves its running statistics alone. `section` is DeepSpeed's `activation_checkpointing`, whose
    `cpu_checkpointing` keeps the inputs in CPU memory.
    """
    keeping = save_on_cpu if section and section.get("cpu_checkpointing") is True else nullcontext
    lists, blocks, inside = (nn.Sequential, nn.ModuleList), [], set()
    for parent in model.modules():  # a parent comes before its children
        for child in parent.children() if isinstance(parent, lists) else ():
            if any(child.children()) and not isinstance(child, lists) and child not in inside:
                blocks.append(child)
                inside.update(child.modules())
    for block in blocks:
        block.forward = partial(_checkpointed, block, block.forward, keeping)
    if not blocks:
        flag = "--gradient-checkpointing" if section is None else "activation_checkpointing in the JSON"
        raise UsageError(f"{flag}: --model {model_name} has no blocks to compute again; leave it out")


def _checkpointed(block: nn.Module, forward: Callable[..., Any], keeping: Callable[[], Any], *inputs: Any, **named: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs, **named)
    contexts = partial(_first_and_second_pass, block)
    with keeping():  # of the inputs only: what the block saves itself is thrown away
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **named)


def _first_and_second_pass(block: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), _without_running_statistics(block)


@contextmanager
def _without_running_statistics(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):  # the pass works on copies, which are thrown away
        norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


class Engine:
    """One model in training: learning rate, forward, backward, step; and its full weights and state on every rank.

    `deepspeed_engine` is what `deepspeed.initialize` returned for a config from `ds_config.resolve`; `seed` is for dropout.
    With `ema`, a decay, or `swa` the weights are averaged (see average.py).
    """

    portable_state, full_state, restore = full_state.portable_state, full_state.full_state, full_state.restore

    def __init__(self, deepspeed_engine: Any, world: World, seed: int = 0, *, ema: float = 0.0, swa: bool = False) -> None:
        self.deepspeed = deepspeed_engine
        self.module: nn.Module = deepspeed_engine.module
        self.world = world
        self.stage: int = deepspeed_engine.zero_optimization_stage()
        # for Adagrad ZeRO creates a new optimizer, and leaves the config's as basic_optimizer
        self.optimizer = deepspeed_engine.optimizer.optimizer if self.stage else deepspeed_engine.basic_optimizer
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.lrs = list(self.base_lrs)  # as last set by set_lr
        self.grad_norm = torch.zeros((), device=world.device)  # of the last step, over all ranks, before clipping
        self.skipped = torch.zeros((), device=world.device)  # 1.0 if the last step was skipped, else 0.0
        self.capture_seconds = 0.0  # spent so far to capture CUDA graphs
        self.seeds_dropout = any(map(_is_random, self.module.modules()))
        norms = {m: [p.requires_grad for p in m.parameters()] for m in self.module.modules() if isinstance(m, _BatchNorm)}
        self._frozen_norms = [norm for norm, trained in norms.items() if trained and not any(trained)]
        self._accumulation = deepspeed_engine.gradient_accumulation_steps()
        self.experts = Experts(self.module, world, self._accumulation)
        self.seeds_dropout |= self.experts.drop_tokens
        self.routed: Tensor | None = None  # with experts: what Experts.seen counts, of the last step on this rank
        self._micro_batch = 0  # of the current step
        self._seed = seed
        filters = next((p for p in self.module.parameters() if p.dim() == 4), None)
        if world.device.type == "cuda" and not self.stage and filters is not None and filters.shape[1] > 1:
            self.module.to(
                memory_format=torch.channels_last
            )  # as color images are, or each convolution would convert its weight
        self._buffers = KeptBuffers(self.module)
        statistics = [buffer for buffer in self._buffers.tensors if buffer.is_floating_point()]
        averaged = [*full_state.fp32_weights(self), *statistics]
        self.average, self._ema = WeightAverage(averaged, world.device) if ema or swa else None, ema
        if deepspeed_engine.torch_autocast_enabled() and deepspeed_engine.torch_autocast_dtype() == torch.float16:
            self._replace_loss_scaler()
        if not self.stage:
            _step_without_dynamo(self.optimizer)
            if inspect.signature(deepspeed_engine.clip_fp32_gradients).parameters:
                raise RuntimeError("this version of DeepSpeed clips gradients differently: cifar10/engine/engine.py must adapt")
            deepspeed_engine.clip_fp32_gradients = self._measure_and_clip
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

    def _start_momentum_at_zero(self) -> None:
        """PyTorch allocates fused SGD's momentum at the first step, uninitialized, and leaves it so if that step is skipped.

        From zero the first step is the same, momentum * 0 + gradient, except with dampening.
        """
        for group in self.optimizer.param_groups:
            if group.get("momentum") and not group.get("dampening") and group.get("fused"):
                for parameter in group["params"]:
                    self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def train(self) -> None:
        """Training mode, but for BatchNorm whose parameters are frozen, which keeps to its running statistics."""
        self.deepspeed.train()
        for norm in self._frozen_norms:
            norm.eval()

    # --- one step, in order -----------------------------------------------------------------------------------------

    def set_lr(self, multiplier: float) -> None:
        """Set each parameter group's base learning rate times `multiplier`, unless the config has a scheduler."""
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
            self._buffers.keep()
        if self.seeds_dropout:
            self.seed_dropout()
        return self.deepspeed(images)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's mean loss; after a step's last micro-batch, average them over ranks."""
        if self.experts:
            self.routed = self.experts.seen() + (self.routed if self._micro_batch else 0)
            loss = loss + self.experts.balance_loss()
        value = loss.detach()  # a hook that held the loss itself would be a cycle and keep every graph alive
        loss.register_hook(lambda gradient: gradient.add(value, alpha=0))  # NaN if it is not finite, and then on every rank
        self.deepspeed.backward(loss, scale_wrt_gas=self._accumulation > 1)
        self._micro_batch += 1

    def step(self) -> None:
        """After the last micro-batch of a step, update the weights and set `grad_norm` and `skipped` (0-dim, on the device)."""
        last = self._micro_batch == self._accumulation
        if last and not self.stage and not self.deepspeed.gradient_clipping():
            self._measure_and_clip()
        self.deepspeed.step()
        if last:
            self._end_step()

    def _end_step(self) -> None:
        """After an update: what it came to; buffers of a skipped step go back; the average follows."""
        self._micro_batch = 0
        if self.stage:  # ZeRO measures, clips and skips by itself, and synchronizes to do so
            self.grad_norm.fill_(self.deepspeed.get_global_grad_norm())  # a copy from the host would be one more wait
            self.skipped.fill_(0.0 if self.deepspeed.was_step_applied() else 1.0)
        self._buffers.put_back(self.skipped)
        if self._ema:
            self.average.follow(self._ema, self.skipped)

    @property
    def has_average(self) -> bool:
        """Whether there is an average of the weights yet. Synchronizes with the device."""
        return self.average is not None and bool(self.average.updates)

    @property
    def lr(self) -> float:
        """The learning rate of the last step (of the first parameter group)."""
        return self.lrs[0] if self.deepspeed.lr_scheduler is None else self.optimizer.param_groups[0]["lr"]

    # --- internals --------------------------------------------------------------------------------------------------

    def seed_dropout(self) -> None:
        """Make dropout a function of (seed, step, micro-batch, rank), so that no random state has to be saved."""
        number = self._seed
        for part in (self.deepspeed.global_steps, self._micro_batch, self.world.rank):
            number = (number * 1_000_003 + part + 1) % 2**63
        torch.manual_seed(number)

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients together, also of other ranks' experts: 0-dim."""
        return self.experts.total_norm(gradients)

    def _measure_and_clip(self) -> None:
        """At stage 0, of averaged gradients: their norm, clipping, and the flag of a bad step, without synchronizing."""
        limit, scaler = self.deepspeed.gradient_clipping(), self.deepspeed.torch_autocast_z0_gradscaler
        if scaler is not None and not limit:
            scaler.unscale_(self.optimizer)  # with clipping DeepSpeed has done it
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = self._total_norm([p.grad for p in parameters])
        if limit:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
        self.grad_norm, self.skipped = norm, torch.ne(norm * 0, 0, out=torch.empty_like(norm))  # 1.0 if it is not finite
        # PyTorch's fused optimizers skip a step in their own kernel, except for SGD with dampening
        if getattr(self.optimizer, "_step_supports_amp_scaling", False) and not self.optimizer.defaults.get("dampening"):
            self.optimizer.found_inf = self.skipped
        elif self.skipped.item():  # synchronizes; other optimizers ignore parameters without a gradient
            for parameter in self.module.parameters():
                parameter.grad = None
