"""Augmentations as values: `--augment "RandomCrop(4) RandomHorizontalFlip Cutout(12)"`, or a recipe's `augment`.

Each is a frozen operation, named as in torchvision if it is there, and is called with a batch of images, of pixels or
normalized. Its random numbers come from `Draws`, a pure function of seed, epoch and image (MixUp's and CutMix's of seed, epoch
and step): the same on any number of ranks and after a resume. To add one, write a class here; everything else finds it by its
name. Importing this file does not import torch, which checks of a command line need not wait for: operations use tensor
methods, or import torch when they are called.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from cifar10 import UsageError
from cifar10.config import values
from cifar10.config.values import Value, is_positive, require

if TYPE_CHECKING:
    from torch import Tensor

    from cifar10.data.pixels import PixelStore
    from cifar10.data.rng import Draws


@dataclass(frozen=True)
class Operation(Value):
    """One augmentation; its fields are its arguments on the command line."""

    on_pixels = False  # whether it is called with uint8 pixels instead of normalized images

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Images [B, C, S, S] -> new images of the same shape and type."""
        raise NotImplementedError

    def describe(self) -> str:
        """What it does, in a few words."""
        raise NotImplementedError

    def check(self, size: int) -> None:
        """Raise ValueError unless the arguments are valid for images of `size` pixels a side."""


# --- crop and flip: one gather does both (see pixels.py), so they come first ------------------------------------------------


@dataclass(frozen=True)
class RandomCrop(Operation):
    """A crop of the image's own size (or of --image-size) after padding."""

    padding: int
    padding_mode: Literal["constant", "reflect"] = "constant"  # black, or the image reflected at its border

    def check(self, size: int) -> None:
        most = size - 1 if self.padding_mode == "reflect" else size
        require(0 <= self.padding <= most, f"padding must be from 0 to {most} for images of {size}x{size}")

    def describe(self) -> str:
        mode = " with reflection" if self.padding_mode == "reflect" else ""
        return f"random crop after padding by {self.padding}{mode}" if self.padding else "random crop"


@dataclass(frozen=True)
class RandomHorizontalFlip(Operation):
    """Flip each image with probability 1/2."""

    def flipped(self, cell: Tensor, cells: int, draws: Draws) -> Tensor:
        """1 for images to flip, else 0, from their draws below `cells`: int64 [B] -> int64 [B]."""
        return cell % 2

    def describe(self) -> str:
        return "random horizontal flip"


@dataclass(frozen=True)
class AlternatingFlip(RandomHorizontalFlip):
    """Flip each image in every other epoch, starting at random (Jordan 2024, arXiv 2404.00498)."""

    def flipped(self, cell: Tensor, cells: int, draws: Draws) -> Tensor:
        return (draws.below(cells, "crop", epoch=0) % 2 + draws.epoch) % 2

    def describe(self) -> str:
        return "horizontal flip in every other epoch"


GATHERED = (RandomCrop, RandomHorizontalFlip)


