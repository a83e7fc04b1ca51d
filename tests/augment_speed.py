"""Images per second of each augmentation on one core, beside torchvision's own, in one run.

    python -m tests.augment_speed [--images 2000] [--rounds 3] [--data-dir FOLDER]

Each row is RandomCrop(4), RandomHorizontalFlip, the augmentation and the normalization of real CIFAR-10 images: here by the
loader that the script uses, in batches of 500, and there by torchvision's transforms on PIL images, one at a time, as its
DataLoader does, collated into the same batches. In rounds, so that other load affects both; the best round counts.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torchvision.transforms import AutoAugmentPolicy, v2

from cifar10.data.loader import TrainLoader
from cifar10.distributed import world as distributed
from cifar10.engine.engine import leave
from cifar10.plan import make_plan

BATCH = 500
THEIRS: dict[str, Callable[[], torch.nn.Module] | None] = {
    "": v2.Identity,
    "RandomRotation(15)": lambda: v2.RandomRotation(15),
    "RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 10)": lambda: v2.RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 10),
    "ColorJitter(0.4, 0.4, 0.4, 0.1)": lambda: v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
    "RandomGrayscale": v2.RandomGrayscale,
    "RandAugment": v2.RandAugment,
    "TrivialAugmentWide": v2.TrivialAugmentWide,
    "AutoAugment": lambda: v2.AutoAugment(AutoAugmentPolicy.CIFAR10),
    "RandomErasing(0.5)": lambda: v2.RandomErasing(0.5),
    "Cutout(12)": None,  # not in torchvision
    "MixUp(0.2)": lambda: v2.MixUp(alpha=0.2, num_classes=10),
    "CutMix(1)": lambda: v2.CutMix(alpha=1.0, num_classes=10),
}
AFTER_NORMALIZING, ON_BATCHES = ("RandomErasing(0.5)",), ("MixUp(0.2)", "CutMix(1)")


def theirs(name: str, pictures: list, labels: torch.Tensor, mean: tuple, std: tuple) -> Callable[[], None]:
    """An epoch of torchvision's transforms."""
    operation = THEIRS[name]()
    usual = v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()
    as_tensor = v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)
    last, whole = name in AFTER_NORMALIZING, name in ON_BATCHES
    first = () if last or whole else (operation,)
    each = v2.Compose([*usual, *first, *as_tensor, *((operation,) if last else ())])

    def epoch() -> None:
        for start in range(0, len(pictures), BATCH):
            images = torch.stack([each(picture) for picture in pictures[start : start + BATCH]])
            if whole:
                operation(images, labels[start : start + BATCH])

    return epoch


def seconds(epoch: Callable[[], object]) -> float:
    started = time.perf_counter()
    epoch()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    known, flags = parser.parse_known_args()
    world = distributed.join(1)
    print(f"{'images/s on one core':46} {'here':>9} {'torchvision':>11} {'ratio':>6}")
    try:
        for name in THEIRS:
            words = "--augment", f"RandomCrop(4) RandomHorizontalFlip {name}", f"--global-batch-size={BATCH}"
            plan = make_plan([*flags, *words], 1, "tests.augment_speed")
            pixels, labels = plan.images("train").pixels[: known.images], plan.images("train").labels[: known.images]
            loader = TrainLoader.of(pixels, labels, plan.recipe, plan.batch, world)
            epochs: dict[str, Callable[[], object]] = {"here": lambda loader=loader: [len(step) for step in loader.epoch(0)]}
            if THEIRS[name]:
                pictures = [v2.functional.to_pil_image(image) for image in pixels]
                given = torch.from_numpy(labels), plan.recipe.mean, plan.recipe.std
                epochs["torchvision"] = theirs(name, pictures, *given)
            times = [{which: seconds(epoch) for which, epoch in epochs.items()} for _ in range(known.rounds)]
            speed = {which: len(pixels) / min(one[which] for one in times) for which in epochs}
            beside = f"{speed['torchvision']:11,.0f} {speed['here'] / speed['torchvision']:6.1f}" if THEIRS[name] else ""
            print(f"{name or 'crop and flip alone':46} {speed['here']:9,.0f} {beside}", flush=True)
    finally:
        leave()


if __name__ == "__main__":
    main()
