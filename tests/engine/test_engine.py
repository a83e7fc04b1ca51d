"""The engine against plain PyTorch on one rank, and two ranks against one; the cost of a step, and skipped steps."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar10.engine.engine import Engine
from cifar10.engine.full_state import weights_sha256
from cifar10.models.registry import build_model
from cifar10.run import checkpoint
from cifar10.run.metric_buffer import MetricBuffer
from cifar10.run.state import RunState
from cifar10_deepspeed import CIFAR10CNNEnhanced, train_step
from tests.helpers import (
    SGD,
    CountOperations,
    CountReads,
    batch,
    largest_difference,
    logged_step,
    make_engine,
    make_loader,
    one_rank,
    one_step,
    same_bits,
    snapshot,
    two_ranks,
)

INFINITE, NOT_A_NUMBER = float("inf"), float("nan")
DAMPENED = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}}


def bn_engine(**config: Any) -> Engine:
    return make_engine(one_rank(), build_model("bn_cnn", 0, 10), **config)


def smooth_engine(**config: Any) -> Engine:
    return make_engine(one_rank(), build_model("smooth_cnn", 0, 10), **config)


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, limit: float) -> None:
    """One step as PyTorch's own tutorials write it, with the multi-tensor clipping."""
    F.cross_entropy(model(images), labels).backward()
    parameters = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    optimizer.step()
    optimizer.zero_grad()


# --- what a step costs --------------------------------------------------------------------------------------------------


def test_a_step_costs_the_operations_of_plain_pytorch() -> None:
    """Forward, loss, backward, clipping, update: the same ATen operations; the guard and the metrics add few."""
    world, data = one_rank(), batch(32)
    model = build_model("bn_cnn", 0, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    engine, buffer = bn_engine(), MetricBuffer(8, world.device)
    plain_step(model, optimizer, *data, limit=1.0)
    logged_step(train_step, engine, [data], buffer)

    with CountOperations() as plain:
        plain_step(model, optimizer, *data, limit=1.0)
    with CountOperations() as ours:
        engine.backward(F.cross_entropy(engine.forward(data[0]), data[1]))
        engine.step()
    assert plain.counts - ours.counts == Counter()
    guard = ours.counts - plain.counts
    assert 0 < guard.total() <= 8, guard

    with CountOperations() as whole:
        logged_step(train_step, engine, [data], buffer)
    metrics = whole.counts - ours.counts
    assert 0 < metrics.total() <= 8, metrics


READS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default", "aten.equal.default")


@pytest.mark.parametrize("config", [{}, {"accumulation": 2}, {"gradient_clipping": 0.0}], ids=["1", "2 passes", "no clipping"])
def test_nothing_is_read_from_the_device_between_log_points(config: dict[str, Any]) -> None:
    world = one_rank()
    engine, buffer = bn_engine(**config), MetricBuffer(20, world.device)
    train = make_loader(world, accumulation=config.get("accumulation", 1))
    with CountOperations() as operations, CountReads() as reads:
        for micro_batches in train.epoch(0):
            if buffer.is_full:
                break
            logged_step(train_step, engine, micro_batches, buffer, 0.5, 0.1)
    assert buffer.is_full
    assert operations.counts["aten._fused_sgd_.default"] == 20, "the steps were counted"
    assert {name: operations.counts[name] for name in READS} == dict.fromkeys(READS, 0)
    assert not reads.counts

    with CountReads() as reads:
        assert len(buffer.read(world)) == 20
    assert reads.counts == {"tolist": 1}, "one read for all steps"
    with CountOperations() as operations:
        bool(engine.skipped)
    assert operations.counts[READS[0]] == 1, "a read is counted"


def test_a_step_leaves_nothing_behind() -> None:
    """The loss of a step, and with it the graph, is freed without the garbage collector."""
    engine, data, losses = smooth_engine(global_images=2), batch(2), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            loss = F.cross_entropy(engine.forward(data[0]), data[1])
            losses.append(weakref.ref(loss))
            engine.backward(loss)
            engine.step()
            del loss
        assert [loss() is None for loss in losses] == [True, True, True]
    finally:
        gc.enable()


# --- one rank against plain PyTorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.0, 0.2])
def test_thirty_steps_equal_plain_pytorch(limit: float) -> None:
    """Same weights as a loop without DeepSpeed, the learning rate moving at every step."""
    engine, model = smooth_engine(gradient_clipping=limit), build_model("smooth_cnn", 0, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    for step in range(30):
        data, multiplier = batch(32, seed=step), (step + 1) / 30
        optimizer.param_groups[0]["lr"] = 0.1 * multiplier
        plain_step(model, optimizer, *data, limit=limit or INFINITE)
        one_step(engine, [data], multiplier)
        assert engine.lr == 0.1 * multiplier
    start = build_model("smooth_cnn", 0, 10).state_dict()
    assert largest_difference(model.state_dict(), start) > 1e-2, "there was something to learn"
    assert largest_difference(engine.portable_state(), model.state_dict()) <= 1e-6


# --- steps that are skipped ----------------------------------------------------------------------------------------------


def bad_images(engine: Engine, data: tuple[Tensor, Tensor]) -> None:
    images = data[0].clone()
    images[3] = NOT_A_NUMBER
    one_step(engine, [(images, data[1])])


def infinite_loss(engine: Engine, data: tuple[Tensor, Tensor]) -> None:
    """Its gradient is finite."""
    one_step(engine, [data], extra=torch.tensor(INFINITE))


def bad_gradient(engine: Engine, data: tuple[Tensor, Tensor]) -> None:
    """The loss is finite, but not the gradient of sqrt at 0: infinity times 0."""
    one_step(engine, [data], extra=torch.sqrt(next(engine.module.parameters()).sum() * 0))


OPTIMIZERS = {
    "SGD": SGD,
    "SGD, no momentum": {"type": "SGD", "params": {"lr": 0.1}},
    "SGD, nesterov": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}},
    "SGD, dampening": DAMPENED,
    "AdamW": {"type": "AdamW", "params": {"lr": 0.001}},
    "RMSprop": {"type": "RMSprop", "params": {"lr": 0.001, "momentum": 0.9, "weight_decay": 0.01}},
    "MuonWithSGD": {"type": "MuonWithSGD", "params": {"lr": 0.1, "bias_lr": 0.05, "decay": 0.01}},
}
CASES = [
    *[(optimizer, bad_images, at) for optimizer in OPTIMIZERS for at in (0, 2)],
    *[("SGD", fault, at) for fault in (infinite_loss, bad_gradient) for at in (0, 2)],
    ("RMSprop", infinite_loss, 2),
]


