"""MuonWithSGD: nearly orthogonal updates, parameter groups, and SGD as in PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar10 import UsageError
from cifar10.config import ds_config
from cifar10.engine import muon
from cifar10.engine.muon import MuonWithSGD, orthogonalized, parameter_groups
from cifar10.models.registry import build_model
from tests.helpers import batch

PARAMS = {"lr": 0.1, "momentum": 0.6, "bias_lr": 0.05, "head_lr": 0.5, "sgd_momentum": 0.85, "decay": 0.001}


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 8, 72), (3, 64, 27)])
def test_the_singular_values_of_an_update_are_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    spread = torch.linalg.svdvals(orthogonalized(matrices, iterations=6))
    assert spread.min() > 0.5
    assert spread.max() < 1.4
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    nearest = u @ v
    found = orthogonalized(matrices, iterations=6)
    assert ((found * nearest).sum(dim=(1, 2)) / found.norm(dim=(1, 2)) / nearest.norm(dim=(1, 2)) > 0.97).all()


def test_each_matrix_of_a_batch_is_treated_alone():
    scales = torch.tensor([0.0, 1e-6, 1.0, 1e4])[:, None, None]
    matrices = torch.randn(4, 12, 30, generator=torch.Generator().manual_seed(2)) * scales
    together = orthogonalized(matrices)
    for alone, among in zip(matrices, together, strict=True):
        assert torch.allclose(orthogonalized(alone[None])[0], among, atol=0.02)
    assert together[0].abs().max() == 0, "a zero gradient gives a zero update"


def test_muon_takes_hidden_weights_and_sgd_takes_biases_and_the_head():
    model = build_model("bn_cnn", 0, 10)
    groups = parameter_groups(model, PARAMS)
    assert [(group["kind"], group["lr"]) for group in groups] == [("muon", 0.1), ("sgd", 0.05), ("sgd", 0.5)]
    names = {id(p): name for name, p in model.named_parameters()}
    hidden, vectors, head = ({names[id(p)] for p in group["params"]} for group in groups)
    assert hidden == {"conv1.weight", "conv2.weight", "fc1.weight"}
    assert head == {"fc2.weight"}
    assert vectors == {n for n, p in model.named_parameters() if p.dim() == 1}
    assert groups[2]["weight_decay"] == pytest.approx(0.001 / 0.5)


def test_the_rest_is_updated_as_by_pytorchs_sgd():
    model = build_model("bn_cnn", 0, 10)
    twin = copy.deepcopy(model)
    ours = MuonWithSGD(parameter_groups(model, PARAMS))
    rest = parameter_groups(twin, PARAMS)[1:]
    given = [{k: group[k] for k in ("params", "lr", "momentum", "weight_decay")} for group in rest]
    theirs = torch.optim.SGD(given, momentum=0.85, nesterov=True)
    for step in range(5):
        images, labels = batch(8, seed=step)
        for net in (model, twin):
            net.zero_grad()
            F.cross_entropy(net(images), labels).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for group, other in zip(ours.param_groups[1:], rest, strict=True):
        assert all(torch.allclose(p, q, rtol=0, atol=1e-6) for p, q in zip(group["params"], other["params"], strict=True))


def test_hidden_weights_keep_their_norm():
    model = build_model("bn_cnn", 0, 10)
    head = model.fc2.weight.detach().clone()
    optimizer = MuonWithSGD(parameter_groups(model, {**PARAMS, "lr": 1e-6, "head_lr": 1e-6, "decay": 0}))
    images, labels = batch(8)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    for weight in (model.conv1.weight, model.conv2.weight, model.fc1.weight):
        assert weight.norm().item() == pytest.approx(len(weight) ** 0.5, rel=1e-3)
    assert torch.allclose(model.fc2.weight, head, atol=1e-4)


def test_a_weight_of_zeros_grows_from_its_update():
    weight, head = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.ones(2, 4))
    group = {"params": [weight], "lr": 0.1, "momentum": 0.6, "kind": "muon", "weight_decay": 0, "iterations": 3}
    optimizer = MuonWithSGD([group])
    F.mse_loss(torch.randn(8, 6, generator=torch.Generator().manual_seed(3)) @ weight.T @ head.T, torch.ones(8, 2)).backward()
    optimizer.step()
    assert torch.isfinite(weight).all()
    assert weight.abs().max() > 0


def test_weights_that_are_channels_last_get_the_same_updates():
    """As a GPU keeps them: to rounding, in their own layout, and a bad step changes nothing."""
    models = [build_model("speednet_small", 0, 10) for _ in range(2)]
    models[1].to(memory_format=torch.channels_last)
    optimizers = [MuonWithSGD(parameter_groups(model, PARAMS)) for model in models]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        gradients = [
            torch.randn(p.shape, generator=generator) * (float("nan") if step == 1 else 1) for p in models[0].parameters()
        ]
        before = [p.detach().clone() for p in models[1].parameters()]
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.found_inf = torch.tensor(float(step == 1))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            optimizer.step()
        assert (step == 1) == all(torch.equal(p, old) for p, old in zip(models[1].parameters(), before, strict=True))
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-3)
        momentum = optimizers[1].state[q]["momentum_buffer"]
        assert torch.equal(momentum, optimizers[0].state[p]["momentum_buffer"])
        assert momentum.stride() == q.stride()
    assert models[1].groups[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_muon_learns():
    model = build_model("speednet_small", 0, 10)
    optimizer = MuonWithSGD(parameter_groups(model, {"lr": 0.1, "bias_lr": 0.05, "head_lr": 20}))
    images, labels = batch(32)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(images[..., :16, :16]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- in the DeepSpeed config ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused_because_it_partitions_matrices(stage):
    config = {"train_batch_size": 8, "optimizer": {"type": muon.NAME, "params": PARAMS}}
    ds_config.resolve(config, 1)
    with pytest.raises(UsageError, match=r"MuonWithSGD .*zero_optimization.stage"):
        ds_config.resolve({**config, "zero_optimization": {"stage": stage}}, 1)


@pytest.mark.parametrize("wrong", [{"learning_rate": 1}, {"bias_lr": 0}, {"head_lr": "fast"}, {"decay": -1}])
def test_invalid_params_are_refused(wrong):
    with pytest.raises(UsageError):
        ds_config.check({"train_batch_size": 8, "optimizer": {"type": muon.NAME, "params": {**PARAMS, **wrong}}})


@pytest.mark.parametrize("native", [("fp32",), ("fp32", "bf16")])
def test_products_are_in_bfloat16_only_where_it_is_native(native, monkeypatch):
    monkeypatch.setattr(muon, "native_precisions", lambda: native)
    muon._dtype.cache_clear()
    found = orthogonalized(torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1)))
    muon._dtype.cache_clear()
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float()) == ("bf16" in native)
