"""The same global batches at any world size and from any step; every evaluation image exactly once."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from cifar10.config.ds_config import Batch
from cifar10.config.recipe import Recipe
from cifar10.data import augment, loader, rng
from cifar10.data import pixels as pixels_
from cifar10.data.loader import EvaluationLoader, MicroBatch, TrainLoader
from tests.helpers import MEAN, STD

CPU = torch.device("cpu")
NUM_IMAGES, GLOBAL_IMAGES = 1_250, 60
STEPS = 20  # 1,250 / 60, and 50 images are left over
WORLD = SimpleNamespace(device=CPU, rank=0, size=1)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Noise: uint8 [N, 32, 32, 3]."""
    shape = (NUM_IMAGES, 32, 32, 3)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def train_loader(pixels: Tensor, *, rank: int = 0, world_size: int = 1, accumulation: int = 1, seed: int = 4) -> TrainLoader:
    """A loader whose labels are the indices of the images."""
    return TrainLoader(
        store=pixels_.pack(pixels, padding=4),
        labels=torch.arange(NUM_IMAGES),
        normalize=pixels_.Normalize(MEAN, STD, CPU),
        operations=augment.parse("RandomCrop(4) RandomHorizontalFlip"),
        seed=seed,
        global_images=GLOBAL_IMAGES,
        micro_images=GLOBAL_IMAGES // world_size // accumulation,
        rank=rank,
        world_size=world_size,
    )


def one(micro_batches: list[MicroBatch]) -> MicroBatch:
    """A rank's micro-batches of a step as one batch."""
    return torch.cat([images for images, _ in micro_batches]), torch.cat([labels for _, labels in micro_batches])


def same_batches(ours: list[list[MicroBatch]], theirs: list[list[MicroBatch]]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b)
        for left, right in zip(ours, theirs, strict=True)
        for a, b in zip(itertools.chain(*left), itertools.chain(*right), strict=True)
    )


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 3), (2, 1), (4, 3)])
def test_a_global_batch_is_the_same_at_any_world_size(pixels: Tensor, world_size: int, accumulation: int) -> None:
    alone = list(train_loader(pixels).epoch(2))
    ranks = [train_loader(pixels, rank=r, world_size=world_size, accumulation=accumulation) for r in range(world_size)]
    shares = [list(rank.epoch(2)) for rank in ranks]
    assert {len(share) for share in shares} == {STEPS}
    for step in range(STEPS):
        for share in shares:
            assert [len(labels) for _, labels in share[step]] == [GLOBAL_IMAGES // world_size // accumulation] * accumulation
            assert {(images.dtype, labels.dtype) for images, labels in share[step]} == {(torch.float32, torch.int64)}
            assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in share[step])
        images, labels = one([micro for share in shares for micro in share[step]])
        (expected_images, expected_labels), order = alone[step][0], labels.argsort()
        assert len(labels.unique()) == GLOBAL_IMAGES, "ranks share no image"
        assert torch.equal(labels[order], expected_labels.sort().values)
        assert torch.equal(images[order], expected_images[expected_labels.argsort()]), "the same crops and flips"


def test_an_epoch_visits_each_image_at_most_once_and_drops_the_partial_batch(pixels: Tensor) -> None:
    seen = torch.cat([one(step)[1] for step in train_loader(pixels).epoch(0)])
    assert train_loader(pixels).steps_per_epoch == STEPS
    assert len(seen) == STEPS * GLOBAL_IMAGES == len(seen.unique())


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 2)])
def test_an_epoch_resumes_from_any_step_bit_for_bit(pixels: Tensor, world_size: int, accumulation: int) -> None:
    train = train_loader(pixels, rank=world_size - 1, world_size=world_size, accumulation=accumulation)
    whole = list(train.epoch(1))
    chunk_steps = loader.CHUNK_IMAGES * world_size // GLOBAL_IMAGES
    assert 1 < chunk_steps < STEPS - 1, "this test crosses the boundary of a chunk"
    for first in (0, 1, chunk_steps - 1, chunk_steps, chunk_steps + 1, STEPS - 1, STEPS):
        assert same_batches(list(train.epoch(1, first_step=first)), whole[first:])


