"""What tests share: real launches of several ranks, engines and loaders in a world of one, counts of PyTorch operations."""

import functools
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cifar10.config import ds_config
from cifar10.data import augment, pixels, synthetic
from cifar10.data.loader import MicroBatch, TrainLoader
from cifar10.data.registry import DATASETS
from cifar10.distributed.world import World, join
from cifar10.engine.engine import Engine, own_optimizer, prepare
from cifar10.run.metric_buffer import MetricBuffer
from tests.launching import BIN, PROJECT, run

WORKERS = Path(__file__).resolve().parent / "workers"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


# --- launches ---------------------------------------------------------------------------------------------------------


def launch(num_ranks: int, script: Path, *arguments: str) -> str:
    """Run a script to its end on the CPU, as a plain process or as real ranks; returns what it printed."""
    torchrun = [str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={num_ranks}"]
    command = [*(torchrun if num_ranks > 1 else [sys.executable]), str(script), *arguments]
    result = run(command, PYTHONPATH=str(PROJECT), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    printed = result.stdout + result.stderr
    assert result.returncode == 0, f"{command} ended with {result.returncode}\n{printed}"
    return printed


@functools.cache
def _launched(script: str, num_ranks: int) -> list[dict[str, Any]] | AssertionError:
    with tempfile.TemporaryDirectory() as folder:
        try:
            launch(num_ranks, WORKERS / script, folder)
        except AssertionError as error:
            return error
        return [torch.load(Path(folder) / f"rank_{rank}.pt") for rank in range(num_ranks)]


def measured(script: str, num_ranks: int) -> list[dict[str, Any]]:
    """What each rank of a script in tests/workers has measured; launched once per process."""
    results = _launched(script, num_ranks)
    if isinstance(results, AssertionError):
        raise results
    return results


def two_ranks() -> list[dict[str, Any]]:
    return measured("two_ranks.py", 2)


# --- data sets --------------------------------------------------------------------------------------------------------


def cut_down(monkeypatch: pytest.MonkeyPatch, train_images: int = 600, test_images: int = 200, **facts: Any) -> None:
    """Generated data sets of fewer images, by default as few as in tests/workers/small_runs.py."""
    facts |= {"train_images": train_images, "test_images": test_images}
    for name, dataset in DATASETS.items():
        if isinstance(dataset, synthetic.Generated):
            monkeypatch.setitem(DATASETS, name, replace(dataset, description=replace(dataset.description, **facts)))


# --- engines ----------------------------------------------------------------------------------------------------------


@functools.cache
def one_rank() -> World:
    """This process as a world of one; never left, because DeepSpeed cannot be initialized twice."""
    return join(threads=1)


SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}


def make_engine(
    world: World,
    model: nn.Module,
    *,
    global_images: int = 32,
    accumulation: int = 1,
    ema: float = 0,
    swa: bool = False,
    **config: Any,
) -> Engine:
    """An engine as the script makes it, from a DeepSpeed config with these keys."""
    sizes = {"train_batch_size": global_images, "gradient_accumulation_steps": accumulation}
    resolved, _, _ = ds_config.resolve({"optimizer": SGD, "gradient_clipping": 1.0, **sizes, **config}, world.size)
    model = model.to(world.device)
    given = {"model_parameters": model.parameters(), "optimizer": own_optimizer(model, resolved), "config": resolved}
    deepspeed_engine, _, _, _ = prepare().initialize(model=model, **given)
    deepspeed_engine.train()
    return Engine(deepspeed_engine, world, ema=ema, swa=swa)


def make_loader(world: World, *, global_images: int = 32, accumulation: int = 1, num_images: int = 800) -> TrainLoader:
    """This rank's share of a few synthetic training images, augmented as in the script."""
    images = synthetic.synthetic("train", num_images, seed=0)
    return TrainLoader(
        store=pixels.pack(torch.from_numpy(images.pixels).to(world.device), padding=4),
        labels=torch.from_numpy(images.labels).to(world.device),
        normalize=pixels.Normalize(MEAN, STD, world.device),
        operations=augment.parse("RandomCrop(4) RandomHorizontalFlip"),
        seed=3,
        global_images=global_images,
        micro_images=global_images // world.size // accumulation,
        rank=world.rank,
        world_size=world.size,
    )


def batch(num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images and labels: float32 [B, 3, 32, 32] channels last, int64 [B]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (num_images,), generator=generator)


def one_step(engine: Engine, micro_batches: list[tuple[Tensor, Tensor]], multiplier: float = 1.0, extra: Any = 0.0) -> Tensor:
    """One update of the weights; `extra` is added to each loss. Returns the mean loss on this rank."""
    engine.set_lr(multiplier)
    losses = []
    for images, labels in micro_batches:
        loss = F.cross_entropy(engine.forward(images).float(), labels) + extra
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def logged_step(
    step: Callable[..., Any], engine: Engine, batches: list[MicroBatch], buffer: MetricBuffer, lr: float = 1, smooth: float = 0
) -> None:
    """One step of the script's loop; `lr` multiplies the learning rate, `smooth` is label smoothing."""
    engine.set_lr(lr)
    loss, correct = step(engine, batches, smooth)
    buffer.write(loss, correct, engine.grad_norm, engine.skipped)


def snapshot(engine: Engine) -> dict[str, Tensor]:
    """Copies of the weights, buffers and optimizer state that this rank holds."""
    named = dict(engine.module.state_dict())
    for name, parameter in engine.module.named_parameters():
        for key, value in engine.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                named[f"{key} of {name}"] = value
    if engine.average:
        named |= {f"average {number}": value for number, value in enumerate([*engine.average.averages, engine.average.updates])}
    return {name: value.detach().clone() for name, value in named.items()}


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two snapshots are equal bit for bit; NaN equals nothing."""
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest absolute difference over two state dicts of the same names; NaN if either holds one."""
    assert ours.keys() == theirs.keys()
    return torch.stack([(value - theirs[name]).abs().max().double() for name, value in ours.items()]).max().item()


# --- counting PyTorch operations --------------------------------------------------------------------------------------


class CountOperations(TorchDispatchMode):
    """Counts ATen operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "aten":
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


class CountReads(TorchFunctionMode):
    """Counts the calls by which Python reads a tensor's values, which synchronize with the device."""

    NAMES = frozenset("item tolist numpy cpu nonzero __bool__ __float__ __int__ __index__ __array__ __contains__".split())

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in self.NAMES:
            self.counts[function.__name__] += 1
        return function(*args, **(kwargs or {}))
