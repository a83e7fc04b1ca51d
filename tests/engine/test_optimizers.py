"""Every optimizer that PyTorch or DeepSpeed has a name for trains, or is refused in one line before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cifar10 import UsageError
from cifar10.config import ds_check, ds_config, signatures
from cifar10.distributed import device
from cifar10.engine import kernels
from cifar10_deepspeed import CIFAR10CNNEnhanced
from tests.helpers import batch, make_engine, one_rank, one_step, same_bits, snapshot

DEEPSPEEDS = signatures.constants(signatures.source("deepspeed", "runtime/config.py"), "DEEPSPEED_OPTIMIZERS")
(NAMES,) = DEEPSPEEDS.values()
PYTORCHS = [name for name in torch.optim.__all__ if hasattr(getattr(torch.optim, name), "step") and name != "Optimizer"]
OTHERS = "MuonWithSGD OneBitAdam OneBitLamb ZeroOneAdam FusedAdam DeepSpeedCPUAdam CPUAdam FusedLamb".split()
TRAIN = set("ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD MuonWithSGD".split())
TRAIN |= {"adagrad", "adam", "adamw"}
WHOLE = {"MuonWithSGD", "Adafactor"}  # their updates are not element by element


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "count_gpus", lambda: 0)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", [*PYTORCHS, *NAMES, *OTHERS])
def test_an_optimizer_trains_or_is_refused_in_one_line(name: str, stage: int) -> None:
    config = {"optimizer": {"type": name, "params": {"lr": 1e-3}}, "zero_optimization": {"stage": stage}}
    try:
        ds_check.check(config)
        resolved, _, _ = ds_config.resolve({"train_batch_size": 4, **config}, 1)
        kernels.refuse_missing_kernel(resolved)
    except UsageError as error:
        (line,) = str(error).splitlines()
        assert name in line
        assert name not in TRAIN or (stage and name in WHOLE)
        return
    assert name in TRAIN
    engine = make_engine(one_rank(), CIFAR10CNNEnhanced(), global_images=4, **config)
    before = snapshot(engine)
    losses = [one_step(engine, [batch(4)]) for _ in range(8)]
    assert torch.isfinite(torch.stack(losses)).all()
    assert not same_bits(before, snapshot(engine))
    assert not engine.skipped
    assert engine.grad_norm > 0


LAMB: dict[str, Any] = {"optimizer": {"type": "Lamb", "params": {"lr": 0.1}}}
OWN_ADAM: dict[str, Any] = {"optimizer": {"type": "Adam", "params": {"lr": 0.1, "torch_adam": False}}}


def test_what_a_kernel_needs_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "missing_for_compiling", lambda: "a C++ compiler")
    with pytest.raises(UsageError, match=r"Adam .*fused_adam.* C\+\+ compiler .*torch_adam"):
        kernels.refuse_missing_kernel(OWN_ADAM)
    monkeypatch.setattr(device, "missing_for_compiling", lambda: None)
    kernels.refuse_missing_kernel({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    with pytest.raises(UsageError, match=r"Lamb .*GPUs"):
        kernels.refuse_missing_kernel(LAMB)
    monkeypatch.setattr(device, "count_gpus", lambda: 1)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match=r"Lamb .*fused_lamb.*CUDA_HOME"):
        kernels.refuse_missing_kernel(LAMB)


@pytest.mark.parametrize(
    ("optimizer", "kernel"),
    [
        ({"type": "AdamW", "params": {"torch_adam": True}}, None),
        ({"type": "AdamW", "params": {"torch_adam": False}}, "cpu_adam"),
        ({"type": "Lion"}, "cpu_lion"),
        ({"type": "Adagrad"}, "cpu_adagrad"),
        ({"type": "SGD"}, None),
    ],
)
def test_the_kernel_of_an_offloaded_optimizer(optimizer: dict[str, Any], kernel: str | None) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert kernels.kernel_of({"optimizer": optimizer, "zero_optimization": zero}) == kernel


@pytest.mark.parametrize(("variable", "below"), [("TORCH_EXTENSIONS_DIR", ""), ("XDG_CACHE_HOME", "torch_extensions/py3_cpu")])
def test_the_lock_of_a_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, below: str) -> None:
    """PyTorch would wait for it without end."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(device, "missing_for_compiling", lambda: None)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    kernels.refuse_missing_kernel(OWN_ADAM)
    lock = tmp_path / below / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with pytest.raises(UsageError, match=str(lock)):
        kernels.refuse_missing_kernel(OWN_ADAM)
