"""DeepSpeed's JSON config: read, validated and resolved for a world size, without importing DeepSpeed.

Keys and values are checked in ds_check.py. DeepSpeed 0.19.8 clips gradients at 1.0 by default, which gets a note here, and
asserts on batch sizes that do not fit the world size, which are resolved.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hjson

from cifar10 import UsageError
from cifar10.config.ds_check import BATCH_KEYS, LEFT_OUT, LOW_PRECISIONS, OUR_OPTIMIZERS, check, is_on, look_up
from cifar10.config.settings import is_deep


@dataclass(frozen=True)
class Batch:
    """The batch triple and the ranks it was resolved for: global = micro * accumulation * data_ranks."""

    global_images: int
    micro_images: int
    accumulation: int
    world_size: int
    stages: int = 1  # of a pipeline; the ranks of one pipeline share their images

    @property
    def data_ranks(self) -> int:
        """Ranks that have images of their own."""
        return self.world_size // self.stages

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


def with_values(config: dict[str, Any], words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A copy of `config` with --set's values, `optimizer.params.lr=0.1`, and a note for each. Raises UsageError."""
    config, notes = copy.deepcopy(config), []
    for word in words:
        path, equals, text = word.partition("=")
        *sections, key = path.split(".")
        if not equals or not all((*sections, key)):
            raise UsageError(f"invalid value for --set: {word}, expected KEY=VALUE, for example --set optimizer.params.lr=0.1")
        try:
            value = json.loads(text, object_pairs_hook=_refuse_duplicates)
        except (ValueError, RecursionError):
            value = text
        inner = config
        for name in sections:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise UsageError(f"--set {word}: {name} is no object, so that it has no {key}")
        if value is True and path in [f"{name}.enabled" for name in LOW_PRECISIONS]:  # instead of another precision
            config.update(
                {
                    name: {**config[name], "enabled": False}
                    for name in LOW_PRECISIONS
                    if name in config and config[name] is not inner
                }
            )
        was = f" instead of {json.dumps(inner[key])}" if key in inner else ""
        inner[key] = value
        notes.append(f"--set {path}: {json.dumps(value)}{was}")
    try:
        if is_deep(config):
            raise UsageError("nested too deeply for a DeepSpeed config")
        check(config)
    except UsageError as error:
        raise UsageError(f"--set {' '.join(words)}: {error}") from None
    return config, notes


