"""Augmentation equals torchvision's bit for bit, and its random numbers are uniform, independent and reproducible."""

import dataclasses
import itertools
import re
from typing import get_type_hints

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as tv
from torchvision.transforms import v2

from cifar10 import UsageError
from cifar10.config import values
from cifar10.data import augment, rng
from cifar10.data import pixels as pixels_
from tests.helpers import MEAN, STD

CPU = torch.device("cpu")
FLIP = " RandomHorizontalFlip"
CELLS = list(itertools.product(range(9), range(9), (0, 1)))  # top, left, flipped
NUM_IMAGES = 50_000


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Noise, a gradient, black and white: uint8 [4, 32, 32, 3]."""
    noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    gradient = torch.arange(32 * 32 * 3).view(32, 32, 3).remainder(256).to(torch.uint8)
    return torch.stack([noise, gradient, torch.zeros_like(noise), torch.full_like(noise, 255)])


def draws(indices: Tensor, seed: int = 0, epoch: int = 0, full_size: int = 32, channels: int = 3) -> rng.Draws:
    """The draws of these images, with a black pixel of 0, 1, 2."""
    return rng.Draws(seed, epoch, indices, torch.arange(channels).float(), full_size)


def crops(store: pixels_.PixelStore, indices: Tensor, text: str, seed: int = 0, epoch: int = 0) -> Tensor:
    """These images, cropped and flipped as --augment TEXT says."""
    cut = augment.crop_and_flip(augment.parse(text), store, draws(indices, seed, epoch))
    return pixels_.gather(store, indices, *cut)


def torchvision_pixels(image: Tensor, top: int, left: int, flipped: int) -> Tensor:
    """The image after RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor and Normalize, for these draws."""
    padded = tv.pad(Image.fromarray(image.numpy()), [4])
    cropped = tv.crop(padded, top, left, 32, 32)
    return tv.normalize(tv.to_tensor(tv.hflip(cropped) if flipped else cropped), MEAN, STD)


def test_every_cell_equals_torchvision_bit_for_bit(images: Tensor) -> None:
    store, normalize = pixels_.pack(images, padding=4), pixels_.Normalize(MEAN, STD, CPU)
    top, left, flipped = torch.tensor(CELLS).T
    for index, image in enumerate(images):
        ours = normalize(pixels_.gather(store, torch.full_like(top, index), top, left, flipped))
        theirs = torch.stack([torchvision_pixels(image, *cell) for cell in CELLS])
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("resize", "image_size", "padding", "flip", "kinds"),
    [(0, 0, 4, FLIP, 162), (0, 0, 4, "", 81), (0, 0, 0, FLIP, 2), (0, 30, 1, "", 25), (10, 8, 0, FLIP, 18)],
)
def test_every_crop_and_flip_is_drawn(
    images: Tensor, resize: int, image_size: int, padding: int, flip: str, kinds: int
) -> None:
    store = pixels_.pack(images[:1].expand(3_000, -1, -1, -1), padding, resize, image_size)
    pixels = crops(store, torch.arange(3_000), f"RandomCrop({padding}){flip}")
    assert pixels.shape[2:] == (image_size or 32, image_size or 32)
    assert len(pixels.flatten(1).unique(dim=0)) == kinds


@pytest.mark.parametrize(("padding", "resize", "image_size"), [(4, 0, 0), (0, 48, 40)])
def test_an_image_does_not_depend_on_its_batch(images: Tensor, padding: int, resize: int, image_size: int) -> None:
    store, text = pixels_.pack(images.repeat(25, 1, 1, 1), padding, resize, image_size), f"RandomCrop({padding}){FLIP}"
    together = crops(store, torch.arange(100), text, seed=5, epoch=7)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    for indices in (order, order[:9], order[9:10]):
        assert torch.equal(crops(store, indices, text, seed=5, epoch=7), together[indices])
    for other in ({"seed": 6, "epoch": 7}, {"seed": 5, "epoch": 8}):
        assert not torch.equal(crops(store, torch.arange(100), text, **other), together)


# --- grayscale images, other sizes, resizing ---------------------------------------------------------------------------


def gray(images: Tensor) -> Tensor:
    """uint8 [N, 28, 28, 1]."""
    return images[:, 2:30, 2:30, 1:2].contiguous()


def test_grayscale_images_equal_torchvision_in_every_cell(images: Tensor) -> None:
    store, normalize = pixels_.pack(gray(images), padding=2), pixels_.Normalize((0.1307,), (0.3081,), CPU)
    some = list(itertools.product(range(5), range(5), (0, 1)))
    top, left, flipped = torch.tensor(some).T
    for index, image in enumerate(gray(images)):
        ours = normalize(pixels_.gather(store, torch.full_like(top, index), top, left, flipped))
        padded = tv.pad(image.permute(2, 0, 1), [2])
        crops = [tv.crop(padded, *cell[:2], 28, 28) for cell in some]
        turned = [tv.hflip(crop) if cell[2] else crop for crop, cell in zip(crops, some, strict=True)]
        theirs = torch.stack([tv.normalize(crop / 255, (0.1307,), (0.3081,)) for crop in turned])
        assert ours.shape == (50, 1, 28, 28)
        assert torch.equal(ours, theirs)


def torchvision_resized(image: Tensor, size: int) -> Tensor:
    """torchvision's Resize, in its defaults: uint8 [S, S, C] -> uint8 [C, size, size]."""
    return v2.Resize(size)(image.permute(2, 0, 1))


