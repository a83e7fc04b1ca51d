"""The basic network of the reference documents: LeNet as in PyTorch's first tutorial, with PyTorch's own initialization."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """conv 3>6, conv 6>16, linear 400>120>84>10."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, kernel_size=5)
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, 32, 32] -> logits [B, classes]."""
        x = self.pool(F.relu(self.conv1(images)))  # [B, 6, 14, 14]
        x = self.pool(F.relu(self.conv2(x)))  # [B, 16, 5, 5]
        x = F.relu(self.fc1(torch.flatten(x, 1)))  # [B, 120]
        x = F.relu(self.fc2(x))  # [B, 84]
        return self.fc3(x)  # [B, classes]


def lenet(num_classes: int) -> Net:
    """LeNet for 32x32 images in color, 62,006 parameters at 10 classes."""
    return Net(num_classes)