def without_auto(config: dict[str, Any], known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A copy of `config` with every "auto" replaced by what is `known` for its path, or left to the default, and a note."""
    config, filled, left = copy.deepcopy(config), [], []

    def fill(section: dict[str, Any], above: str) -> None:
        for key, value in list(section.items()):
            path = f"{above}{key}"
            if isinstance(value, dict):
                fill(value, f"{path}.")
            elif value == "auto" and known.get(path) is not None:
                section[key] = known[path]
                filled.append(f"{path} {known[path]:g}")
            elif value == "auto":
                del section[key]
                left.append(path)

    fill(config, "")
    defaults = [f"{', '.join(left)} left to {'their defaults' if len(left) > 1 else 'its default'}"] if left else []
    return config, [f'"auto": {"; ".join([*filled, *defaults])}'] if filled or left else []


def override(
    config: dict[str, Any],
    *,
    lr: float | None,
    global_batch_size: int | None,
    micro_batch_size: int | None = None,
    stages: int | None = None,
) -> dict[str, Any]:
    """A copy of `config` with --lr, batch sizes and --pipeline-stages from the command line."""
    config = copy.deepcopy(config)
    if stages is not None:
        config["pipeline"] = {**config.get("pipeline", {}), "stages": stages}
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
    for section in LOW_PRECISIONS:
        if section in config or section == precision:
            config[section] = {**config.get(section, {}), "enabled": section == precision}
    return config


def batch(config: dict[str, Any], world_size: int) -> Batch:
    """The batch triple for `world_size` ranks; it keeps the global batch size, and the micro-batch size or its next divisor.

    Without a global batch size in the JSON, each rank trains on micro * accumulation images. Raises UsageError.
    """
    stages = look_up(config, "pipeline.stages", 1)
    if world_size % stages:
        ranks = f"{world_size} rank{'' if world_size == 1 else 's'}"
        raise UsageError(
            f"a pipeline of {stages} stages needs a multiple of {stages} ranks, not {ranks}; start"
            f" main.py with --num-gpus {stages} (ranks on the CPU, too), or use --pipeline-stages 1"
        )
    data_ranks = world_size // stages
    total, micro, accumulation = (config.get(key) for key in BATCH_KEYS)
    if total is None and micro is None:
        raise UsageError('the JSON sets no batch size; add "train_batch_size": 128, or use --global-batch-size 128')
    if total is None:
        accumulation = accumulation or 1
        return Batch(micro * accumulation * data_ranks, micro, accumulation, world_size, stages)
    if total % data_ranks:
        near = max(1, round(total / data_ranks)) * data_ranks
        fits = [ranks for ranks in range(1, total + 1) if total % ranks == 0]
        nearest = [*[ranks for ranks in fits if ranks < data_ranks][-1:], *[ranks for ranks in fits if ranks > data_ranks][:1]]
        ways = f"but by {' or '.join(map(str, nearest))}; or try --global-batch-size {near}"
        raise UsageError(f"global batch size {total} is not divisible by {data_ranks} ranks, {ways}")
    per_rank = total // data_ranks
    if micro is None:
        micro = per_rank // accumulation if accumulation and per_rank % accumulation == 0 else per_rank
    elif per_rank % micro:  # never more than that, which may not fit into memory
        micro = next(n for n in range(min(micro, per_rank), 0, -1) if per_rank % n == 0)
    return Batch(total, micro, per_rank // micro, world_size, stages)


def resolve(config: dict[str, Any], world_size: int) -> tuple[dict[str, Any], Batch, list[str]]:
    """The config for `deepspeed.initialize`, its batch sizes, and a note for each change that users should know about.

    bf16 and fp16 become torch_autocast: DeepSpeed's own bf16 fails on BatchNorm's fp32 buffers, and so does its fp16, which
    many CPUs do not support and which does not train at stage 0: it divides by a loss scale that it never multiplied by.
    """
    config, notes = copy.deepcopy(config), []
    for key in sorted(LEFT_OUT.keys() & config.keys()):
        if is_on(config[key]):
            del config[key]
            notes.append(f"{key}: left out ({LEFT_OUT[key]})")
    _resolve_checkpointing(config.pop("activation_checkpointing", None), notes)
    sizes = batch(config, world_size)
    triple = dict(zip(BATCH_KEYS, (sizes.global_images, sizes.micro_images, sizes.accumulation), strict=True))
    if changed := [f"{key} {config[key]}" for key, value in triple.items() if config.get(key, value) != value]:
        notes.append(
            f"batch: {sizes.global_images} images = {sizes.micro_images} per micro-batch x {sizes.accumulation} accumulation"
            f" x {sizes.data_ranks} ranks (the config's {', '.join(changed)} does not fit)"
        )
    config.update(triple)
    if "gradient_clipping" not in config:
        config["gradient_clipping"] = 1.0
        notes.append("gradient_clipping: 1.0 (DeepSpeed's default; not set in the JSON)")
    config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})  # it synchronizes twice per step
    for section, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if look_up(config, f"{section}.enabled") is True:
            lost = [key for key in _NOT_IN_AUTOCAST if is_on(config[section].get(key)) and key != "enabled"]
            loss_scale = config[section] if section == "fp16" else {}  # cifar10/engine/loss_scale.py reads it
            config[section] = {**loss_scale, "enabled": False}
            config["torch_autocast"] = {"enabled": True, "dtype": dtype}
            without = f"; without {', '.join(lost)}" if lost else ""
            notes.append(f"{section} -> torch_autocast {dtype}, which keeps fp32 weights and BatchNorm statistics{without}")
    if is_on(config.get("communication_data_type")) and world_size > 1:
        notes.append(f"communication_data_type: gradients are averaged in {config['communication_data_type']}, and so rounded")
    _resolve_zero(config, notes)
    _resolve_optimizer(config, notes)
    _resolve_pipeline(config, sizes, notes)
    if config.get("scheduler"):
        config["scheduler"].setdefault("params", {})
        kind = config["scheduler"]["type"]
        notes.append(f"learning rate: set by the JSON's scheduler {kind}, not by the recipe's schedule")
    return config, sizes, notes


# Keys of fp16 and bf16 that have no meaning under torch_autocast; an overflow halves the loss scale at once.
_NOT_IN_AUTOCAST = """hysteresis consecutive_hysteresis min_loss_scale fp16_master_weights_and_grads
    bf16_master_weights_and_grads bf16_optimizer_states immediate_grad_update""".split()


_NOT_IN_CHECKPOINTING = {
    "partition_activations": "no ranks share a model's layers here",
    "contiguous_memory_optimization": "it needs partition_activations",
    "number_checkpoints": "it sizes the buffer of contiguous_memory_optimization; every block is one checkpoint",
    "synchronize_checkpoint_boundary": "it would only wait for the device",
    "profile": "use the flops_profiler section, or --dry-run for the time of a step",
}


def _resolve_checkpointing(section: dict[str, Any] | None, notes: list[str]) -> None:
    """Notes on `activation_checkpointing`, which DeepSpeed leaves to the model and plan.py turns into an option."""
    if section is None:
        return
    where = "CPU memory" if section.get("cpu_checkpointing") is True else "memory"
    notes.append(f"activation_checkpointing: only each block's input stays in {where}, as with --gradient-checkpointing")
    for key, why in _NOT_IN_CHECKPOINTING.items():
        if section.get(key) not in (None, False, "auto"):
            notes.append(f"activation_checkpointing.{key}: left out ({why})")


_OFFLOADS = {"offload_optimizer": 1, "offload_param": 3}  # and the least ZeRO stage


def _resolve_zero(config: dict[str, Any], notes: list[str]) -> None:
    zero, optimizer = config.get("zero_optimization", {}), config["optimizer"]["type"]
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.pop(old, None) and new not in zero:
            zero[new] = {"device": "cpu"}
            notes.append(f'zero_optimization: {old} is deprecated by DeepSpeed; read as {new}: {{"device": "cpu"}}')
    stage = zero.get("stage", 0)
    for key, least in _OFFLOADS.items():
        if stage < least and look_up(zero, f"{key}.device") == "cpu":
            raise UsageError(f"zero_optimization.{key} to cpu needs ZeRO stage {least} at least; set zero_optimization.stage")
    if look_up(zero, "offload_optimizer.ratio", 1) != 1:
        raise UsageError("zero_optimization.offload_optimizer.ratio below 1 splits the optimizer's state; leave it out")
    if not stage:
        return
    if zero.pop("round_robin_gradients", False):
        notes.append("zero_optimization.round_robin_gradients: left out (DeepSpeed 0.19.8 gathers the wrong weights with it)")
    if optimizer in (*OUR_OPTIMIZERS, "Adafactor"):
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


_NOT_IN_PIPELINES = {
    "activation_checkpoint_interval": "use --gradient-checkpointing, which is an interval of one layer",
    "pipe_partitioned": "it is for tensor parallelism",
    "grad_partitioned": "it is for tensor parallelism",
    "seed_layers": "dropout is seeded by seed, step, micro-batch and rank",
    "use_reentrant": "--gradient-checkpointing needs no reentrant checkpoints",
}


def _resolve_pipeline(config: dict[str, Any], sizes: Batch, notes: list[str]) -> None:
    """Leave out keys that have no meaning here, and the section where there is one stage."""
    if sizes.stages == 1:
        if config.pop("pipeline", {}).keys() - {"stages"}:
            notes.append("pipeline: left out (one stage; --pipeline-stages N makes N of them, on N ranks or a multiple)")
        return
    for key in sorted(_NOT_IN_PIPELINES.keys() & config["pipeline"].keys()):
        if config["pipeline"].pop(key):
            notes.append(f"pipeline.{key}: left out ({_NOT_IN_PIPELINES[key]})")
    if sizes.accumulation < sizes.stages:
        micro = max(1, sizes.rank_images // (4 * sizes.stages))
        passes = f"{sizes.accumulation} micro-batch{'es' * (sizes.accumulation > 1)} a step"
        notes.append(f"pipeline: with {passes} its {sizes.stages} stages mostly wait; try --micro-batch-size {micro}")
