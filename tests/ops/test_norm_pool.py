"""BatchNorm, pooling and ReLU as one operation, against PyTorch's three: values, gradients, NaN, ties; and whole runs."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.models.bn_cnn import bn_cnn
from cifar10.ops import build, norm_pool
from cifar10.plan import Plan, make_plan
from tests.launching import run, summary

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


def images(size: tuple[int, ...], kind: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Values around 3, as after a convolution with a bias: [B, C, H, W], channels last."""
    made = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2 + 3
    return made.to(kind).contiguous(memory_format=torch.channels_last)


def both(x: Tensor, *, training: bool = True) -> list[dict[str, Tensor]]:
    """What PyTorch's three operations and the one make of images: results, gradients, BatchNorm's buffers."""
    results = []
    for fused in (False, True):
        norm = nn.BatchNorm2d(x.shape[1]).train(training)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 2, x.shape[1]))  # a negative scale turns the order round
            norm.bias.copy_(torch.linspace(-1, 1, x.shape[1]))
        network = bn_cnn(10)
        if fused:
            norm_pool.fuse(network)
        given = x.clone().requires_grad_()
        result = network.norm_pool_relu(norm, given)
        towards = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        result.backward(towards)
        assert (type(result.grad_fn).__name__ == "_NormPoolBackward") == (fused and training and x.shape[2] % 2 == 0)
        gradients = {"x": given.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
        results.append({"result": result.detach(), **gradients, **dict(norm.named_buffers())})
    return results


def furthest(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((one.float() - other.float()).abs().max() / one.float().abs().max())


@pytest.mark.parametrize("size", [(8, 16, 32, 32), (5, 48, 6, 10), (1, 32, 2, 2)])
def test_it_computes_what_pytorch_computes(size):
    plain, fused = both(images(size))
    assert plain.keys() == fused.keys()
    assert {name: furthest(plain[name], fused[name]) < 2e-5 for name in plain} == dict.fromkeys(plain, True)


def test_in_bf16_it_rounds_only_results():
    """As close to the same in fp32 as PyTorch is, which also rounds between the three."""
    x = images((8, 16, 32, 32), torch.bfloat16)
    plain, fused = both(x)
    exact, _ = both(x.float())
    for name in ("result", "weight", "bias", "running_mean", "running_var"):
        assert furthest(exact[name], fused[name]) <= max(1.1 * furthest(exact[name], plain[name]), 1e-5), name
    assert fused["result"].dtype == fused["x"].dtype == torch.bfloat16


def test_the_first_of_equal_values_gets_the_gradient():
    x = images((4, 16, 8, 8)).round()
    plain, fused = both(x)
    assert torch.equal(plain["x"].abs() > plain["x"].abs().mean(), fused["x"].abs() > fused["x"].abs().mean())
    assert furthest(plain["x"], fused["x"]) < 2e-5


def test_a_nan_reaches_all_results_of_its_channel():
    x = images((4, 16, 8, 8))
    x[1, 3, 2, 2] = float("nan")
    plain, fused = both(x)
    for name in plain:
        assert torch.equal(plain[name].isnan(), fused[name].isnan()), name


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_does_not_matter(kind):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(both(images((9, 32, 12, 12), kind))[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_it_does_not_take_goes_through_pytorch():
    for x, training in ((images((2, 16, 7, 8)), True), (images((2, 16, 8, 8)), False)):
        plain, fused = both(x, training=training)
        assert all(torch.equal(plain[name], fused[name]) for name in plain)


# --- when it is used ------------------------------------------------------------------------------------------------------


def plan(*flags: str, **options: Any) -> Plan:
    return make_plan(["--dataset", "synthetic", *flags], options.get("ranks", 1), "test")


def test_recipes_take_it_where_it_is_supported():
    fused = plan()
    assert (fused.options.engine_level, fused.notes) == ("fused", ["engine level: fused, as the recipe asks"])
    assert plan("--recipe", "slurm_zero2", "--precision", "fp32", ranks=2).options.engine_level == "fused"
    for flags in (
        ("--engine-level", "eager"),
        ("--model", "resnet18"),
        ("--set", "zero_optimization.stage=3"),
        ("--recipe", "lenet"),
    ):
        assert plan(*flags).options.engine_level == "eager", flags
    with pytest.raises(UsageError, match="nothing to fuse in --model resnet18; use --engine-level eager"):
        plan("--model", "resnet18", "--engine-level", "fused")


def test_without_a_compiler_a_run_is_eager_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing has been built there
    monkeypatch.setenv("CXX", "/nowhere/g++")
    build.library.cache_clear()
    try:
        without = plan()
        assert without.options.engine_level == "eager"
        assert [note for note in without.notes if "/nowhere/g++ was not found" in note and "eager" in note]
        with pytest.raises(UsageError, match=r"--engine-level fused needs a C\+\+ compiler .*; or use --engine-level eager"):
            plan("--engine-level", "fused")
        monkeypatch.setenv("CXX", "false")
        with pytest.raises(UsageError, match=r"needs g\+\+, which false does not replace"):
            plan("--engine-level", "fused")
        monkeypatch.delenv("CXX")
        assert plan().options.engine_level == "fused"
        assert [path.suffix for path in (tmp_path / "cifar10-deepspeed" / "ops").iterdir()] == [".so"]
    finally:
        build.library.cache_clear()


def test_a_resumed_run_keeps_its_level(tmp_path):
    flags = ["--dataset", "synthetic", "--epochs", "1", "--threads", "1", "--test-images", "0", "--log-every-steps", "4"]
    begin = ["cifar10_deepspeed.py", *flags, "--no-report", "--output-dir"]

    def train(name: str, *more: str) -> Path:
        done = run([sys.executable, *begin, str(tmp_path / name), *more])
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    eager = train("eager", "--max-steps", "4", "--engine-level", "eager")
    plan_of = ["--output-dir", str(eager), *flags[2:]]
    assert plan(*plan_of).options.engine_level == "eager"
    starts = json.loads((eager / "environment.json").read_text())["starts"]
    assert [start["engine_level"] for start in starts] == ["eager"]
    train("stopped", "--max-steps", "6")
    stopped, whole = train("stopped", "--max-steps", "12"), train("whole", "--max-steps", "12")
    assert summary(stopped)["weights_sha256"] == summary(whole)["weights_sha256"]
    assert summary(whole)["weights_sha256"] != summary(train("eager", "--max-steps", "12"))["weights_sha256"]