def test_how_many_images_are_gathered_at_once_changes_nothing(pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(train_loader(pixels, accumulation=2).epoch(1))
    for chunk_images in (1, 100_000):
        monkeypatch.setattr(loader, "CHUNK_IMAGES", chunk_images)
        assert same_batches(list(train_loader(pixels, accumulation=2).epoch(1)), whole)


def test_of_larger_images_fewer_are_gathered_at_once(pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [loader.at_once(512, size) for size in (28, 32, 64, 224, 1024)] == [512, 512, 128, 10, 1]
    gathered, gather = [], pixels_.gather
    monkeypatch.setattr(
        pixels_, "gather", lambda store, indices, *cut: gathered.append(len(indices)) or gather(store, indices, *cut)
    )
    train = dataclasses.replace(train_loader(pixels), store=pixels_.pack(pixels, 0, 128, 96), global_images=4, micro_images=2)
    for _ in itertools.islice(train.epoch(0), 20):
        pass
    store = pixels_.pack(pixels[:250], 0, 128, 96)
    evaluated = EvaluationLoader(store, torch.arange(250), pixels_.Normalize(MEAN, STD, CPU), 0, 1)
    batches = [len(labels) for _, labels in evaluated]
    assert gathered == [56, 56, *batches]  # 512 / 9, in whole steps
    assert batches == [111, 111, 28]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_images", [0, 3, 250])
def test_evaluation_sees_every_image_exactly_once(pixels: Tensor, num_images: int, world_size: int) -> None:
    store, normalize = pixels_.pack(pixels[:num_images], padding=0), pixels_.Normalize(MEAN, STD, CPU)
    loaders = [
        EvaluationLoader(store, torch.arange(num_images), normalize, rank, world_size, batch_images=40)
        for rank in range(world_size)
    ]
    assert {len(one_rank) for one_rank in loaders} == {num_images}
    batches = list(itertools.chain(*loaders))
    assert all(0 < len(labels) <= 40 for _, labels in batches)
    seen = torch.cat([torch.zeros(0, dtype=torch.int64), *(labels for _, labels in batches)])
    assert seen.sort().values.tolist() == list(range(num_images))
    for images, labels in batches:
        assert torch.equal(images, normalize(pixels_.center(store, labels)))


EVERY = (  # in an order that goes from pixels to normalized images and back
    "RandomCrop(4) RandomHorizontalFlip Cutout(8) RandomRotation(15) RandomAffine(10, (0.1, 0.1)) RandomGrayscale"
    " ColorJitter(0.2, 0.2, 0.2, 0.1) RandAugment TrivialAugmentWide AutoAugment BrightnessContrast(0.1) RandomErasing"
    " MixUp CutMix(0.5)"
)


def mixing_loader(pixels: Tensor, text: str, **how: int) -> TrainLoader:
    return dataclasses.replace(train_loader(pixels, **how), operations=augment.parse(text), classes=NUM_IMAGES)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 3), (2, 1), (4, 3)])
def test_every_augmentation_is_the_same_at_any_world_size_and_after_a_resume(
    pixels: Tensor, world_size: int, accumulation: int
) -> None:
    alone = list(mixing_loader(pixels, EVERY).epoch(2))
    ranks = [mixing_loader(pixels, EVERY, rank=r, world_size=world_size, accumulation=accumulation) for r in range(world_size)]
    shares = [list(rank.epoch(2, first_step=7)) for rank in ranks]
    for step, (expected,) in enumerate(alone[7:]):
        images, targets = one([micro for share in shares for micro in share[step]])
        assert torch.equal(images, expected[0])
        assert torch.equal(targets, expected[1])
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(alone[0][0][0], next(mixing_loader(pixels, EVERY).epoch(3))[0][0])


@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_neighbors_are_mixed_as_by_torchvision(pixels: Tensor, name: str) -> None:
    train = mixing_loader(pixels, f"RandomCrop(4) {name}(0.7)")
    plain = dataclasses.replace(train, operations=train.operations[:1])
    shares = []
    for step, (((images, targets),), ((whole, labels),)) in enumerate(zip(train.epoch(1), plain.epoch(1), strict=True)):
        shares.append(targets[0, labels[0]].item())
        assert (targets.argmax(dim=1) == (labels if shares[-1] > 0.5 else labels.roll(1))).all(), "the dominant label"
        theirs = getattr(v2, name)(alpha=0.7, num_classes=NUM_IMAGES)
        random = rng.of_step(4, 1, step)
        random.choice([name])
        share = random.betavariate(0.7, 0.7)
        if name == "MixUp":
            params = {"lam": share}
        else:  # the box is where the image was replaced
            changed = (images != whole).any(dim=1).any(dim=0)
            rows, columns = changed.any(dim=1).nonzero().flatten().tolist(), changed.any(dim=0).nonzero().flatten().tolist()
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows else (0, 0, 0, 0)
            params = {"box": box, "lam_adjusted": 1 - (box[2] - box[0]) * (box[3] - box[1]) / 32**2}
            assert params["lam_adjusted"] >= share - 1e-6, "smaller only at the border"
        params |= {"labels": labels, "batch_size": len(labels)}
        assert torch.allclose(images, theirs.transform(whole, params), atol=1e-6)
        assert torch.allclose(targets, theirs.transform(labels, params), atol=1e-6)
    assert max(shares) > 0.9
    assert min(shares) < 0.4


