"""What a rank holds and what it sends, measured: live storages by kind, and collectives counted at the process group.

Storages are found by Python's garbage collector, so that what DeepSpeed allocates is seen whatever it is called; each counts
once, under the first kind that it belongs to, with all of its bytes whether they have been touched or not. What no kind claims
is DeepSpeed's own. Activations are what autograd saves for backward (saved_tensors_hooks), and what it has computed that is
still needed.
"""

import gc
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cifar10.engine.engine import Engine

KINDS = ("parameters", "gradients", "optimizer state", "buffers", "activations", "DeepSpeed's buffers")
BACKWARD = "backward"
Bytes = dict[str, int]  # of each kind
Storages = dict[int, int]  # address -> bytes

COLLECTIVES = {  # methods of torch's ProcessGroup, some of torch 2.15 only: the collective, and the argument with all it moves
    method: (collective, position)
    for collective, position, methods in (
        ("all-reduce", 0, "allreduce allreduce_coalesced"),
        ("broadcast", 0, "broadcast"),
        ("reduce", 0, "reduce"),
        ("all-gather", 0, "allgather _allgather_base allgather_into_tensor_coalesced"),
        ("all-gather", 0, "all_gather_single all_gather_single_coalesced"),
        ("reduce-scatter", 1, "reduce_scatter _reduce_scatter_base reduce_scatter_tensor_coalesced"),
        ("reduce-scatter", 1, "reduce_scatter_single reduce_scatter_single_coalesced"),
        ("all-to-all", 1, "alltoall alltoall_base all_to_all_single"),
        ("send", 0, "send"),
        ("receive", 0, "recv"),
        ("barrier", 0, "barrier"),
    )
    for method in methods.split()
}


@contextmanager
def torchs_linear() -> Iterator[None]:
    """Within, F.linear is PyTorch's own. DeepSpeed replaces it at ZeRO 3, for the rest of the process, by one that saves the
    weights themselves for backward and not their copies in bf16 or fp16."""
    found, F.linear = F.linear, torch._C._nn.linear
    try:
        yield
    finally:
        F.linear = found


def storages(tensors: Iterable[Any]) -> Storages:
    """The storages of tensors that have memory."""
    found = {}
    for tensor in tensors:
        if tensor is not None and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.device.type != "meta":
                found[storage.data_ptr()] = storage.nbytes()
    return found


