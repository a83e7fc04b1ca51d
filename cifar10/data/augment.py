"""Augmentations as values: `--augment "RandomCrop(4) RandomHorizontalFlip Cutout(12)"`, or a recipe's `augment`.

Each is a frozen operation, named as torchvision names it, that is called with a batch of normalized images. Its random numbers
come from `Draws`, a pure function of seed, epoch and image, so that a batch is the same on any number of ranks and after a
resume. To add one, write a class here; the command line, the console, the loader and the report find it by its name.

Importing this file does not import torch, so that a command line can be checked without it: operations use tensor methods, or
import what they need when they are called.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from cifar10 import UsageError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from cifar10.data.pixels import PixelStore
    from cifar10.data.rng import Draws


@dataclass(frozen=True)
class Operation:
    """One augmentation; its fields are its arguments on the command line."""

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Normalized images [B, C, S, S] -> the same shape and type; the input is left as it was."""
        raise NotImplementedError

    def describe(self) -> str:
        """What it does, in a few words for the console and the report."""
        raise NotImplementedError

    def check(self, size: int) -> None:
        """Raise ValueError unless the arguments are valid for images of `size` pixels a side."""

    def __str__(self) -> str:
        given = [getattr(self, f.name) for f in dataclasses.fields(self)]
        defaults = [f.default for f in dataclasses.fields(self)]
        while given and given[-1] == defaults[-1]:
            given.pop(), defaults.pop()
        return f"{type(self).__name__}({', '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in given)})".removesuffix(
            "()"
        )


# --- crop and flip: one gather does both (see pixels.py), so they come first ------------------------------------------------


@dataclass(frozen=True)
class RandomCrop(Operation):
    """A crop of the image's own size (or of --image-size) after padding."""

    padding: int
    padding_mode: Literal["constant", "reflect"] = "constant"  # black, or the image reflected at its border

    def check(self, size: int) -> None:
        most = size - 1 if self.padding_mode == "reflect" else size
        if not 0 <= self.padding <= most:
            raise ValueError(f"padding must be from 0 to {most} for images of {size}x{size}")

    def describe(self) -> str:
        mode = " with reflection" if self.padding_mode == "reflect" else ""
        return f"random crop after padding by {self.padding}{mode}" if self.padding else "random crop"


@dataclass(frozen=True)
class RandomHorizontalFlip(Operation):
    """Flip each image with probability 1/2."""

    def flipped(self, cell: Tensor, cells: int, draws: Draws) -> Tensor:
        """1 for an image that is flipped, else 0, from its draw below `cells`: int64 [B] -> int64 [B]."""
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


def crop_and_flip(operations: tuple[Operation, ...], store: PixelStore, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Where each image is cropped, and whether it is flipped: top, left, flipped, int64 [B] each.

    One draw per image picks one of (side - size + 1)^2 crops, times two with a flip.
    """
    crop, flip = find(operations, RandomCrop), find(operations, RandomHorizontalFlip)
    offsets, sides = store.side - store.size + 1 if crop else 1, 2 if flip else 1
    cells = offsets * offsets * sides
    cell = draws.below(cells, "crop")
    flipped = flip.flipped(cell, cells, draws) if flip else cell * 0
    place, center = cell // sides, 0 if crop else round((store.side - store.size) / 2)
    return center + place // offsets, center + place % offsets, flipped


# --- the others, applied one after another ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BrightnessContrast(Operation):
    """Add up to +-brightness to an image's normalized pixels, then multiply them by 1 +- contrast, computed in float32.

    As in github.com/hiverge/cifar10-speedrun; torchvision's ColorJitter works on pixels that are not normalized.
    """

    brightness: float
    contrast: float = 0.0

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        shift, scale = (draws.uniform(name)[:, None, None, None] for name in ("brightness", "contrast"))
        return ((images + self.brightness * shift) * (1 + self.contrast * scale)).to(images.dtype)

    def check(self, size: int) -> None:
        if not (0 <= self.brightness <= 1 and 0 <= self.contrast <= 1):
            raise ValueError("brightness and contrast must be from 0 to 1")

    def describe(self) -> str:
        given = {"brightness": self.brightness, "contrast": self.contrast}
        return " and ".join(f"{name} +-{most:g}" for name, most in given.items() if most) or "no change of brightness"


@dataclass(frozen=True)
class Cutout(Operation):
    """Paint a black square of `size` pixels somewhere inside the image (DeVries & Taylor 2017, arXiv 1708.04552).

    On smaller images (--first-sizes) the square is smaller in proportion.
    """

    size: int

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        from torch import arange

        side = images.shape[-1]
        square = min(side, round(self.size * side / draws.full_size))
        places = side - square + 1
        place = draws.below(places * places, "cutout")
        pixels = arange(side, device=images.device)
        rows, columns = (
            (first[:, None] <= pixels) & (pixels < first[:, None] + square) for first in (place // places, place % places)
        )  # [B, S]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return draws.black[:, None, None].to(images.dtype).where(inside, images)

    def check(self, size: int) -> None:
        if not 1 <= self.size <= size:
            raise ValueError(f"size must be from 1 to {size}, the image's side")

    def describe(self) -> str:
        return f"{self.size}x{self.size} cutout"


@dataclass(frozen=True)
class RandomRotation(Operation):
    """Rotate about the center by up to +-degrees, to the nearest pixel; corners without a pixel are black."""

    degrees: float

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        from torch import ones_like, stack
        from torch.nn.functional import affine_grid, grid_sample

        angle = draws.uniform("RandomRotation") * self.degrees * math.pi / 180
        cos, sin, zero = angle.cos(), angle.sin(), angle * 0
        turn = stack((cos, -sin, zero, sin, cos, zero), dim=1).view(-1, 2, 3)
        grid = affine_grid(turn, list(images.shape), align_corners=False)
        rotated, inside = (
            grid_sample(values, grid, mode="nearest", align_corners=False)
            for values in (images.float(), ones_like(images[:, :1], dtype=grid.dtype))
        )
        return rotated.where(inside > 0, draws.black[:, None, None]).to(images.dtype)

    def check(self, size: int) -> None:
        if not 0 < self.degrees <= 180:
            raise ValueError("degrees must be above 0 and at most 180")

    def describe(self) -> str:
        return f"rotation by +-{self.degrees:g} degrees"


# --- reading and checking -----------------------------------------------------------------------------------------------------


def _classes(base: type[Operation] = Operation) -> dict[str, type[Operation]]:
    found = {}
    for kind in base.__subclasses__():
        found |= {kind.__name__: kind} | _classes(kind)
    return found


def _argument(value: Any, kind: Any) -> Any:
    """A value from the command line as the type of its field. Raises ValueError."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{value} is not one of {', '.join(get_args(kind))}")
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or (kind is int and not isinstance(value, int)):
        raise ValueError(f"{value} is not {'a whole number' if kind is int else 'a number'}")
    return kind(value)


