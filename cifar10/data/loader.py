"""Data loaders for training and evaluation. No worker processes: images are on the device, and a batch is one gather."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar10.config.ds_config import Batch
from cifar10.config.recipe import Recipe
from cifar10.data import augment, pixels, rng
from cifar10.data.pixels import Normalize, PixelStore
from cifar10.distributed.world import World

CHUNK_IMAGES = 512  # images gathered at once: small steps share the launch overhead of a dozen operations
MOST_BYTES_ON_GPU = 2 * 1024**3  # that normalized images may take, of each size that they are trained at
FULL_SIZE = 32  # height and width; larger images are gathered in smaller chunks

MicroBatch = tuple[Tensor, Tensor]  # float32 [B, C, S, S] channels last, int64 [B] or, mixed, float32 [B, classes]


def at_once(num_images: int, size: int) -> int:
    """Chunk size for images of size x size with about as many pixels as `num_images` of 32x32."""
    return max(1, num_images * FULL_SIZE**2 // max(FULL_SIZE, size) ** 2)


@dataclass(frozen=True)
class TrainLoader:
    """Batches of augmented training images for one rank.

    Step s of an epoch trains on positions s * global_images .. (s+1) * global_images of that epoch's permutation at any world
    size; each rank takes its slice of them. The last partial global batch of an epoch is dropped.
    """

    store: PixelStore
    labels: Tensor  # int64 [N], on the device
    normalize: Normalize
    operations: tuple[augment.Operation, ...]
    seed: int
    global_images: int
    micro_images: int
    rank: int
    world_size: int
    first_stores: tuple[tuple[int, PixelStore], ...] = ()  # progressive resizing: (end epoch, smaller images)
    classes: int = 10  # of probabilities, for MixUp and CutMix

    @classmethod
    def of(
        cls,
        images: np.ndarray,
        labels: np.ndarray,
        recipe: Recipe,
        batch: Batch,
        world: World,
        *,
        bf16: bool = False,
        classes: int = 10,
    ) -> TrainLoader:
        """A loader for images uint8 [N, S, S, C] and labels int64 [N], augmented as the recipe says.

        For training in `bf16`, RGB images are stored as bf16, unless an operation needs their pixels or a GPU would be filled.
        """
        on_device, untils = torch.from_numpy(images).to(world.device), itertools.accumulate(recipe.first_epochs)
        normalize, operations = Normalize(recipe.mean, recipe.std, world.device), augment.parse(recipe.augment)
        crop = augment.find(operations, augment.RandomCrop) or augment.RandomCrop(0)

        def packed(resize: int, image_size: int = 0) -> PixelStore:
            reflect = crop.padding_mode == "reflect"
            store = pixels.pack(on_device, crop.padding, resize, image_size, reflect=reflect)
            fits = world.device.type == "cpu" or store.pixels.numel() * pixels.NORMALIZED_BYTES <= MOST_BYTES_ON_GPU
            once = bf16 and fits and store.channels == 3 and not store.resize
            once = once and not any(operation.on_pixels for operation in operations)
            return pixels.normalized(store, normalize) if once else store

        return cls(
            store=packed(recipe.resize, recipe.image_size),
            first_stores=tuple(zip(untils, map(packed, recipe.first_sizes), strict=True)),
            labels=torch.from_numpy(labels).to(world.device),
            normalize=normalize,
            operations=operations,
            seed=recipe.seed,
            global_images=batch.global_images,
            micro_images=batch.micro_images,
            rank=world.rank % batch.data_ranks,  # as in DeepSpeed's grid of pipelines
            world_size=batch.data_ranks,
            classes=classes,
        )

    def first_images(self, num_images: int) -> Tensor:
        """The first training images without augmentation: [B, C, S, S]."""
        return self.normalize(pixels.center(self.store, torch.arange(num_images, device=self.labels.device)))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.labels) // self.global_images

    def rank_indices(self, epoch: int) -> Tensor:
        """Indices of this rank's images: int64 [steps, images per rank and step].

        To be mixed, they follow the image before them in the global batch, and the first one follows the last.
        """
        order = rng.permutation(len(self.labels), self.seed, epoch)
        steps = order[: self.steps_per_epoch * self.global_images].view(self.steps_per_epoch, self.global_images)
        share = self.global_images // self.world_size
        first = self.rank * share
        if not augment.mixing(self.operations):
            return steps[:, first : first + share]
        return torch.cat((steps[:, first - 1 :][:, :1], steps[:, first : first + share]), dim=1)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each step of `epoch`, from `first_step` on."""
        rest, mixing = self.rank_indices(epoch)[first_step:], augment.mixing(self.operations)
        per_step, indices = rest.shape[1], rest.reshape(-1)
        chunk = per_step * max(1, at_once(CHUNK_IMAGES, self.store.size) // per_step)  # whole steps
        draws, positions = self.draws(epoch, indices), rng.to_device(indices, self.labels.device)
        for first in range(0, len(positions), chunk):
            part = slice(first, first + chunk)
            images, labels = self.augmented(positions[part], replace(draws, part=part)), self.labels[positions[part]]
            steps = zip(images.split(per_step), labels.split(per_step), strict=True)
            for step, seen in enumerate(steps, first_step + first // per_step):
                seen = self.mixed(*seen, epoch, step) if mixing else seen
                yield list(zip(*(half.split(self.micro_images) for half in seen), strict=True))

    def draws(self, epoch: int, indices: Tensor) -> rng.Draws:
        """The random numbers in `epoch` for images with these indices in the training split: int64 [N], on the CPU."""
        black = self.normalize(torch.zeros(1, self.store.channels, 1, 1, dtype=torch.uint8, device=self.labels.device))
        return rng.Draws(self.seed, epoch, indices, black[0, :, 0, 0], self.store.size)

    def augmented(self, positions: Tensor, draws: rng.Draws) -> Tensor:
        """The stored images at `positions`, augmented as drawn: int64 [B] -> normalized [B, C, S, S]."""
        store = next((store for until, store in self.first_stores if draws.epoch < until), self.store)
        images = pixels.gather(store, positions, *augment.crop_and_flip(self.operations, store, draws))
        for operation in self.operations:
            if isinstance(operation, augment.GATHERED + augment.MIXING):
                continue
            if operation.on_pixels and images.dtype != torch.uint8:
                images = self.normalize.to_pixels(images)
            images = operation(images if operation.on_pixels else self._normalized(images), draws)
        return self._normalized(images).contiguous(memory_format=torch.channels_last)

    def _normalized(self, images: Tensor) -> Tensor:
        return images if images.dtype == torch.float32 else self.normalize(images)

    def mixed(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> MicroBatch:
        """[1 + B, C, S, S], led by the image before them in the global batch, and labels -> [B, ...], float32 [B, classes]."""
        random = rng.of_step(self.seed, epoch, step)
        operation = random.choice(augment.mixing(self.operations))
        mixed, share = operation.mix(images[1:], images[:-1], random)
        targets = F.one_hot(labels, self.classes).float()
        return mixed, targets[1:] * share + targets[:-1] * (1 - share)


@dataclass(frozen=True)
class EvaluationLoader:
    """Batches of a split without augmentation, center-cropped; each image is on exactly one rank, without padding."""

    store: PixelStore
    labels: Tensor  # int64 [N], on the device
    normalize: Normalize
    rank: int
    world_size: int
    batch_images: int = 1_000  # at 32x32; fewer if images are larger

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray, recipe: Recipe, world: World) -> EvaluationLoader:
        """A loader for images uint8 [N, S, S, C] and labels int64 [N]."""
        store = pixels.pack(torch.from_numpy(images).to(world.device), 0, recipe.resize, recipe.image_size)
        normalize = Normalize(recipe.mean, recipe.std, world.device)
        return cls(store, torch.from_numpy(labels).to(world.device), normalize, world.rank, world.size)

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[MicroBatch]:
        mine = torch.arange(len(self.labels), device=self.labels.device)[self.rank :: self.world_size]
        for indices in mine.split(at_once(self.batch_images, self.store.size)) if len(mine) else ():
            yield self.normalize(pixels.center(self.store, indices)), self.labels[indices]
