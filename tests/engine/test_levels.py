"""--engine-level: what each level refuses before any rank starts, and compiled steps against eager ones."""

import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cifar10 import UsageError
from cifar10.config import ds_config
from cifar10.distributed import device
from cifar10.engine import levels
from cifar10.engine.cuda_graphs import accelerate
from cifar10.plan import make_plan
from cifar10_deepspeed import initial_model, start_run, train_step
from tests.helpers import SGD, batch, largest_difference, make_engine, one_rank, one_step, snapshot


def resolve_level(level: str, world_size: int = 1, *, sync_bn: bool = False, **config: Any) -> str:
    resolved, _, _ = ds_config.resolve({"train_batch_size": 64, "optimizer": SGD, **config}, world_size)
    return levels.resolve_level(level, resolved, world_size, sync_bn=sync_bn)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one, so that only the config matters."""
    monkeypatch.setattr(device, "count_gpus", lambda: 1)
    monkeypatch.setattr(device, "missing_for_compiling", lambda: None)


@pytest.mark.usefixtures("gpus")
def test_what_each_level_supports_on_a_gpu() -> None:
    everything = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 2}
    assert resolve_level("auto") == "eager"
    assert resolve_level("eager", 4, sync_bn=True, **everything) == "eager"
    assert resolve_level("compile", 4, zero_optimization={"stage": 2}, gradient_accumulation_steps=2) == "compile"
    assert resolve_level("graph", 4, zero_optimization={"stage": 2}, fp16={"enabled": True}) == "graph"
    assert resolve_level("captured", sync_bn=True, bf16={"enabled": True}) == "captured"
    assert resolve_level("captured", optimizer={"type": "MuonWithSGD", "params": {"lr": 0.1}}) == "captured"


def level_of(*words: str, world_size: int = 1) -> str:
    plan = make_plan(["--dataset", "synthetic", "--recipe", "speedrun94", *words], world_size, "test")
    said = any("engine level: captured" in note for note in plan.notes)
    assert said == (plan.options.engine_level == "captured" and not words)
    return plan.options.engine_level


def test_auto_is_what_the_recipe_asks_for_where_it_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "count_gpus", lambda: 2)
    assert level_of() == "captured"
    assert level_of("--engine-level", "eager") == "eager"
    assert level_of("--engine-level", "captured") == "captured"
    assert level_of(world_size=2) == "eager"
    assert level_of("--precision", "fp16") == "eager"
    assert make_plan(["--dataset", "synthetic"], 1, "test").options.engine_level == "eager"
    monkeypatch.setattr(device, "count_gpus", lambda: 0)
    assert level_of() == "eager"


ADAM, PLAIN = {"type": "AdamW", "params": {"lr": 0.1}}, {"type": "SGD", "params": {"lr": 0.1, "foreach": True}}
DAMPENED = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}}
IN_PASSES = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16}
REFUSED: list[tuple[str, int, dict[str, Any], str]] = [
    ("compile", 1, {"zero_optimization": {"stage": 3}}, "ZeRO stage 3, .* stage 2"),
    ("graph", 2, {"sync_bn": True}, "--sync-bn"),
    ("graph", 2, IN_PASSES, "2 passes a step; use --micro-batch-size 32"),
    ("captured", 1, IN_PASSES, "4 passes a step; use --micro-batch-size 64"),
    ("captured", 2, {}, "2 ranks, .* --engine-level graph"),
    ("captured", 1, {"zero_optimization": {"stage": 1}}, "ZeRO stage 1, .* zero_optimization.stage to 0"),
    ("captured", 1, {"fp16": {"enabled": True}}, "fp16, .* --precision bf16"),
    ("captured", 1, {"scheduler": {"type": "WarmupLR"}}, "scheduler .* --engine-level graph"),
    ("captured", 1, {"optimizer": ADAM}, "AdamW, .* SGD and MuonWithSGD; .* --engine-level graph"),
    ("captured", 1, {"optimizer": PLAIN}, '"fused": true'),
    ("captured", 1, {"optimizer": DAMPENED}, "no dampening"),
    ("captured", 1, {"timers": {"throughput": {"enabled": True}}}, "timers.throughput"),
    ("captured", 1, {"wall_clock_breakdown": True}, "wall_clock_breakdown"),
    ("compile", 1, {"flops_profiler": {"enabled": True}}, "flops_profiler"),
]


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("level", "world_size", "config", "message"), REFUSED)
def test_an_unsupported_level_is_refused_with_what_fixes_it(level: str, world_size: int, config: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^--engine-level {level} .*{message}") as refused:
        resolve_level(level, world_size, **config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("level", ["graph", "captured"])
def test_graphs_are_refused_without_a_gpu(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "count_gpus", lambda: 0)
    with pytest.raises(UsageError, match=f"--engine-level {level} needs a GPU, .* --engine-level eager"):
        make_plan(["--dataset", "synthetic", "--engine-level", level], 1, "test")


@pytest.mark.parametrize(
    ("gpus", "variables", "there", "missing"),
    [
        (0, {}, ["g++"], None),
        (0, {}, [], r"a C\+\+ compiler .g\+\+ .*CXX"),
        (0, {"CXX": "clang++ -O2"}, ["clang++"], None),
        (0, {"CXX": "mine"}, ["g++"], ".mine was not found"),
        (1, {}, ["clang"], None),
        (1, {}, ["g++"], "a C compiler .gcc .*CC"),
    ],
)
def test_compiling_needs_a_compiler(gpus, variables, there, missing, monkeypatch, tmp_path) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, variables.get(name, ""))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(device, "count_gpus", lambda: gpus)
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda word: word if word in there else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    if missing is None:
        assert resolve_level("compile") == "compile"
        (tmp_path / "Python.h").unlink()
        missing = "Python.h: install Python's headers"
    with pytest.raises(UsageError, match=f"--engine-level compile needs .*{missing}.*; or use --engine-level eager"):
        resolve_level("compile")


COMPILES = device.missing_for_compiling() is None


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(256, 10))


@pytest.mark.slow
@pytest.mark.skipif(not COMPILES, reason="needs a C++ compiler and Python.h")
def test_compiled_steps_are_the_eager_ones() -> None:
    """To rounding, after two hundred, one of them bad, and after a resume; names and counters stay the same."""
    torch._dynamo.reset()
    eager, ours = (make_engine(one_rank(), tiny_net(), global_images=8) for _ in range(2))
    accelerate(train_step, ours, "compile")
    torch._dynamo.utils.counters.clear()
    for step in range(200):
        images, labels = batch(8, seed=step)
        if step == 50:
            images[0] = float("nan")
        for engine in (eager, ours):
            one_step(engine, [(images, labels)], 0.1)
            assert engine.skipped.item() == (step == 50)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "compiled whole and once"
    assert not torch._dynamo.utils.counters["graph_break"]
    assert largest_difference(ours.portable_state(), eager.portable_state()) < 1e-5
    assert largest_difference(eager.portable_state(), tiny_net().state_dict()) > 1e-2, "there was something to learn"
    assert list(snapshot(ours)) == list(snapshot(eager))
    assert ours.deepspeed.global_steps == eager.deepspeed.global_steps == 200
    resumed = make_engine(one_rank(), tiny_net(), global_images=8)
    resumed.restore(ours.full_state())
    for engine in (ours, resumed):
        one_step(engine, [batch(8, seed=200)], 0.1)
    assert largest_difference(ours.portable_state(), resumed.portable_state()) < 1e-6


def test_the_script_uses_the_level_asked_for(tmp_path: Path) -> None:
    """Without a step, nothing is compiled yet."""
    for level in ("auto", "compile") if COMPILES else ("auto",):
        plan = make_plan(["--dataset", "synthetic", "--engine-level", level], 1, "test")
        (tmp_path / level / "checkpoints").mkdir(parents=True)
        run, _ = start_run(plan, one_rank(), tmp_path / level, initial_model(plan)[0])
        run.metrics.close()
        assert run.engine.deepspeed.is_compiled == (level == "compile")
