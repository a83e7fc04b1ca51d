"""Test-time augmentation: a model that answers with the mean of its outputs for several views of an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VIEWS = {"mirror": 2, "mirror+translate": 6}  # how often each image is looked at


@dataclass(frozen=True)
class SplitResult:
    """A split's mean loss and accuracy (a fraction) over `images` images, each counted once, in `seconds` seconds."""

    loss: float
    accuracy: float
    images: int
    seconds: float

    @property
    def throughput(self) -> float:
        """Images per second."""
        return self.images / self.seconds if self.seconds else 0.0


def _both_ways(model: nn.Module, images: Tensor) -> Tensor:
    return (model(images) + model(images.flip(-1))) / 2


def views(model: nn.Module, images: Tensor, kind: str) -> Tensor:
    """Normalised images [B, C, S, S] -> the mean of the logits of all views [B, classes].

    `mirror`: as it is and mirrored. `mirror+translate`: both of these also moved by one pixel up and to the left, and down
    and to the right; the image where it is counts as much as the two others together (airbench94's, see models/speednet.py).
    """
    logits = _both_ways(model, images)
    if kind == "mirror":
        return logits
    size = images.shape[-1]
    around = F.pad(images, (1, 1, 1, 1), mode="reflect")
    moved = [around[:, :, at : at + size, at : at + size].contiguous(memory_format=torch.channels_last) for at in (0, 2)]
    return logits / 2 + sum(_both_ways(model, images) for images in moved) / 4


class Augmented(nn.Module):
    """`model`, looking again at every image whose most probable class has a probability below `below`."""

    def __init__(self, model: nn.Module, kind: str, below: float = 1.0) -> None:
        super().__init__()
        self.model, self.kind, self.below = model, kind, below

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, C, S, S] -> logits [B, classes]; an image's answer does not depend on the others of its batch."""
        if self.below == 1:
            return views(self.model, images, self.kind)
        logits = self.model(images)
        unsure = (logits.softmax(dim=1).amax(dim=1) < self.below).nonzero()[:, 0]
        if len(unsure):
            logits[unsure] = views(self.model, images[unsure], self.kind)
        return logits
