"""Networks of torchvision, with a head for the data set's classes and torchvision's own initialization."""

from torch import nn
from torchvision import models


def vgg19(num_classes: int) -> nn.Module:
    """float32 [B, 3, S, S] -> logits [B, classes], S of at least 32 (made for 224); 139,611,210 parameters at 10 classes."""
    return models.vgg19(weights=None, num_classes=num_classes)
