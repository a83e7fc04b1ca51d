"""The network of the speed-run recipes: wide, shallow, and initialized to learn from the first step.

Ideas of airbench94 (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498) and later entries, none
of it their code: frozen 2x2 filters that whiten patches of the training images, each with its negative; filters that start as
a partial identity; BatchNorm without scale and with a short memory; SiLU; a head on each channel's global maximum, so that it
accepts images of any size and can train on small ones first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 2  # pixels a side


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm with a trained bias, no trained scale, and statistics of the last few steps."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=0.4)
        del self.weight
        self.register_buffer("weight", torch.ones(channels))


class Conv(nn.Conv2d):
    """3x3 filters; the first ones start as the identity."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
        same = min(channels_in, channels_out)
        with torch.no_grad():
            self.weight[:same].zero_()
            self.weight[:same, :same, 1, 1].copy_(torch.eye(same))


class Group(nn.Module):
    """Two convolutions, the first followed by pooling: [B, C, S, S] -> [B, width, S // 2, S // 2]."""

    def __init__(self, channels_in: int, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = Conv(channels_in, width), BatchNorm(width)
        self.conv2, self.norm2 = Conv(width, width), BatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.silu(self.norm2(self.conv2(x)))


class DeepGroup(Group):
    """Three convolutions, the first followed by pooling, the others with a shortcut; shapes as in Group."""

    def __init__(self, channels_in: int, width: int) -> None:
        super().__init__(channels_in, width)
        self.conv3, self.norm3 = Conv(width, width), BatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        inner = F.silu(self.norm2(self.conv2(x)))
        return F.silu(self.norm3(self.conv3(inner)) + x)


class SpeedNet(nn.Module):
    """Whitening, three groups of `widths` channels, a linear head on each channel's maximum."""

    patch_images = 5_000  # whose patches are whitened

    def __init__(self, widths: tuple[int, int, int], group: type[nn.Module], num_classes: int) -> None:
        super().__init__()
        whitened = 2 * 3 * PATCH**2
        self.register_buffer("whitening", torch.randn(whitened, 3, PATCH, PATCH))
        self.groups = nn.Sequential(*(group(i, o) for i, o in zip((whitened, *widths[:-1]), widths, strict=True)))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.std())

    @torch.no_grad()
    def start_from_images(self, images: Tensor) -> None:
        """Let the first layer whiten normalized images float32 [N, 3, S, S], of which the first 5,000 are used.

        Its filters are the eigenvectors of the patches' covariance over the root of their eigenvalues, and the negatives.
        """
        images = images[: self.patch_images].float()
        patches = F.unfold(images, PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2)
        values, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).cpu())  # 12 x 12
        filters = (vectors / torch.sqrt(values + 5e-4)).T.reshape(-1, 3, PATCH, PATCH)
        self.whitening.copy_(torch.cat((filters, -filters)))

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, S, S], S of at least 16 -> logits [B, classes]."""
        x = F.silu(F.conv2d(images, self.whitening))  # [B, 24, S - 1, S - 1]
        x = self.groups(x).amax(dim=(2, 3))  # [B, C]
        return self.head(x) / x.shape[1]


def speednet(num_classes: int) -> SpeedNet:
    """The size for 94%: 64, 256 and 256 channels, 1,971,328 parameters at 10 classes."""
    return SpeedNet((64, 256, 256), Group, num_classes)


def speednet_small(num_classes: int) -> SpeedNet:
    """A size for two CPU cores: 32, 64 and 128 channels, 294,336 parameters at 10 classes."""
    return SpeedNet((32, 64, 128), Group, num_classes)


def speednet_large(num_classes: int) -> SpeedNet:
    """The size for 96%: twice as wide, a third convolution and a shortcut in each group; 9,915,392 parameters at 10 classes."""
    return SpeedNet((128, 384, 512), DeepGroup, num_classes)
