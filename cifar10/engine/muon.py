"""Muon for hidden weights and SGD for biases and the last layer, as one optimizer for `deepspeed.initialize`.

Muon (Jordan 2024, "Muon: an optimizer for hidden layers in neural networks") orthogonalizes the momentum of a weight matrix
with a few Newton-Schulz iterations, so that all its singular values are about one; convolution weights [out, in, k, k] are
treated as matrices [out, in * k * k]. Biases and the last layer use SGD with Nesterov momentum. The scale of weights before
a BatchNorm only changes their effective learning rate, so each is kept at norm sqrt(out), as in airbench94
(github.com/KellerJordan/cifar10-airbench). So are other hidden weights: for bn_cnn this replaces weight decay
(records/LOG.md).

DeepSpeed's own `Muon` does not batch its matrix products, uses Adam for the rest, and treats the last layer as hidden.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cifar10.distributed.device import native_precisions

NAME = "MuonWithSGD"  # in DeepSpeed's JSON: "optimizer": {"type": "MuonWithSGD", "params": {...}}

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero; maps singular values in (0, 1] to about 0.7 .. 1.2 in five iterations


@functools.cache
def _dtype() -> torch.dtype:
    """On a CPU without bfloat16, PyTorch's batched products in it took more than half of a step of bn_cnn_fast."""
    return torch.bfloat16 if "bf16" in native_precisions() else torch.float32


def orthogonalized(matrices: Tensor, iterations: int = 3) -> Tensor:
    """Newton-Schulz: [N, rows, columns] -> the same with singular values near one, computed in bfloat16 if that is native."""
    a, b, c = _QUINTIC
    dtype = _dtype()
    x = matrices.to(dtype)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True).to(dtype) + 1e-7)  # no singular value is above one
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    for _ in range(iterations):
        gram = x @ x.mT
        if x.is_cuda:  # sums inside the products, in five kernels instead of eight, and rounded less often
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        else:
            x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype, memory_format=torch.contiguous_format)


def parameter_groups(model: nn.Module, params: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups from the JSON's `params`: hidden weights for Muon; biases and the last layer's weight for SGD.

    `decay` is the fraction of an SGD parameter removed per step at the full learning rate, before momentum: a weight_decay of
    decay / lr.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    muon = {"params": matrices[:-1], "lr": params["lr"], "momentum": params.get("momentum", 0.6), "kind": "muon"}
    muon |= {"weight_decay": 0.0, "iterations": params.get("newton_schulz_iterations", 3)}
    groups = [muon]
    for parameters, key in ((vectors, "bias_lr"), (matrices[-1:], "head_lr")):
        lr = params.get(key, params["lr"])
        sgd = {"momentum": params.get("sgd_momentum", 0.85), "weight_decay": params.get("decay", 0.0) / lr}
        groups.append({"params": parameters, "lr": lr, "kind": "sgd", **sgd})
    return [group for group in groups if group["params"]]


class MuonWithSGD(torch.optim.Optimizer):
    """Muon and SGD over the groups of `parameter_groups`.

    A step with non-finite gradients is skipped on the device: `found_inf` (0-dim) is 1.0, as in PyTorch's fused optimizers.
    """

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True  # the engine and GradScaler then set `found_inf`

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        bad = None if self.found_inf is None else self.found_inf.bool()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            updates = self._directions(parameters, group, bad)
            if group["kind"] == "muon":
                updates = _all_orthogonalized(updates, group["iterations"])
                _rescale(parameters, bad)
            rate = -group["lr"] if bad is None else (self.found_inf - 1) * group["lr"]  # lr may be a tensor on the device
            torch._foreach_add_(parameters, torch._foreach_mul(updates, rate))

    def _directions(self, parameters: list[Tensor], group: dict[str, Any], bad: Tensor | None) -> list[Tensor]:
        """Nesterov momentum: the gradient plus the updated momentum, which a bad step leaves as it is."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers, gradients = [self.state[p]["momentum_buffer"] for p in parameters], [p.grad for p in parameters]
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        if bad is not None:
            gradients = _zero_where(bad, gradients)
        torch._foreach_mul_(buffers, group["momentum"] if bad is None else self.found_inf.clamp(min=group["momentum"]))
        torch._foreach_add_(buffers, gradients)
        return list(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))


# Tensors are read in the order in which they lie in memory, which is the same for a weight, its gradient and its momentum, so
# that weights that are channels last need no copies. It permutes a matrix's columns, which Newton-Schulz does not notice.


def _as(tensor: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    return tensor.as_strided(shape, strides, tensor.storage_offset())


def _zero_where(bad: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, or zeros if `bad` (0-dim): two operations for all of them."""
    flat = torch.cat([_as(tensor, (tensor.numel(),), (1,)) for tensor in tensors]).masked_fill_(bad, 0)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [_as(part, tensor.shape, tensor.stride()) for part, tensor in zip(parts, tensors, strict=True)]


def _all_orthogonalized(directions: list[Tensor], iterations: int) -> list[Tensor]:
    """Each direction as a matrix, orthogonalized; those of equal shape share one batch of matrix products."""
    shapes: dict[torch.Size, list[int]] = {}
    for place, direction in enumerate(directions):
        shapes.setdefault(direction.shape, []).append(place)
    updates = list(directions)
    for shape, places in shapes.items():
        rows, columns = shape[0], shape[1:].numel()
        matrices = torch.stack([_as(directions[place], (rows, columns), (columns, 1)) for place in places])
        for place, update in zip(places, orthogonalized(matrices, iterations), strict=True):
            updates[place] = _as(update, shape, directions[place].stride())
    return updates


def _rescale(parameters: list[Tensor], bad: Tensor | None) -> None:
    """Scale each weight to norm sqrt(out), unless `bad`; a weight of zeros grows from its update."""
    factors = torch.stack(torch._foreach_norm(parameters)).clamp_min_(1e-7).reciprocal_()
    of_each = list(factors.unbind())
    torch._foreach_mul_(of_each, [parameter.shape[0] ** 0.5 for parameter in parameters])
    if bad is not None:
        factors.masked_fill_(bad, 1)
    torch._foreach_mul_(parameters, of_each)
