"""DeepSpeed's JSON config: read, validated and resolved for a world size, without importing DeepSpeed.

DeepSpeed 0.19.8 ignores misspelled top-level keys, clips gradients at 1.0 by default, and asserts on batch sizes that do not
fit the world size. Here the first is an error, the second gets a note, and batch sizes are resolved.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import hjson

from cifar10 import UsageError
from cifar10.config.settings import is_deep

LARGEST = 1e300  # a larger integer may not fit a float
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

TOP_LEVEL_KEYS = frozenset(
    """activation_checkpointing aio autotuning bf16 checkpoint comms_logger communication_data_type compile csv_monitor comet
        data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state
        expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
        gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer pipeline
        prescale_gradients scheduler seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers
        torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism wall_clock_breakdown
        wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization""".split()
)  # a test checks each against DeepSpeed's own source

SECTION_KEYS = {
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "scheduler": frozenset({"type", "params"}),
    "torch_autocast": frozenset({"enabled", "dtype", "lower_precision_safe_modules"}),
    "fp16": frozenset(
        """enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads""".split()
    ),
    "bf16": frozenset(
        "enabled check_grad_overflow immediate_grad_update bf16_master_weights_and_grads bf16_optimizer_states".split()
    ),
    "zero_optimization": frozenset(
        """allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients cpu_offload
        cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks gather_16bit_weights_on_model_save
        ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights log_trace_cache_warnings max_live_parameters
        max_reuse_distance memory_efficient_linear model_persistence_threshold module_granularity_threshold offload_optimizer
        offload_param overlap_comm override_module_apply param_persistence_threshold parameter_alignment
        pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients
        save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save
        stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters stage3_max_reuse_distance
        stage3_model_persistence_threshold stage3_module_granularity_threshold stage3_param_persistence_threshold
        stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size use_all_reduce_for_fetch_params
        use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients
        zero_quantized_nontrainable_weights zero_quantized_weights""".split()
    ),
    "timers": frozenset({"throughput"}),
}

_ADAM = frozenset("lr betas eps weight_decay amsgrad maximize differentiable adam_w_mode torch_adam fused foreach".split())
OPTIMIZER_PARAMS = {
    "sgd": frozenset("lr momentum dampening weight_decay nesterov maximize foreach differentiable fused".split()),
    "adam": _ADAM,
    "adamw": _ADAM,
    "muonwithsgd": frozenset("lr momentum bias_lr head_lr sgd_momentum decay newton_schulz_iterations".split()),
}
# torch.optim's classes, and DeepSpeed's own names, which are case-insensitive
TORCH_OPTIMIZERS = "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax Muon NAdam RAdam RMSprop Rprop SGD".split()
DEEPSPEED_OPTIMIZERS = "adagrad adam adamw lamb lion muadam muadamw muon musgd".split()
RATES = ("lr", "bias_lr", "head_lr")
MOMENTA = ("momentum", "weight_decay", "dampening", "sgd_momentum", "decay")
OUR_OPTIMIZERS = ("MuonWithSGD",)  # cifar10/engine/muon.py


@dataclass(frozen=True)
class Batch:
    """The batch triple and the world size it was resolved for: global = micro * accumulation * world_size."""

    global_images: int
    micro_images: int
    accumulation: int
    world_size: int

    @property
    def rank_images(self) -> int:
        """Images per rank and optimizer step."""
        return self.micro_images * self.accumulation


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UsageError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
    return seen


def read(source: Path | dict[str, Any]) -> dict[str, Any]:
    """Load and validate a DeepSpeed JSON file (comments are allowed, as in DeepSpeed) or a recipe's dict. Raises UsageError."""
    if isinstance(source, dict):
        check(source)
        return copy.deepcopy(source)
    path = Path(source)
    try:
        config = hjson.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)
        if not isinstance(config, dict):
            raise UsageError("must hold one JSON object: {...}")
        if is_deep(config):
            raise UsageError("nested too deeply for a DeepSpeed config")
        check(config)
        return config
    except UsageError as error:
        problem = str(error)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError:
        problem = "not a text file in UTF-8"
    except (ValueError, RecursionError, OverflowError) as error:  # the last for 1e999
        problem = f"not JSON: {str(error).splitlines()[0]}"
    raise UsageError(f"--deepspeed_config {path}: {problem}")


def _check_keys(where: str, given: Any, known: frozenset[str]) -> None:
    if not isinstance(given, dict):
        raise UsageError(f"{where} must be an object: {{...}}")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"
            raise UsageError(f"unknown key {key!r} in {where}{hint}")


