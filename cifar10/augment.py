"""Random crop, mirror and normalisation of a whole batch in one gather; the same images as torchvision's transforms.

Images stay on the device as uint8. A pixel's three bytes and a spare one make one int32, so that one `index_select` moves
a pixel at a time: half the time of gathering three bytes. Equal, bit for bit, to RandomCrop(32, padding=4),
RandomHorizontalFlip, ToTensor, Normalize of torchvision for the same draws (tests/test_augment.py goes through every cell).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cifar10 import draws


@dataclass(frozen=True)
class PixelStore:
    """Images padded with black and packed, one int32 a pixel."""

    pixels: Tensor  # int32 [N * side * side]
    side: int  # height and width with the padding
    padding: int

    @property
    def size(self) -> int:
        return self.side - 2 * self.padding


def pack(images: Tensor, padding: int) -> PixelStore:
    """uint8 [N, S, S, 3] -> a store on the same device. Black is added before normalising, as torchvision does."""
    num_images, size = images.shape[:2]
    side = size + 2 * padding
    padded = torch.zeros(num_images, side, side, 4, dtype=torch.uint8, device=images.device)
    padded[:, padding : padding + size, padding : padding + size, :3] = images
    return PixelStore(padded.view(torch.int32).view(-1), side, padding)


def gather(store: PixelStore, indices: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
    """Crops of the stored images at (top, left), mirrored where asked: int64 [B] each -> uint8 [B, 3, S, S]."""
    across = torch.arange(store.size, device=indices.device)
    rows = top[:, None] + across  # [B, S]
    columns = left[:, None] + torch.where(mirrored[:, None].bool(), store.size - 1 - across, across)  # [B, S]
    first = (indices * store.side**2)[:, None] + rows * store.side  # [B, S]
    where = first[:, :, None] + columns[:, None, :]  # [B, S, S]
    pixels = store.pixels.index_select(0, where.view(-1)).view(torch.uint8)
    return pixels.view(-1, store.size, store.size, 4)[..., :3].permute(0, 3, 1, 2)


class Normalise:
    """uint8 [B, 3, S, S] -> float32 [B, 3, S, S], channels last: ToTensor's /255, then Normalize's (x - mean) / std."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(torch.float32, memory_format=torch.channels_last)
        return images.div_(255).sub_(self.mean).div_(self.std)


def random_crop_and_mirror(store: PixelStore, indices: Tensor, *, seed: int, epoch: int, flip: bool) -> Tensor:
    """Each image's own crop and mirroring for this epoch: int64 [B] -> uint8 [B, 3, S, S].

    One draw a sample picks a cell of (2 * padding + 1)^2 crops, times two if images are mirrored.
    """
    offsets, sides = 2 * store.padding + 1, 2 if flip else 1
    cell = draws.below(offsets * offsets * sides, seed, epoch, indices)
    crop = cell // sides
    return gather(store, indices, crop // offsets, crop % offsets, cell % sides)


def centre(store: PixelStore, indices: Tensor) -> Tensor:
    """The images as they are: int64 [B] -> uint8 [B, 3, S, S]."""
    middle = torch.full_like(indices, store.padding)
    return gather(store, indices, middle, middle, torch.zeros_like(indices))
