"""The speed-run network in a size for two CPU cores."""

from cifar10.models.speednet import SpeedNet


def build() -> SpeedNet:
    return SpeedNet(widths=(32, 64, 128))
