"""The training loss against torch.nn.functional.cross_entropy, and how many images are correct."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar10.engine.loss import count_correct, cross_entropy
from tests.helpers import CountOperations


def logits_of(images: int, classes: int = 10) -> Tensor:
    return torch.randn(images, classes, generator=torch.Generator().manual_seed(images)).mul_(3).requires_grad_()


def labels_of(images: int, classes: int = 10) -> Tensor:
    return torch.arange(images) * 7 % classes


def both(images: int, labels: Tensor, smoothing: float) -> list[tuple[Tensor, Tensor]]:
    """The loss and its gradient, PyTorch's and ours, for a loss that is scaled by 1024 as in fp16."""
    ours = lambda logits: cross_entropy(logits, labels, smoothing)  # noqa: E731
    results = []
    for function in (lambda logits: F.cross_entropy(logits, labels, label_smoothing=smoothing), ours):
        logits = logits_of(images)
        loss = function(logits)
        (loss * 1024).backward()
        results.append((loss.detach(), logits.grad))
    return results


@pytest.mark.parametrize("smoothing", [0.0, 0.09, 0.1, 0.2])
@pytest.mark.parametrize("images", [32, 64, 500, 512])
def test_loss_and_gradients_are_those_of_pytorch(images: int, smoothing: float) -> None:
    """Gradients to the bit for a power of two of images, else to rounding."""
    (loss, gradient), (our_loss, our_gradient) = both(images, labels_of(images), smoothing)
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-5, atol=1e-7)
    assert torch.equal(our_gradient, gradient) or images == 500


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_labels(smoothing: float) -> None:
    shares = F.one_hot(labels_of(64), 10) * 0.7 + F.one_hot(labels_of(64).flip(0), 10) * 0.3
    (loss, gradient), (our_loss, our_gradient) = both(64, shares, smoothing)
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_logit_makes_the_loss_bad(bad: float) -> None:
    logits = logits_of(8).detach()
    logits[3, 4] = bad
    assert not cross_entropy(logits, labels_of(8), 0.1).isfinite()


def test_correct_images_are_counted() -> None:
    logits = 5.0 * F.one_hot(labels_of(12), 10)
    labels = torch.cat((labels_of(9), (labels_of(12)[9:] + 1) % 10))
    assert count_correct(logits, labels).item() == 9
    assert count_correct(logits, F.one_hot(labels, 10) * 0.6 + 0.04).item() == 9


def test_they_are_few_operations() -> None:
    logits, labels = logits_of(64), labels_of(64)
    with CountOperations() as operations:
        cross_entropy(logits, labels, 0.1).backward()
        count_correct(logits, labels)
    moving = ("unsqueeze", "expand", "detach", "empty", "new_empty", "ones_like")
    counted = {name: n for name, n in operations.counts.items() if name.split(".")[1] not in moving}
    assert sum(counted.values()) == 7 + 3, counted
