"""Networks of torchvision, with a head for the data set's classes and torchvision's own initialization."""

from torch import nn
from torchvision import models


def vgg19(num_classes: int) -> nn.Module:
    """float32 [B, 3, S, S] -> logits [B, classes]; 139,611,210 parameters at 10 classes.

    Made for 224x224 pixels, it takes any size from 32 up.
    """
    return models.vgg19(weights=None, num_classes=num_classes)
