"""Residual networks with a stem for small images, as He et al. 2015 (arXiv 1512.03385) adapted them to CIFAR-10."""

from torch import nn
from torchvision import models


def resnet18(num_classes: int = 10) -> nn.Module:
    """float32 [B, 3, S, S] -> logits [B, classes]; 11,173,962 parameters at 10 classes.

    torchvision's but for the stem: 3x3 filters without stride and no pooling, so that 32x32 images keep their size in the first
    stage. Published reference: 94.82% on CIFAR-10 after 200 epochs (mmpretrain, ResNet-18).
    """
    model = models.resnet18(weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision initializes the others
    model.maxpool = nn.Identity()
    return model