def nested(values: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples and dicts of them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from nested(value)


def ring_bytes(collective: str, payload: int, ranks: int) -> tuple[float, float]:
    """Bytes that a rank sends and receives if the collective runs as a ring (ZeRO's section 7.1), of this payload."""
    if collective in ("send", "receive"):
        return (payload, 0) if collective == "send" else (0, payload)
    passes = 2 if collective == "all-reduce" else 1
    share = passes * payload * (ranks - 1) / ranks
    return share, share


class Waited:
    """Work that has been waited for. Gloo's sends and receives cannot be waited for twice: the second wait never ends."""

    def wait(self, *_: Any) -> bool:
        return True


class Traffic:
    """Calls of collectives, and for each its payload in bytes, ring bytes and seconds; `look` is called within each."""

    def __init__(self, device: torch.device, look: Callable[[str], None] = lambda moment: None) -> None:
        self.rows: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._device, self._look = device, look

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within, every collective of this process is counted, and waited for, so that its time is its own."""
        group = dist.ProcessGroup
        kept = {name: method for name, method in vars(group).items() if name in COLLECTIVES}  # as they are bound
        for name in kept:
            setattr(group, name, self._counting(getattr(group, name), *COLLECTIVES[name]))
        try:
            yield
        finally:
            for name, method in kept.items():
                setattr(group, name, method)

    def _counting(self, method: Callable[..., Any], collective: str, position: int) -> Callable[..., Any]:
        def counting(group: Any, *arguments: Any, **named: Any) -> Any:
            payload = sum(tensor.nbytes for tensor in nested(arguments[position : position + 1]))
            self._look(collective)
            started = self._now()
            work = method(group, *arguments, **named)
            if work is not None:
                work.wait()
            sent, received = ring_bytes(collective, payload, group.size())
            facts = {"calls": 1, "payload": payload, "sent": sent, "received": received, "seconds": self._now() - started}
            for name, value in facts.items():
                self.rows[collective][name] += value
            return Waited() if work is not None and collective in ("send", "receive") else work

        return counting

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def computed(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Those that autograd has computed: logits, the loss, and what checkpointed blocks keep."""
    return [one for one in tensors if one is not None and one.grad_fn is not None]


def live_tensors() -> list[Tensor]:
    """All tensors that Python knows of."""
    return [one for one in gc.get_objects() if issubclass(type(one), Tensor)]


class Memory:
    """Live storages by kind at moments of a step, but for those of tensors that were there before the network."""

    def __init__(self, engine: Engine, before: list[Tensor]) -> None:
        self.moments: list[tuple[str, Bytes]] = []
        self._engine, self._before, self._ignored = engine, before, storages(before)
        self._parameters = list(engine.module.parameters())
        self._saved: list[weakref.ref[Tensor]] = []

    @property
    def most(self) -> Bytes:
        """The most of each kind at any moment, but for those when gradients are on their way through the layers."""
        return {kind: max(found[kind] for moment, found in self.moments if moment != BACKWARD) for kind in KINDS}

    @property
    def peak(self) -> tuple[str, int]:
        """The moment with the most bytes in all, and these."""
        moment, found = max(self.moments, key=lambda one: sum(one[1].values()))
        return moment, sum(found.values())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, look after forward, at each gradient, before the reduction, after backward, and at the optimizer's step."""
        engine, looks = self._engine, self.look
        backward = engine.backward
        reduce, step = engine.deepspeed.allreduce_gradients, engine.optimizer.step

        def looking_backward(loss: Tensor) -> None:
            looks("the end of forward")
            backward(loss)
            looks("the end of backward")

        def looking(moment: str, method: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments, **named: (looks(moment), method(*arguments, **named))[1]

        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        hooks = [one.register_post_accumulate_grad_hook(lambda _: looks(BACKWARD)) for one in trained]
        engine.backward = looking_backward
        engine.deepspeed.allreduce_gradients = looking("before the reduction", reduce)
        engine.optimizer.step = looking("the optimizer's step", step)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
                yield
        finally:
            engine.backward = backward
            engine.deepspeed.allreduce_gradients, engine.optimizer.step = reduce, step
            for hook in hooks:
                hook.remove()

    def look(self, moment: str) -> None:
        """Count what is live now."""
        tensors = [*live_tensors(), *(one.grad for one in self._parameters)]  # Python may not have seen a gradient yet
        live = storages(tensors)
        for address in self._ignored:
            live.pop(address, None)
        found = {}
        for kind, claimed in self._claims(tensors).items():
            found[kind] = sum(live.pop(address, 0) for address in claimed)
        rest = sum(live.values())
        if self._engine.stage >= 2:  # gradients of parameters that lie across partitions are kept whole, by DeepSpeed
            own = min(found["gradients"], self._partition_bytes())
            rest, found["gradients"] = rest + found["gradients"] - own, own
        self.moments.append((moment, {**found, KINDS[-1]: rest}))

    def _claims(self, tensors: list[Tensor | None]) -> dict[str, Storages]:
        engine, zero, parameters = self._engine, self._engine.deepspeed.optimizer, self._parameters
        held = storages(one.ds_tensor if engine.stage == 3 else one.data for one in parameters)
        buffers = [*engine.module.buffers(), *nested(list(vars(engine._buffers).values())), engine.grad_norm, engine.skipped]
        gradients = storages(one.grad for one in parameters)
        if engine.stage == 3:
            gradients = storages([zero.grad_partitions_flat_buffer])
        elif engine.stage:
            partition = [zero.grads_in_partition, *nested(zero.averaged_gradients), *nested(zero.all_grad_tensors)]
            partition += [one.grad for one in zero.single_partition_of_fp32_groups]
            buckets = storages(nested([bucket.buffer for bucket in zero.ipg_buckets.values()]))
            own = storages(partition)
            gradients = own if engine.stage == 2 else {key: size for key, size in gradients.items() if key not in own}
            gradients = {key: size for key, size in gradients.items() if key not in buckets}
        state = storages(nested(dict(engine.optimizer.state)))
        updated = nested([group["params"] for group in engine.optimizer.param_groups])  # of which DeepSpeed has views
        whole = storages([*(one.data for one in parameters), *updated])
        saved = storages([*(one() for one in self._saved), *computed(tensors)])
        saved = {key: size for key, size in saved.items() if key not in whole}
        return dict(zip(KINDS, (held, gradients, state, storages(buffers), saved), strict=False))

    def _partition_bytes(self) -> int:
        """Of this rank's partition of the gradients."""
        zero = self._engine.deepspeed.optimizer
        if self._engine.stage == 3:
            return zero.grad_partitions_flat_buffer.nbytes
        return sum(map(int, zero.partition_size)) * torch.finfo(zero.gradient_accumulation_dtype).bits // 8

    def _save(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in storages(one.data for one in self._parameters):
            self._saved.append(weakref.ref(tensor))  # ZeRO 3 has taken back the parameters when memory is looked at
        return tensor
