"""Augmentations as values: `--augment "RandomCrop(4) RandomHorizontalFlip Cutout(12)"`, or a recipe's `augment`.

Each is a frozen operation, named as in torchvision if it is there, and is called with a batch of normalized images. Its random
numbers come from `Draws`, a pure function of seed, epoch and image: the same on any number of ranks and after a resume. To add
one, write a class here; everything else finds it by its name. Importing this file does not import torch, which checks of a
command line need not wait for: operations use tensor methods, or import torch when they are called.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from cifar10 import UsageError, nearest
from cifar10.config.recipe import is_a

if TYPE_CHECKING:
    from torch import Tensor

    from cifar10.data.pixels import PixelStore
    from cifar10.data.rng import Draws


@dataclass(frozen=True)
class Operation:
    """One augmentation; its fields are its arguments on the command line."""

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Normalized images [B, C, S, S] -> new images of the same shape and type."""
        raise NotImplementedError

    def describe(self) -> str:
        """What it does, in a few words."""
        raise NotImplementedError

    def check(self, size: int) -> None:
        """Raise ValueError unless the arguments are valid for images of `size` pixels a side."""

    def __str__(self) -> str:
        fields = dataclasses.fields(self)
        given = [getattr(self, field.name) for field in fields]
        while given and given[-1] == fields[len(given) - 1].default:
            given.pop()
        arguments = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in given)
        return type(self).__name__ + (f"({arguments})" if given else "")


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
        if not (0 <= self.brightness <= 1 and 0 <= self.contrast <= 1):
            raise ValueError("brightness and contrast must be from 0 to 1")

    def describe(self) -> str:
        given = {"brightness": self.brightness, "contrast": self.contrast}
        return " and ".join(f"{name} +-{most:g}" for name, most in given.items() if most) or "no change of brightness"


@dataclass(frozen=True)
class Cutout(Operation):
    """Black out a square of `size` pixels, in proportion on smaller images (DeVries & Taylor 2017, arXiv 1708.04552)."""

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


def classes(base: type[Operation] = Operation) -> dict[str, type[Operation]]:
    """All operations by name."""
    found = {}
    for kind in base.__subclasses__():
        found |= {kind.__name__: kind} | classes(kind)
    return found


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def _operation(text: str) -> Operation:
    """`Cutout(12)` -> Cutout(size=12). Raises ValueError; nothing in the text is executed."""
    try:
        node = ast.parse(text, mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        args, keywords = [_value(arg) for arg in call.args], {word.arg: _value(word.value) for word in call.keywords}
        kind = classes().get(call.func.id)
    except (SyntaxError, AttributeError, ValueError, TypeError):
        raise ValueError("expected a name with arguments in parentheses") from None
    if kind is None:
        raise ValueError(f"unknown augmentation{nearest(call.func.id, sorted(classes()))}")
    try:
        given = signature(kind).bind(*args, **keywords).arguments
    except TypeError:
        raise ValueError(f"expected {kind.__name__}({', '.join(signature(kind).parameters)})") from None
    for name, value in given.items():
        wanted = get_type_hints(kind)[name]
        if not is_a(value, wanted):
            allowed = {int: "a whole number", float: "a number"}.get(wanted) or " or ".join(get_args(wanted))
            raise ValueError(f"{name} is {value}, expected {allowed}")
    return kind(**given)


def parse(text: str) -> tuple[Operation, ...]:
    """The operations that `--augment` names, in order; () for "none". Raises UsageError, one line with an example."""
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
        raise UsageError("invalid value for --augment: RandomCrop and flips must come first, as in RandomCrop(4) Cutout(12)")
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
    """The canonical spelling, which `parse` reads."""
    return " ".join(map(str, operations)) or "none"


def describe(operations: tuple[Operation, ...]) -> str:
    """All of them in a few words."""
    return ", ".join(operation.describe() for operation in operations) or "none"


def with_old_flags(operations: tuple[Operation, ...], old: dict[str, Any]) -> tuple[Operation, ...]:
    """The operations with the flags of 0.1 applied (--crop-padding, --flip, --cutout, ...); to be removed after 0.2."""
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
