"""`python -m cifar10 predict RUN IMAGE...`: labels and confidences for image files.

Every file becomes an image like the data set's: 8 bits, RGB or grayscale as the model expects, rotated by its EXIF orientation,
on a background where it is transparent, its middle square resized with antialiasing if it has another size. Then it is treated
as the test images are, so an image of the data set's own size gets the answer that `evaluate` gives. Only plain image formats
are opened, none that can carry a program (EPS, PDF), and none that decompresses to more than MAX_PIXELS.
"""

import csv
import json
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import ImageColor

from cifar10 import UsageError
from cifar10.commands.common import Count, Device, Run, Threads, WhichModel, settle
from cifar10.data.image_files import files_in, read_image, shown
from cifar10.data.loader import EvaluationLoader, at_once
from cifar10.distributed.world import World
from cifar10.run import trained
from cifar10.run.trained import Trained

BATCH_IMAGES = 500  # of 32x32 pixels

Format = Literal["text", "csv", "json"]


@torch.no_grad()
def probabilities(found: Trained, pixels: np.ndarray, world: World) -> np.ndarray:
    """uint8 [N, S, S, C] of the data set's size -> float64 [N, classes], treated as test images are."""
    loader = EvaluationLoader.of(pixels, np.zeros(len(pixels), np.int64), found.recipe, world)
    logits = torch.cat([found.model(images).cpu() for images, _ in loader])
    return F.softmax(logits.double(), dim=1).numpy()


class Predictor:
    """Predicts image files in batches, and counts what could not be read, what is hidden, and what had to be resized."""

    def __init__(self, found: Trained, world: World, top: int, background: tuple[int, int, int]) -> None:
        self.failed = self.answered = self.resized = 0
        self.hidden: list[Path] = []
        self._found, self._world, self._top, self._background = found, world, top, background

    def _report(self, path: Path, fault: object) -> None:
        self.failed += 1
        print(f"{shown(path)}: {shown(str(fault))}", file=sys.stderr)

    def _files(self, places: list[Path]) -> Iterator[Path]:
        for place in places:
            try:
                is_folder = place.is_dir()
            except (OSError, ValueError):  # a name that is too long; read_image reports it
                is_folder = False
            found, hidden, closed = files_in(place) if is_folder else ([place], [], [])
            self.hidden += hidden
            for folder, why in closed:
                self._report(folder, why)
            if not found and not closed:
                self._report(place, "no file in this folder or below")
            yield from found

    def _images(self, places: list[Path]) -> Iterator[tuple[Path, np.ndarray]]:
        size = self._found.dataset_size
        for path in self._files(places):
            try:
                image, was = read_image(path, size, self._found.channels, self._background)
            except ValueError as error:
                self._report(path, error)
                continue
            self.resized += was != (size, size)
            yield path, image

    def answers(self, places: list[Path]) -> Iterator[dict[str, Any]]:
        """For each file that can be read, in order, its likeliest classes; the others are reported on stderr."""
        images, batch_images = self._images(places), at_once(BATCH_IMAGES, self._found.image_shape[1])
        while batch := list(islice(images, batch_images)):
            files, pixels = zip(*batch, strict=True)
            for path, row in zip(files, probabilities(self._found, np.stack(pixels), self._world), strict=True):
                best = np.argsort(-row, kind="stable")[: self._top]
                self.answered += 1
                top = [{"label": self._found.classes[i], "confidence": float(row[i])} for i in best]
                yield {"file": shown(path), **top[0], "top": top}


# --- the command --------------------------------------------------------------------------------------------------------


def _write_text(answers: Iterator[dict[str, Any]]) -> None:
    for answer in answers:
        first, *others = (f"{one['label']} {one['confidence']:.1%}" for one in answer["top"])
        print(f"{answer['file']}: {first}" + (f"  ({', '.join(others)})" if others else ""))


def _write_csv(answers: Iterator[dict[str, Any]], top: int) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    more = [f"{word}_{place}" for place in range(2, top + 1) for word in ("label", "confidence")]
    writer.writerow(["file", "label", "confidence", *more])
    for answer in answers:
        ranked = ((one["label"], f"{one['confidence']:.6f}") for one in answer["top"])
        writer.writerow([answer["file"], *chain.from_iterable(ranked)])


def run(
    where: Run,
    images: Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="")],
    top: Count = None,
    format: Format = "text",
    background: str = "white",
    which: WhichModel = "best_model",
    threads: Threads = None,
    device: Device = "auto",
) -> int:
    """The label and the confidence for image files of any format and size; the exit code is 1 if one could not be read.

    If an image does not have the data set's size, its middle square is resized with antialiasing. Only the first frame or page
    of a file is read. What is left out is named on stderr, and the rest is answered.

    Args:
        images: Image files, and folders, of which every file at any depth is read that is not hidden.
        top: How many of the likeliest classes to show; 3 if there are as many.
        format: Text, CSV with a header, or a list in JSON.
        background: The color behind transparent pixels: a name, or #rrggbb.
    """
    settle(device)
    world = trained.alone(threads)
    found = trained.load(where, which, world)
    if not images:
        raise UsageError("no IMAGE is given, expected image files or folders after RUN, for example photos/cat.png")
    top = min(3, len(found.classes)) if top is None else top
    if not 1 <= top <= len(found.classes):
        raise UsageError(f"invalid value for --top: {top}, expected 1 to {len(found.classes)}, for example 1")
    try:
        color = ImageColor.getcolor(background, "RGB")
    except ValueError:
        message = f"invalid value for --background: {background}, expected a color, for example white or '#808080'"
        raise UsageError(message) from None
    predictor = Predictor(found, world, top, color)
    answers = predictor.answers(images)
    if format == "json":
        print(json.dumps(list(answers), indent=2))
    elif format == "csv":
        _write_csv(answers, top)
    else:
        _write_text(answers)
    if predictor.resized:
        how = f"their middle squares were resized to {found.dataset_size}x{found.dataset_size} (bicubic, antialiased)"
        print(f"{predictor.resized} of {predictor.answered} images had another size: {how}", file=sys.stderr)
    if predictor.hidden:
        names = ", ".join(map(shown, predictor.hidden))
        print(f"{len(predictor.hidden)} hidden files or folders were left out: {names}", file=sys.stderr)
    if predictor.failed:
        total = predictor.failed + predictor.answered
        print(f"{predictor.answered} of {total} files are answered; what was left out is named above", file=sys.stderr)
    return 1 if predictor.failed else 0
