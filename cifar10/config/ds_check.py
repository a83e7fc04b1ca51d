"""Which keys and values DeepSpeed's JSON may have: DeepSpeed's and PyTorch's own, read from their source (see signatures.py).

DeepSpeed 0.19.8 ignores misspelled top-level keys, and what else it refuses, it refuses in a traceback after the ranks have
started. Here all of it is checked before. `"auto"`, as in Hugging Face's JSONs, is accepted for any value.
"""

import ast
import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import cache, reduce
from typing import Any

from cifar10 import UsageError
from cifar10.config.signatures import LARGEST, Module, Parameter, arguments, constants, names, source

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
LOW_PRECISIONS = ("fp16", "bf16", "torch_autocast")

_SWITCHES = """dump_state disable_python_gc managed_gradient_accumulation memory_breakdown prescale_gradients
    wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"""
_TYPES: dict[str, Any] = {  # a type; or DeepSpeed's file and class for a section; or a section's own keys, where it has none
    **dict.fromkeys(BATCH_KEYS, "int"),
    **dict.fromkeys(_SWITCHES.split(), "bool"),
    "gradient_clipping": "float",
    "steps_per_print": "Optional[int]",
    "log_level": "Optional[Literal['debug', 'info', 'warning', 'error', 'critical']]",
    "communication_data_type": "Optional[Literal['fp32', 'fp16', 'bf16']]",
    "gradient_allreduce_op": "Literal['mean', 'sum']",
    "zero_optimization": "runtime/zero/config.py DeepSpeedZeroConfig",
    "fp16": "runtime/precision_config.py DeepSpeedFP16Config",
    "bf16": "runtime/precision_config.py DeepSpeedBF16Config",
    "comms_logger": "comm/config.py CommsLoggerConfig",
    "pipeline": {
        **dict.fromkeys(("stages", "activation_checkpoint_interval"), "int"),
        **dict.fromkeys(("seed_layers", "pipe_partitioned", "grad_partitioned", "use_reentrant"), "bool"),
        "partition": "Literal['best', 'parameters', 'uniform']",
    },
    "optimizer": {"type": "str", "params": "dict", "legacy_fusion": "bool"},
    "scheduler": {"type": "str", "params": "dict"},
    "activation_checkpointing": {
        **dict.fromkeys(("partition_activations", "contiguous_memory_optimization", "cpu_checkpointing"), "bool"),
        **{"number_checkpoints": "Optional[int]", "synchronize_checkpoint_boundary": "bool", "profile": "bool"},
    },
    "timers": {"throughput": "utils/config.py DeepSpeedThroughputTimerConfig"},
    "torch_autocast": {"enabled": "bool", "dtype": "str", "lower_precision_safe_modules": "list"},
    "flops_profiler": {
        **dict.fromkeys(("profile_step", "module_depth", "top_modules"), "int"),
        **{"enabled": "bool", "recompute_fwd_factor": "float", "detailed": "bool", "output_file": "Optional[str]"},
    },
}

_LR_ALONE = "DeepSpeed would log the learning rate alone; this run's metrics go to "
LEFT_OUT = {  # what would have no effect here is not passed on to DeepSpeed, and there is a note
    "aio": "it is for offloading to NVMe",
    "checkpoint": "checkpoints are written by this program",
    "comet": _LR_ALONE + "TensorBoard and, with --wandb, to W&B",
    "csv_monitor": _LR_ALONE + "steps.csv and metrics.csv",
    "data_types": "with torch_autocast, weights, gradients and buffers are fp32",
    "dataloader_drop_last": "it is for DeepSpeed's loader; here an epoch's last partial batch is always left out",
    "disable_allgather": "this version of DeepSpeed does not use it",
    "gradient_predivide_factor": "gradients are averaged without it",
    "prescale_gradients": "gradients are averaged without it",
    "seq_parallel_communication_data_type": "there is no sequence parallelism here",
    "tensorboard": _LR_ALONE + "TensorBoard with --tensorboard",
    "use_data_before_expert_parallelism": "neighboring ranks share a layer's experts; see --expert-parallel",
    "wandb": _LR_ALONE + "W&B with --wandb online",
}
_REFUSED = {
    "autotuning": "it would end the run after a few steps; python -m cifar10 bench measures settings",
    "compile": "use --engine-level compile",
    "data_efficiency": "it needs DeepSpeed's data loader, which is not used here",
    "datastates_ckpt": "checkpoints are written by this program",
    "expert_parallel": "it is DeepSpeed's AutoEP, for language models' experts; use --recipe moe with --expert-parallel",
    "gradient_allreduce_op": "a sum over ranks makes the learning rate depend on their number; use mean",
    "hybrid_engine": "it is for reinforcement learning with language models",
    "managed_gradient_accumulation": "DeepSpeed's accumulation is used here; set it to true",
    "optimizer.params.maximize": "it would raise the loss",
    "tensor_parallel": "it is for transformers",
    "weight_quantization": "it is for inference",
    "zero_optimization.compute_grad_norm": "the gradient norm is reported here; set it to true",
    "zero_optimization.offload_optimizer.super_offload": "it is for GH200 superchips",
    "zero_optimization.zenflow": "it updates weights with old gradients, on GPUs only",
}
_ON_BY_DEFAULT = ("managed_gradient_accumulation", "zero_optimization.compute_grad_norm")  # refused if false
TOP_LEVEL_KEYS = {*_TYPES, *LEFT_OUT, *(key for key in _REFUSED if "." not in key)}  # a test compares them with DeepSpeed's

