"""The BatchNorm CNN of the reference document, and the SLURM document's with twice the channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CIFAR10CNNEnhanced(nn.Module):
    """The reference document's network: two convolutions with BatchNorm, two linear layers."""

    def __init__(self, channels: tuple[int, int] = (16, 32), num_classes: int = 10) -> None:
        super().__init__()
        first, second = channels
        self.conv1 = nn.Conv2d(3, first, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(second)
        self.pool = nn.MaxPool2d(kernel_size=2)
        self.fc1 = nn.Linear(second * 8 * 8, 128)
        self.fc2 = nn.Linear(128, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        """Kaiming normal (fan-in), linear weights halved, biases zero."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(module.bias)
                if isinstance(module, nn.Linear):
                    module.weight.data.mul_(0.5)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, 32, 32] -> logits [B, classes]."""
        x = self.norm_pool_relu(self.bn1, self.conv1(images))  # [B, first, 16, 16]
        x = self.norm_pool_relu(self.bn2, self.conv2(x))  # [B, second, 8, 8]
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))  # [B, 128] -> [B, classes]

    def norm_pool_relu(self, norm: nn.Module, x: Tensor) -> Tensor:
        return F.relu(self.pool(norm(x)))  # the document pools last: the same result, more work


def bn_cnn(num_classes: int) -> CIFAR10CNNEnhanced:
    """The default: 16 and 32 channels, 268,746 parameters at 10 classes."""
    return CIFAR10CNNEnhanced((16, 32), num_classes)


def bn_cnn_wide(num_classes: int) -> CIFAR10CNNEnhanced:
    """The SLURM document's: 32 and 64 channels, 545,290 parameters at 10 classes."""
    return CIFAR10CNNEnhanced((32, 64), num_classes)