# VGG's, with black around it, made smaller (where antialiasing shows), and made as small as what is stored with its padding
SIZES = [(256, 224, 0), (48, 50, 4), (20, 16, 2), (24, 32, 4), (33, 0, 0)]


@pytest.mark.parametrize(("resize", "image_size", "padding"), SIZES)
def test_resized_crops_equal_torchvision_to_a_gray_level(images: Tensor, resize: int, image_size: int, padding: int) -> None:
    store, size = pixels_.pack(images, padding, resize, image_size), image_size or resize
    end = resize + 2 * padding - size
    some = list(itertools.product({0, end}, {0, end // 2, end}, (0, 1)))
    top, left, flipped = torch.tensor(some).T
    normalize = pixels_.Normalize(MEAN, STD, CPU)
    for index, image in enumerate(images):
        pixels = pixels_.gather(store, torch.full_like(top, index), top, left, flipped)
        padded = tv.pad(torchvision_resized(image, resize), [padding])
        crops = [tv.crop(padded, *corner, size, size) for *corner, _ in some]
        theirs = torch.stack([tv.hflip(crop) if cell[2] else crop for crop, cell in zip(crops, some, strict=True)])
        assert (pixels.int() - theirs.int()).abs().max() <= 1
        floats = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])(theirs)
        assert (normalize(pixels) - floats).abs().max() <= 1.01 / 255 / min(STD)


@pytest.mark.parametrize(("resize", "image_size"), [(256, 224), (40, 32), (41, 32), (33, 30), (0, 24), (0, 27), (32, 0)])
def test_the_middle_equals_torchvisions_center_crop(images: Tensor, resize: int, image_size: int) -> None:
    pixels = pixels_.center(pixels_.pack(images, 0, resize, image_size), torch.tensor([2, 0, 3, 1]))
    for ours, image in zip(pixels, images[[2, 0, 3, 1]], strict=True):
        whole = torchvision_resized(image, resize or 32)
        theirs = tv.center_crop(whole, [image_size or resize or 32] * 2)
        assert ours.shape == theirs.shape
        assert (ours.int() - theirs.int()).abs().max() <= (1 if resize not in (0, 32) else 0)


def test_resizing_keeps_the_small_images_in_memory(images: Tensor) -> None:
    assert pixels_.pack(images, 0, 256, 224).pixels.nbytes == 4 * 32 * 32 * 4
    assert pixels_.pack(gray(images), 0).pixels.nbytes == 4 * 28 * 28


@pytest.mark.parametrize(("size", "padding"), [(32, 2), (24, 3), (40, 1), (8, 7), (28, 3)])
def test_reflected_borders_equal_torchvisions(images: Tensor, size: int, padding: int) -> None:
    """Of images as they are, made smaller once, enlarged batch by batch, and grayscale."""
    images = gray(images) if size == 28 else images
    store = pixels_.pack(images, padding, size, reflect=True)
    end = 2 * padding
    some = list(itertools.product({0, end}, {0, padding, end}, (0, 1)))
    top, left, flipped = torch.tensor(some).T
    for index, image in enumerate(images):
        whole = pixels_.center(pixels_.pack(image[None], 0, size), torch.tensor([0]))[0]
        padded = tv.pad(whole, [padding], padding_mode="reflect")
        crops = [tv.crop(padded, *corner, size, size) for *corner, _ in some]
        theirs = torch.stack([tv.hflip(crop) if cell[2] else crop for crop, cell in zip(crops, some, strict=True)])
        assert torch.equal(pixels_.gather(store, torch.full_like(top, index), top, left, flipped), theirs)


@pytest.mark.parametrize("resize", [0, 8, 40])
def test_a_border_as_wide_as_the_image_is_refused(images: Tensor, resize: int) -> None:
    pixels_.pack(images, (resize or 32) - 1, resize, reflect=True)
    with pytest.raises(ValueError, match="reflection"):
        pixels_.pack(images, resize or 32, resize, reflect=True)


# --- brightness and contrast ---------------------------------------------------------------------------------------------


def test_each_image_has_one_brightness_and_one_contrast() -> None:
    few = torch.arange(500)
    levels = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    given = levels.expand(500, 3, 2, 4).contiguous(memory_format=torch.channels_last)
    jitter = augment.BrightnessContrast(0.2, 0.5)
    seen = jitter(given, draws(few, 3, 2))
    assert seen.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(given, levels.expand_as(given)), "the input is unchanged"
    rows = seen[:, 0, 0].double()
    scale = rows[:, 3] - rows[:, 2]
    shift = rows[:, 1] / scale
    assert torch.allclose(seen.double(), ((levels + shift[:, None]) * scale[:, None])[:, None, None].expand_as(seen), atol=1e-5)
    for drawn, most in ((shift, 0.2), (scale - 1, 0.5)):
        assert drawn.abs().max() <= most + 1e-5
        assert drawn.min() < -0.95 * most
        assert drawn.max() > 0.95 * most
        assert drawn.mean().abs() < 5 * most / (3 * 500) ** 0.5
    assert abs(correlation(shift, scale)) < chance(500)
    assert torch.equal(jitter(given.bfloat16(), draws(few, 3, 2)), seen.bfloat16()), "rounded once"


def test_rotated_images_are_torchvisions(images: Tensor) -> None:
    pixels = images.permute(0, 3, 1, 2).repeat(10, 1, 1, 1)
    some, operation = draws(torch.arange(40), 3, 1), augment.RandomRotation(30)
    angles = (some.uniform("RandomRotation") * 30).tolist()
    theirs = [v2.functional.rotate(one, angle) for one, angle in zip(pixels, angles, strict=True)]
    same = (operation(pixels, some) == torch.stack(theirs)).float().mean()
    assert same > 0.999, "but for pixels half way between two"
    assert max(map(abs, angles)) <= 30
    assert min(angles) < -20 < 20 < max(angles)


# --- draws -------------------------------------------------------------------------------------------------------------


def cells(seed: int, epoch: int) -> Tensor:
    return draws(torch.arange(NUM_IMAGES), seed, epoch).below(162, "crop")


def correlation(ours: Tensor, theirs: Tensor) -> float:
    return torch.corrcoef(torch.stack([ours.double(), theirs.double()]))[0, 1].item()


def chance(num_pairs: int) -> float:
    """Five standard deviations of the correlation of that many independent pairs."""
    return 5 / num_pairs**0.5


def test_draws_are_uniform() -> None:
    """Chi-square over the cells: mean 161, standard deviation sqrt(2 * 161) = 17.9 for true randomness."""
    squares = []
    for seed, epoch in itertools.product((0, 2**31 - 1), (0, 1, 49)):
        counts = torch.bincount(cells(seed, epoch), minlength=162).double()
        assert len(counts) == 162
        expected = NUM_IMAGES / 162
        squares.append(((counts - expected) ** 2 / expected).sum().item())
    assert all(161 - 5 * 17.9 < square < 161 + 5 * 17.9 for square in squares)
    assert abs(sum(squares) / len(squares) - 161) < 5 * 17.9 / len(squares) ** 0.5


def test_draws_of_neighbors_are_not_correlated() -> None:
    first = cells(0, 0)
    for lag in (1, 2, 3, 10):
        assert abs(correlation(first, cells(0, lag))) < chance(NUM_IMAGES), f"epochs {lag} apart"
        assert abs(correlation(first, cells(lag, 0))) < chance(NUM_IMAGES), f"seeds {lag} apart"
        assert abs(correlation(first[lag:], first[:-lag])) < chance(NUM_IMAGES), f"images {lag} apart"
    assert abs(correlation(cells(0, 1), cells(1, 0))) < chance(NUM_IMAGES), "seed and epoch are not summed"
    assert abs(correlation(first % 2, first // 2)) < chance(NUM_IMAGES), "the crop does not predict the flip"


def test_an_order_is_a_permutation_of_its_own() -> None:
    order = rng.permutation(NUM_IMAGES, 0, 0)
    assert torch.equal(order.sort().values, torch.arange(NUM_IMAGES))
    for other in (rng.permutation(NUM_IMAGES, 0, 1), rng.permutation(NUM_IMAGES, 1, 0)):
        assert abs(correlation(order, other)) < chance(NUM_IMAGES)
    assert abs(correlation(order, torch.arange(NUM_IMAGES))) < chance(NUM_IMAGES)
    assert abs(correlation(order[1:], order[:-1])) < chance(NUM_IMAGES)


def test_order_and_augmentation_are_not_correlated() -> None:
    for epoch in range(3):
        place = rng.permutation(NUM_IMAGES, 0, epoch).argsort()  # of each image
        assert abs(correlation(place, cells(0, epoch))) < chance(NUM_IMAGES)
        assert abs(correlation(place, cells(0, epoch) % 2)) < chance(NUM_IMAGES)


def test_draws_are_the_same_on_every_platform() -> None:
    """Fixed numbers: if they changed, a resumed run would see other images."""
    assert rng.permutation(NUM_IMAGES, 0, 0)[:6].tolist() == [45632, 6899, 33758, 9665, 27080, 48233]
    assert rng.permutation(1_000, 2**31 - 1, 49)[:6].tolist() == [295, 62, 693, 471, 116, 692]
    assert cells(0, 0)[:12].tolist() == [52, 124, 161, 126, 31, 75, 68, 126, 95, 158, 11, 9]
    another = draws(torch.arange(12), 2**31 - 1, 49).below(162, "crop")
    drawn = [draws(torch.arange(2), 2**31 - 1, 49).uniform(name) for name in ("brightness", "contrast")]
    assert torch.stack(drawn).mul(2**23).int().tolist() == [[-2419706, 1185094], [-5558287, -5145]]
    assert another.tolist() == [130, 128, 120, 39, 58, 161, 68, 116, 21, 149, 83, 110]


@pytest.mark.parametrize("size", [20, 24, 31])
def test_smaller_images_are_torchvisions_resized_once(size: int) -> None:
    pixels = torch.randint(0, 256, (7, 32, 32, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    store = pixels_.pack(pixels, padding=2, resize=size)
    assert (store.resize, store.stored, store.side, store.size) == (0, size + 4, size + 4, size), "resized once"
    ours = pixels_.center(store, torch.arange(7))
    theirs = tv.resize(pixels.permute(0, 3, 1, 2), [size, size], antialias=True)
    assert torch.equal(ours, theirs)


def test_alternating_images_are_flipped_in_every_other_epoch(images: Tensor) -> None:
    many = images[:1].expand(2_000, -1, -1, -1)
    store, indices = pixels_.pack(many, padding=0), torch.arange(2_000)

    def flipped(epoch: int, kind: str = "AlternatingFlip") -> Tensor:
        seen = crops(store, indices, kind, seed=3, epoch=epoch)
        return (seen != seen[0]).flatten(1).any(dim=1) ^ (seen[0] == images[0].permute(2, 0, 1)).logical_not().any()

    first, second, third = (flipped(epoch) for epoch in range(3))
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert torch.equal(first, flipped(0, "RandomHorizontalFlip")), "the first epoch is random"
    assert 800 < first.sum() < 1_200
    assert not torch.equal(flipped(1, "RandomHorizontalFlip"), ~flipped(0, "RandomHorizontalFlip"))


def test_pixels_normalized_once_equal_autocasts(images: Tensor) -> None:
    store, normalize = pixels_.pack(images, padding=3), pixels_.Normalize(MEAN, STD, CPU)
    once = pixels_.normalized(store, normalize)
    indices = torch.arange(4).repeat(25)
    for epoch in range(3):
        both = [crops(s, indices, "RandomCrop(3) RandomHorizontalFlip", seed=1, epoch=epoch) for s in (store, once)]
        plain, ready = map(normalize, both)
        assert ready.dtype == torch.bfloat16
        assert ready.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(plain.to(torch.bfloat16), ready)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cutout_blacks_out_a_whole_square_anywhere(dtype: torch.dtype) -> None:
    indices = torch.arange(3_000)
    images = torch.full((3_000, 3, 16, 16), 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
    black, cutout = torch.arange(3).to(dtype), augment.Cutout(12)
    cut = cutout(images, draws(indices, 1, 2, full_size=16))
    assert cut.is_contiguous(memory_format=torch.channels_last), "else the loader copies it"
    gone = (cut != 9).any(dim=1)
    assert (gone.flatten(1).sum(dim=1) == 144).all()
    assert (gone.any(dim=1).sum(dim=1) == 12).all(), "a square, not scattered pixels"
    assert all(torch.equal(cut[:, c][gone], black[c].expand(144 * 3_000)) for c in range(3))
    corners = gone.flatten(1).to(torch.uint8).argmax(dim=1)
    counts = torch.bincount(corners // 16 * 5 + corners % 16, minlength=25)
    assert len(counts) == 25
    assert counts.min() > 70, "each of the 5 x 5 places"


# --- the command line --------------------------------------------------------------------------------------------------------


def every_operation() -> list[augment.Operation]:
    """One of each class, with valid arguments."""
    arguments = {int: 4, float: 0.25, tuple[float, float]: (0.25, 0.5), "degrees": 15.0, "num_magnitude_bins": 31, "p": 0.9}
    made = []
    for kind in values.classes(augment.Operation).values():
        types = get_type_hints(kind)
        made.append(kind(*(arguments.get(f.name, arguments.get(types[f.name], "reflect")) for f in dataclasses.fields(kind))))
    return made


@pytest.mark.parametrize("operation", every_operation(), ids=str)
def test_an_operation_is_written_read_and_described(operation: augment.Operation) -> None:
    assert augment.parse(str(operation)) == (operation,)
    assert operation.describe()
    operation.check(32)


APPLIED = [one for one in every_operation() if not isinstance(one, augment.GATHERED + augment.MIXING)]
CASES = [(one, dtype) for one in APPLIED for dtype in ((torch.uint8,) if one.on_pixels else (torch.float32, torch.bfloat16))]


@pytest.mark.parametrize(("operation", "dtype"), CASES, ids=lambda one: getattr(one, "name", one.__str__)())
def test_an_operation_is_a_function_of_seed_epoch_and_image(operation: augment.Operation, dtype: torch.dtype) -> None:
    images = torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = (images * 60 + 120).clamp(0, 255).to(dtype) if operation.on_pixels else images.to(dtype)
    given, indices = images.clone(), torch.arange(50)
    together = operation(images, draws(indices, 1, 2))
    assert (together.shape, together.dtype) == (images.shape, dtype)
    assert torch.equal(images, given), "the input is unchanged"
    assert torch.equal(operation(images[7:9], draws(indices[7:9], 1, 2)), together[7:9])
    assert torch.equal(operation(images[7:8], draws(indices[7:8], 1, 2)), together[7:8])
    for other in ((2, 2), (1, 3)):
        assert not torch.equal(operation(images, draws(indices, *other)), together)


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("none", "none"),
        ("", "none"),
        (" RandomCrop( 4 )  RandomHorizontalFlip() ", "RandomCrop(4) RandomHorizontalFlip"),
        ("RandomCrop(padding=2, padding_mode=reflect)", "RandomCrop(2, reflect)"),
        ("BrightnessContrast(1)", "BrightnessContrast(1)"),
        ("ColorJitter(hue=0.1) RandomAffine(0,[0.1, 0.2])", "ColorJitter(0, 0, 0, 0.1) RandomAffine(0, (0.1, 0.2))"),
        ("MixUp(0.2) CutMix(alpha=1.0)", "MixUp(0.2) CutMix"),
    ],
)
def test_an_augmentation_has_one_spelling(text: str, due: str) -> None:
    assert augment.as_text(augment.parse(text)) == due


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("RandomCorp(4)", "RandomCrop"),
        ("RandomCrop", "RandomCrop(padding, padding_mode)"),
        ("RandomCrop(1.5)", "whole number"),
        ("RandomCrop(4, mirror)", "constant or reflect"),
        ("RandomCrop(4", "RandomCrop(4"),
        ("__import__('os')", "__import__"),
        ("Cutout(4) Cutout(5)", "Cutout is given twice"),
        ("RandomHorizontalFlip AlternatingFlip", "twice"),
        ("Cutout(4) RandomCrop(4)", "come first"),
        ("MixUp Cutout(4)", "MixUp and CutMix last"),
        ("RandomAffine(10, 0.1)", "two numbers in brackets"),
    ],
)
def test_an_invalid_augmentation_is_refused_in_one_line(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=re.escape(named)) as error:
        augment.parse(text)
    assert str(error.value).startswith("invalid value for --augment: ")


@pytest.mark.parametrize(
    ("text", "size", "named"),
    [
        ("RandomCrop(28, reflect)", 28, "27"),
        ("RandomCrop(-1)", 32, "32"),
        ("BrightnessContrast(2)", 9, "1"),
        ("RandomAffine(0, (0.1, 2))", 32, "0 to 1"),
        ("RandomAffine(0, (0, 0), (2, 1))", 32, "lowest"),
        ("ColorJitter(0, 0, 0, 0.6)", 32, "0.5"),
        ("RandomErasing(0)", 32, "above 0"),
        ("RandAugment(2, 31)", 32, "30"),
        ("MixUp(0)", 32, "above 0"),
    ],
)
def test_an_argument_out_of_range_is_refused_with_the_range(text: str, size: int, named: str) -> None:
    with pytest.raises(UsageError, match=f"{re.escape(text)}.* {named}"):
        augment.check(augment.parse(text), size)