def crop_and_flip(operations: tuple[Operation, ...], store: PixelStore, draws: Draws) -> Tensor:
    """Where each image is cropped, and whether it is flipped, from one draw per image: top, left, flipped, int64 [3, B]."""
    crop, flip = find(operations, RandomCrop), find(operations, RandomHorizontalFlip)
    offsets, sides = store.side - store.size + 1 if crop else 1, 2 if flip else 1
    cells, center = offsets * offsets * sides, 0 if crop else round((store.side - store.size) / 2)

    def cut(draws: Draws) -> Tensor:
        from torch import stack

        cell = draws.below(cells, "crop")
        flipped = flip.flipped(cell, cells, draws) if flip else cell * 0
        place = cell // sides
        return stack((center + place // offsets, center + place % offsets, flipped))

    return draws.once("crop and flip", cut)


# --- the others, applied one after another ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BrightnessContrast(Operation):
    """Add up to +-brightness to normalized pixels, then multiply them by 1 +- contrast, in float32.

    As in github.com/hiverge/cifar10-speedrun; torchvision's ColorJitter works on pixels that are not normalized.
    """

    brightness: float
    contrast: float = 0.0

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        shift, scale = (draws.uniform(name)[:, None, None, None] for name in ("brightness", "contrast"))
        return ((images + self.brightness * shift) * (1 + self.contrast * scale)).to(images.dtype)

    def check(self, size: int) -> None:
        require(0 <= self.brightness <= 1 and 0 <= self.contrast <= 1, "brightness and contrast must be from 0 to 1")

    def describe(self) -> str:
        given = {"brightness": self.brightness, "contrast": self.contrast}
        return " and ".join(f"{name} +-{most:g}" for name, most in given.items() if most) or "no change of brightness"


def inside(images: Tensor, top: Tensor, left: Tensor, height: Tensor | int, width: Tensor | int) -> Tensor:
    """Which pixels are in these rectangles: int64 [B] each -> bool [B, 1, S, S]."""
    from torch import arange

    pixels = arange(images.shape[-1], device=images.device)
    rows, columns = (  # [B, S]
        (first[:, None] <= pixels) & (pixels < (first + extent)[:, None]) for first, extent in ((top, height), (left, width))
    )
    return rows[:, None, :, None] & columns[:, None, None, :]


@dataclass(frozen=True)
class Cutout(Operation):
    """Black out a square of `size` pixels, in proportion on smaller images (DeVries & Taylor 2017, arXiv 1708.04552)."""

    size: int

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        side = images.shape[-1]
        square = min(side, round(self.size * side / draws.full_size))
        places = side - square + 1
        place = draws.below(places * places, "cutout")
        gone = inside(images, place // places, place % places, square, square)
        return draws.black[:, None, None].to(images.dtype).where(gone, images)

    def check(self, size: int) -> None:
        require(1 <= self.size <= size, f"size must be from 1 to {size}, the image's side")

    def describe(self) -> str:
        return f"{self.size}x{self.size} cutout"


@dataclass(frozen=True)
class RandomRotation(Operation):
    """Rotate about the center by up to +-degrees, to the nearest pixel; corners without a pixel are black."""

    on_pixels = True
    degrees: float

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        from cifar10.data import functional

        return functional.affine(images, -self.degrees * draws.uniform("RandomRotation"))

    def check(self, size: int) -> None:
        require(0 < self.degrees <= 180, "degrees must be above 0 and at most 180")

    def describe(self) -> str:
        return f"rotation by +-{self.degrees:g} degrees"


@dataclass(frozen=True)
class RandomAffine(Operation):
    """Rotate by up to +-degrees, move by up to a share of the side, scale, and shear by up to +-degrees."""

    on_pixels = True
    degrees: float
    translate: tuple[float, float] = (0.0, 0.0)  # shares of the side, across and down
    scale: tuple[float, float] = (1.0, 1.0)  # lowest and highest
    shear: float = 0.0

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        from cifar10.data import functional

        angle, shear = self.degrees * draws.uniform("RandomAffine"), self.shear * draws.uniform("RandomAffine shear")
        most = zip(self.translate, ("across", "down"), strict=True)
        translate = [(share * images.shape[-1] * draws.uniform(f"RandomAffine {way}")).round() for share, way in most]
        scale = draws.between(*self.scale, "RandomAffine scale")
        return functional.affine(images, angle, tuple(translate), scale, (shear, 0.0))

    def check(self, size: int) -> None:
        require(
            0 <= self.degrees <= 180 and 0 <= self.shear < 90, "degrees must be from 0 to 180, and shear from 0 to below 90"
        )
        require(len(self.translate) == 2 and all(0 <= n <= 1 for n in self.translate), "translate must be two shares, 0 to 1")
        low, high = self.scale if len(self.scale) == 2 else (0, 0)
        require(0 < low <= high < math.inf, "scale must be the lowest and the highest, above 0, as (0.8, 1.2)")

    def describe(self) -> str:
        across, down = self.translate
        words = [f"rotation by +-{self.degrees:g} degrees"] if self.degrees else []
        words += [f"translation by up to {across:.0%} and {down:.0%}"] if across or down else []
        words += ["scale {:g} to {:g}".format(*self.scale)] if self.scale != (1, 1) else []
        words += [f"shear +-{self.shear:g} degrees"] if self.shear else []
        return ", ".join(words) or "no affine change"


@dataclass(frozen=True)
class ColorJitter(Operation):
    """Change brightness, contrast and saturation by factors 1 +- the given, and the hue by +- that share of a turn.

    In an order of each image's own, as torchvision does.
    """

    on_pixels = True
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        from torch import tensor

        from cifar10.data import functional

        names = ("brightness", "contrast", "saturation", "hue")
        orders = tensor(list(itertools.permutations(range(4))), device=images.device)[draws.below(24, "ColorJitter order")]
        numbers = [self._drawn(name, draws) for name in names]
        changes = [partial(_changed, getattr(functional, name), numbers[place]) for place, name in enumerate(names)]
        for turn in range(4):
            images = functional.choose(images, orders[:, turn], changes)
        return images

    def _drawn(self, name: str, draws: Draws) -> Tensor | None:
        most = getattr(self, name)
        low, high = (-most, most) if name == "hue" else (max(0.0, 1 - most), 1 + most)
        return draws.between(low, high, f"ColorJitter {name}") if most else None

    def check(self, size: int) -> None:
        factors = (self.brightness, self.contrast, self.saturation)
        require(all(0 <= factor < math.inf for factor in factors), "brightness, contrast and saturation must be at least 0")
        require(0 <= self.hue <= 0.5, "hue must be from 0 to 0.5")

    def describe(self) -> str:
        words = [f"{name} +-{most:g}" for name, most in vars(self).items() if most]
        return f"color jitter ({', '.join(words) or 'none'})"


def _changed(function: Callable[[Tensor, Tensor], Tensor], numbers: Tensor | None, images: Tensor, rows: Tensor) -> Tensor:
    return images if numbers is None else function(images, numbers[rows])


@dataclass(frozen=True)
class RandomGrayscale(Operation):
    """Gray with probability p, in all channels."""

    on_pixels = True
    p: float = 0.1

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        from torchvision.transforms.v2.functional import rgb_to_grayscale

        gray = rgb_to_grayscale(images, num_output_channels=images.shape[1])
        return gray.where((draws.between(0, 1, "RandomGrayscale") < self.p)[:, None, None, None], images)

    def check(self, size: int) -> None:
        require(0 < self.p <= 1, "p must be a probability above 0")

    def describe(self) -> str:
        return f"gray with probability {self.p:g}"


@dataclass(frozen=True)
class RandomErasing(Operation):
    """With probability p, set a rectangle to 0, the mean color, of normalized images (Zhong et al. 2017, arXiv 1708.04896)."""

    p: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)  # share of the image's area
    ratio: tuple[float, float] = (0.3, 3.3)  # height over width

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        side, (low, high) = images.shape[-1], map(math.log, self.ratio)
        height = width = 0 * draws.below(1, "RandomErasing")  # of nothing, should no try fit
        for number in reversed(range(10)):
            area = side * side * draws.between(*self.scale, f"RandomErasing area {number}")
            ratio = draws.between(low, high, f"RandomErasing ratio {number}").exp()
            tall, wide = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
            fits = (tall < side) & (wide < side)
            height, width = tall.where(fits, height), wide.where(fits, width)
        down, right = (draws.between(0, 1, f"RandomErasing {way}").double() for way in ("down", "right"))
        top, left = (down * (side - height + 1)).long(), (right * (side - width + 1)).long()
        erased = inside(images, top, left, height, width) & (draws.between(0, 1, "RandomErasing") < self.p)[:, None, None, None]
        return images.masked_fill(erased, 0)

    def check(self, size: int) -> None:
        require(0 < self.p <= 1, "p must be a probability above 0")
        require(len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1, "scale must be two shares, as (0.02, 0.33)")
        sound = len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1] < math.inf
        require(sound, "ratio must be the lowest and the highest, as (0.3, 3.3)")

    def describe(self) -> str:
        return f"random erasing with probability {self.p:g}"


# --- policies: a few operations of each image's own, with torchvision's magnitudes -------------------------------------------


@functools.cache
def _space(kind: str, bins: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """torchvision's `kind`: its operations as places in functional.NAMES [K], magnitudes [K, bins], 1 where signed [K]."""
    from torch import tensor, zeros
    from torchvision.transforms import v2

    from cifar10.data.functional import NAMES

    table = getattr(v2, kind)._AUGMENTATION_SPACE
    magnitudes = [levels(bins, side, side) for levels, _ in table.values()]
    rows = [[0.0] * bins if row is None else row.tolist() for row in magnitudes]
    which = tensor([NAMES.index(name) for name in table])
    return which, tensor(rows, dtype=zeros(0).double().dtype), tensor([int(signed) for _, signed in table.values()])


class _Policy(Operation):
    """What RandAugment, TrivialAugmentWide and AutoAugment share."""

    on_pixels = True

    def _apply(self, images: Tensor, draws: Draws, kind: Tensor, level: Tensor | int, turn: int, bins: int) -> Tensor:
        """Each image by operation `kind` of the space, at magnitude `level` and a random sign: int64 [B] each."""
        from cifar10.data import functional

        which, magnitudes, signed = (part.to(images.device) for part in _space(type(self).__name__, bins, images.shape[-1]))
        sign = 1 - 2 * signed[kind] * draws.below(2, f"{type(self).__name__} sign {turn}")
        return functional.by_name(images, which[kind], magnitudes[kind, level] * sign)


@dataclass(frozen=True)
class RandAugment(_Policy):
    """num_ops random operations, one after another, all of one magnitude (Cubuk et al. 2019, arXiv 1909.13719)."""

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        for turn in range(self.num_ops):
            kind = draws.below(len(_space("RandAugment", 2, 2)[0]), f"RandAugment {turn}")
            images = self._apply(images, draws, kind, self.magnitude, turn, self.num_magnitude_bins)
        return images

    def check(self, size: int) -> None:
        require(self.num_ops >= 1, "num_ops must be at least 1")
        sound = 0 <= self.magnitude < self.num_magnitude_bins and self.num_magnitude_bins >= 2
        require(sound, f"magnitude must be from 0 to {max(1, self.num_magnitude_bins - 1)}, below num_magnitude_bins")

    def describe(self) -> str:
        return f"RandAugment of {self.num_ops} operations, magnitude {self.magnitude} of {self.num_magnitude_bins}"


@dataclass(frozen=True)
class TrivialAugmentWide(_Policy):
    """One random operation of a random magnitude (Mueller & Hutter 2021, arXiv 2103.10158)."""

    num_magnitude_bins: int = 31

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        kind = draws.below(len(_space("TrivialAugmentWide", 2, 2)[0]), "TrivialAugmentWide")
        level = draws.below(self.num_magnitude_bins, "TrivialAugmentWide magnitude")
        return self._apply(images, draws, kind, level, 0, self.num_magnitude_bins)

    def check(self, size: int) -> None:
        require(self.num_magnitude_bins >= 2, "num_magnitude_bins must be at least 2")

    def describe(self) -> str:
        return "TrivialAugment"


@dataclass(frozen=True)
class AutoAugment(_Policy):
    """One of 25 pairs of operations that were found for CIFAR-10, each with a probability (Cubuk 2018, arXiv 1805.09501)."""

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        from torch import tensor
        from torchvision.transforms import AutoAugmentPolicy, v2

        names = list(v2.AutoAugment._AUGMENTATION_SPACE)
        policies = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)._policies
        table = tensor([[(names.index(n), p, level or 0) for n, p, level in pair] for pair in policies], device=images.device)
        pair = draws.below(len(policies), "AutoAugment")
        for turn in range(2):
            kind, probability, level = table[pair, turn].unbind(dim=1)
            chosen = draws.between(0, 1, f"AutoAugment {turn}") <= probability
            changed = self._apply(images, draws, kind.long(), level.long(), turn, 10)
            images = changed.where(chosen[:, None, None, None], images)
        return images

    def describe(self) -> str:
        return "AutoAugment's policy for CIFAR-10"


# --- two images of a global batch, mixed --------------------------------------------------------------------------------------


class _Mixing(Operation):
    """Mixes each image of a global batch with the one before it, and the first with the last, as torchvision does.

    A global batch has one random share, and uses one of several such operations; targets become probabilities.
    """

    def mix(self, images: Tensor, partners: Tensor, random: Random) -> tuple[Tensor, float]:
        """Normalized images and their partners [B, C, S, S] -> mixed images, and the images' share of the target."""
        raise NotImplementedError

    def check(self, size: int) -> None:
        require(is_positive(self.alpha), "alpha must be above 0")

    def describe(self) -> str:
        return f"{type(self).__name__} of neighbors in the batch, alpha {self.alpha:g}"


@dataclass(frozen=True)
class MixUp(_Mixing):
    """A weighted mean of two images and of their targets (Zhang et al. 2018, arXiv 1710.09412)."""

    alpha: float = 1.0

    def mix(self, images: Tensor, partners: Tensor, random: Random) -> tuple[Tensor, float]:
        share = random.betavariate(self.alpha, self.alpha)
        return (images.float() * share + partners.float() * (1 - share)).to(images.dtype), share


@dataclass(frozen=True)
class CutMix(_Mixing):
    """A rectangle of another image, which has its area's share of the target (Yun et al. 2019, arXiv 1905.04899)."""

    alpha: float = 1.0

    def mix(self, images: Tensor, partners: Tensor, random: Random) -> tuple[Tensor, float]:
        side, share = images.shape[-1], random.betavariate(self.alpha, self.alpha)
        half = int(0.5 * math.sqrt(1 - share) * side)
        rows, columns = (
            slice(max(0, center - half), min(side, center + half))
            for center in (random.randrange(side), random.randrange(side))
        )
        mixed = images.clone()
        mixed[..., rows, columns] = partners[..., rows, columns]
        return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / side**2


MIXING = (MixUp, CutMix)


# --- reading and checking -----------------------------------------------------------------------------------------------------


def parse(text: str) -> tuple[Operation, ...]:
    """The operations that `--augment` names, in order; () for "none". Raises UsageError, one line with an example."""
    operations = []
    for word in values.WORD.findall("" if text.strip() == "none" else text):
        try:
            operations.append(values.read(word, Operation, "augmentation"))
        except ValueError as error:
            raise UsageError(
                f'invalid value for --augment: {word}: {error}; for example --augment "RandomCrop(4) RandomHorizontalFlip"'
            ) from None
    kinds = [RandomHorizontalFlip if isinstance(one, RandomHorizontalFlip) else type(one) for one in operations]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
        raise UsageError(f"invalid value for --augment: {twice.__name__} is given twice")
    places = [0 if kind in GATHERED else 2 if kind in MIXING else 1 for kind in kinds]
    if places != sorted(places):
        example = "RandomCrop(4) Cutout(12) MixUp"
        raise UsageError(
            f"invalid value for --augment: RandomCrop and flips come first, MixUp and CutMix last, as in {example}"
        )
    return tuple(operations)


def mixing(operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """Those that mix the images of a batch; with any, targets are probabilities."""
    return tuple(one for one in operations if isinstance(one, MIXING))


def find(operations: tuple[Operation, ...], kind: type[Operation]) -> Any:
    """The operation of this class, or None."""
    return next((one for one in operations if isinstance(one, kind)), None)


def check(operations: tuple[Operation, ...], smallest: int) -> None:
    """Raise UsageError unless every operation is valid for images of `smallest` pixels a side."""
    for operation in operations:
        try:
            operation.check(smallest)
        except ValueError as error:
            raise UsageError(f"invalid value for --augment: {operation}: {error}") from None


def as_text(operations: tuple[Operation, ...]) -> str:
    """The canonical spelling, which `parse` reads."""
    return " ".join(map(str, operations)) or "none"


def describe(operations: tuple[Operation, ...]) -> str:
    """All of them in a few words."""
    return ", ".join(operation.describe() for operation in operations) or "none"