def _is_integer(value: Any, least: int, most: float = LARGEST) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST


_LOW_PRECISIONS = ("fp16", "bf16", "torch_autocast")
_VALUES: list[tuple[list[str], Callable[[Any], bool], str]] = [  # keys, a predicate, and what is expected
    ([*BATCH_KEYS, "fp16.loss_scale_window"], lambda value: _is_integer(value, 1), "an integer >= 1"),
    (["fp16.initial_scale_power"], lambda value: _is_integer(value, 0, 127), "an integer from 0 to 127, for example 16"),
    (["zero_optimization.stage"], lambda value: _is_integer(value, 0, 3), "0, 1, 2 or 3"),
    (["gradient_clipping", "fp16.loss_scale"], _is_number, "a number >= 0"),
    ([f"optimizer.params.{key}" for key in MOMENTA], _is_number, "a number >= 0"),
    ([f"optimizer.params.{key}" for key in RATES], lambda value: _is_number(value) and value > 0, "a number > 0"),
    ([f"{name}.enabled" for name in _LOW_PRECISIONS], lambda value: isinstance(value, bool), "true or false"),
    (["timers.throughput"], lambda value: isinstance(value, dict), 'an object: {"enabled": true}'),
]


def check(config: dict[str, Any]) -> None:
    """Validate keys and values that DeepSpeed would silently ignore or fail on later. Raises UsageError."""
    _check_keys("the top level", config, TOP_LEVEL_KEYS)
    for section, known in SECTION_KEYS.items():
        if section in config:
            _check_keys(repr(section), config[section], known)
    _check_optimizer(config.get("optimizer"))
    for paths, is_valid, expected in _VALUES:
        for path in paths:
            *sections, key = path.split(".")
            values = reduce(lambda inner, name: inner.get(name, {}), sections, config)
            if key in values and not is_valid(values[key]):
                raise UsageError(f"invalid value for {path}: {values[key]!r}, expected {expected}")
    if sum(config.get(name, {}).get("enabled", False) for name in _LOW_PRECISIONS) > 1:
        raise UsageError("more than one of fp16, bf16 and torch_autocast is enabled; enable one")


def _check_optimizer(optimizer: Any) -> None:
    if optimizer is None:
        raise UsageError('no \'optimizer\'; add {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}')
    name, params = optimizer.get("type"), optimizer.get("params", {})
    if not isinstance(name, str):
        raise UsageError('optimizer.type must be a name, for example "SGD"')
    if name not in (*TORCH_OPTIMIZERS, *OUR_OPTIMIZERS) and name.lower() not in DEEPSPEED_OPTIMIZERS:
        spelt = {known.lower(): known for known in (*DEEPSPEED_OPTIMIZERS, *TORCH_OPTIMIZERS, *OUR_OPTIMIZERS)}
        near = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.5)
        hint = f"; did you mean {spelt[near[0]]!r}?" if near else f"; known optimizers: {', '.join(TORCH_OPTIMIZERS)}"
        raise UsageError(f"unknown optimizer.type {name!r}{hint}")
    if not isinstance(params, dict):
        raise UsageError('optimizer.params must be an object: {"lr": 0.1}')
    if name.lower() in OPTIMIZER_PARAMS:
        _check_keys(f"optimizer.params of {name}", params, OPTIMIZER_PARAMS[name.lower()])
    if "lr" not in params:
        raise UsageError("optimizer.params has no 'lr', the base learning rate; add one, for example \"lr\": 0.1")


def override(
    config: dict[str, Any], *, lr: float | None, global_batch_size: int | None, micro_batch_size: int | None = None
) -> dict[str, Any]:
    """A copy of `config` with --lr and batch sizes from the command line."""
    config = copy.deepcopy(config)
    if lr is not None:
        config["optimizer"]["params"]["lr"] = lr
    if global_batch_size is not None:
        if "train_batch_size" not in config:
            config.pop("gradient_accumulation_steps", None)
        config["train_batch_size"] = global_batch_size
    if micro_batch_size is not None:
        config["train_micro_batch_size_per_gpu"] = micro_batch_size
        if "train_batch_size" in config:
            config.pop("gradient_accumulation_steps", None)
    return config


def with_precision(config: dict[str, Any], precision: str) -> dict[str, Any]:
    """A copy of `config` with only "fp32", "bf16" or "fp16" enabled; an fp16 block keeps its loss scale."""
    config = copy.deepcopy(config)
    for section in _LOW_PRECISIONS:
        if section in config or section == precision:
            config[section] = {**config.get(section, {}), "enabled": section == precision}
    return config


