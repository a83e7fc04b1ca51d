"""DeepSpeed's engine with its quirks settled: the only file, beside the script's own `deepspeed.initialize`, that knows them.

Everything goes through DeepSpeed's forward, backward and step. What this file adds, and why:

- `prepare()` keeps DeepSpeed from compiling its CPU communication op (it needs a C++ compiler, and training never uses
  it), and from greeting the console.
- The true gradient norm, before clipping and averaged over ranks, at every step and without waiting for the device.
  DeepSpeed 0.19.8 throws it away at ZeRO stage 0; its clipping also waits for the device twice a step.
- A step whose loss or gradient is not finite on any rank is skipped on all. At stage 0 DeepSpeed would apply it; here the
  fused optimizer is told on the device (`found_inf`) and BatchNorm's statistics are put back. ZeRO does its own check.
- fp16's loss scale under ZeRO, where DeepSpeed clips gradients that are still scaled (see loss_scale.py).
- The levels of `--engine-level` (see levels.py): DeepSpeed's compile(), and CUDA graphs of what it does.
- At world size 1 there is nothing to reduce, so the flatten, all-reduce and copy back of every gradient are left out.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.distributed.world import World
from cifar10.engine import muon
from cifar10.engine.cuda_graphs import CudaRecorder, Kept, RecordedForward, RecordedStep, Recorder
from cifar10.engine.levels import Level
from cifar10.engine.loss_scale import LossScale
from cifar10.engine.muon import MuonWithSGD

COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # DeepSpeed's own

SCALE = ("scale", "_growth_tracker")  # a loss scale's state

STATE = frozenset("parameters optimizer optimizer_name buffers loss_scale scheduler scheduler_name groups counters".split())


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
    """The optimizer that DeepSpeed is to be handed, if the JSON names one that it does not have; None for its own."""
    optimizer = config["optimizer"]
    return MuonWithSGD(muon.parameter_groups(model, optimizer["params"])) if optimizer["type"] == muon.NAME else None


class Engine:
    """One model in training: forward, backward, step, and the weights as anyone can load them.

    `deepspeed_engine` is what `deepspeed.initialize` returned for a config that `ds_json.resolve` made; `seed` is dropout's;
    `level` is one that `levels.settle` allows, and CUDA graphs are its `recorder`'s.
    """

    def __init__(
        self, deepspeed_engine: Any, world: World, seed: int = 0, level: Level = "eager", recorder: Recorder | None = None
    ) -> None:
        self.deepspeed = deepspeed_engine
        self.module: nn.Module = deepspeed_engine.module
        self._world = world
        self._stage = deepspeed_engine.zero_optimization_stage()
        self._zero = self._stage > 0
        # ZeRO makes a new Adagrad in place of the one that was asked for, which stays behind as basic_optimizer
        self.optimizer = deepspeed_engine.optimizer.optimizer if self._zero else deepspeed_engine.basic_optimizer
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._lrs = list(self.base_lrs)  # of the last step, while no scheduler of the JSON moves them
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
        self._recorder: Recorder | None = None
        self._recordings: dict[Any, RecordedStep] = {}  # at the level "captured": steps, by the shape of their images
        self._is_recording = False
        self._take_level(level, recorder)

    def _take_level(self, level: Level, recorder: Recorder | None) -> None:
        if level == "compile":
            for hook in (self.deepspeed.module_forward_pre_hook, self.deepspeed.module_forward_post_hook):
                hook.remove()  # they start and stop timers, and read a count of steps: each step would be compiled anew
            self.deepspeed.compile(compile_kwargs={"dynamic": False})  # each size of images is compiled for itself
        if level not in ("graph", "captured"):
            return
        if recorder is None and self._world.device.type != "cuda":
            raise UsageError(f"--engine-level {level} needs a GPU, for CUDA graphs; take --engine-level eager, or compile")
        recorder = recorder or CudaRecorder()
        if level == "graph":
            RecordedForward(self.module, recorder, self._world.device)
            return
        host_decides = self.deepspeed.lr_scheduler or self.deepspeed.torch_autocast_z0_gradscaler or not self._skips_on_device
        if self._zero or self._world.size > 1 or self._accumulation > 1 or host_decides:
            raise UsageError("--engine-level captured is for one rank, one pass a step, no ZeRO, and fused SGD or MuonWithSGD")
        self._recorder = recorder
        self.deepspeed._config.steps_per_print = None  # its line would read the learning rate from the device
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = torch.tensor(lr, dtype=torch.float32, device=self._world.device)  # which recordings read

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
            raise RuntimeError(
                "this DeepSpeed clips in another way; cifar10/engine/engine.py must be read again before it is used"
            )
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

    def micro_step(self, learn: Callable[..., Any], images: Tensor, labels: Tensor, multiplier: float, *settings: Any) -> Any:
        """`learn(self, images, labels, multiplier, *settings)`, which calls forward, backward and step, in this order.

        At the level "captured" it is called once, to be recorded, for each shape of images; after that its recording is
        replayed, and returns the same tensors with new values. What of it the host does, is done here.
        """
        if self._recorder is None:
            return learn(self, images, labels, multiplier, *settings)
        key = learn, images.shape, *settings
        if key not in self._recordings:
            self._recordings[key] = self._record(learn, images, labels, multiplier, *settings)
        recording, engine = self._recordings[key], self.deepspeed
        self._move_lr(multiplier)
        if self._has_dropout:
            self._seed_dropout()  # a replay draws from the seed of its moment
        measured, self._grad_norm, self._skipped = recording(images, labels)
        engine.global_steps, engine.micro_steps = engine.global_steps + 1, engine.micro_steps + 1
        engine.global_samples += engine.train_batch_size()
        return measured

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, C, S, S] -> logits [B, classes], through DeepSpeed's forward."""
        if self._micro_batch == 0:
            self._remember_buffers()
        if self._has_dropout and not self._is_recording:
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
            if self.deepspeed.lr_scheduler is None and not self._is_recording:  # else it is the JSON's scheduler's
                self._move_lr(lr_multiplier)
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
        return self._lrs[0] if self.deepspeed.lr_scheduler is None else self.optimizer.param_groups[0]["lr"]

    @property
    def grad_norm(self) -> Tensor:
        """The last step's gradient norm, before clipping, over all ranks: 0-dim on the device."""
        return self._grad_norm

    @property
    def skipped(self) -> Tensor:
        """1.0 if the last step was skipped, else 0.0: 0-dim on the device."""
        return self._skipped

    # --- what happens inside ----------------------------------------------------------------------------------------

    def _move_lr(self, multiplier: float) -> None:
        self._lrs = [base * multiplier for base in self.base_lrs]
        for group, lr in zip(self.optimizer.param_groups, self._lrs, strict=True):
            if self._recorder is None:
                group["lr"] = lr
            else:
                group["lr"].fill_(lr)

    def _record(self, learn: Callable[..., Any], images: Tensor, labels: Tensor, *settings: Any) -> RecordedStep:
        """A step on images of this shape, recorded. All that this has moved stands where it stood before."""
        kept = Kept(self.module, self.optimizer, self._world.device)
        counters = {name: getattr(self.deepspeed, name) for name in (*COUNTERS, "micro_steps")}

        def step(own_images: Tensor, own_labels: Tensor) -> tuple[Any, Tensor, Tensor]:
            return learn(self, own_images, own_labels, *settings), self._grad_norm, self._skipped

        self._is_recording = True
        try:
            return RecordedStep(self._recorder, step, images, labels)
        finally:
            self._is_recording, self._micro_batch = False, 0
            kept.put_back()
            for name, value in counters.items():
                setattr(self.deepspeed, name, value)

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
        state = {name: self._full(parameter) for name, parameter in self.module.named_parameters()}
        for name, buffer in self.module.named_buffers():
            mean = buffer.detach().clone()
            if mean.is_floating_point():
                mean = self._world.total(mean.to(torch.float32)) / self._world.size
            state[name] = mean.cpu()
        return {name: state[name] for name in self.module.state_dict() if name in state}

    def full_state(self) -> dict[str, Any]:
        """All that training goes on from, whole, on the CPU and of plain types; every rank must call it, and gets the same.

        Weights and optimizer state are {name: tensor}, gathered where ZeRO has split them, so that they fit any number of
        ranks and any ZeRO stage. Buffers are a list, those of each rank, since each has BatchNorm statistics of its own.
        """
        engine = self.deepspeed
        scheduler, scaler = engine.lr_scheduler, self._loss_scaler()
        return {
            "parameters": {name: self._full(parameter) for name, parameter in self.module.named_parameters()},
            "optimizer": {key: self._full_optimizer_state(key) for key in self._optimizer_keys()},
            "optimizer_name": type(self.optimizer).__name__,
            "buffers": self._world.gather({name: buffer.cpu().clone() for name, buffer in self.module.named_buffers()}),
            "loss_scale": {k: scaler.state_dict()[k] for k in SCALE} if scaler is not None else None,
            "scheduler": scheduler.state_dict() if scheduler is not None else None,
            "scheduler_name": type(scheduler).__name__ if scheduler is not None else None,
            "groups": self._group_settings(),
            "counters": {name: getattr(engine, name) for name in COUNTERS},
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `full_state` returned, in a run of any number of ranks and any ZeRO stage. All ranks call it.

        Where the number of ranks is another, each starts from the mean of the saved buffers. Raises UsageError, and changes
        nothing, if the weights are another model's or the optimizer state another optimizer's.
        """
        self._refuse_others(saved)
        self._recordings.clear()  # the optimizer's state will lie elsewhere
        for name, parameter in self.module.named_parameters():
            self._set(parameter, saved["parameters"][name].to(self._world.device))
        self._set_optimizer_state(saved["optimizer"])
        for name, value in self._buffers_from(saved["buffers"]).items():
            self.module.get_buffer(name).copy_(value)
        scaler = self._loss_scaler()
        if scaler is not None and saved["loss_scale"] is not None:
            scaler.load_state_dict({**scaler.state_dict(), **saved["loss_scale"]})
        if self.deepspeed.lr_scheduler is not None and saved["scheduler"] is not None:
            self.deepspeed.lr_scheduler.load_state_dict(saved["scheduler"])
            for group, settings in zip(self.optimizer.param_groups, saved["groups"], strict=True):
                group.update(settings)  # the scheduler has moved them; without one they are the JSON's, as recorded
        for name in COUNTERS:
            setattr(self.deepspeed, name, saved["counters"][name])
        self.deepspeed.micro_steps = self.deepspeed.global_steps * self._accumulation  # DeepSpeed finds a step's last by it

    def _refuse_others(self, saved: dict[str, Any]) -> None:
        if not isinstance(saved, dict) or not saved.keys() >= STATE:
            raise UsageError("the checkpoint is another program's, or another version's")
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.module.named_parameters()}
        theirs = {name: tuple(value.shape) for name, value in saved["parameters"].items()}
        if shapes != theirs:
            name = next(name for name in {**shapes, **theirs} if shapes.get(name) != theirs.get(name))
            raise UsageError(f"the checkpoint is another model's: {name} is {theirs.get(name)} there, {shapes.get(name)} here")
        if saved["optimizer_name"] != type(self.optimizer).__name__:
            ours = type(self.optimizer).__name__
            raise UsageError(f"the checkpoint's optimizer is {saved['optimizer_name']}, and this run's is {ours}")
        scheduler = self.deepspeed.lr_scheduler
        if scheduler is not None and saved["scheduler_name"] not in (None, type(scheduler).__name__):
            ours = type(scheduler).__name__
            raise UsageError(f"the checkpoint's scheduler is {saved['scheduler_name']}, and this run's is {ours}")
        buffers = {name: tuple(buffer.shape) for name, buffer in self.module.named_buffers()}
        if any({name: tuple(value.shape) for name, value in one.items()} != buffers for one in saved["buffers"]):
            raise UsageError("the checkpoint's buffers are another model's")
        for key, values in saved["optimizer"].items():  # a fused optimizer would read beyond the end of one that is too short
            if odd := [name for name, value in values.items() if not self._fits(value, shapes.get(name))]:
                raise UsageError(f"the checkpoint's {key} of {odd[0]} does not fit the model")
        if any(type(saved["counters"][name]) is not int for name in COUNTERS):
            raise UsageError("the checkpoint's counters are no numbers")

    def _fits(self, state: Tensor, shape: tuple[int, ...] | None) -> bool:
        """Whether an optimizer's state is one number, or has its parameter's shape; Adafactor's have shapes of their own."""
        return shape is not None and (
            state.dim() == 0 or tuple(state.shape) == shape or type(self.optimizer).__name__ == "Adafactor"
        )

    def _group_settings(self) -> list[dict[str, Any]]:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        plain = self._lrs if self.deepspeed.lr_scheduler is None else [group["lr"] for group in groups]
        return [{**group, "lr": lr} for group, lr in zip(groups, plain, strict=True)]

    def _loss_scaler(self) -> Any:
        """What keeps fp16's loss scale, at whichever ZeRO stage; None in other precisions."""
        if self._zero and isinstance(self.deepspeed.optimizer.loss_scaler, LossScale):
            return self.deepspeed.optimizer.loss_scaler
        return self.deepspeed.torch_autocast_z0_gradscaler

    # --- DeepSpeed's getters and setters of what ZeRO has split ----------------------------------------------------------

    def _full(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(parameter) if self._zero else parameter.detach()
        return full.to("cpu", torch.float32, copy=True).contiguous()

    def _set(self, parameter: nn.Parameter, value: Tensor) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        with GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3), torch.no_grad():
            parameter.copy_(value)
        if self._stage == 3:
            safe_set_local_fp32_param(parameter, self._own_part(parameter, value))
        elif self._zero:
            safe_set_full_fp32_param(parameter, value)

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """What this rank keeps of a whole tensor at stage 3; the last part is padded, which DeepSpeed's own setter forgets."""
        size = parameter.ds_tensor.numel()
        padded = value.new_zeros(size * self._world.size)
        padded[: value.numel()] = value.flatten()
        return padded[size * self._world.rank : size * (self._world.rank + 1)]

    def _flat_partitions(self) -> list[Tensor]:
        """Under ZeRO, the flat tensors that the optimizer has in place of parameters."""
        zero = self.deepspeed.optimizer
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _optimizer_keys(self) -> list[str]:
        """The names of the optimizer's state; none before the first step."""
        owners = self._flat_partitions() if self._zero else list(self.module.parameters())
        return sorted(
            {key for owner in owners for key, value in self.optimizer.state.get(owner, {}).items() if torch.is_tensor(value)}
        )

    def _full_optimizer_state(self, key: str) -> dict[str, Tensor]:
        """{parameter name: its state}; a count of steps is 0-dim."""
        from deepspeed.utils import safe_get_full_optimizer_state

        named, state = dict(self.module.named_parameters()), self.optimizer.state
        if not self._zero:
            return {name: state[p][key].to("cpu", copy=True) for name, p in named.items() if key in state.get(p, {})}
        first = state[self._flat_partitions()[0]][key]
        if first.dim() == 0:
            return {name: first.to("cpu", copy=True) for name in named}
        return {
            name: safe_get_full_optimizer_state(p, key).to("cpu", copy=True).view(p.ds_shape if self._stage == 3 else p.shape)
            for name, p in named.items()
        }

    def _set_optimizer_state(self, saved: dict[str, dict[str, Tensor]]) -> None:
        named = dict(self.module.named_parameters())
        if not self._zero:
            for key, values in saved.items():
                for name, value in values.items():
                    self.optimizer.state[named[name]][key] = self._placed(value)
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for key, values in saved.items():
            one = next(iter(values.values()))
            for flat in self._flat_partitions():
                self.optimizer.state[flat][key] = self._placed(one).clone() if one.dim() == 0 else torch.zeros_like(flat)
        if saved and self._stage < 3:  # its setters know the optimizer's state only once this has been done
            self.deepspeed.optimizer._hp_optimizer_states_linked = False
            self.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
        for key, values in saved.items():
            for name, value in values.items():
                parameter, value = named[name], value.to(self._world.device)
                if value.dim() and self._stage == 3:
                    safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), key)
                elif value.dim():
                    safe_set_full_optimizer_state(parameter, value, key)

    def _placed(self, value: Tensor) -> Tensor:
        """A copy of a state where the optimizer keeps it: PyTorch's fused ones count steps on the device, others on the CPU."""
        on_device = value.dim() or self.optimizer.param_groups[0].get("fused")
        return value.to(self._world.device if on_device else "cpu", copy=True)

    def _buffers_from(self, saved: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """This rank's buffers: its own, or the mean over ranks where there were more or fewer of them."""
        if len(saved) == self._world.size:
            return saved[self._world.rank]
        return {name: mean_buffer([one[name] for one in saved]) for name in saved[0]}


def mean_buffer(values: list[Tensor]) -> Tensor:
    """The mean of the ranks' values of one buffer; of a count, which all ranks share, the first."""
    return torch.stack(values).mean(dim=0) if values[0].is_floating_point() else values[0]


def weights_sha256(state: dict[str, Tensor]) -> str:
    """A fingerprint of a state dict: names, types, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
