"""torchvision's v2.functional for a batch with an argument per image: uint8 [B, C, S, S], and numbers [B].

The pixels are torchvision's, to within one of 255 levels (tests/data/test_functional.py compares every operation).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv
from torchvision.transforms.v2.functional._color import _hsv_to_rgb, _rgb_to_hsv  # adjust_hue takes one number only

Number = Tensor | float


def choose(images: Tensor, which: Tensor, functions: Sequence[Callable[[Tensor, Tensor], Tensor]]) -> Tensor:
    """Each image by the function that it chose: int64 [B]; a function gets its images and their rows in the batch."""
    changed = images.clone()
    for number, function in enumerate(functions):
        if len(rows := (which == number).nonzero()[:, 0]):
            changed[rows] = function(images[rows], rows)
    return changed


# --- where pixels are -----------------------------------------------------------------------------------------------------


def affine(
    images: Tensor,
    angle: Number = 0.0,
    translate: tuple[Number, Number] = (0.0, 0.0),
    scale: Number = 1.0,
    shear: tuple[Number, Number] = (0.0, 0.0),
    *,
    about_corner: bool = False,
) -> Tensor:
    """v2.functional.affine to the nearest pixel, black outside: angles in degrees, translations in pixels, x before y."""
    size, radians = images.shape[-1], math.pi / 180
    numbers = [torch.as_tensor(n, dtype=torch.float64, device=images.device) for n in (angle, *translate, scale, *shear)]
    turn, across, down, scale, shear_x, shear_y = torch.broadcast_tensors(*numbers, images.new_empty(len(images)))[:6]
    turn, shear_x, shear_y, center = turn * radians, shear_x * radians, shear_y * radians, -size / 2 if about_corner else 0.0
    cos, sin = (turn - shear_y).cos() / shear_y.cos(), (turn - shear_y).sin() / shear_y.cos()
    x_to_x, y_to_x = (turn.cos() - sin * shear_x.tan()) / scale, (cos * shear_x.tan() + turn.sin()) / scale
    x_to_y, y_to_y = -sin / scale, cos / scale
    to_x = center - x_to_x * (center + across) - y_to_x * (center + down)
    to_y = center - x_to_y * (center + across) - y_to_y * (center + down)
    matrix = torch.stack((x_to_x, y_to_x, to_x, x_to_y, y_to_y, to_y), dim=1).float().view(-1, 2, 3)
    line = torch.linspace((1.0 - size) * 0.5, (size - 1.0) * 0.5, size, device=images.device)
    places = torch.stack((line.expand(size, -1), line[:, None].expand(-1, size), torch.ones_like(line).expand(size, -1)), dim=2)
    grid = places.view(1, -1, 3).expand(len(images), -1, -1).bmm(matrix.transpose(1, 2) / (0.5 * size))
    moved = F.grid_sample(images.float(), grid.view(-1, size, size, 2), mode="nearest", align_corners=False)
    return moved.to(images.dtype)


# --- what pixels are --------------------------------------------------------------------------------------------------------


def per_image(numbers: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return numbers.float()[:, None, None, None]


def _blend(images: Tensor, other: Number, share: Tensor) -> Tensor:
    """share of the images and 1 - share of the other, clipped."""
    share = per_image(share)
    return images.mul(share).add_((1 - share) * other).clamp_(0, 255).to(images.dtype)


def _gray(images: Tensor) -> Tensor:
    """Brightness in whole numbers: float32 [B, 1, S, S]."""
    weights = (0.2989, 0.587, 0.114) if images.shape[1] == 3 else (1.0,)
    return sum(images[:, place : place + 1] * weight for place, weight in enumerate(weights)).floor()


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, 0.0, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _gray(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _gray(images), factor) if images.shape[1] == 3 else images


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """The hue moved by `shift` of a whole turn."""
    if images.shape[1] == 1:
        return images
    turn, strength, value = _rgb_to_hsv(tv.to_dtype(images, torch.float32, scale=True)).unbind(dim=1)
    turned = torch.stack(((turn + per_image(shift)[:, 0]).remainder(1.0), strength, value), dim=1)
    return tv.to_dtype(_hsv_to_rgb(turned), torch.uint8, scale=True)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    kernel = torch.full((images.shape[1], 1, 3, 3), 1 / 13, device=images.device)
    kernel[:, :, 1, 1] = 5 / 13
    blurred = images.float()
    blurred[:, :, 1:-1, 1:-1] = F.conv2d(blurred, kernel, groups=images.shape[1]).round_()
    return _blend(images, blurred, factor)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    return images & (256 - (1 << (8 - bits.to(torch.int64)))).to(torch.uint8)[:, None, None, None]


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images >= per_image(threshold), 255 - images, images)


# What AutoAugment and its kin choose from: torchvision's names, and what each does with its magnitude.
BY_NAME: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Identity": lambda images, _: images,
    "ShearX": lambda images, level: affine(images, shear=(level.atan() * (180 / math.pi), 0.0), about_corner=True),
    "ShearY": lambda images, level: affine(images, shear=(0.0, level.atan() * (180 / math.pi)), about_corner=True),
    "TranslateX": lambda images, level: affine(images, translate=(level.trunc(), 0.0)),
    "TranslateY": lambda images, level: affine(images, translate=(0.0, level.trunc())),
    "Rotate": lambda images, level: affine(images, -level),
    "Brightness": lambda images, level: brightness(images, 1 + level),
    "Color": lambda images, level: saturation(images, 1 + level),
    "Contrast": lambda images, level: contrast(images, 1 + level),
    "Sharpness": lambda images, level: sharpness(images, 1 + level),
    "Posterize": posterize,
    "Solarize": lambda images, level: solarize(images, 255 * level),
    "AutoContrast": lambda images, _: tv.autocontrast(images),
    "Equalize": lambda images, _: tv.equalize(images),
    "Invert": lambda images, _: 255 - images,
}
NAMES = list(BY_NAME)


def by_name(images: Tensor, which: Tensor, magnitudes: Tensor) -> Tensor:
    """Each image changed by one operation of NAMES: places in that list, int64 [B], and its magnitude, float64 [B]."""
    return choose(images, which, [lambda some, rows, f=function: f(some, magnitudes[rows]) for function in BY_NAME.values()])