_NO_KERNEL = "has a kernel for GPUs only; use AdamW"
_MUP = "needs the package mup and a network with mup's base shapes; use Adam, AdamW or SGD"
REFUSED_OPTIMIZERS = {
    "lbfgs": "computes the loss several times per step, which DeepSpeed's step does not; use SGD or AdamW",
    "sparseadam": "is for sparse gradients; use Adam",
    "muon": "of DeepSpeed fails on the weights of convolutions; use MuonWithSGD",
    **dict.fromkeys(("muadam", "muadamw", "musgd"), _MUP),
    **dict.fromkeys(("onebitadam", "onebitlamb", "zerooneadam"), "is not part of this version of DeepSpeed; use AdamW"),
    **dict.fromkeys(("fusedadam", "cpuadam", "deepspeedcpuadam"), "is written Adam or AdamW in DeepSpeed's JSON"),
    **dict.fromkeys(("fusedlamb", "fusedlion"), "is written Lamb or Lion in DeepSpeed's JSON"),
}
OUR_OPTIMIZERS = {  # cifar10/engine/muon.py
    "MuonWithSGD": dict.fromkeys("lr momentum bias_lr head_lr sgd_momentum decay".split(), "float")
    | {"newton_schulz_iterations": "int"}
}
REFUSED_SCHEDULERS = {
    "ReduceLROnPlateau": "needs a metric, which DeepSpeed does not give it; use --plateau-lr-factor 0.1 --plateau-patience 5",
    **dict.fromkeys(("LambdaLR", "MultiplicativeLR"), "needs a function of Python, which JSON cannot hold"),
    **dict.fromkeys(("SequentialLR", "ChainedScheduler"), "is made of other schedulers, which JSON cannot hold"),
}


def _integer(least: int, most: float = LARGEST) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST


_RATES = ("lr", "bias_lr", "head_lr")
_MOMENTA = ("momentum", "weight_decay", "dampening", "sgd_momentum", "decay")
_STEPS = "warmup_num_steps total_num_steps total_steps total_iters step_size T_max T_0 step_size_up steps_per_epoch".split()
_DTYPES = tuple(
    f"{torch}{name}" for torch in ("", "torch.") for name in ("bfloat16", "bf16", "float16", "fp16", "half", "float32", "fp32")
)
_OFFLOADED = [f"zero_optimization.offload_{what}.device" for what in ("optimizer", "param")]
_VALUES: list[tuple[list[str], Callable[[Any], bool], str]] = [  # paths, a predicate, and what is expected
    ([*BATCH_KEYS, "fp16.loss_scale_window", "pipeline.stages"], _integer(1), "an integer >= 1"),
    (["pipeline.activation_checkpoint_interval"], _integer(0), "an integer >= 0, in layers"),
    (["steps_per_print"], lambda value: value is None or _integer(1)(value), "an integer >= 1"),
    ([f"scheduler.params.{key}" for key in _STEPS], _integer(1), "an integer >= 1, in steps"),
    (["scheduler.params.warmup_type"], ("log", "linear").__contains__, "log or linear"),
    (["fp16.initial_scale_power"], _integer(0, 127), "an integer from 0 to 127, for example 16"),
    (["zero_optimization.stage"], _integer(0, 3), "0, 1, 2 or 3"),
    (_OFFLOADED, ("cpu", "none").__contains__, "cpu or none; what lies on NVMe is not in checkpoints"),
    (["gradient_clipping", "fp16.loss_scale"], _is_number, "a number >= 0"),
    ([f"optimizer.params.{key}" for key in _MOMENTA], _is_number, "a number >= 0"),
    ([f"optimizer.params.{key}" for key in _RATES], lambda value: _is_number(value) and value > 0, "a number > 0"),
    (["torch_autocast.dtype"], _DTYPES.__contains__, "bfloat16 or float16"),
]


