"""Images on the device, packed so that one gather crops and flips a whole batch; normalization.

Images stay uint8. A pixel's three bytes and one byte of padding form an int32, so that `index_select` moves whole pixels:
half the time of moving bytes. The result equals torchvision's RandomCrop, RandomHorizontalFlip, ToTensor and Normalize
bit for bit, given the same crop and flip (tests/data/test_augment.py compares every crop).

For bf16, images are normalized once and stored as bf16, three values and one of padding in an int64: on a CPU a batch takes a
quarter of the time, and 50,000 images take 580 MB instead of 290.

Enlarged images are stored at their original size and resized per batch: 50,000 images of 256x256 would take 13 GB. Images that
are shrunk are resized once.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_IMAGES = 5_000  # images resized at once
NORMALIZED_BYTES = 8  # of a pixel in bf16


@dataclass(frozen=True)
class PixelStore:
    """Images packed one word per pixel (int32 for RGB, uint8 for grayscale, int64 if normalized), and the size of the crops."""

    pixels: Tensor  # [N * stored * stored]
    stored: int  # height and width of an image in `pixels`, including the padding unless it is resized per batch
    channels: int
    size: int  # height and width of a crop
    padding: int
    resize: int = 0  # height and width that images are resized to per batch; 0: no resizing
    reflect: bool = False  # padding mode "reflect" instead of black

    @property
    def is_normalized(self) -> bool:
        """Whether the store holds normalized bf16 instead of uint8."""
        return self.pixels.dtype == torch.int64

    @property
    def side(self) -> int:
        """Height and width of the resized and padded images that crops are taken from."""
        return self.resize + 2 * self.padding if self.resize else self.stored


def pack(images: Tensor, padding: int, resize: int = 0, image_size: int = 0, *, reflect: bool = False) -> PixelStore:
    """uint8 [N, S, S, C] -> a store on the same device, of images resized to `resize` (0: S) and padded on each side.

    Crops have size `image_size` (0: the image without padding). The padding is black and added before normalization, or with
    `reflect` torchvision's padding_mode="reflect". Raises ValueError if that needs more pixels than the image has.
    """
    if resize and resize < images.shape[1]:
        images = torch.cat([_resize(part.permute(0, 3, 1, 2), resize) for part in images.split(CHUNK_IMAGES)])
    num_images, size, _, channels = images.shape
    resize = 0 if resize == size else resize
    now = 0 if resize else padding
    stored = size + 2 * now
    padded = torch.zeros(num_images, stored, stored, 1 if channels == 1 else 4, dtype=torch.uint8, device=images.device)
    if reflect and padding >= (resize or size):
        raise ValueError(
            f"reflection padding of {padding} pixels is too large for an image of {resize or size}x{resize or size}"
        )
    if reflect and now:
        across = torch.arange(-now, size + now, device=images.device).abs()
        across = torch.minimum(across, 2 * (size - 1) - across)
        padded[..., :channels] = images[:, across[:, None], across]
    else:
        padded[:, now : now + size, now : now + size, :channels] = images
    pixels = padded.view(-1) if channels == 1 else padded.view(torch.int32).view(-1)
    return PixelStore(pixels, stored, channels, image_size or resize or size, padding, resize, reflect)


def _cut(store: PixelStore, indices: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The stored images' pixels at rows x columns: int64 [B], [B, H], [B, W] -> uint8 or bf16 [B, C, H, W]."""
    first = (indices * store.stored**2)[:, None] + rows * store.stored  # [B, H]
    where = first[:, :, None] + columns[:, None, :]  # [B, H, W]
    pixels = store.pixels.index_select(0, where.view(-1)).view(torch.bfloat16 if store.is_normalized else torch.uint8)
    return pixels.view(*where.shape, -1)[..., : store.channels].permute(0, 3, 1, 2)


def _resize(images: Tensor, size: int) -> Tensor:
    """uint8 [B, C, S, S] -> uint8 [B, size, size, C]: torchvision's Resize, antialiased as by default."""
    if not len(images):  # which a GPU refuses to resize
        return images.new_empty(0, size, size, images.shape[1])
    images = images.to(torch.float32, memory_format=torch.contiguous_format)
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return images.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _resized(store: PixelStore, indices: Tensor) -> PixelStore:
    """A store of only these images, resized and padded."""
    every = torch.arange(store.stored, device=indices.device).expand(len(indices), -1)
    images = _resize(_cut(store, indices, every, every), store.resize)
    return pack(images, store.padding, image_size=store.size, reflect=store.reflect)


def gather(store: PixelStore, indices: Tensor, top: Tensor, left: Tensor, flipped: Tensor) -> Tensor:
    """Crops of the stored images at (top, left), flipped where asked: int64 [B] each -> uint8 [B, C, size, size]."""
    if store.resize:
        store, indices = _resized(store, indices), torch.arange(len(indices), device=indices.device)
    across = torch.arange(store.size, device=indices.device)
    rows = top[:, None] + across  # [B, size]
    columns = left[:, None] + torch.where(flipped[:, None].bool(), store.size - 1 - across, across)  # [B, size]
    return _cut(store, indices, rows, columns)


class Normalize:
    """uint8 [B, C, S, S] -> float32, channels last: ToTensor's /255, then Normalize's (x - mean) / std; bf16 stays as it is."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype == torch.bfloat16:  # from a normalized store
            return images.contiguous(memory_format=torch.channels_last)
        images = images.to(torch.float32, memory_format=torch.channels_last)
        return images.div_(255).sub_(self.mean).div_(self.std)

    def to_pixels(self, images: Tensor) -> Tensor:
        """The inverse: normalized float32 [B, C, S, S] -> uint8, rounded and clipped to 0..255."""
        return images.mul(self.std).add_(self.mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def normalized(store: PixelStore, normalize: Normalize) -> PixelStore:
    """The same RGB images, normalized and rounded to bf16: bit for bit what autocast would feed to the first layer."""
    bytes_of_pixels = store.pixels.view(-1, 1).view(torch.uint8)  # [N * stored * stored, 4]
    words = torch.empty(len(bytes_of_pixels), 4, dtype=torch.bfloat16, device=store.pixels.device)
    rows = CHUNK_IMAGES * store.stored**2
    for part, out in zip(bytes_of_pixels.split(rows), words.split(rows), strict=True):
        out[:, :3] = normalize(part[None, :, None, :3].permute(0, 3, 1, 2))[0, :, :, 0].T
    return replace(store, pixels=words.view(torch.int64).view(-1))


def center(store: PixelStore, indices: Tensor) -> Tensor:
    """Center crops: int64 [B] -> uint8 or bf16 [B, C, size, size]."""
    middle = torch.full_like(indices, round((store.side - store.size) / 2))  # half to even, like torchvision
    return gather(store, indices, middle, middle, torch.zeros_like(indices))
