"""The levels of CUDA graphs, on a CPU: instead of a graph, recorded operations are executed again (see also test_gpu.py)."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cifar10.engine.cuda_graphs import CapturedStep, Forward, Step, Work, accelerate
from cifar10.engine.engine import Engine
from cifar10.engine.levels import Level
from cifar10.run import checkpoint
from cifar10.run.metric_buffer import MetricBuffer
from cifar10.run.state import RunState
from cifar10_deepspeed import train_step
from tests.helpers import CountOperations, batch, logged_step, make_engine, one_rank, one_step, same_bits, snapshot

MUON = {"type": "MuonWithSGD", "params": {"lr": 0.05, "bias_lr": 0.1, "head_lr": 0.2, "decay": 0.001}}
READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")


class Operations(TorchDispatchMode):
    """Records operations, and repeats them on the same tensors; as in a CUDA graph, reading a value is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(read in str(function) for read in READS):
            raise RuntimeError(f"{function} reads from the device")
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, tensors_in(results)))
        return results

    @torch.no_grad()
    def again(self) -> None:
        for function, args, kwargs, results in self.calls:
            for old, new in zip(results, tensors_in(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors_in(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results.detach()]
    return [tensor for part in results for tensor in tensors_in(part)] if isinstance(results, (tuple, list)) else []


class CpuRecorder:
    """In place of CUDA's; counts captures and replays."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.modules: list[nn.Module] = []

    def warm_up(self, work: Work) -> None:
        for _ in range(3):
            work()
            torch.rand(5)

    def capture(self, work: Work) -> Work:
        seeded = RuntimeError("seeded during a capture")  # as in CUDA
        with Operations() as operations, patch("torch.manual_seed", side_effect=seeded):
            results = work()
        self.captured += 1

        def replay() -> Any:
            self.replayed += 1
            operations.again()
            return results

        return replay

    def capture_forward(self, module: nn.Module, images: Tensor) -> Forward:
        """A few forwards to warm up, as make_graphed_callables does."""
        assert not [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks], "graphs refuse hooks"
        for _ in range(3):
            module(images)
        self.captured += 1
        self.modules.append(module)

        def replay(images: Tensor) -> Tensor:
            self.replayed += 1
            return module(images)

        return replay


def at_level(level: Level, model: nn.Module, recorder: CpuRecorder | None = None, **config: Any) -> tuple[Engine, Step]:
    engine = make_engine(one_rank(), model, global_images=8, **config)
    return engine, accelerate(train_step, engine, level, recorder or CpuRecorder())


def small_net(dropout: float = 0.0) -> nn.Module:
    """Two convolutions with BatchNorm, for images of any size."""
    torch.manual_seed(1)
    convolutions = [layer for c in (3, 4) for layer in (nn.Conv2d(c, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())]
    drop = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *drop, nn.Linear(16, 10))


def train(engine: Engine, step: Step, numbers: range) -> list[Any]:
    """The metrics of the script's steps, one in ten on images with NaN."""
    buffer = MetricBuffer(len(numbers), one_rank().device)
    for number in numbers:
        images, labels = batch(8, seed=number)
        if number % 10 == 3:
            images[2] = float("nan")
        logged_step(step, engine, [(images, labels)], buffer, (number + 1) / 200, 0.1)
        torch.rand(2)  # other random numbers
    return [repr(row) for row in buffer.read(one_rank())]  # repr makes NaN comparable


def counters(engine: Engine) -> list[Any]:
    deepspeed = engine.deepspeed
    numbers = [deepspeed.global_steps, deepspeed.micro_steps, deepspeed.global_samples, deepspeed.skipped_steps]
    return [*numbers, engine.lr, repr(engine.grad_norm.item()), engine.skipped.item()]


CASES = {
    "captured, SGD": ("captured", 0.0, {}),
    "captured, Muon": ("captured", 0.3, {"optimizer": MUON}),
    "captured, EMA": ("captured", 0.0, {"ema": 0.9}),
    "captured, no momentum": ("captured", 0.3, {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "gradient_clipping": 0.0}),
    "captured, bf16": ("captured", 0.0, {"bf16": {"enabled": True}}),
    "graph, SGD": ("graph", 0.3, {}),
    "graph, ZeRO 2": ("graph", 0.0, {"zero_optimization": {"stage": 2}}),
}


@pytest.mark.parametrize(("level", "dropout", "config"), CASES.values(), ids=CASES)
def test_two_hundred_steps_are_the_eager_ones_to_the_bit(level: Level, dropout: float, config: Any, monkeypatch: Any) -> None:
    """Weights, momentum, statistics, losses, norms, skipped steps, counters, learning rate and dropout."""
    monkeypatch.setattr("deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED", False)  # and put back afterwards
    recorder = CpuRecorder()
    both = [at_level(name, small_net(dropout), recorder, **config) for name in ("eager", level)]
    (eager, eager_step), (ours, our_step) = both
    names, start = list(ours.module.state_dict()), snapshot(ours)
    assert train(ours, our_step, range(200)) == train(eager, eager_step, range(200))
    assert same_bits(snapshot(ours), snapshot(eager))
    assert counters(ours) == counters(eager)
    assert counters(ours)[:3] == [200, 200, 1600]
    assert not same_bits(snapshot(ours), start)
    assert list(ours.portable_state()) == names
    assert (recorder.captured, recorder.replayed) == (1, 200)


@pytest.mark.parametrize("level", ["graph", "captured"])
def test_soft_targets_are_the_eager_ones_to_the_bit(level: Level) -> None:
    """As MixUp and CutMix make them; a captured step beside one with classes, too."""
    recorder = CpuRecorder()
    both = [at_level(name, small_net(0.3), recorder) for name in ("eager", level)]
    rows = []
    for engine, step in both:
        buffer = MetricBuffer(12, one_rank().device)
        for number in range(12):
            images, classes = batch(8, seed=number)
            targets = torch.nn.functional.one_hot(classes, 10).float()
            mixed = torch.lerp(targets, targets.roll(1, 0), number / 20)
            logged_step(step, engine, [(images, classes if number % 4 == 3 else mixed)], buffer, 0.5, 0.1)
        rows.append(buffer.read(one_rank()))
    assert rows[0] == rows[1]
    assert same_bits(snapshot(both[0][0]), snapshot(both[1][0]))
    assert recorder.captured == (2 if level == "captured" else 1), "one for each type of targets"


@pytest.mark.parametrize("bad_first", [False, True])
@pytest.mark.parametrize("optimizer", [None, MUON], ids=["SGD", "Muon"])
def test_capturing_leaves_no_trace(optimizer: Any, bad_first: bool) -> None:
    """Also if the first step is skipped, and with other image sizes later."""
    config, recorder = {"optimizer": optimizer} if optimizer else {}, CpuRecorder()
    both = [at_level(name, small_net(), recorder, **config) for name in ("eager", "captured")]
    (eager, _), (ours, _) = both
    for number, size in enumerate((16, 16, 32, 16, 24, 32)):
        images, labels = batch(8, seed=number)
        images = images[:, :, :size, :size] * (float("nan") if bad_first and number == 0 else 1.0)
        for engine, step in both:
            torch.manual_seed(number)
            logged_step(step, engine, [(images, labels)], MetricBuffer(1, one_rank().device), 0.5)
            assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(number)))
        assert same_bits(state_of(ours), state_of(eager)), number
        assert counters(ours) == counters(eager)
    assert recorder.captured == 3, "one per size"