def is_on(value: Any) -> bool:
    """Whether a setting asks for anything: a section without "enabled" does if one of its values does."""
    if isinstance(value, dict):
        return value["enabled"] is True if "enabled" in value else any(map(is_on, value.values()))
    return value is True or value not in (None, False, 0, 1, "", "auto", "mean", "fp32", [])


def look_up(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a path as `zero_optimization.stage`."""
    *sections, key = path.split(".")
    section = reduce(lambda inner, name: inner.get(name, {}) if isinstance(inner, dict) else {}, sections, config)
    return section.get(key, default) if isinstance(section, dict) else default


def _deepspeeds(file: str) -> Module:
    return source("deepspeed", file)


def _parameter(kind: Any) -> Any:
    """One entry of `_TYPES` as a `Parameter`, or as a dict of them."""
    if isinstance(kind, dict):
        return {key: _parameter(inner) for key, inner in kind.items()}
    file, _, name = kind.rpartition(" ") if ".py " in kind else ("runtime/config.py", "", kind)
    return Parameter(_deepspeeds(file), ast.parse(name, mode="eval").body, required=False)


@cache
def _removed() -> dict[str, str]:
    """Keys that DeepSpeed has removed, and its reasons."""
    tables = constants(_deepspeeds("runtime/config.py"), "_REMOVED_TOP_LEVEL_CONFIG_KEYS", "_REMOVED_ZERO_CONFIG_KEYS")
    top, zero = tables.values()
    return {**top, **{f"zero_optimization.{key}": why for key, why in zero.items()}}


def _did_you_mean(word: str, known: Iterable[str], what: str) -> str:
    spelt = {name.lower(): name for name in sorted(known)}
    near = difflib.get_close_matches(word.lower(), spelt, n=1, cutoff=0.5)
    return f"; did you mean {spelt[near[0]]!r}?" if near else f"; {what}: {', '.join(sorted(known))}"


def _check_section(path: str, given: Any, known: Mapping[str, Any]) -> None:
    """Check the keys and the types of an object and of those in it."""
    if not isinstance(given, dict):
        raise UsageError(f"{path} must be an object: {{...}}")
    for key, value in given.items():
        inner = f"{path}.{key}" if path else key
        if inner in _removed():
            raise UsageError(f"{inner}: {_removed()[inner]}")
        if key not in known:
            where = repr(path) if path else "the top level"
            raise UsageError(f"unknown key {key!r} in {where}{_did_you_mean(key, known, 'known keys')}")
        parameter = known[key]
        if isinstance(parameter, dict):
            _check_section(inner, value, parameter)
        elif parameter is not None and value != "auto":
            if isinstance(value, dict) and parameter.model:
                _check_section(inner, value, parameter.model)
            elif expected := parameter.wrong(value):
                raise UsageError(f"invalid value for {inner}: {value!r}, expected {expected}")


def check(config: dict[str, Any]) -> None:
    """Validate keys and values that DeepSpeed would silently ignore or fail on later. Raises UsageError."""
    known = {key: None for key in TOP_LEVEL_KEYS} | {key: _parameter(_TYPES[key]) for key in config.keys() & _TYPES.keys()}
    _check_section("", config, known)
    _check_optimizer(config.get("optimizer"))
    _check_scheduler(config.get("scheduler", {}))
    for paths, is_valid, expected in _VALUES:
        for path in paths:
            value = look_up(config, path, "auto")
            if value != "auto" and not is_valid(value):
                raise UsageError(f"invalid value for {path}: {value!r}, expected {expected}")
    for path, why in _REFUSED.items():
        value = look_up(config, path)
        if value is False if path in _ON_BY_DEFAULT else is_on(value):
            raise UsageError(f"{path} is not supported: {why}")
    if sum(look_up(config, f"{name}.enabled") is True for name in LOW_PRECISIONS) > 1:
        raise UsageError("more than one of fp16, bf16 and torch_autocast is enabled; enable one")


@cache
def _torch_optimizers() -> list[str]:
    return [name for name in names(source("torch", "optim/__init__.py")) if name != "Optimizer"]


def parameters_of(optimizer: str, params: Mapping[str, Any]) -> dict[str, Any] | None:
    """The parameters that an optimizer takes; None if DeepSpeed has none of this name. `"Adam"` is PyTorch's AdamW or Adam,
    unless `params` ask for DeepSpeed's own."""
    if optimizer in OUR_OPTIMIZERS:
        return _parameter(OUR_OPTIMIZERS[optimizer])
    name, torch = optimizer.lower(), source("torch", "optim/__init__.py")
    if name in ("adam", "adamw"):
        own = {"torch_adam": "bool", "adam_w_mode": "bool", "fp32_optimizer_states": "bool"}
        fused = params.get("torch_adam") is False
        takes = arguments(_deepspeeds("ops/adam/fused_adam.py"), "FusedAdam") if fused else arguments(torch, "AdamW")
        return {**takes, **_parameter(own)}
    if name in ("lamb", "lion"):
        return arguments(_deepspeeds(f"ops/{name}/fused_{name}.py"), f"Fused{name.title()}")
    if name == "adagrad":
        return arguments(torch, "Adagrad")
    return arguments(torch, optimizer) if optimizer in _torch_optimizers() else None


def _check_optimizer(optimizer: Any) -> None:
    if optimizer is None:
        raise UsageError('no \'optimizer\'; add {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}')
    name, params = optimizer.get("type"), optimizer.get("params", {})
    if not isinstance(name, str):
        raise UsageError('optimizer.type must be a name, for example "SGD"')
    if why := REFUSED_OPTIMIZERS.get(name.lower()):
        raise UsageError(f"optimizer.type {name} {why}")
    known = parameters_of(name, params)
    if known is None:
        kinds = {*_torch_optimizers(), *OUR_OPTIMIZERS, "Lamb", "Lion"}
        kinds = {kind for kind in kinds if kind.lower() not in REFUSED_OPTIMIZERS}
        raise UsageError(f"unknown optimizer.type {name!r}{_did_you_mean(name, kinds, 'known optimizers')}")
    if "max_grad_norm" in params:
        raise UsageError("optimizer.params.max_grad_norm is not supported by DeepSpeed; use gradient_clipping")
    _check_section("optimizer.params", params, known)
    if "lr" not in params:
        raise UsageError("optimizer.params has no 'lr', the base learning rate; add one, for example \"lr\": 0.1")


def _check_scheduler(scheduler: dict[str, Any]) -> None:
    name = scheduler.get("type")
    if not scheduler:
        return
    file, torch = _deepspeeds("runtime/lr_schedules.py"), source("torch", "optim/lr_scheduler.py")
    (deepspeeds,) = constants(file, "VALID_LR_SCHEDULES").values()
    kinds = {**dict.fromkeys(names(torch, ending="LR"), torch), **dict.fromkeys(names(torch, ending="Restarts"), torch)}
    kinds |= dict.fromkeys(deepspeeds, file)
    if why := REFUSED_SCHEDULERS.get(name):
        raise UsageError(f"scheduler.type {name} {why}")
    if name not in kinds:
        there = kinds.keys() - REFUSED_SCHEDULERS.keys()
        raise UsageError(f"unknown scheduler.type {name!r}{_did_you_mean(name or '', there, 'known schedulers')}")
    takes = {key: one for key, one in arguments(kinds[name], name).items() if not key.startswith("last_")}
    params = scheduler.get("params", {})
    _check_section("scheduler.params", params, takes)
    if missing := [key for key, one in takes.items() if one.required and key not in params]:
        raise UsageError(f"scheduler.params of {name} has no {missing[0]!r}, which it needs")
