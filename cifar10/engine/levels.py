"""How a step is carried out, `--engine-level`: what each level can do, and what it cannot, before any rank starts.

    eager      as the script has it, one operation after another: the reference that the others are tested against
    compile    DeepSpeed's engine.compile(): forward and backward as kernels that PyTorch's Inductor makes
    graph      forward and backward as two CUDA graphs; averaging over ranks and the update stay eager
    captured   the whole step as one CUDA graph: nothing of DeepSpeed's Python, or ours, is left in it

The levels change how fast the same numbers come, not which: each step does the same arithmetic on the same images. (Compiled
dropout draws other random numbers, though still by seed and position.) No level has been measured on a GPU yet, so
`auto` is eager everywhere.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from cifar10 import UsageError
from cifar10.distributed import device

Level = Literal["eager", "compile", "graph", "captured"]
LEVELS: tuple[Level, ...] = get_args(Level)
CAPTURED_OPTIMIZERS = ("SGD", "MuonWithSGD")  # they take a learning rate that lies on the device, and skip a step there
TIMERS = ("wall_clock_breakdown", "flops_profiler", "timers.throughput")  # DeepSpeed's, around each forward
MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")  # DeepSpeed's: the host writes to them at each step


def settle(wanted: str, config: dict[str, Any], world_size: int, *, sync_bn: bool = False) -> Level:
    """The level that is meant by --engine-level `wanted`, for DeepSpeed's JSON as `ds_json.resolve` made it.

    Raises UsageError, one line with what to type instead, if this machine or this JSON does not allow it.
    """
    level: Level = "eager" if wanted == "auto" else wanted
    talks = sync_bn and world_size > 1
    why_not = "does not go with --sync-bn over several ranks; take --engine-level eager" if talks and level != "eager" else None
    why_not = why_not or _why_not(level, config, world_size)
    if why_not:
        raise UsageError(f"--engine-level {level} {why_not}")
    return level


def _why_not(level: Level, config: dict[str, Any], world_size: int) -> str | None:
    stage, accumulation = config.get("zero_optimization", {}).get("stage", 0), config["gradient_accumulation_steps"]
    if level == "eager":
        return None
    if stage == 3:
        return (
            "does not go with ZeRO 3, which gathers weights in the middle of a forward; take stage 2, or --engine-level eager"
        )
    if timed := [key for key in TIMERS if _is_on(config, key)]:
        return f"leaves no room for DeepSpeed's {timed[0]}; leave it out of the JSON, or take --engine-level eager"
    if level == "compile":
        missing = device.missing_for_compiling()
        return f"needs {missing}; or take --engine-level eager" if missing else None
    if not device.count_gpus():
        return "needs a GPU, for CUDA graphs; take --engine-level eager, or compile"
    if accumulation > 1:
        images = config["train_micro_batch_size_per_gpu"] * accumulation
        return f"takes a step's images in one pass, and these are {accumulation}; type --micro-batch-size {images}"
    return _why_not_captured(config, world_size, stage) if level == "captured" else None


def _why_not_captured(config: dict[str, Any], world_size: int, stage: int) -> str | None:
    optimizer = config["optimizer"]
    if world_size > 1:
        return f"is for one rank, and these are {world_size}; take --engine-level graph"
    if stage:
        return f"does not go with ZeRO {stage}, which waits for the device; set zero_optimization.stage to 0"
    if config.get("torch_autocast", {}).get("enabled") and config["torch_autocast"].get("dtype") == "float16":
        return "does not go with fp16, whose loss scale is kept by the host; take --precision bf16, or --engine-level graph"
    if config.get("scheduler"):
        return "does not go with the JSON's scheduler, which the host moves; leave it out, or take --engine-level graph"
    spelt = {name.lower(): name for name in CAPTURED_OPTIMIZERS}.get(optimizer["type"].lower())
    if spelt is None:
        return f"knows {' and '.join(CAPTURED_OPTIMIZERS)}, not {optimizer['type']}; take --engine-level graph"
    params = optimizer.get("params", {})
    if spelt == "SGD" and (not params.get("fused") or params.get("dampening")):
        return 'needs SGD with "fused": true and no dampening; take --engine-level graph'
    asked = (key for key in MONITORS if _is_on(config, key))
    return next((f"leaves no room for DeepSpeed's {key}; leave it out of the JSON" for key in asked), None)


def _is_on(config: dict[str, Any], key: str) -> bool:
    value: Any = config
    for word in key.split("."):
        value = value.get(word, False) if isinstance(value, dict) else False
    return bool(value.get("enabled", False) if isinstance(value, dict) else value)
