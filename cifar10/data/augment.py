"""Random crop, mirror and normalisation of a whole batch in one gather; the same images as torchvision's transforms.

Cutout and changes of brightness and contrast come after it, if a recipe asks for them.

Images stay on the device as uint8. A pixel's three bytes and a spare one make one int32, so that one `index_select` moves
a pixel at a time: half the time of gathering three bytes. Equal, bit for bit, to RandomCrop(32, padding=4),
RandomHorizontalFlip, ToTensor, Normalize of torchvision for the same draws (tests/data/test_augment.py tries every cell).
For bf16 on a CPU they are normalised once, a pixel's three numbers and a spare one in an int64: a batch takes a quarter of the
time, and 50,000 images 580 MB in place of 290.

A recipe that enlarges images keeps them as they are, too, and resizes those of a batch when they are asked for: 50,000 images
of 256x256 would take 13 GB. Smaller ones are made once.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar10.data import rng

AT_ONCE = 5_000  # images resized at once


@dataclass(frozen=True)
class PixelStore:
    """Images packed one word a pixel, and what is cut out of them: int32 in colour, uint8 in grey, int64 if normalised."""

    pixels: Tensor  # [N * stored * stored]
    stored: int  # height and width of an image in `pixels`; with the padding, unless images are resized first
    channels: int
    size: int  # height and width of a crop
    padding: int
    resize: int = 0  # height and width to which images are resized when they are gathered; 0: they are not
    reflect: bool = False  # the padding is the image mirrored at its border, not black

    @property
    def is_normalised(self) -> bool:
        """Whether crops come out as Normalise makes them, in bf16."""
        return self.pixels.dtype == torch.int64

    @property
    def side(self) -> int:
        """Height and width that crops are taken from: resized and padded."""
        return self.resize + 2 * self.padding if self.resize else self.stored


def pack(images: Tensor, padding: int, resize: int = 0, image_size: int = 0, *, reflect: bool = False) -> PixelStore:
    """uint8 [N, S, S, C] -> a store on the same device, of images of `resize` (0: S) pixels a side and the padding around them.

    Crops are of `image_size` pixels (0: all but the padding). The padding is black, added before normalising as torchvision
    does; with `reflect` it is torchvision's padding_mode="reflect". Raises ValueError for one of as many pixels as the image.
    """
    if resize and resize < images.shape[1]:
        images = torch.cat([_resize(part.permute(0, 3, 1, 2), resize) for part in images.split(AT_ONCE)])
    num_images, size, _, channels = images.shape
    resize = 0 if resize == size else resize
    now = 0 if resize else padding
    stored = size + 2 * now
    padded = torch.zeros(num_images, stored, stored, 1 if channels == 1 else 4, dtype=torch.uint8, device=images.device)
    if reflect and padding >= (resize or size):
        raise ValueError(f"{padding} pixels cannot be reflected in an image of {resize or size}x{resize or size}")
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
    pixels = store.pixels.index_select(0, where.view(-1)).view(torch.bfloat16 if store.is_normalised else torch.uint8)
    return pixels.view(*where.shape, -1)[..., : store.channels].permute(0, 3, 1, 2)


def _resize(images: Tensor, size: int) -> Tensor:
    """uint8 [B, C, S, S] -> uint8 [B, size, size, C]: torchvision's Resize, antialiased as by default."""
    images = images.to(torch.float32, memory_format=torch.contiguous_format)
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return images.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _resized(store: PixelStore, indices: Tensor) -> PixelStore:
    """A store of these images alone, resized and padded."""
    every = torch.arange(store.stored, device=indices.device).expand(len(indices), -1)
    images = _resize(_cut(store, indices, every, every), store.resize)
    return pack(images, store.padding, image_size=store.size, reflect=store.reflect)


