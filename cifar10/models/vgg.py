"""VGG for 32x32 images: configuration A of Simonyan and Zisserman 2014 ("Very deep convolutional networks") with BatchNorm.

It is a plain sequence of layers, as pipeline parallelism needs it (see engine/pipeline.py).
"""

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 256, 512, 512, 512, 512)
POOLED = (0, 1, 3, 5)  # layers that halve the image


class Convolution(nn.Module):
    """3x3 filters, BatchNorm, ReLU, and pooling if asked for: [B, C, S, S] -> [B, width, S, S], or S // 2."""

    def __init__(self, channels_in: int, width: int, *, pool: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(channels_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), pool
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return F.max_pool2d(x, 2) if self.pool else x


class Head(nn.Module):
    """The mean over positions, dropout, and a linear layer: [B, C, S, S] -> logits [B, classes]."""

    def __init__(self, channels_in: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(dropout), nn.Linear(channels_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(x.mean(dim=(2, 3))))


def vgg11(num_classes: int = 10, channels: int = 3, dropout: float = 0.0) -> nn.Sequential:
    """VGG-11 for images of at least 16x16, 9,228,362 parameters at 10 classes: eight convolutions and one linear layer."""
    layers = [
        Convolution(channels_in, width, pool=number in POOLED)
        for number, (channels_in, width) in enumerate(zip((channels, *WIDTHS), WIDTHS, strict=False))
    ]
    return nn.Sequential(*layers, Head(WIDTHS[-1], num_classes, dropout))
