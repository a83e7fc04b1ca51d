"""What a rank holds and sends, predicted: the ZeRO paper's formulas, and beside them what DeepSpeed 0.19.8 adds.

Rajbhandari et al. 2020 (arXiv 1910.02054), here with fp32 weights at any precision (bf16 and fp16 are torch_autocast), for
P parameters on N ranks, in bytes: parameters 4P, gradients 4P, and 4P for each tensor of the optimizer's state. ZeRO 1 divides
the state by N, ZeRO 2 the gradients as well, ZeRO 3 the parameters as well. Sent a step: 8P, at ZeRO 3 12P, times (N - 1) / N.
DeepSpeed pads partitions: the whole to 2N elements at ZeRO 1 and 2, each parameter to N at ZeRO 3. Activations are counted by
running the network on tensors without memory (FakeTensorMode), with the same hooks as in xray.py.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cifar10.engine import pipeline
from cifar10.engine.buffers import ALIGNMENT
from cifar10.engine.loss import cross_entropy
from cifar10.engine.xray import KINDS, computed, live_tensors, ring_bytes, torchs_linear
from cifar10.models.moe import MixtureOfExperts

FP32 = 4  # bytes
ALL_REDUCE_ELEMENTS = 500_000_000  # that ZeRO 0 reduces at once: MEMORY_OPT_ALLREDUCE_SIZE in DeepSpeed's engine.py
NORM_AND_FLAG = 2 * FP32  # the gradient's norm and whether the step was skipped
PERSISTENCE = 100_000  # elements; ZeRO 3 keeps smaller parameters whole: stage3_param_persistence_threshold
COPY, BUCKET, FLAT = "copy of the partition's weights", "gradient bucket", "gradients put together to be sent"
OWN, AROUND, WHOLE = "gradients larger than a bucket", "gradients around the partition", "gathered parameters"
Pieces = dict[str, int]


@dataclass(frozen=True)
class Footprint:
    """Of a network in training on one rank, whatever the number of ranks."""

    sizes: tuple[int, ...]  # elements of each trained parameter, in the network's order
    item_sizes: tuple[int, ...]  # bytes of an element of its gradient on the way between ranks under ZeRO
    frozen: tuple[int, ...]  # elements of each other parameter
    buffers: int  # bytes
    activations: int  # bytes, of one micro-batch
    linear_casts: int  # bytes of them that are copies of linear layers' weights in bf16 or fp16
    states: int  # tensors of the optimizer's state for each parameter


@torchs_linear()
def footprint(
    build: Callable[[], nn.Module], images: Sequence[int], config: dict[str, Any], device: torch.device, smoothing: float = 0.0
) -> Footprint:
    """Of the network that `build` returns, on images [B, C, S, S], with label smoothing; nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # takes a second to import

    autocast = config.get("torch_autocast", {})
    dtype = getattr(torch, autocast["dtype"]) if autocast.get("enabled") else torch.float32
    saved: list[Tensor] = []

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with FakeTensorMode() as mode, device, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model = build().train()
        kind = dtype if dtype == torch.bfloat16 else torch.float32  # as the loader makes them
        pixels = torch.empty(images, dtype=kind, memory_format=torch.channels_last)
        labels = torch.empty(images[0], dtype=torch.int64)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(pixels)
        loss = cross_entropy(logits.float(), labels, smoothing)
        parameters, buffers = list(model.parameters()), list(model.buffers())
        known = {one.untyped_storage()._cdata for one in (*parameters, *buffers, pixels, labels)}
        kept = [*saved, *computed([*live_tensors(), logits, loss])]
        here = [one.untyped_storage() for one in kept if isinstance(one, FakeTensor) and one.fake_mode is mode]
        found = {storage._cdata: storage.nbytes() for storage in here}
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    cast = {id(one) for layer in layers for one in layer.parameters(recurse=False)}
    trained = [one for one in parameters if one.requires_grad]
    return Footprint(
        sizes=tuple(one.numel() for one in trained),
        item_sizes=tuple(dtype.itemsize if id(one) in cast else FP32 for one in trained),
        frozen=tuple(one.numel() for one in parameters if not one.requires_grad),
        buffers=2 * sum(math.ceil(one.nbytes / ALIGNMENT) * ALIGNMENT for one in buffers) + NORM_AND_FLAG,  # with a copy
        activations=sum(size for storage, size in found.items() if storage not in known),
        linear_casts=0 if dtype == torch.float32 else dtype.itemsize * sum(one.weight.numel() for one in linear),
        states=states(config["optimizer"]),
    )


def states(optimizer: dict[str, Any]) -> int:
    """Tensors of a parameter's size in the state of the JSON's optimizer: 1 for SGD's momentum, 2 for Adam."""
    name, params = optimizer["type"].lower(), dict(optimizer.get("params", {}))
    if name == "sgd":
        return int(bool(params.get("momentum")))
    return {"muonwithsgd": 1, "adagrad": 1, "lion": 1, "rmsprop": 1 + bool(params.get("momentum"))}.get(name, 2)


# --- memory -------------------------------------------------------------------------------------------------------------