def gather(store: PixelStore, indices: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
    """Crops of the stored images at (top, left), mirrored where asked: int64 [B] each -> uint8 [B, C, size, size]."""
    if store.resize:
        store, indices = _resized(store, indices), torch.arange(len(indices), device=indices.device)
    across = torch.arange(store.size, device=indices.device)
    rows = top[:, None] + across  # [B, size]
    columns = left[:, None] + torch.where(mirrored[:, None].bool(), store.size - 1 - across, across)  # [B, size]
    return _cut(store, indices, rows, columns)


class Normalise:
    """uint8 [B, C, S, S] -> float32, channels last: ToTensor's /255, then Normalize's (x - mean) / std; bf16 stays as it is."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype == torch.bfloat16:  # of a store that is normalised already
            return images.contiguous(memory_format=torch.channels_last)
        images = images.to(torch.float32, memory_format=torch.channels_last)
        return images.div_(255).sub_(self.mean).div_(self.std)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Normalised float32 [B, C, S, S] -> uint8, the nearest pixels that there are; what lies outside 0..255 is clipped."""
        return images.mul(self.std).add_(self.mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def normalised(store: PixelStore, normalise: Normalise) -> PixelStore:
    """The same colour images, normalised and rounded to bf16: what autocast would feed the first layer with, to the bit."""
    bytes_of_pixels = store.pixels.view(-1, 1).view(torch.uint8)  # [N * stored * stored, 4]
    words = torch.empty(len(bytes_of_pixels), 4, dtype=torch.bfloat16, device=store.pixels.device)
    rows = AT_ONCE * store.stored**2
    for part, out in zip(bytes_of_pixels.split(rows), words.split(rows), strict=True):
        out[:, :3] = normalise(part[None, :, None, :3].permute(0, 3, 1, 2))[0, :, :, 0].T
    return replace(store, pixels=words.view(torch.int64).view(-1))


def draw(
    store: PixelStore, indices: Tensor, *, seed: int, epoch: int, flip: bool, alternate: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's own crop and mirroring for this epoch: int64 [B] -> top, left, mirrored, int64 [B] each.

    One draw a sample picks a cell of (side - size + 1)^2 crops, times two if images are mirrored at random. If mirroring
    alternates (Jordan 2024, arXiv 2404.00498), the draw of epoch 0 says how an image begins.
    """
    offsets, sides = store.side - store.size + 1, 2 if flip else 1
    cell = rng.below(offsets * offsets * sides, seed, epoch, indices)
    crop, mirrored = cell // sides, cell % sides
    if flip and alternate:
        first = rng.below(offsets * offsets * sides, seed, 0, indices) % sides
        mirrored = (first + epoch) % 2
    return crop // offsets, crop % offsets, mirrored


def random_crop_and_mirror(
    store: PixelStore, indices: Tensor, *, seed: int, epoch: int, flip: bool, alternate: bool = False
) -> Tensor:
    """These images, cropped and mirrored as `draw` says: int64 [B] -> uint8 or bf16 [B, C, size, size]."""
    return gather(store, indices, *draw(store, indices, seed=seed, epoch=epoch, flip=flip, alternate=alternate))


def cut_out(images: Tensor, side: int, black: Tensor, *, seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Put a square of `side` pixels of `black` [C] somewhere in each image: [B, C, S, S] -> the same.

    The square lies wholly inside the image, at a place of its own for each epoch (DeVries & Taylor 2017, arXiv 1708.04552).
    """
    size = images.shape[-1]
    side = min(side, size)
    places = size - side + 1
    at = rng.below(places * places, seed, epoch, indices, rng.CUTOUT)
    across = torch.arange(size, device=images.device)
    rows, columns = (
        (first[:, None] <= across) & (across < first[:, None] + side) for first in (at // places, at % places)
    )  # [B, S]
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, black[:, None, None], images)


def color_jitter(images: Tensor, brightness: float, contrast: float, *, seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Normalised images, each with its own brightness and contrast for this epoch: [B, C, S, S] -> the same type.

    To all pixels of an image one number in -brightness .. brightness is added; what results is multiplied by one in
    1 - contrast .. 1 + contrast; computed in float32. So does github.com/hiverge/cifar10-speedrun; torchvision's ColorJitter
    multiplies pixels that are not normalised.
    """
    shift, scale = (rng.uniform(seed, epoch, indices, stream)[:, None, None, None] for stream in (rng.BRIGHTNESS, rng.CONTRAST))
    return ((images + brightness * shift) * (1 + contrast * scale)).to(images.dtype)


def centre(store: PixelStore, indices: Tensor) -> Tensor:
    """The middle of the images, or all of them where crops are that large: int64 [B] -> uint8 [B, C, size, size]."""
    middle = torch.full_like(indices, round((store.side - store.size) / 2))  # to even, as torchvision does
    return gather(store, indices, middle, middle, torch.zeros_like(indices))
