"""Networks of torchvision and timm, with a head for the data set's classes and the library's own initialization.

`--model torchvision:NAME` and `--model timm:NAME` build any of their classifiers: the functions here that take a `name`.
"""

from typing import Any

from torch import nn
from torchvision import models


def vgg19(num_classes: int, dropout: float = 0.5) -> nn.Module:
    """float32 [B, 3, S, S] -> logits [B, classes], S of at least 32 (made for 224); 139,611,210 parameters at 10 classes.

    Published reference: 72.38% on ImageNet (torchvision, VGG19_Weights.IMAGENET1K_V1).
    """
    return models.vgg19(weights=None, num_classes=num_classes, dropout=dropout)


def densenet121(num_classes: int = 10, image_size: int = 32, channels: int = 3, dropout: float = 0.0) -> nn.Module:
    """float32 [B, C, S, S] -> logits [B, classes]; 6,956,426 parameters at 10 classes.

    torchvision's; images below 64 pixels a side get 3x3 filters without stride and no pooling. Published reference: 95.04% on
    CIFAR-10 (github.com/kuangliu/pytorch-cifar, DenseNet121).
    """
    model = models.densenet121(weights=None, num_classes=num_classes, drop_rate=dropout)
    if image_size < 64:
        model.features.conv0 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.features.conv0.weight)
        model.features.pool0 = nn.Identity()
    return model


def torchvision(name: str, num_classes: int, dropout: float | None = None, drop_path: float | None = None) -> nn.Module:
    """Any of torchvision's classifiers, float32 [B, 3, S, S] -> logits [B, classes]. Raises TypeError for a missing option."""
    whole = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    options = {"stochastic_depth_prob": drop_path, "drop_rate" if "densenet" in name else "dropout": dropout, **whole}
    return models.get_model(
        name, num_classes=num_classes, **{key: value for key, value in options.items() if value is not None}
    )


def timm(
    name: str,
    num_classes: int,
    image_size: int = 32,
    channels: int = 3,
    dropout: float | None = None,
    drop_path: float | None = None,
) -> nn.Module:
    """Any of timm's classifiers, float32 [B, C, S, S] -> logits [B, classes]. Raises TypeError for a missing option."""
    from timm import create_model

    how: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels, "drop_rate": dropout, "drop_path_rate": drop_path}
    try:
        return create_model(name, img_size=image_size, **how)
    except TypeError:  # one of any size
        return create_model(name, **how)
