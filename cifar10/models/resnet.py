"""Residual networks of torchvision with a stem for small images, as He et al. 2015 (arXiv 1512.03385) adapted them to CIFAR-10.

Images below 64 pixels a side get 3x3 filters without stride and no pooling, so that they keep their size in the first stage;
larger ones torchvision's own stem, which ImageNet's weights fit.
"""

from torch import nn
from torchvision import models


def _with_small_stem(model: models.ResNet, image_size: int, channels: int) -> nn.Module:
    if image_size < 64:
        model.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(
            model.conv1.weight, mode="fan_out", nonlinearity="relu"
        )  # as torchvision initializes the others
        model.maxpool = nn.Identity()
    return model


def resnet18(num_classes: int = 10, image_size: int = 32, channels: int = 3) -> nn.Module:
    """float32 [B, C, S, S] -> logits [B, classes]; 11,173,962 parameters at 10 classes.

    Published reference: 94.82% on CIFAR-10 after 200 epochs (mmpretrain, ResNet-18).
    """
    return _with_small_stem(models.resnet18(weights=None, num_classes=num_classes), image_size, channels)


def resnet34(num_classes: int = 10, image_size: int = 32, channels: int = 3) -> nn.Module:
    """float32 [B, C, S, S] -> logits [B, classes]; 21,282,122 parameters at 10 classes.

    Published reference: 95.34% on CIFAR-10 after 200 epochs (mmpretrain, ResNet-34).
    """
    return _with_small_stem(models.resnet34(weights=None, num_classes=num_classes), image_size, channels)


def resnet50(num_classes: int = 10, image_size: int = 32, channels: int = 3) -> nn.Module:
    """float32 [B, C, S, S] -> logits [B, classes]; 23,520,842 parameters at 10 classes.

    Published reference: 95.55% on CIFAR-10 after 200 epochs (mmpretrain, ResNet-50).
    """
    return _with_small_stem(models.resnet50(weights=None, num_classes=num_classes), image_size, channels)
