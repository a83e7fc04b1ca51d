"""cifar10/augment.py and draws.py: the same pixels as torchvision's transforms, and draws that behave like random ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as tv

from cifar10 import augment, draws
from tests.helpers import MEAN, STD

CPU = torch.device("cpu")
CELLS = list(itertools.product(range(9), range(9), (0, 1)))  # top, left, mirrored
NUM_IMAGES = 50_000


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Noise, a gradient, black and white: uint8 [4, 32, 32, 3]."""
    noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    gradient = torch.arange(32 * 32 * 3).view(32, 32, 3).remainder(256).to(torch.uint8)
    return torch.stack([noise, gradient, torch.zeros_like(noise), torch.full_like(noise, 255)])


def torchvision_pixels(image: Tensor, top: int, left: int, mirrored: int) -> Tensor:
    """What RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor and Normalize make of an image for these draws."""
    padded = tv.pad(Image.fromarray(image.numpy()), [4])
    cropped = tv.crop(padded, top, left, 32, 32)
    return tv.normalize(tv.to_tensor(tv.hflip(cropped) if mirrored else cropped), MEAN, STD)


def test_every_cell_equals_torchvision_bit_for_bit(images: Tensor) -> None:
    store, normalise = augment.pack(images, padding=4), augment.Normalise(MEAN, STD, CPU)
    top, left, mirrored = torch.tensor(CELLS).T
    for index, image in enumerate(images):
        ours = normalise(augment.gather(store, torch.full_like(top, index), top, left, mirrored))
        theirs = torch.stack([torchvision_pixels(image, *cell) for cell in CELLS])
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_images_as_they_are_equal_torchvision(images: Tensor) -> None:
    for padding in (0, 4):
        pixels = augment.centre(augment.pack(images, padding), torch.tensor([3, 0, 1, 2, 0]))
        ours = augment.Normalise(MEAN, STD, CPU)(pixels)
        as_they_are = [tv.to_tensor(image.numpy()) for image in images[[3, 0, 1, 2, 0]]]
        assert torch.equal(ours, torch.stack([tv.normalize(image, MEAN, STD) for image in as_they_are]))


def test_batches_are_channels_last(images: Tensor) -> None:
    store = augment.pack(images, padding=4)
    pixels = augment.random_crop_and_mirror(store, torch.arange(4), seed=0, epoch=0, flip=True)
    assert augment.Normalise(MEAN, STD, CPU)(pixels).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("padding", "flip", "kinds"), [(4, True, 162), (4, False, 81), (0, True, 2), (0, False, 1), (1, True, 18)]
)
def test_every_cell_is_drawn(images: Tensor, padding: int, flip: bool, kinds: int) -> None:
    copies = images[:1].expand(3_000, -1, -1, -1)
    store = augment.pack(copies, padding)
    pixels = augment.random_crop_and_mirror(store, torch.arange(3_000), seed=0, epoch=0, flip=flip)
    assert len(pixels.flatten(1).unique(dim=0)) == kinds


def test_an_image_is_the_same_whatever_batch_it_is_in(images: Tensor) -> None:
    store = augment.pack(images.repeat(25, 1, 1, 1), padding=4)
    together = augment.random_crop_and_mirror(store, torch.arange(100), seed=5, epoch=7, flip=True)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    for indices in (order, order[:9], order[9:10]):
        assert torch.equal(augment.random_crop_and_mirror(store, indices, seed=5, epoch=7, flip=True), together[indices])
    for other in ({"seed": 6, "epoch": 7}, {"seed": 5, "epoch": 8}):
        assert not torch.equal(augment.random_crop_and_mirror(store, torch.arange(100), flip=True, **other), together)


# --- draws -------------------------------------------------------------------------------------------------------------


def cells(seed: int, epoch: int) -> Tensor:
    return draws.below(162, seed, epoch, torch.arange(NUM_IMAGES))


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


def test_draws_of_neighbours_are_not_correlated() -> None:
    here = cells(0, 0)
    for lag in (1, 2, 3, 10):
        assert abs(correlation(here, cells(0, lag))) < chance(NUM_IMAGES), f"epochs {lag} apart"
        assert abs(correlation(here, cells(lag, 0))) < chance(NUM_IMAGES), f"seeds {lag} apart"
        assert abs(correlation(here[lag:], here[:-lag])) < chance(NUM_IMAGES), f"images {lag} apart"
    assert abs(correlation(cells(0, 1), cells(1, 0))) < chance(NUM_IMAGES), "seed and epoch are not added up"
    assert abs(correlation(here % 2, here // 2)) < chance(NUM_IMAGES), "the crop does not tell the mirroring"


def test_an_order_is_a_permutation_of_its_own() -> None:
    order = draws.permutation(NUM_IMAGES, 0, 0)
    assert torch.equal(order.sort().values, torch.arange(NUM_IMAGES))
    for other in (draws.permutation(NUM_IMAGES, 0, 1), draws.permutation(NUM_IMAGES, 1, 0)):
        assert abs(correlation(order, other)) < chance(NUM_IMAGES)
    assert abs(correlation(order, torch.arange(NUM_IMAGES))) < chance(NUM_IMAGES)
    assert abs(correlation(order[1:], order[:-1])) < chance(NUM_IMAGES)


def test_order_and_augmentation_are_not_correlated() -> None:
    for epoch in range(3):
        place = draws.permutation(NUM_IMAGES, 0, epoch).argsort()  # of each image
        assert abs(correlation(place, cells(0, epoch))) < chance(NUM_IMAGES)
        assert abs(correlation(place, cells(0, epoch) % 2)) < chance(NUM_IMAGES)


def test_draws_are_the_same_on_every_platform() -> None:
    """Fixed numbers: were they to change, a run resumed or repeated elsewhere would see other images."""
    assert draws.permutation(NUM_IMAGES, 0, 0)[:6].tolist() == [45632, 6899, 33758, 9665, 27080, 48233]
    assert draws.permutation(1_000, 2**31 - 1, 49)[:6].tolist() == [295, 62, 693, 471, 116, 692]
    assert cells(0, 0)[:12].tolist() == [52, 124, 161, 126, 31, 75, 68, 126, 95, 158, 11, 9]
    another = draws.below(162, 2**31 - 1, 49, torch.arange(12))
    assert another.tolist() == [130, 128, 120, 39, 58, 161, 68, 116, 21, 149, 83, 110]
