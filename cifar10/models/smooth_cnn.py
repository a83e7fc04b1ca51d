"""A small smooth network: tanh and average pooling, no batch statistics.

For comparing runs closely: rounding differences do not make it jump (as ReLU and max pooling do), and an image's result does
not depend on the rest of its micro-batch (as with BatchNorm).
"""

import torch
from torch import Tensor, nn


class SmoothCNN(nn.Module):
    """conv 3>8, conv 8>16, linear 1024>10."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(16 * 8 * 8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, 32, 32] -> logits [B, classes]."""
        x = self.pool(torch.tanh(self.conv1(images)))  # [B, 8, 16, 16]
        x = self.pool(torch.tanh(self.conv2(x)))  # [B, 16, 8, 8]
        return self.fc(torch.flatten(x, 1))  # [B, classes]


def smooth_cnn(num_classes: int) -> SmoothCNN:
    """The smooth network for 32x32 images in color, 11,642 parameters at 10 classes."""
    return SmoothCNN(num_classes)