def batch(config: dict[str, Any], world_size: int) -> Batch:
    """The batch triple for `world_size` ranks; it keeps the global batch size, and the micro-batch size if that divides.

    Without a global batch size in the JSON, each rank trains on micro * accumulation images. Raises UsageError.
    """
    total, micro, accumulation = (config.get(key) for key in BATCH_KEYS)
    if total is None and micro is None:
        raise UsageError('the JSON sets no batch size; add "train_batch_size": 128, or use --global-batch-size 128')
    if total is None:
        accumulation = accumulation or 1
        return Batch(micro * accumulation * world_size, micro, accumulation, world_size)
    if total % world_size:
        near = max(1, round(total / world_size)) * world_size
        raise UsageError(f"global batch size {total} is not divisible by {world_size} ranks; try --global-batch-size {near}")
    per_rank = total // world_size
    if micro is None:
        micro = per_rank // accumulation if accumulation and per_rank % accumulation == 0 else per_rank
    elif per_rank % micro:
        micro = per_rank
    return Batch(total, micro, per_rank // micro, world_size)


def resolve(config: dict[str, Any], world_size: int) -> tuple[dict[str, Any], Batch, list[str]]:
    """The config for `deepspeed.initialize`, its batch sizes, and a note for each change that users should know about.

    bf16 and fp16 become torch_autocast: DeepSpeed's own bf16 fails on BatchNorm's fp32 buffers, and so does its fp16, which
    many CPUs do not support and which does not train at stage 0: it divides by a loss scale that it never multiplied by.
    """
    config, notes = copy.deepcopy(config), []
    sizes = batch(config, world_size)
    triple = dict(zip(BATCH_KEYS, (sizes.global_images, sizes.micro_images, sizes.accumulation), strict=True))
    if any(key in config and config[key] != value for key, value in triple.items()):
        notes.append(
            f"batch: {sizes.global_images} images = {sizes.micro_images} per micro-batch x {sizes.accumulation} accumulation"
            f" x {world_size} ranks (the JSON's batch sizes are for another number of ranks)"
        )
    config.update(triple)
    if "gradient_clipping" not in config:
        config["gradient_clipping"] = 1.0
        notes.append("gradient_clipping: 1.0 (DeepSpeed's default; not set in the JSON)")
    config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})  # it synchronizes twice per step
    for section, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if config.get(section, {}).get("enabled"):
            loss_scale = config[section] if section == "fp16" else {}  # cifar10/engine/loss_scale.py reads it
            config[section] = {**loss_scale, "enabled": False}
            config["torch_autocast"] = {"enabled": True, "dtype": dtype}
            notes.append(f"{section} -> torch_autocast {dtype}, which keeps fp32 weights and BatchNorm statistics")
    _resolve_zero(config, notes)
    _resolve_optimizer(config, notes)
    if config.get("scheduler"):
        kind = config["scheduler"].get("type")
        notes.append(f"learning rate: set by the JSON's scheduler {kind}, not by the recipe's schedule")
    return config, sizes, notes


def _resolve_zero(config: dict[str, Any], notes: list[str]) -> None:
    zero, optimizer = config.get("zero_optimization", {}), config["optimizer"]["type"]
    if not zero.get("stage"):
        return
    if optimizer in OUR_OPTIMIZERS:
        raise UsageError(f"{optimizer} needs whole matrices, which ZeRO partitions: set zero_optimization.stage to 0")
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        zero.setdefault(bucket, 5_000_000)  # 20 MB instead of 2 GB
    if not config.get("zero_allow_untested_optimizer"):
        config["zero_allow_untested_optimizer"] = True
        notes.append(f"zero_allow_untested_optimizer: true (ZeRO refuses {optimizer} without it)")


def _resolve_optimizer(config: dict[str, Any], notes: list[str]) -> None:
    """Use PyTorch's fused optimizers: one kernel, no compiler, and a non-finite step is skipped on the device."""
    name, params = config["optimizer"]["type"].lower(), config["optimizer"].setdefault("params", {})
    if name == "adam" and "adam_w_mode" not in params:
        params["adam_w_mode"] = True
        notes.append("optimizer: adam_w_mode: true (DeepSpeed's default for Adam; not set in the JSON)")
    if name in ("adam", "adamw"):
        params.setdefault("torch_adam", True)  # DeepSpeed's FusedAdam needs a compiler, on the CPU as well
    plain = name == "sgd" or (name in ("adam", "adamw") and params["torch_adam"])
    if plain and not params.get("foreach") and not params.get("differentiable"):
        params.setdefault("fused", True)