@pytest.mark.parametrize(("optimizer", "fault", "at"), CASES)
def test_a_bad_step_leaves_no_trace(optimizer: str, fault: Callable, at: int) -> None:
    """Weights, momentum and BatchNorm's buffers stay bit for bit, and later steps are as without it."""
    engine, twin = (bn_engine(global_images=8, optimizer=OPTIMIZERS[optimizer]) for _ in range(2))
    for step in range(4):
        data = batch(8, seed=step)
        if step == at:
            before = snapshot(engine)
            assert before["bn1.num_batches_tracked"] == at
            fault(engine, data)
            after = snapshot(engine)
            assert engine.skipped.item() == 1
            assert same_bits({name: after[name] for name in before}, before)
        one_step(engine, [data])
        one_step(twin, [data])
        assert engine.skipped.item() == 0
    assert same_bits(snapshot(engine), snapshot(twin))
    assert not same_bits(snapshot(engine), before)


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("optimizer", ["SGD", "SGD, dampening", "AdamW", "RMSprop", "MuonWithSGD"])
def test_a_bad_step_in_fp16_changes_nothing(optimizer: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that overflows only because of its loss scale, which the scaler skips."""
    monkeypatch.setattr("deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED", False)  # and put back afterwards
    config = {"optimizer": OPTIMIZERS[optimizer], "gradient_clipping": limit, "fp16": {"enabled": True}}
    engine = bn_engine(global_images=8, **config)
    for fault in (bad_images, infinite_loss):
        before = snapshot(engine)
        fault(engine, batch(8))
        assert engine.skipped.item() == 1
        assert same_bits({name: snapshot(engine)[name] for name in before}, before)
    for step in range(8):
        one_step(engine, [batch(8, seed=step)], 0.01)
    assert engine.skipped.item() == 0, "the scale is small enough"
    assert not same_bits({name: snapshot(engine)[name] for name in before}, before)
    assert all(torch.isfinite(value).all() for value in snapshot(engine).values())


def test_a_bad_pass_skips_the_whole_step() -> None:
    """With accumulation, one bad micro-batch is enough, and those before it leave no trace."""
    engine, twin = (bn_engine(global_images=16, accumulation=2) for _ in range(2))
    good, other, bad = batch(8, 0), batch(8, 1), batch(8, 2)
    bad[0][0] = NOT_A_NUMBER
    for passes in ([good, bad], [bad, good]):
        before = snapshot(engine)
        one_step(engine, passes)
        assert engine.skipped.item() == 1
        assert same_bits(snapshot(engine), before)
    one_step(engine, [good, other])
    one_step(twin, [good, other])
    assert same_bits(snapshot(engine), snapshot(twin))


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_norm_beyond_floating_point_is_a_bad_step(limit: float) -> None:
    """Finite gradients whose norm overflows cannot be clipped."""
    engine = smooth_engine(global_images=4, gradient_clipping=limit)
    before, (images, labels) = snapshot(engine), batch(4)
    engine.backward(F.cross_entropy(engine.forward(images), labels) * 1e30)
    engine.step()
    assert engine.grad_norm.item() == INFINITE
    assert engine.skipped.item() == 1
    assert same_bits(snapshot(engine), before)


def test_dropout_depends_on_the_step_alone(tmp_path: Path) -> None:
    """Not on other random numbers, nor on whether the run was interrupted."""

    def small_net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 10))

    world, undisturbed = one_rank(), make_engine(one_rank(), small_net())
    masks = []
    for step in range(4):
        one_step(undisturbed, [batch(8, seed=step)])
        masks.append(F.dropout(torch.ones(50)))  # continues this step's random numbers
    assert not any(torch.equal(masks[0], mask) for mask in masks[1:])
    first, resumed = make_engine(world, small_net()), make_engine(world, small_net())
    for step in (0, 1):
        torch.rand(step + 1)
        one_step(first, [batch(8, seed=step)])
    checkpoint.save(tmp_path, first, RunState(step=2), world, {}, keep=1)
    checkpoint.resume(tmp_path, None, resumed, world, {})
    for step in (2, 3):
        torch.rand(7)
        one_step(resumed, [batch(8, seed=step)])
    assert same_bits(undisturbed.portable_state(), resumed.portable_state())


# --- portable weights -------------------------------------------------------------------------------------------------------


def test_portable_state_is_a_copy_that_loads_into_a_plain_model() -> None:
    engine = bn_engine(global_images=8)
    one_step(engine, [batch(8)])
    state = engine.portable_state()
    plain = CIFAR10CNNEnhanced()
    plain.load_state_dict(state)
    assert same_bits(plain.state_dict(), {name: value.cpu() for name, value in engine.module.state_dict().items()})
    kept = {name: value.clone() for name, value in state.items()}
    one_step(engine, [batch(8, seed=1)])
    assert same_bits(state, kept), "training changed the copy"


def test_weights_sha256_detects_any_difference_but_of_order_and_memory_layout() -> None:
    state = build_model("bn_cnn", 0, 10).state_dict()
    strided = {**state, "fc1.weight": state["fc1.weight"].t().contiguous().t()}
    reordered = {name: state[name].clone() for name in reversed(state)}
    assert weights_sha256(state) == weights_sha256(reordered) == weights_sha256(strided)
    last_bit = {**state, "fc2.bias": state["fc2.bias"].clone()}
    last_bit["fc2.bias"].view(torch.int32)[0] += 1
    renamed = {("fc3.bias" if name == "fc2.bias" else name): value for name, value in state.items()}
    reshaped = {**state, "fc2.bias": state["fc2.bias"].view(2, 5)}
    assert len({weights_sha256(s) for s in (state, last_bit, renamed, reshaped)}) == 4


# --- two ranks ---------------------------------------------------------------------------------------------------------------

ZERO_STAGES = ("zero 1", "zero 2", "zero 3")


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return two_ranks()


def run_alone(limit: float = 1.0) -> dict[str, Any]:
    """Losses, norms and weights of one rank on the same global batches."""
    engine, losses, norms = smooth_engine(gradient_clipping=limit), [], []
    for micro_batches, _ in zip(make_loader(one_rank()).epoch(0), range(20), strict=False):
        losses.append(one_step(engine, micro_batches, 0.5).item())
        norms.append(engine.grad_norm.item())
    return {"losses": losses, "norms": norms, "weights": engine.portable_state()}


@pytest.mark.parametrize("run", ["zero 0", "2 passes", *ZERO_STAGES])
def test_two_ranks_train_as_one(ranks: list[dict[str, Any]], run: str) -> None:
    """The same losses, gradient norms and, after 20 steps, weights."""
    alone = run_alone()
    for rank in ranks:
        assert rank[run]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert rank[run]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert largest_difference(rank[run]["weights"], alone["weights"]) < 1e-5
    assert same_bits(ranks[0][run]["weights"], ranks[1][run]["weights"])
    start = build_model("smooth_cnn", 0, 10).state_dict()
    assert largest_difference(alone["weights"], start) > 1e-2, "there was something to learn"


@pytest.mark.parametrize("fault", ["images", "loss"])
@pytest.mark.parametrize("run", ["zero 0", *ZERO_STAGES, "bf16", "bf16, zero 2", "fp16", "fp16, no clipping"])
def test_a_bad_step_on_one_rank_is_skipped_on_both(ranks: list[dict[str, Any]], run: str, fault: str) -> None:
    for rank in ranks:
        seen = rank[run][f"bad {fault}"]
        assert (seen["skipped"], seen["skipped next"]) == (1, 0)
        assert same_bits(seen["after"], seen["before"])
        assert not same_bits(seen["next"], seen["before"])
        assert all(torch.isfinite(value).all() for value in seen["next"].values())
    assert same_bits(ranks[0][run][f"bad {fault}"]["next"], ranks[1][run][f"bad {fault}"]["next"])


@pytest.mark.parametrize("fault", ["images", "loss"])
def test_a_bad_step_on_one_rank_leaves_each_ranks_own_buffers_and_momentum(ranks: list[dict[str, Any]], fault: str) -> None:
    for rank in ranks:
        seen = rank["bn"][f"bad {fault}"]
        assert seen["skipped"] == 1
        assert any("momentum_buffer" in name for name in seen["before"])
        assert same_bits(seen["after"], seen["before"])


def test_portable_state_is_the_same_on_all_ranks_and_changes_none(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["bn"]["portable"] for rank in ranks)
    own = [rank["bn"]["own before"] for rank in ranks]
    assert same_bits(first, second)
    assert not torch.equal(own[0]["bn1.running_mean"], own[1]["bn1.running_mean"])
    for name in ("bn1.running_mean", "bn1.running_var", "bn2.running_mean", "bn2.running_var"):
        torch.testing.assert_close(first[name], (own[0][name] + own[1][name]) / 2)
    for rank in ranks:
        assert same_bits(rank["bn"]["own after"], rank["bn"]["own before"])


def test_evaluating_and_saving_a_run_never_changes_it(ranks: list[dict[str, Any]]) -> None:
    """At every step, or never: the same weights, momentum and buffers on each rank."""
    for rank in ranks:
        assert same_bits(rank["bn"]["watched"], rank["bn"]["unwatched"])


def test_evaluation_is_the_same_on_two_ranks(ranks: list[dict[str, Any]]) -> None:
    loss, *rest = ranks[0]["evaluation"]
    assert ranks[1]["evaluation"] == (loss, *rest)
    expected, *expected_rest = ranks[0]["evaluation on one"]
    assert (loss, rest) == (pytest.approx(expected, rel=1e-6), expected_rest)
    assert rest[1] == 333, "an odd number: every image once"


@pytest.mark.parametrize("run", ["bf16", "bf16, zero 2", "fp16", "fp16, no clipping"])
def test_lower_precision_trains_and_reports_the_true_norm(ranks: list[dict[str, Any]], run: str) -> None:
    expected = run_alone(limit=0.0 if "no clipping" in run else 1.0)
    for rank in ranks:
        assert any("torch_autocast" in note for note in rank[run]["notes"])
        assert rank[run]["logits"] == (torch.bfloat16 if "bf16" in run else torch.float16)
        assert rank[run]["skipped"] == [0] * 20
        assert rank[run]["losses"] == pytest.approx(expected["losses"], rel=0.05)
        assert rank[run]["norms"] == pytest.approx(expected["norms"], rel=0.05)
        assert {value.dtype for value in rank[run]["weights"].values()} == {torch.float32}
    assert same_bits(ranks[0][run]["weights"], ranks[1][run]["weights"])


@pytest.mark.parametrize("run", ["zero 0", "2 passes", "bf16", "fp16", "fp16, no clipping"])
def test_two_ranks_read_nothing_from_the_device_either(ranks: list[dict[str, Any]], run: str) -> None:
    for rank in ranks:
        assert rank[run]["reads"] == 0
        assert rank["zero 2"]["reads"] > 0, "ZeRO does"
