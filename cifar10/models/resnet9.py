"""ResNet-9, the network that Page 2018 ("How to train your ResNet") made for training CIFAR-10 fast."""

from torch import Tensor, nn


class Convolution(nn.Sequential):
    """3x3 filters, BatchNorm, ReLU, and pooling if asked for: [B, C, S, S] -> [B, width, S, S], or S // 2."""

    def __init__(self, channels_in: int, width: int, pool: bool = False) -> None:
        layers = [nn.Conv2d(channels_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        super().__init__(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Stage(nn.Module):
    """A convolution with pooling, and `depth` more with a shortcut: [B, C, S, S] -> [B, width, S // 2, S // 2]."""

    def __init__(self, channels_in: int, width: int, depth: int) -> None:
        super().__init__()
        self.first = Convolution(channels_in, width, pool=True)
        self.rest = nn.Sequential(*(Convolution(width, width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.rest(x) if len(self.rest) else x


class ResNet9(nn.Module):
    """A convolution of 64 channels, three stages, the maximum over positions, a linear layer scaled by 1/8."""

    def __init__(self, num_classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.stem = Convolution(channels, 64)
        self.stages = nn.Sequential(Stage(64, 128, 2), Stage(128, 256, 0), Stage(256, 512, 2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(512, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, C, S, S], S of at least 8 -> logits [B, classes]."""
        x = self.stages(self.stem(images)).amax(dim=(2, 3))  # [B, 512]
        return self.head(self.dropout(x)) * 0.125


def resnet9(num_classes: int = 10, channels: int = 3, dropout: float = 0.0) -> ResNet9:
    """ResNet-9 for images of any size, 6,573,120 parameters at 10 classes.

    Published reference: 94% on CIFAR-10 after 24 epochs (github.com/davidcpage/cifar10-fast).
    """
    return ResNet9(num_classes, channels, dropout)