def state_of(engine: Engine) -> dict[str, Tensor]:
    return {name: value.nan_to_num(7.0) for name, value in snapshot(engine).items()}


@pytest.mark.parametrize("optimizer", [None, MUON], ids=["SGD", "Muon"])
def test_a_run_resumes_at_another_level(optimizer: Any, tmp_path: Path) -> None:
    """Also in an engine that has captured steps already; what is saved is plain numbers."""
    config, world = {"optimizer": optimizer} if optimizer else {}, one_rank()
    undisturbed, step = at_level("eager", small_net(0.3), **config)
    train(undisturbed, step, range(40))
    engine, step = at_level("captured", small_net(0.3), **config)
    train(engine, step, range(10))
    for number, level in ((10, "captured"), (20, "eager"), (30, "captured")):
        saved = engine.full_state()
        assert [group["lr"] for group in saved["groups"]] == [base * (number / 200) for base in engine.base_lrs]
        checkpoint.save(tmp_path / str(number), engine, RunState(step=number), world, {}, keep=1)
        engine, step = at_level(level, small_net(0.3), **config)
        train(engine, step, range(3))
        checkpoint.resume(tmp_path / str(number), None, engine, world, {})
        train(engine, step, range(number, number + 10))
    assert same_bits(snapshot(engine), snapshot(undisturbed))
    assert counters(engine) == counters(undisturbed)


def test_the_operations_beside_a_replay() -> None:
    """Copies of images and labels, the learning rate, and a row of the metric buffer."""
    (engine, step), buffer = at_level("captured", small_net(0.3)), MetricBuffer(4, one_rank().device)
    assert isinstance(step, CapturedStep)
    logged_step(step, engine, [batch(8)], buffer, 0.5, 0.1)
    ((key, (inputs, replay)),) = step._graphs.items()
    results = replay()
    step._graphs[key] = inputs, lambda: results
    with CountOperations() as beside:
        logged_step(step, engine, [batch(8, seed=1)], buffer, 0.4, 0.1)
    random = {"aten.randn.generator": 1, "aten.randint.low_generator": 1, "aten.clone.default": 1}  # of `batch`
    launched = {"aten.copy_.default": 2, "aten.fill_.Scalar": 1, "aten.stack.out": 1}
    assert beside.counts == Counter({**random, **launched, "aten.select.int": 1})


def test_a_forward_is_captured_only_in_training() -> None:
    """In evaluation the module's own forward uses the statistics of training; submodules and names stay its own."""
    recorder = CpuRecorder()
    (eager, _), (ours, _) = (at_level(name, small_net(), recorder) for name in ("eager", "graph"))
    for step, size in enumerate((16, 32, 16)):
        images, labels = batch(8, seed=step)
        for engine in (eager, ours):
            one_step(engine, [(images[:, :, :size, :size], labels)])
    assert (recorder.captured, recorder.replayed) == (2, 3)
    twin = recorder.modules[0]
    assert twin is not ours.module
    assert all(one is other for one, other in zip(twin.parameters(), ours.module.parameters(), strict=True))
    ours.module.eval()
    eager.module.eval()
    with torch.no_grad():
        assert torch.equal(ours.module(batch(3)[0]), eager.module(batch(3)[0]))
    assert recorder.replayed == 3
    assert same_bits(snapshot(ours), snapshot(eager))
