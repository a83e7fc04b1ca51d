"""The speed-run network in a size for 96%: twice as wide, and a third convolution beside a shortcut in each group."""

from cifar10.models.speednet import DeepGroup, SpeedNet


def build() -> SpeedNet:
    return SpeedNet(widths=(128, 384, 512), group=DeepGroup)