def test_with_several_ways_of_mixing_each_step_uses_one(pixels: Tensor) -> None:
    both, kinds = mixing_loader(pixels, "MixUp CutMix"), set()
    for ((images, _),) in both.epoch(0):
        pixels_seen = both.normalize.to_pixels(images).float()
        kinds.add(bool(((both.normalize(pixels_seen.to(torch.uint8)) - images).abs() < 1e-4).all()))
    assert kinds == {True, False}, "whole pixels, and means of pixels"


def test_the_first_epochs_are_on_smaller_images(pixels: Tensor) -> None:
    recipe = Recipe(epochs=4, warmup_epochs=0, val_images=0, first_sizes=(16, 24), first_epochs=(2, 1), augment="RandomCrop(2)")
    one = TrainLoader.of(pixels.numpy(), torch.arange(NUM_IMAGES).numpy(), recipe, Batch(60, 60, 1, 1), WORLD)
    whole = dataclasses.replace(one, first_stores=())
    sizes = [{images.shape[-1] for step in one.epoch(epoch) for images, _ in step} for epoch in range(5)]
    assert sizes == [{16}, {16}, {24}, {32}, {32}]
    for epoch in range(4):
        labels = [torch.cat([labels for _, labels in step]) for step in one.epoch(epoch)]
        assert all(map(torch.equal, labels, [torch.cat([labels for _, labels in step]) for step in whole.epoch(epoch)]))
    assert same_batches(list(one.epoch(3)), list(whole.epoch(3)))
    assert same_batches(list(one.epoch(1, first_step=7)), list(one.epoch(1))[7:])


def test_the_first_images_are_not_augmented(pixels: Tensor) -> None:
    one = train_loader(pixels)
    expected = one.normalize(pixels[:5].permute(0, 3, 1, 2))
    assert torch.equal(one.first_images(5), expected)


@pytest.mark.parametrize("bf16", [False, True])
def test_operations_follow_one_another(pixels: Tensor, bf16: bool) -> None:
    text = "RandomCrop(4, reflect) RandomHorizontalFlip BrightnessContrast(0.3, 0.2) Cutout(8)"
    recipe = Recipe(epochs=2, warmup_epochs=0, val_images=0, augment=text)
    one = TrainLoader.of(pixels.numpy(), torch.arange(NUM_IMAGES).numpy(), recipe, Batch(60, 60, 1, 1), WORLD, bf16=bf16)
    *gathered, jitter, cutout = one.operations
    plain = dataclasses.replace(one, operations=tuple(gathered))
    cut = dataclasses.replace(plain, operations=(*gathered, cutout))
    (images, indices), (whole, _), (black, _) = (next(each.epoch(1))[0] for each in (one, plain, cut))
    expected = jitter(whole, rng.Draws(recipe.seed, 1, indices, torch.zeros(3), 32))
    inside = (black != whole).any(dim=1, keepdim=True)
    assert torch.equal(images, torch.where(inside, black, expected))
    assert not torch.equal(expected, whole)


def test_borders_have_the_recipes_padding_mode(pixels: Tensor) -> None:
    how = {"augment": "RandomCrop(2, reflect)", "first_sizes": (16,), "first_epochs": (1,)}
    recipe = Recipe(epochs=2, warmup_epochs=0, val_images=0, **how)
    one = TrainLoader.of(pixels.numpy(), torch.arange(NUM_IMAGES).numpy(), recipe, Batch(60, 60, 1, 1), WORLD)
    ((_, small),) = one.first_stores
    for store, size in ((small, 16), (one.store, 0)):
        assert torch.equal(store.pixels, pixels_.pack(pixels, 2, size, reflect=True).pixels)
        assert not torch.equal(store.pixels, pixels_.pack(pixels, 2, size).pixels)


@pytest.mark.parametrize("bf16", [False, True])
def test_cutout_is_black(pixels: Tensor, bf16: bool) -> None:
    recipe = Recipe(epochs=2, warmup_epochs=0, val_images=0, augment="Cutout(10)")
    recipe = dataclasses.replace(recipe, first_sizes=(16,), first_epochs=(1,))
    given = torch.clamp(pixels, min=1).numpy(), torch.arange(NUM_IMAGES).numpy()  # nothing in them is black
    one = TrainLoader.of(*given, recipe, Batch(60, 60, 1, 1), WORLD, bf16=bf16)
    plain = dataclasses.replace(one, operations=())
    black = (torch.zeros(3) - torch.tensor(MEAN)) / torch.tensor(recipe.std)
    for epoch, side in ((0, 5), (1, 10)):
        (images, _), (whole, _) = next(one.epoch(epoch))[0], next(plain.epoch(epoch))[0]
        changed = (images != whole).any(dim=1)
        assert (changed.flatten(1).sum(dim=1) == side**2).all()
        seen = images.permute(0, 2, 3, 1)[changed].float()
        assert torch.allclose(seen, black.expand_as(seen), atol=0.01 if bf16 else 1e-6)