def _operation(text: str) -> Operation:
    """`Cutout(12)` -> Cutout(size=12). Raises ValueError; nothing in the text is executed."""
    try:
        node = ast.parse(text, mode="eval").body
        name = node if isinstance(node, ast.Name) else node.func
        args = [] if isinstance(node, ast.Name) else node.args
        keywords = {} if isinstance(node, ast.Name) else {keyword.arg: keyword.value for keyword in node.keywords}
        values = [one.id if isinstance(one, ast.Name) else ast.literal_eval(one) for one in (*args, *keywords.values())]
        kind = _classes().get(name.id)
    except (SyntaxError, AttributeError, ValueError, TypeError):
        raise ValueError("expected a name with arguments in parentheses") from None
    if kind is None:
        raise ValueError(f"unknown augmentation{nearest(name.id, sorted(_classes()))}")
    fields = [f.name for f in dataclasses.fields(kind)]
    given = dict(zip([*fields[: len(args)], *keywords], values, strict=False))
    hints = get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    if len(values) != len(given) or not required <= given.keys() <= set(fields):
        raise ValueError(f"expected {kind.__name__}({', '.join(fields)})")
    return kind(**{field: _argument(value, hints[field]) for field, value in given.items()})


def parse(text: str) -> tuple[Operation, ...]:
    """The operations that `--augment` names, in order; none for "none". Raises UsageError, one line with an example."""
    operations = []
    for word in re.findall(r"[^\s()]+(?:\s*\([^)]*\)?)?|\S", "" if text.strip() == "none" else text):
        try:
            operations.append(_operation(word))
        except ValueError as error:
            raise UsageError(
                f'invalid value for --augment: {word}: {error}; for example --augment "RandomCrop(4) RandomHorizontalFlip"'
            ) from None
    kinds = [RandomHorizontalFlip if isinstance(one, RandomHorizontalFlip) else type(one) for one in operations]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
        raise UsageError(f"invalid value for --augment: {twice.__name__} is given twice")
    gathered = [kind in GATHERED for kind in kinds]
    if gathered != sorted(gathered, reverse=True):
        raise UsageError("invalid value for --augment: RandomCrop and the flips come first, as in RandomCrop(4) Cutout(12)")
    return tuple(operations)


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
    """What `parse` reads again, the same for the same operations however they were written."""
    return " ".join(map(str, operations)) or "none"


def describe(operations: tuple[Operation, ...]) -> str:
    """All of them in a few words."""
    return ", ".join(operation.describe() for operation in operations) or "none"


def with_old_flags(operations: tuple[Operation, ...], old: dict[str, Any]) -> tuple[Operation, ...]:
    """The operations that the flags of 0.1 mean (--crop-padding, --flip, --cutout, ...); to be removed after 0.2."""
    crop, jitter = find(operations, RandomCrop), find(operations, BrightnessContrast)
    cutout, flip = find(operations, Cutout), find(operations, RandomHorizontalFlip)
    padding = old.get("crop_padding", crop.padding if crop else 0)  # 0 crops only if --image-size is smaller than the image
    mode = old.get("padding_mode", crop.padding_mode if crop else "constant")
    alternate = old.get("alternate_flip", isinstance(flip, AlternatingFlip))
    light = [old.get(name, getattr(jitter, name, 0.0)) for name in ("brightness", "contrast")]
    size = old.get("cutout", cutout.size if cutout else 0)
    kept = tuple(one for one in operations if one not in (crop, flip, jitter, cutout))
    return (
        *((RandomCrop(padding, mode),) if padding or old.get("crops") else ()),
        *(((AlternatingFlip if alternate else RandomHorizontalFlip)(),) if old.get("flip", flip is not None) else ()),
        *((BrightnessContrast(*light),) if any(light) else ()),
        *((Cutout(size),) if size else ()),
        *kept,
    )
