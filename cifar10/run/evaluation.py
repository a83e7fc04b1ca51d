"""Evaluation on a split, with optional test-time augmentation (TTA): mean logits over several views of an image."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar10.data.loader import EvaluationLoader
from cifar10.distributed.world import World
from cifar10.run.summary import SplitResult

VIEWS = {"mirror": 2, "mirror+translate": 6}  # views per image


def calculate_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The percentage of rows of `outputs` [B, classes] whose largest value is at `targets` [B]."""
    return (outputs.argmax(dim=1) == targets).float().mean().item() * 100.0


@torch.no_grad()
def evaluate(model: nn.Module, loader: EvaluationLoader, world: World, keep: list[Tensor] | None = None) -> SplitResult:
    """Mean loss and accuracy of an fp32 `model` over a split, the same on every rank; this rank's logits go to `keep`."""
    started = time.perf_counter()
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)  # loss, correct
    for images, labels in loader:
        logits = model(images)
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(dim=1) == labels).sum()
        if keep is not None:
            keep.append(logits.cpu())
    loss, correct = world.total(sums).tolist()
    return SplitResult(loss / len(loader), correct / len(loader), len(loader), time.perf_counter() - started)


def _flip_mean(model: nn.Module, images: Tensor) -> Tensor:
    return (model(images) + model(images.flip(-1))) / 2


def views(model: nn.Module, images: Tensor, kind: str) -> Tensor:
    """Normalized images [B, C, S, S] -> mean logits over all views [B, classes].

    `mirror`: the image and its horizontal flip. `mirror+translate`: also both of them shifted by one pixel up and left, and
    down and right; the two shifts together weigh as much as the unshifted views (as in airbench94, see models/speednet.py).
    """
    logits = _flip_mean(model, images)
    if kind == "mirror":
        return logits
    size = images.shape[-1]
    around = F.pad(images, (1, 1, 1, 1), mode="reflect")
    moved = [around[:, :, at : at + size, at : at + size].contiguous(memory_format=torch.channels_last) for at in (0, 2)]
    return logits / 2 + sum(_flip_mean(model, images) for images in moved) / 4


class Augmented(nn.Module):
    """`model` with TTA for images whose highest class probability is below `below`."""

    def __init__(self, model: nn.Module, kind: str, below: float = 1.0) -> None:
        super().__init__()
        self.model, self.kind, self.below = model, kind, below

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, C, S, S] -> logits [B, classes]; each image's are independent of the rest of its batch."""
        if self.below == 1:
            return views(self.model, images, self.kind)
        logits = self.model(images)
        unsure = (logits.softmax(dim=1).amax(dim=1) < self.below).nonzero()[:, 0]
        if len(unsure):
            logits[unsure] = views(self.model, images[unsure], self.kind)
        return logits
