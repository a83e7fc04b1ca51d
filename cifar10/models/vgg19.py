"""torchvision's VGG19 with a head for ten classes; made for 224x224 images, it takes any size from 32 up."""

from torch import nn
from torchvision import models


def build() -> nn.Module:
    """float32 [B, 3, S, S] -> logits [B, 10]; 139,611,210 parameters, in torchvision's own initialisation."""
    return models.vgg19(weights=None, num_classes=10)