def partition(seen: Footprint, stage: int, ranks: int) -> int:
    """Elements of the trained parameters that one rank has of its own, with padding."""
    if stage == 3:
        return sum(math.ceil(size / ranks) for size in seen.sizes)
    return math.ceil(sum(seen.sizes) / (2 * ranks)) * 2 if stage else sum(seen.sizes)


def memory(seen: Footprint, config: dict[str, Any], ranks: int) -> tuple[dict[str, int], Pieces]:
    """Bytes of each kind that a rank holds at most during a step, and what DeepSpeed's own buffers then consist of."""
    zero = config.get("zero_optimization", {})
    stage, whole, frozen = zero.get("stage", 0), sum(seen.sizes), sum(seen.frozen)
    part = partition(seen, stage, ranks)
    if stage == 3:
        held = part + sum(math.ceil(size / ranks) for size in seen.frozen)
    else:
        held = frozen + (part * ranks if stage else whole)
    pieces = max((_zero_0, _zero_1_2, _zero_1_2, _zero_3)[stage](seen, zero, ranks), key=lambda found: sum(found.values()))
    found = {
        "parameters": FP32 * held,
        "gradients": FP32 * (part if stage >= 2 else whole),
        "optimizer state": FP32 * seen.states * part,
        "buffers": seen.buffers,
        "activations": seen.activations - (seen.linear_casts if stage == 3 else 0),  # it saves the weights themselves
        "DeepSpeed's buffers": sum(pieces.values()),
    }
    return found, {name: size for name, size in pieces.items() if size}


def _zero_0(seen: Footprint, zero: dict[str, Any], ranks: int) -> Iterator[Pieces]:
    """The gradients are flattened to be reduced; one rank sends nothing."""
    yield {}
    if ranks > 1:
        yield {FLAT: FP32 * min(sum(seen.sizes), ALL_REDUCE_ELEMENTS)}


def _buckets(seen: Footprint, limit: int) -> Iterator[tuple[list[int], int | None]]:
    """Parameters, by number, whose gradients are reduced together, and the one whose gradient ended the bucket."""
    filling: dict[int, list[int]] = {}
    for number in reversed(range(len(seen.sizes))):
        bucket = filling.setdefault(seen.item_sizes[number], [])
        if bucket and sum(seen.sizes[one] for one in bucket) + seen.sizes[number] > limit:
            yield bucket.copy(), number
            bucket.clear()
        bucket.append(number)
    yield from ((bucket, None) for bucket in filling.values())


