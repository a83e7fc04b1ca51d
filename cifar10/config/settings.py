"""Settings of an experiment, flattened and compared: two runs without differences are the same experiment."""

from typing import Any

from cifar10.config.schedule import modern

# These may change when a run resumes: micro-batches follow from the number of ranks; ZeRO and stages do not change the result.
FREE = (
    "deepspeed.train_micro_batch_size_per_gpu",
    "deepspeed.gradient_accumulation_steps",
    "deepspeed.zero_",
    "deepspeed.pipeline.",
)


def is_deep(value: Any, levels: int = 20) -> bool:
    """Whether a JSON value is nested so deeply that recursive code could hit Python's recursion limit."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not levels or any(is_deep(one, levels - 1) for one in inner)


def flattened(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten nested settings: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flattened(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value})
    return flat


def differences(saved: dict[str, Any], ours: dict[str, Any]) -> str:
    """Up to four differences, `epochs 5 there, 6 here; ...`, of two {"recipe": ..., "deepspeed": ...}; empty if none."""
    there, here = flattened({**saved, "recipe": modern(saved.get("recipe", {}))}), flattened(ours)
    keys = sorted(key for key in there.keys() | here.keys() if not key.startswith(FREE) and there.get(key) != here.get(key))
    names = (key.partition(".")[2] or key for key in keys[:4])
    shown = ((_short(name), _short(there.get(key)), _short(here.get(key))) for name, key in zip(names, keys, strict=False))
    return "; ".join("{} {} there, {} here".format(*words) for words in shown)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
