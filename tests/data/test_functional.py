"""Batched operations equal torchvision's for the same numbers: within 1 of 255, and pixels from the same places."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms import AutoAugmentPolicy, v2
from torchvision.transforms.v2 import functional as tv

from cifar10.data import augment, functional, rng
from cifar10.data.functional import NAMES

COUNT = 24
NUMBERS = torch.linspace(0, 1, COUNT, dtype=torch.float64)


def pictures(channels: int = 3, size: int = 32) -> Tensor:
    """Noise, smooth color and nearly flat images: uint8 [COUNT, C, S, S]."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(COUNT, channels, size, size, generator=generator)
    smooth = torch.nn.functional.interpolate(noise[:, :, :4, :4], size=size, mode="bicubic").clamp(0, 1)
    images = torch.where((torch.arange(COUNT) % 3 == 0)[:, None, None, None], noise, smooth)
    images[1::3] = 0.4 + images[1::3] * 0.05
    return (images * 255).to(torch.uint8)


def assert_same(ours: Tensor, theirs: list[Tensor]) -> None:
    """Within one level everywhere, but for the few pixels that lie half way between two."""
    different = (ours.int() - torch.stack(theirs).int()).abs() > 1
    assert ours.dtype == torch.uint8
    assert different.float().mean() < 5e-4


LEVELS = {"Posterize": 8 * NUMBERS, "Rotate": 135 * (2 * NUMBERS - 1), "TranslateX": 31 * (2 * NUMBERS - 1)}
LEVELS |= {"TranslateY": LEVELS["TranslateX"], "Solarize": NUMBERS}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_of_the_policies_is_torchvisions(name: str, channels: int) -> None:
    images, policy = pictures(channels), v2.RandAugment()
    levels = LEVELS.get(name, 0.99 * (2 * NUMBERS - 1))
    ours = functional.BY_NAME[name](images, levels)
    apply = policy._apply_image_or_video_transform
    pairs = zip(images, levels.tolist(), strict=True)
    assert_same(ours, [apply(image, name, level, policy.interpolation, policy._fill) for image, level in pairs])
    if name != "Identity" and (channels, name) != (1, "Color"):
        assert not torch.equal(ours, images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (functional.brightness, tv.adjust_brightness, 0.0, 2.0),
        (functional.contrast, tv.adjust_contrast, 0.0, 2.0),
        (functional.saturation, tv.adjust_saturation, 0.0, 3.0),
        (functional.hue, tv.adjust_hue, -0.5, 0.5),
    ],
)
def test_a_change_of_color_is_torchvisions(ours: Callable, theirs: Callable, low: float, high: float, channels: int) -> None:
    images, numbers = pictures(channels), (low + (high - low) * NUMBERS).float()
    expected = [theirs(image, number) for image, number in zip(images, numbers.tolist(), strict=True)]
    assert (ours(images, numbers).int() - torch.stack(expected).int()).abs().max() <= 1


@pytest.mark.parametrize("size", [32, 28, 21])
def test_an_affine_change_is_torchvisions(size: int) -> None:
    images, turn = pictures(size=size), 180 * (2 * NUMBERS - 1)
    across, down, scale, shear = (9 * NUMBERS).round(), (-7 * NUMBERS).round(), 0.5 + NUMBERS, 40 * NUMBERS - 20
    ours = functional.affine(images, turn, (across, down), scale, (shear, 0.0))
    numbers = zip(images, *(n.tolist() for n in (turn, across, down, scale, shear)), strict=True)
    assert_same(ours, [tv.affine(image, a, [x, y], z, [s, 0.0]) for image, a, x, y, z, s in numbers])


# --- whole augmentations, with the numbers that they draw -----------------------------------------------------------------


def draws(count: int = COUNT, epoch: int = 1) -> rng.Draws:
    return rng.Draws(7, epoch, torch.arange(count), torch.zeros(3), 32)


def test_color_jitter_is_torchvisions_in_each_images_own_order() -> None:
    images, some = pictures(), draws()
    ours = augment.ColorJitter(0.4, 0.3, 0.2, 0.1)(images, some)
    names = ("brightness", "contrast", "saturation", "hue")
    numbers = [
        some.between(*bounds, f"ColorJitter {name}")
        for name, bounds in zip(names, [(0.6, 1.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1)], strict=True)
    ]
    orders, theirs = some.below(24, "ColorJitter order").tolist(), []
    for place, image in enumerate(images):
        for turn in list(augment.itertools.permutations(range(4)))[orders[place]]:
            image = getattr(tv, f"adjust_{names[turn]}")(image, numbers[turn][place].item())
        theirs.append(image)
    assert len(set(orders)) > 10
    assert (ours.int() - torch.stack(theirs).int()).abs().max() <= 3, "1 for each of the first three, amplified"


