"""The full state of a model in training, gathered from all ranks and restored on any number of them, also under ZeRO.

It is saved unpartitioned, as {name: tensor}: DeepSpeed 0.19.8's own checkpoints cannot change the number of ranks under ZeRO.
Every rank must call these functions, which use DeepSpeed's getters and setters for what ZeRO has partitioned.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.engine.loss_scale import LossScale

if TYPE_CHECKING:
    from cifar10.engine.engine import Engine

COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # DeepSpeed's own
SCALE = ("scale", "_growth_tracker")  # a loss scale's state
STATE = frozenset("parameters optimizer optimizer_name buffers loss_scale scheduler scheduler_name groups counters".split())


def portable_state(engine: Engine, *, averaged: bool = False) -> dict[str, Tensor]:
    """The model, or its average, as a plain fp32 state dict on the CPU, the same on every rank.

    Weights are the fp32 masters. BatchNorm statistics are averaged over ranks, on a copy: each rank trains on with its own.
    """
    if averaged:
        with engine.average.applied():
            return portable_state(engine)
    state = {name: _gathered(engine, parameter) for name, parameter in engine.module.named_parameters()}
    for name, buffer in engine.module.named_buffers():
        mean = buffer.detach().clone()
        if mean.is_floating_point():
            mean = engine.world.total(mean.to(torch.float32)) / engine.world.size
        state[name] = mean.cpu()
    return engine.experts.of_all_ranks({name: state[name] for name in engine.module.state_dict() if name in state})


def full_state(engine: Engine) -> dict[str, Any]:
    """All that training continues from, on the CPU and of plain types, the same on every rank.

    Weights and optimizer state fit any number of ranks and any ZeRO stage. Buffers (BatchNorm's) are a list, one per rank.
    """
    scheduler, scaler = engine.deepspeed.lr_scheduler, loss_scaler(engine)
    groups = [{k: v for k, v in group.items() if k not in ("params", "name")} for group in engine.optimizer.param_groups]
    optimizer = {key: _gathered_optimizer_state(engine, key) for key in _optimizer_keys(engine)}
    if scheduler is None:
        groups = [{**group, "lr": lr} for group, lr in zip(groups, engine.lrs, strict=True)]  # never a tensor
    return {
        **_tensors(engine),
        "average": _average(engine),
        "optimizer": {key: engine.experts.of_all_ranks(values) for key, values in optimizer.items()},
        "optimizer_name": type(engine.optimizer).__name__,
        "loss_scale": {k: scaler.state_dict()[k] for k in SCALE} if scaler is not None else None,
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
        "scheduler_name": type(scheduler).__name__ if scheduler is not None else None,
        "groups": groups,
        "counters": {name: getattr(engine.deepspeed, name) for name in COUNTERS},
    }


def restore(engine: Engine, saved: dict[str, Any]) -> None:
    """Continue from what `full_state` returned, on any number of ranks and at any ZeRO stage.

    With another number of ranks, each starts from the mean of the saved buffers. Raises UsageError, and changes nothing, if
    the state is that of another model or optimizer.
    """
    _check(engine, saved)
    deepspeed, scaler = engine.deepspeed, loss_scaler(engine)
    if engine.average and saved.get("average"):
        with engine.average.applied():
            _set_tensors(engine, saved["average"])
        engine.average.updates.fill_(saved["average"]["updates"])
    _set_tensors(engine, saved)
    _set_optimizer_state(engine, saved["optimizer"])
    if scaler is not None and saved["loss_scale"] is not None:
        scaler.load_state_dict({**scaler.state_dict(), **saved["loss_scale"]})
    if deepspeed.lr_scheduler is not None and saved["scheduler"] is not None:
        deepspeed.lr_scheduler.load_state_dict(saved["scheduler"])
        for group, settings in zip(engine.optimizer.param_groups, saved["groups"], strict=True):
            group.update(settings)  # which the scheduler has changed
    for name in COUNTERS:
        setattr(deepspeed, name, saved["counters"][name])
    deepspeed.micro_steps = deepspeed.global_steps * deepspeed.gradient_accumulation_steps()


def loss_scaler(engine: Engine) -> Any:
    """The object that holds fp16's loss scale, at any ZeRO stage; None in other precisions."""
    if engine.stage and isinstance(engine.deepspeed.optimizer.loss_scaler, LossScale):
        return engine.deepspeed.optimizer.loss_scaler
    return engine.deepspeed.torch_autocast_z0_gradscaler


def weights_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 of a state dict: names, types, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- checks -------------------------------------------------------------------------------------------------------------


def _check(engine: Engine, saved: dict[str, Any]) -> None:
    if not isinstance(saved, dict) or not saved.keys() >= STATE:
        raise UsageError("the checkpoint was written by another program or version")
    own = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    shapes, trained = engine.experts.of_all_ranks(own), engine.experts.of_all_ranks(dict.fromkeys(_trained(engine)))
    theirs = {name: tuple(value.shape) for name, value in saved["parameters"].items()}
    if shapes != theirs:
        name = next(name for name in {**shapes, **theirs} if shapes.get(name) != theirs.get(name))
        raise UsageError(f"the checkpoint is another model's: {name} is {theirs.get(name)} there, {shapes.get(name)} here")
    optimizer, scheduler = type(engine.optimizer).__name__, engine.deepspeed.lr_scheduler
    if saved["optimizer_name"] != optimizer:
        raise UsageError(f"the checkpoint's optimizer is {saved['optimizer_name']}, but this run's is {optimizer}")
    if scheduler is not None and saved["scheduler_name"] not in (None, type(scheduler).__name__):
        ours = type(scheduler).__name__
        raise UsageError(f"the checkpoint's scheduler is {saved['scheduler_name']}, but this run's is {ours}")
    buffers = {name: tuple(buffer.shape) for name, buffer in engine.module.named_buffers()}
    if any({name: tuple(value.shape) for name, value in one.items()} != buffers for one in saved["buffers"]):
        raise UsageError("the checkpoint's buffers are another model's")
    for key, values in saved["optimizer"].items():  # a fused optimizer would read past the end of a tensor that is too short
        for name, value in values.items():
            fits = value.dim() == 0 or tuple(value.shape) == shapes.get(name) or optimizer == "Adafactor"  # rows and columns
            if name not in trained or not fits:
                raise UsageError(f"the checkpoint's {key} of {name} does not fit the model")
    if any(type(saved["counters"][name]) is not int for name in COUNTERS):
        raise UsageError("the checkpoint's counters are not numbers")


# --- parameters and buffers ----------------------------------------------------------------------------------------------


def _trained(engine: Engine) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer has, by name."""
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def _gathered(engine: Engine, parameter: nn.Parameter) -> Tensor:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.stage and parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).to("cpu", torch.float32, copy=True).contiguous()
    with GatheredParameters([parameter], enabled=engine.stage == 3):
        return parameter.detach().to("cpu", torch.float32, copy=True).contiguous()


def _tensors(engine: Engine) -> dict[str, Any]:
    """All parameters by name, and each rank's buffers by name."""
    own = {name: _gathered(engine, parameter) for name, parameter in engine.module.named_parameters()}
    return {
        "parameters": engine.experts.of_all_ranks(own),
        "buffers": engine.world.gather({name: buffer.cpu().clone() for name, buffer in engine.module.named_buffers()}),
    }


def _average(engine: Engine) -> dict[str, Any] | None:
    if not engine.has_average:
        return None
    with engine.average.applied():
        return {**_tensors(engine), "updates": int(engine.average.updates)}


def _set_tensors(engine: Engine, saved: dict[str, Any]) -> None:
    """The inverse of `_tensors`."""
    for name, parameter in engine.module.named_parameters():
        _set(engine, parameter, saved["parameters"][name].to(engine.world.device))
    for name, buffer in engine.module.named_buffers():
        of_ranks = [buffers[name] for buffers in saved["buffers"]]
        if len(of_ranks) == engine.world.size:
            buffer.copy_(of_ranks[engine.world.rank])
        else:  # a count (an integer) is the same on all ranks
            buffer.copy_(torch.stack(of_ranks).mean(dim=0) if buffer.is_floating_point() else of_ranks[0])


def _set(engine: Engine, parameter: nn.Parameter, value: Tensor) -> None:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    with GatheredParameters([parameter], modifier_rank=0, enabled=engine.stage == 3), torch.no_grad():
        parameter.copy_(value)
    if not parameter.requires_grad:
        return
    if engine.stage == 3:
        safe_set_local_fp32_param(parameter, _own_part(engine, parameter, value))
    elif engine.stage:
        safe_set_full_fp32_param(parameter, value)


def _own_part(engine: Engine, parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's part of a tensor at stage 3, the last one padded, which DeepSpeed 0.19.8's setter forgets."""
    size = parameter.ds_tensor.numel()
    padded = value.new_zeros(size * engine.world.size)
    padded[: value.numel()] = value.flatten()
    return padded[size * engine.world.rank : size * (engine.world.rank + 1)]


# --- the optimizer's state ----------------------------------------------------------------------------------------------


def fp32_weights(engine: Engine) -> list[Tensor]:
    """This rank's part of the weights that the optimizer updates: the parameters, under ZeRO flat tensors."""
    return _flat_partitions(engine) if engine.stage else list(engine.module.parameters())


def _flat_partitions(engine: Engine) -> list[Tensor]:
    """The flat tensors that the optimizer has instead of parameters under ZeRO."""
    zero = engine.deepspeed.optimizer
    return zero.fp32_partitioned_groups_flat if engine.stage == 3 else zero.single_partition_of_fp32_groups


def _optimizer_keys(engine: Engine) -> list[str]:
    """The names of the optimizer's state, empty before the first step."""
    states = (engine.optimizer.state.get(owner, {}) for owner in fp32_weights(engine))
    return sorted({key for state in states for key, value in state.items() if torch.is_tensor(value)})


def _link_optimizer_state(engine: Engine) -> None:
    """At stages 1 and 2, for DeepSpeed's getters and setters: it does so itself after the first step of the first parameter
    group, when the other groups (of experts) have no state yet."""
    engine.deepspeed.optimizer._hp_optimizer_states_linked = False
    engine.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()


def _gathered_optimizer_state(engine: Engine, key: str) -> dict[str, Tensor]:
    """{parameter name: its state}; a step count is 0-dim."""
    from deepspeed.utils import safe_get_full_optimizer_state

    named, state = _trained(engine), engine.optimizer.state
    if not engine.stage:
        return {name: state[p][key].to("cpu", copy=True) for name, p in named.items() if key in state.get(p, {})}
    if engine.stage < 3:
        _link_optimizer_state(engine)
    first = state[_flat_partitions(engine)[0]][key]
    if first.dim() == 0:
        return {name: first.to("cpu", copy=True) for name in named}
    return {
        name: safe_get_full_optimizer_state(p, key).to("cpu", copy=True).view(p.ds_shape if engine.stage == 3 else p.shape)
        for name, p in named.items()
    }


def _set_optimizer_state(engine: Engine, saved: dict[str, dict[str, Tensor]]) -> None:
    named = _trained(engine)
    saved = {key: {name: value for name, value in values.items() if name in named} for key, values in saved.items()}
    if not engine.stage:
        for key, values in saved.items():
            for name, value in values.items():
                state = engine.optimizer.state[named[name]]
                if torch.is_tensor(state.get(key)):
                    state[key].copy_(value)  # in place: a captured step reads it there
                else:
                    state[key] = _placed(engine, value, named[name])
        return
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    for key, values in saved.items():
        one = next(iter(values.values()))
        for flat in _flat_partitions(engine):
            engine.optimizer.state[flat][key] = _placed(engine, one, flat) if one.dim() == 0 else torch.zeros_like(flat)
    if saved and engine.stage < 3:
        _link_optimizer_state(engine)
    for key, values in saved.items():
        for name, value in values.items():
            parameter, value = named[name], value.to(engine.world.device)
            if value.dim() and engine.stage == 3:
                safe_set_local_optimizer_state(parameter, _own_part(engine, parameter, value), key)
            elif value.dim():
                safe_set_full_optimizer_state(parameter, value, key)


def _placed(engine: Engine, value: Tensor, owner: Tensor) -> Tensor:
    """A copy where the optimizer keeps it: PyTorch's fused optimizers count steps beside the weights, others on the CPU."""
    beside = value.dim() or engine.optimizer.param_groups[0].get("fused")
    return value.to(owner.device if beside else "cpu", copy=True)
