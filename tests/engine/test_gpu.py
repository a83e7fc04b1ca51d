"""On a GPU: the levels agree, no step synchronizes, and every precision trains at every ZeRO stage (never run so far)."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifar10.distributed import device
from cifar10.engine.cuda_graphs import accelerate
from cifar10.engine.engine import Engine, synchronize_batch_norm
from cifar10.engine.levels import Level
from cifar10.models.registry import build_model
from cifar10.run.metric_buffer import MetricBuffer
from cifar10_deepspeed import train_step
from tests.helpers import batch, largest_difference, logged_step, make_engine, one_rank, one_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")

MUON = {"type": "MuonWithSGD", "params": {"lr": 0.02, "bias_lr": 0.1, "head_lr": 0.1}}


@pytest.fixture(autouse=True)
def one_precision_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED", False)  # and put back afterwards


def data(num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    images, labels = batch(num_images, seed)
    return images.to(one_rank().device), labels.to(one_rank().device)


def at_level(level: Level, model: nn.Module, **config: Any) -> tuple[Engine, Callable[..., Any]]:
    engine = make_engine(one_rank(), model, **config)
    return engine, accelerate(train_step, engine, level)


def smooth_net(dropout: float) -> nn.Module:
    model = build_model("smooth_cnn", 0, 10)
    return nn.Sequential(model, nn.Dropout(dropout)) if dropout else model


@pytest.mark.parametrize("optimizer", [None, MUON], ids=["SGD", "Muon"])
@pytest.mark.parametrize(("level", "dropout"), [("compile", 0.0), ("graph", 0.2), ("captured", 0.2)])
def test_two_hundred_steps_are_the_eager_ones(level: Level, dropout: float, optimizer: Any) -> None:
    """To rounding, with bad steps and dropout; compiled dropout uses other random numbers."""
    config = {"optimizer": optimizer} if optimizer else {}
    if level == "compile" and (missing := device.missing_for_compiling()):
        pytest.skip(f"needs {missing}")
    engines, steps = zip(*(at_level(name, smooth_net(dropout), **config) for name in ("eager", level)), strict=True)
    buffers = [MetricBuffer(200, one_rank().device) for _ in engines]
    for step in range(200):
        images, labels = data(32, seed=step)
        if step % 50 == 0:
            images[3] = float("nan")
        for each in zip(steps, engines, [[(images, labels)]] * 2, buffers, strict=True):
            logged_step(*each, (step + 1) / 400, 0.1)
    eager, ours = (buffer.read(one_rank()) for buffer in buffers)
    assert [row[3] for row in ours] == [row[3] for row in eager] == [step % 50 == 0 for step in range(200)]
    assert [row[0] for row in ours if not row[3]] == pytest.approx([row[0] for row in eager if not row[3]], abs=1e-3)
    tolerance = 1e-3 if not optimizer else 1e-1  # Muon's matrix products are in bfloat16
    assert largest_difference(engines[1].portable_state(), engines[0].portable_state()) < tolerance
    assert [engine.deepspeed.global_steps for engine in engines] == [200, 200]


@pytest.fixture
def no_synchronizing() -> Iterator[Any]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("level", ["eager", "graph", "captured"])
def test_a_step_never_synchronizes(level: Level, no_synchronizing: Any) -> None:
    engine, step = at_level(level, build_model("bn_cnn", 0, 10))
    buffer, batches = MetricBuffer(20, one_rank().device), [data(32, s) for s in range(10)]
    for one in batches[:5]:
        logged_step(step, engine, [one], buffer, 0.5, 0.1)
    torch.cuda.synchronize()
    no_synchronizing()
    for one in batches[5:]:
        logged_step(step, engine, [one], buffer, 0.5, 0.1)
    with pytest.raises(RuntimeError, match="synchron"):
        buffer.read(one_rank())  # this mode detects it


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_precision_trains_at_every_stage(precision: str, stage: int) -> None:
    """The loss on one batch falls, and the weights are finite and fp32."""
    sections = {precision: {"enabled": True}} if precision != "fp32" else {}
    engine = make_engine(one_rank(), build_model("bn_cnn", 0, 10), zero_optimization={"stage": stage}, **sections)
    losses = [one_step(engine, [data(32)], 0.1).item() for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert engine.skipped.item() == 0
    state = engine.portable_state()
    assert {value.dtype for name, value in state.items() if not name.endswith("num_batches_tracked")} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in state.values())


def test_sync_bn_of_one_rank_is_batch_norm() -> None:
    plain = make_engine(one_rank(), build_model("bn_cnn", 0, 10))
    model = build_model("bn_cnn", 0, 10)
    synchronize_batch_norm(model)
    synced = make_engine(one_rank(), model)
    for step in range(5):
        for engine in (plain, synced):
            one_step(engine, [data(32, seed=step)], 0.1)
    assert largest_difference(synced.portable_state(), plain.portable_state()) < 1e-4