def test_random_affine_stays_in_its_ranges() -> None:
    some, operation = draws(), augment.RandomAffine(30, (0.1, 0.2), (0.8, 1.2), 10)
    ours, images = operation(pictures(), some), pictures()
    theirs = []
    for place, image in enumerate(images):
        angle, shear = 30 * some.uniform("RandomAffine")[place].item(), 10 * some.uniform("RandomAffine shear")[place].item()
        moved = [round(s * 32 * some.uniform(f"RandomAffine {w}")[place].item()) for s, w in ((0.1, "across"), (0.2, "down"))]
        theirs.append(tv.affine(image, angle, moved, some.between(0.8, 1.2, "RandomAffine scale")[place].item(), [shear, 0.0]))
    assert_same(ours, theirs)


def drawn_policy(
    operation: augment.Operation, some: rng.Draws, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[list[str], Tensor]]:
    """The operations' names and magnitudes that an augmentation applied, turn by turn."""
    seen, by_name = [], functional.by_name
    monkeypatch.setattr(
        functional, "by_name", lambda i, which, m: seen.append(([NAMES[w] for w in which], m)) or by_name(i, which, m)
    )
    operation(pictures()[:1].repeat(len(some.indices), 1, 1, 1), some)
    return seen


@pytest.mark.parametrize(
    ("operation", "theirs", "bins"),
    [(augment.RandAugment(2, 9), v2.RandAugment, [9]), (augment.TrivialAugmentWide(), v2.TrivialAugmentWide, range(31))],
)
def test_a_policy_draws_torchvisions_operations_evenly(
    operation: augment.Operation, theirs: type, bins: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    count, space = 4_000, theirs._AUGMENTATION_SPACE
    for names, magnitudes in drawn_policy(operation, draws(count), monkeypatch):
        for name, (levels, signed) in space.items():
            found = magnitudes[torch.tensor([one == name for one in names])]
            assert abs(len(found) - count / 14) < 5 * math.sqrt(count / 14)
            due = levels(31, 32, 32)
            due = {0.0} if due is None else {float(due[level]) for level in bins}
            assert set(found.tolist()) <= due | ({-level for level in due} if signed else set())
            if signed:
                assert 0.3 < (found < 0).float().mean() < 0.7


def test_auto_augment_draws_the_policy_for_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    count, some, operation = 2_000, draws(2_000), augment.AutoAugment()
    policies = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)._policies
    pairs = some.below(25, "AutoAugment").tolist()
    assert set(pairs) == set(range(25))
    for turn, (names, _) in enumerate(drawn_policy(operation, some, monkeypatch)):
        assert names == [policies[pair][turn][0] for pair in pairs]
    flat = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    changed = (operation(flat.expand(count, -1, -1, -1), some) != flat).flatten(1).any(dim=1)
    for pair in (1, 3, 21):  # of operations that change such an image
        (_, first, _), (_, second, _) = policies[pair]
        chance, share = 1 - (1 - first) * (1 - second), changed[torch.tensor(pairs) == pair].float()
        assert abs(share.mean() - chance) < 5 * math.sqrt(chance * (1 - chance) / len(share))


def test_random_grayscale_and_erasing_change_the_share_that_they_should() -> None:
    images = pictures()[:1].repeat(2_000, 1, 1, 1)
    gray = augment.RandomGrayscale(0.3)(images, draws(2_000))
    is_gray = (gray[:, 0] == gray[:, 2]).flatten(1).all(dim=1)
    assert torch.equal(gray[is_gray][0], tv.rgb_to_grayscale(images[0], 3))
    assert torch.equal(gray[~is_gray], images[~is_gray])
    assert 0.25 < is_gray.float().mean() < 0.35
    erased = augment.RandomErasing(0.5)(images.float() + 1, draws(2_000)) == 0
    share = erased.float().flatten(1).mean(dim=1)
    assert 0.45 < (share > 0).float().mean() < 0.55
    assert share[share > 0].min() > 0.01
    assert 0.3 < share.max() < 0.36
    box = erased[:, 0].any(dim=2).sum(dim=1) * erased[:, 0].any(dim=1).sum(dim=1)
    assert torch.equal(box, erased[:, 0].flatten(1).sum(dim=1)), "rectangles"