def _flattened(bucket: list[int], spans: list[tuple[int, int]], part: int, limit: int) -> int:
    """Elements of the largest flattened copy: slices for several ranks are put together until they are more than the limit."""
    slices: list[list[int]] = []  # rank, elements
    for start, end in (spans[number] for number in bucket):
        for rank in range(start // part, (end - 1) // part + 1):
            size = min(end, (rank + 1) * part) - max(start, rank * part)
            if slices and slices[-1][0] == rank:
                slices[-1][1] += size
            else:
                slices.append([rank, size])
    largest = together = count = 0
    for _, size in slices:
        together, count = together + size, count + 1
        largest = max(largest, together if count > 1 else 0)
        if together > limit:
            together = count = 0
    return largest


def _zero_1_2(seen: Footprint, zero: dict[str, Any], ranks: int) -> Iterator[Pieces]:
    """At each reduction and at the end of backward, on each rank.

    A bucket is flattened if it is for several ranks, and a rank that has some of a parameter keeps all of its gradient.
    """
    limit, part = zero["reduce_bucket_size"], partition(seen, zero["stage"], ranks)
    ends = list(accumulate(seen.sizes))
    spans = [(end - size, end) for end, size in zip(ends, seen.sizes, strict=True)]
    ranks_of = [set(range(start // part, (end - 1) // part + 1)) for start, end in spans]
    all_buckets = FP32 * limit * len({*seen.item_sizes}) * (2 if zero.get("overlap_comm") else 1)
    for rank in range(ranks):
        mine = sum(size for size, owners in zip(seen.sizes, ranks_of, strict=True) if rank in owners)
        around = FP32 * (mine if zero["stage"] == 1 else mine - min(mine, part))
        kept = 0
        for bucket, following in _buckets(seen, limit):
            elements, item = sum(seen.sizes[number] for number in bucket), seen.item_sizes[bucket[0]]
            flat = FP32 * _flattened(bucket, spans, part, limit) + (elements * item if item != FP32 else 0)
            whole = (elements if elements > limit else 0) + (0 if following is None else seen.sizes[following])
            own = FP32 * whole if zero["stage"] == 2 else 0
            yield {COPY: FP32 * part, BUCKET: all_buckets, FLAT: flat, OWN: own, AROUND: kept}
            if following is not None and any(rank in ranks_of[number] for number in bucket):  # the last ones go together
                kept = around
        yield {COPY: FP32 * part, AROUND: around}


def _zero_3(seen: Footprint, zero: dict[str, Any], ranks: int) -> Iterator[Pieces]:
    """Buckets always exist. Parameters once gathered are kept until backward has passed them, small ones for good."""
    limit, part = zero["reduce_bucket_size"], FP32 * partition(seen, 3, ranks)
    always = {COPY: part, BUCKET: limit * sum({*seen.item_sizes})}
    smallest = zero.get("stage3_param_persistence_threshold", PERSISTENCE)

    def gathered(last: int) -> int:
        kept = sum(size for number, size in enumerate(seen.sizes) if number <= last or size <= smallest)
        return FP32 * kept if ranks > 1 else 0

    yield {**always, WHOLE: gathered(len(seen.sizes))}
    for bucket, following in _buckets(seen, limit):
        sizes = [seen.sizes[number] for number in bucket]
        sent = sum(math.ceil(size / ranks) * ranks for size in sizes) * seen.item_sizes[bucket[0]]
        flat = 0 if len(sizes) == 1 and sizes[0] % ranks == 0 else sent
        own = sum(size for size in sizes if size > limit) + (0 if following is None else seen.sizes[following])
        yield {**always, WHOLE: gathered(following or 0), FLAT: flat, OWN: FP32 * own}
    yield {**always, FLAT: part}  # at the optimizer's step


def of_experts(build: Callable[[], nn.Module], config: dict[str, Any], ranks: int, size: int | None) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer state that a rank holds, each layer of experts divided over `size` ranks.

    ZeRO divides what is not an expert over all ranks, and experts over those that have the same.
    """
    stage, each = config.get("zero_optimization", {}).get("stage", 0), FP32 * states(config["optimizer"])
    with torch.device("meta"):
        layers = [layer for layer in build().modules() if isinstance(layer, MixtureOfExperts)]
        whole = sum(one.numel() for one in build().parameters())
    of_layers = sum(one.numel() for layer in layers for one in layer.experts.parameters())
    held = whole - of_layers + of_layers // (size or math.gcd(ranks, len(layers[0].experts)))
    part = math.ceil(whole / ranks)
    found = FP32 * held, FP32 * (part if stage > 1 else held), each * (part if stage else held)
    return dict(zip(KINDS[:3], found, strict=True))


def of_pipeline(build: Callable[[], nn.Module], images: Sequence[int], config: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Of pipeline stages: bytes of parameters, gradients and optimizer state of the largest; what the first moves in a step."""
    stages, each = config["pipeline"]["stages"], FP32 * states(config["optimizer"])
    data_ranks, passes = ranks // stages, config["gradient_accumulation_steps"]
    with torch.device("meta"):
        model = build()
        bounds = pipeline.bounds(model, config)
        output = model[: bounds[1]](torch.empty(images))
    sizes = [sum(one.numel() for one in model[start:end].parameters()) for start, end in pairwise(bounds)]
    state = max(sizes) if not config.get("zero_optimization", {}).get("stage", 0) else math.ceil(max(sizes) / data_ranks)
    moved = {name: passes * output.numel() * FP32 for name in ("send", "receive")}
    moved |= {"all-reduce": FP32 * sizes[0]} if data_ranks > 1 else {}
    sent = {name: ring_bytes(name, payload, data_ranks)[0] for name, payload in moved.items()}
    held = dict(zip(KINDS[:3], (FP32 * max(sizes), FP32 * max(sizes), each * state), strict=True))
    return {"memory": held, "traffic": moved, "sent": sent}


# --- traffic ------------------------------------------------------------------------------------------------------------


def traffic(seen: Footprint, config: dict[str, Any], ranks: int) -> dict[str, int]:
    """Bytes that each collective moves in a step of DeepSpeed, of a whole tensor whatever the algorithm."""
    zero, each = config.get("zero_optimization", {}), config["gradient_accumulation_steps"]
    stage = zero.get("stage", 0)
    gradients = sum(size * item for size, item in zip(seen.sizes, seen.item_sizes, strict=True))
    if stage == 0:
        return {"all-reduce": FP32 * sum(seen.sizes)} if ranks > 1 else {}
    if stage < 3:
        gather = {"all-gather": FP32 * ranks * partition(seen, stage, ranks)} if ranks > 1 else {}
        return {"all-reduce": gradients * (each if stage == 2 else 1), **gather}
    padded = [math.ceil(size / ranks) * ranks for size in seen.sizes]
    sent = sum(size * item for size, item in zip(padded, seen.item_sizes, strict=True)) * each
    smallest = zero.get("stage3_param_persistence_threshold", PERSISTENCE)
    of_each = zip(padded, seen.sizes, seen.item_sizes, strict=True)
    gather = sum(size * (FP32 if whole <= smallest else each * item) for size, whole, item in of_each)
    return {"reduce-scatter": sent, **({"all-gather": gather} if ranks > 1 else {})}


def paper_bytes(seen: Footprint, stage: int, ranks: int) -> float:
    """Bytes that a rank sends in a step by the ZeRO paper: of 2P elements, at ZeRO 3 3P, as a ring."""
    return (3 if stage == 3 else 2) * FP32 * sum(seen.sizes) * (ranks - 1) / ranks
