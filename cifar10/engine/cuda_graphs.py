"""CUDA graphs: device work that is recorded once and then replayed as a whole, without the Python that led to it.

What a recording may rely on: tensors stay where they are, nothing is read back, and the host's own bookkeeping is done by
whoever replays. `Recorder` is the seam between that bookkeeping (engine.py) and CUDA; tests put another in its place that
records the operations of a CPU. Nothing in this file has run on a GPU yet.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

WARMUP_RUNS = 3  # before a recording: libraries choose their algorithms, and allocate what stays, outside of it

Work = Callable[[], Any]  # device work on fixed tensors, and the tensors that it leaves its results in
Forward = Callable[[Tensor], Tensor]


class Recorder(Protocol):
    """How device work is recorded."""

    def warm_up(self, work: Work) -> None:
        """Do `work` a few times; what that changes is for the caller to put back."""

    def record(self, work: Work) -> Work:
        """What does the same again, into the same results. Whether `work` is carried out while it is recorded is left open."""

    def record_module(self, module: nn.Module, images: Tensor) -> Forward:
        """The module's forward for images of this shape, which also records the backward that belongs to it."""


class CudaRecorder:
    """CUDA graphs on the current device."""

    def warm_up(self, work: Work) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_RUNS):
                work()
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread goes on asking the device
            results = work()

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def record_module(self, module: nn.Module, images: Tensor) -> Forward:
        on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):  # a cast of another graph would be stale
            return torch.cuda.make_graphed_callables(
                module, (images.clone(),), num_warmup_iters=WARMUP_RUNS, capture_error_mode="thread_local"
            )


class Kept:
    """All that a step moves on the device, and the random numbers' position: to be put back after steps that do not count."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device) -> None:
        self._optimizer, self._device = optimizer, device
        self._tensors = [*module.parameters(), *module.buffers(), *self._optimizer_state()]
        self._values = [tensor.detach().clone() for tensor in self._tensors]
        self._random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def _optimizer_state(self) -> list[Tensor]:
        states = self._optimizer.state.values() if self._optimizer else ()
        return [value for state in states for value in state.values() if torch.is_tensor(value)]

    @torch.no_grad()
    def put_back(self) -> None:
        """Momentum that there was not before is zero, which is where it starts."""
        known = {id(tensor) for tensor in self._tensors}
        for tensor in self._optimizer_state():
            if id(tensor) not in known:
                tensor.zero_()
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)
        torch.set_rng_state(self._random[0])
        if self._random[1] is not None:
            torch.cuda.set_rng_state(self._random[1], self._device)


class RecordedStep:
    """A step that has been recorded, on images and labels that lie where it reads them."""

    def __init__(self, recorder: Recorder, step: Callable[[Tensor, Tensor], Any], images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images.clone(), labels.clone()

        def work() -> Any:
            return step(self._images, self._labels)

        recorder.warm_up(work)
        self._replay = recorder.record(work)

    def __call__(self, images: Tensor, labels: Tensor) -> Any:
        """What the step returned, the same tensors each time, now of these images."""
        self._images.copy_(images)
        self._labels.copy_(labels)
        return self._replay()


def without_hooks(module: nn.Module) -> nn.Module:
    """The same module, its parameters, buffers and parts shared, without the hooks that DeepSpeed has put on it."""
    twin = copy.copy(module)
    twin._forward_hooks, twin._forward_pre_hooks, twin._backward_hooks = OrderedDict(), OrderedDict(), OrderedDict()
    return twin


class RecordedForward:
    """In place of a module's own forward while it trains: one recording for each shape of images."""

    def __init__(self, module: nn.Module, recorder: Recorder, device: torch.device) -> None:
        self._module, self._recorder, self._device = module, recorder, device
        self._eager: Forward = module.forward
        self._recordings: dict[torch.Size, Forward] = {}
        module.forward = self

    def __call__(self, images: Tensor) -> Tensor:
        if not (self._module.training and torch.is_grad_enabled()):
            return self._eager(images)
        if images.shape not in self._recordings:
            self._recordings[images.shape] = self._record(images)
        return self._recordings[images.shape](images)

    def _record(self, images: Tensor) -> Forward:
        twin = without_hooks(self._module)
        del twin.forward  # this object, which the module's own class is to take the place of
        kept = Kept(self._module, None, self._device)
        recording = self._recorder.record_module(twin, images)
        kept.put_back()
        return recording
