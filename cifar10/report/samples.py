"""Images for reports: augmented training images and misclassified test images, uint8 [N, S, S, 3]."""

from dataclasses import dataclass

import numpy as np
import torch

from cifar10.config.ds_config import Batch
from cifar10.config.recipe import Recipe
from cifar10.data import augment, rng
from cifar10.data.dataset import Images, stratified_split
from cifar10.data.loader import TrainLoader
from cifar10.distributed.world import World
from cifar10.report.stats import worst_mistakes
from cifar10.run.predictions import Predictions

SHOWN = 24  # images in a grid


@dataclass(frozen=True)
class Mistake:
    """A misclassified test image."""

    index: int  # in the test split
    pixels: np.ndarray  # uint8 [S, S, 3]
    true: str
    predicted: str
    probability: float  # of the predicted class
    probability_of_true: float


def in_color(pixels: np.ndarray) -> np.ndarray:
    """uint8 [..., 1 or 3] -> [..., 3]."""
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def first_augmented(
    recipe: Recipe, images: Images, global_images: int = SHOWN, count: int = SHOWN
) -> tuple[np.ndarray, np.ndarray]:
    """The first training images as the loader augments them: uint8 [count, S, S, 3], and their labels.

    Augmentation depends only on an image's index, so only these few are packed. Mixed images, at most a global batch of them,
    have the probabilities of classes as labels: float32 [count, classes].
    """
    train, _ = stratified_split(images.labels, recipe.val_images, recipe.split_seed)
    places = order = rng.permutation(len(train), recipe.seed, 0)  # in the training split
    if mixed := augment.mixing(augment.parse(recipe.augment)):
        places, count = torch.cat((order[global_images - 1 : global_images], order)), 1 + min(count, global_images)
    places = places[:count]
    few, world = train[places.numpy()], World(0, 0, 1, 1, torch.device("cpu"), "python")
    classes = int(images.labels.max()) + 1
    loader = TrainLoader.of(images.pixels[few], images.labels[few], recipe, Batch(1, 1, 1, 1), world, classes=classes)
    seen, labels = loader.augmented(torch.arange(len(few)), loader.draws(0, places)), loader.labels
    if mixed:
        seen, labels = loader.mixed(seen, labels, epoch=0, step=0)
    return in_color(loader.normalize.to_pixels(seen).permute(0, 2, 3, 1).numpy()), labels.numpy()


def mistakes(predictions: Predictions, images: Images, classes: list[str], count: int = SHOWN) -> list[Mistake]:
    """The most confident mistakes, worst first; none if `images` are not the ones that the predictions are for."""
    tested = len(predictions.labels)
    if tested > len(images) or not np.array_equal(images.labels[:tested], predictions.labels):
        return []
    found = []
    for index in worst_mistakes(predictions, count).tolist():
        true, predicted, p = predictions.labels[index], predictions.predicted[index], predictions.probabilities[index]
        names = classes[true], classes[predicted]
        found.append(Mistake(index, in_color(images.pixels[index]), *names, float(p[predicted]), float(p[true])))
    return found
