"""The faster levels of `--engine-level` (see levels.py): compiled code, and CUDA graphs that replay a step without its Python.

`accelerate` wraps the script's step function once, at the start, as torch.compile would; nothing else knows the levels.
A captured graph needs tensors that stay where they are and are never read back; the host's bookkeeping is repeated at each
replay. On a CPU, tests replace `CudaRecorder`. None of these graphs has been measured on a GPU yet.
"""

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cifar10.engine.engine import Engine
from cifar10.engine.levels import Level
from cifar10.ops import norm_pool

WARMUP_RUNS = 3  # before a capture, in which libraries choose their algorithms and allocate their memory
COUNTERS = ("global_steps", "micro_steps", "global_samples", "skipped_steps")  # DeepSpeed's

Work = Callable[[], Any]  # device work on fixed tensors; returns the tensors that hold its results
Forward = Callable[[Tensor], Tensor]
Step = Callable[..., Any]  # (engine, micro_batches, *settings) -> tensors


class CudaRecorder:
    """Captures CUDA graphs on the current device."""

    def warm_up(self, work: Work) -> None:
        """Do `work` a few times; the caller undoes its effects."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_RUNS):
                work()
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, work: Work, pool: Any = None) -> Work:
        """A function that repeats `work` and leaves its results in the same tensors. `pool`: memory that graphs share."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):  # NCCL's own thread queries the device
            results = work()

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def capture_forward(self, module: nn.Module, images: Tensor) -> Forward:
        """The module's forward, and its backward, for images of this shape.

        Unlike torch.cuda.make_graphed_callables it captures with other leaves of the same memory: those of the parameters may
        belong to the default stream, as where ZeRO has hooks on them, which breaks a capture, or costs waits at each replay.
        """
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        place = images.clone()

        def forward() -> Tensor:
            on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
            with torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):  # another graph's cast would be stale
                return torch.func.functional_call(module, leaves, place)

        def backward(logits: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(logits, list(leaves.values()), gradient)

        self.warm_up(lambda: backward(logits := forward(), torch.zeros_like(logits)))
        pool = torch.cuda.graph_pool_handle()
        replay_forward = self.capture(forward, pool)
        logits = replay_forward()
        arriving = torch.zeros_like(logits)
        replay_backward = self.capture(lambda: backward(logits, arriving), pool)
        results = logits.detach()

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, images: Tensor, *parameters: Tensor) -> Tensor:
                place.copy_(images)
                replay_forward()
                return results.detach()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
                arriving.copy_(gradient)
                return None, *(gradient.detach() for gradient in replay_backward())

        return lambda images: Replay.apply(images, *parameters.values())


@contextmanager
def undone(engine: Engine) -> Iterator[None]:
    """Undo what steps change, including the random state: warm-up and capture are not training. Their time is counted apart."""

    def optimizer_state() -> list[Tensor]:
        return [value for state in engine.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]

    device = engine.world.device
    if device.type == "cuda":
        torch.cuda.synchronize()  # earlier steps are not a part of it
    started = time.perf_counter()
    before = optimizer_state()
    average = [*engine.average.averages, engine.average.updates] if engine.average else []
    tensors = [*engine.module.parameters(), *engine.module.buffers(), *average, *before]
    values, counters = [t.detach().clone() for t in tensors], {name: getattr(engine.deepspeed, name) for name in COUNTERS}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            known = {id(tensor) for tensor in before}
            with torch.no_grad():
                for tensor in optimizer_state():
                    if id(tensor) not in known:
                        tensor.zero_()  # momentum starts at zero
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
            for name, count in counters.items():
                setattr(engine.deepspeed, name, count)
            engine.capture_seconds += time.perf_counter() - started


class CapturedStep:
    """`step(engine, micro_batches, *settings)` as one graph per image shape, captured at the first call with that shape.

    A replay returns the same tensors with new values; the host's part of a step is repeated at each replay.
    """

    def __init__(self, step: Step, engine: Engine, recorder: CudaRecorder) -> None:
        self._step, self._recorder = step, recorder
        self._graphs: dict[Any, tuple[list[Tensor], Work]] = {}  # the input tensors, and the replay
        self._has_dropout, engine.seeds_dropout = engine.seeds_dropout, False  # CUDA cannot seed during a capture
        engine.deepspeed._config.steps_per_print = None  # it would read the learning rate from the device
        for group in engine.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=engine.world.device)

    def __call__(self, engine: Engine, micro_batches: list[tuple[Tensor, Tensor]], *settings: Any) -> Any:
        tensors = [tensor for micro_batch in micro_batches for tensor in micro_batch]
        key = (*(tensor.shape for tensor in tensors), *settings)
        if key not in self._graphs:
            self._graphs[key] = self._capture(engine, micro_batches, *settings)
        inputs, replay = self._graphs[key]
        if self._has_dropout:
            engine.seed_dropout()  # a replay uses the current seed
        for place, tensor in zip(inputs, tensors, strict=True):
            place.copy_(tensor)
        results, engine.grad_norm, engine.skipped = replay()
        deepspeed = engine.deepspeed
        deepspeed.global_steps, deepspeed.micro_steps = deepspeed.global_steps + 1, deepspeed.micro_steps + 1
        deepspeed.global_samples += deepspeed.train_batch_size()
        return results

    def _capture(self, engine: Engine, micro_batches: list[tuple[Tensor, Tensor]], *settings: Any) -> tuple[list[Tensor], Work]:
        places = [(images.clone(), labels.clone()) for images, labels in micro_batches]

        def work() -> tuple[Any, Tensor, Tensor]:
            return self._step(engine, places, *settings), engine.grad_norm, engine.skipped

        with undone(engine):
            self._recorder.warm_up(work)
            return [tensor for pair in places for tensor in pair], self._recorder.capture(work)


class GraphedForward:
    """A module's forward in training, as one graph per image shape; in evaluation, the module's own."""

    def __init__(self, engine: Engine, recorder: CudaRecorder) -> None:
        self._engine, self._module, self._recorder = engine, engine.module, recorder
        self._eager: Forward = engine.module.forward
        self._graphs: dict[torch.Size, Forward] = {}

    def __call__(self, images: Tensor) -> Tensor:
        if not (self._module.training and torch.is_grad_enabled()):
            return self._eager(images)
        if images.shape not in self._graphs:
            twin = copy.copy(self._module)  # shares parameters and buffers, without DeepSpeed's hooks and this forward
            twin._forward_hooks, twin._forward_pre_hooks, twin._backward_hooks = OrderedDict(), OrderedDict(), OrderedDict()
            del twin.forward
            with undone(self._engine):
                self._graphs[images.shape] = self._recorder.capture_forward(twin, images)
        return self._graphs[images.shape](images)


def accelerate(step: Step, engine: Engine, level: Level, recorder: CudaRecorder | None = None) -> Step:
    """`step` at a level from `levels.resolve_level`; call it once, before the first step."""
    if level == "fused":
        norm_pool.fuse(engine.module)
    elif level == "compile":
        for hook in (engine.deepspeed.module_forward_pre_hook, engine.deepspeed.module_forward_post_hook):
            hook.remove()  # they read a step count, which would recompile at each step
        engine.deepspeed.compile(compile_kwargs={"dynamic": False})  # one compilation per image size
    elif level == "graph":
        engine.module.forward = GraphedForward(engine, recorder or CudaRecorder())
    elif level == "captured":
        return CapturedStep(step, engine, recorder or CudaRecorder())
    return step
