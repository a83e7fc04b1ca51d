"""What a trained model sees in image files: `python -m cifar10 predict RUN IMAGE...`.

A file of any kind becomes what the data set holds: 8 bits, in colour or grey as the model wants it, turned as its EXIF says,
on a background where it is transparent, and of an image that has another size the middle square, resized with antialiasing.
From there on it takes the way of the test images, so an image of the data set's own size is answered as `evaluate` does.
Only plain image formats are opened, none that can carry a program (EPS, PDF), and none that unfolds into more than PIXELS.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from cifar10 import UsageError
from cifar10.data.loader import EvaluationLoader, at_once
from cifar10.distributed.world import World
from cifar10.run import trained
from cifar10.run.trained import Trained, Which

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA")
SUFFIXES = frozenset(".png .jpg .jpeg .jpe .bmp .gif .tif .tiff .webp .ppm .pgm .pnm .tga".split())  # looked for in folders
PIXELS = 100_000_000  # of one image
BATCH_IMAGES = 500  # of 32x32 pixels

Format = Literal["text", "csv", "json"]


# --- one file -> one image of the data set's kind -----------------------------------------------------------------------


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of whole numbers of 16 bits, in 8; what has no known range is a ValueError."""
    pixels = np.asarray(image)
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 65_535:
        raise ValueError(f"its values, {pixels.min():g} to {pixels.max():g}, have no known range; save it with 8 or 16 bits")
    return Image.fromarray((pixels.astype(np.float64) / 257).round().astype(np.uint8))


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), layer)


def _converted(image: Image.Image, channels: int, background: tuple[int, int, int]) -> Image.Image:
    """Upright, opaque, 8 bits, grey or in colour."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = _on_background(image, background)
    return image.convert("L" if channels == 1 else "RGB")


def read_image(path: Path, size: int, channels: int, background: tuple[int, int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """A file as uint8 [size, size, channels], and the width and height that it had. Raises ValueError with the reason.

    Of several frames or pages it is the first. A square of `size` pixels is taken as it is, to the bit; of anything else the
    middle square is resized (bicubic, antialiased).
    """
    try:
        if not path.is_file():
            raise ValueError("it is no file" if path.exists() else "there is no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; what matters is an error
            with Image.open(path, formats=FORMATS) as file:
                if file.width * file.height > PIXELS:
                    raise ValueError(f"it has {file.width}x{file.height} pixels; {PIXELS:,} are the most that are opened")
                image = _converted(file, channels, background)
        was = image.size
        if was != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(size, size, channels), was
    except UnidentifiedImageError:
        raise ValueError(f"it is not an image of a known kind ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ValueError(f"it has too many pixels; {PIXELS:,} are the most that are opened") from None
    except ValueError:
        raise
    except Exception as error:  # whatever a file makes of a decoder
        said = str(error).strip().splitlines()
        raise ValueError(said[0][:200] if said else type(error).__name__) from None


# --- which files --------------------------------------------------------------------------------------------------------


def files_in(folder: Path) -> list[Path]:
    """The image files in a folder and below it, sorted, by their suffixes; hidden ones and linked folders are left out."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        kept = (name for name in names if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES)
        found += [Path(place) / name for name in kept]
    return sorted(found)


def _files(places: list[Path], complain: Any) -> Iterator[Path]:
    for place in places:
        try:
            is_folder = place.is_dir()
        except (OSError, ValueError):  # a name that is too long; the file will say so
            is_folder = False
        if not is_folder:
            yield place
        elif found := files_in(place):
            yield from found
        else:
            complain(place, f"no image in this folder or below; looked for {' '.join(sorted(SUFFIXES))}")


# --- answering ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """The classes for one file with the model's probabilities, the likeliest first."""

    file: str
    top: list[tuple[str, float]]

    def as_dict(self) -> dict[str, Any]:
        label, confidence = self.top[0]
        ranked = [{"label": name, "confidence": probability} for name, probability in self.top]
        return {"file": self.file, "label": label, "confidence": confidence, "top": ranked}


def shown(path: Path | str) -> str:
    """A path or a reason as a line can carry it: bytes that are no text, and characters that are not printed, are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@torch.no_grad()
def probabilities(found: Trained, pixels: np.ndarray, here: World) -> np.ndarray:
    """uint8 [N, S, S, C] of the data set's size -> float64 [N, classes], by the way that test images take."""
    loader = EvaluationLoader.of(pixels, np.zeros(len(pixels), np.int64), found.recipe, here)
    logits = torch.cat([found.model(images).cpu() for images, _ in loader])
    return F.softmax(logits.double(), dim=1).numpy()


class Predictor:
    """Goes through files, answers in batches, and counts what could not be read and what had to be fitted."""

    def __init__(self, found: Trained, here: World, top: int, background: tuple[int, int, int]) -> None:
        self.failed = self.answered = self.fitted = 0
        self._found, self._here, self._top, self._background = found, here, top, background
        self.size, self.channels = found.dataset_size, found.channels

    def complain(self, path: Path, reason: object) -> None:
        self.failed += 1
        print(f"{shown(path)}: {shown(str(reason))}", file=sys.stderr)

    def _answer(self, files: list[Path], pixels: list[np.ndarray]) -> Iterator[Answer]:
        for path, row in zip(files, probabilities(self._found, np.stack(pixels), self._here), strict=True):
            best = np.argsort(-row, kind="stable")[: self._top]
            self.answered += 1
            yield Answer(shown(path), [(self._found.classes[i], float(row[i])) for i in best])

    def answers(self, places: list[Path]) -> Iterator[Answer]:
        """An answer for each file that can be read, in order; the others are named on stderr."""
        at_a_time = at_once(BATCH_IMAGES, self._found.image_shape[1])
        files, pixels = [], []
        for path in _files(places, self.complain):
            try:
                image, was = read_image(path, self.size, self.channels, self._background)
            except ValueError as error:
                self.complain(path, error)
                continue
            self.fitted += was != (self.size, self.size)
            files.append(path)
            pixels.append(image)
            if len(files) == at_a_time:
                yield from self._answer(files, pixels)
                files, pixels = [], []
        if files:
            yield from self._answer(files, pixels)


# --- saying it ----------------------------------------------------------------------------------------------------------


def _write_text(answers: Iterator[Answer]) -> None:
    for answer in answers:
        (label, confidence), *others = answer.top
        also = f"  ({', '.join(f'{name} {probability:.1%}' for name, probability in others)})" if others else ""
        print(f"{answer.file}: {label} {confidence:.1%}{also}")


def _write_csv(answers: Iterator[Answer], top: int) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    more = [f"{word}_{place}" for place in range(2, top + 1) for word in ("label", "confidence")]
    writer.writerow(["file", "label", "confidence", *more])
    for answer in answers:
        writer.writerow([answer.file, *(value for name, share in answer.top for value in (name, f"{share:.6f}"))])


def _colour(name: str) -> tuple[int, int, int]:
    try:
        return ImageColor.getcolor(name, "RGB")
    except ValueError:
        raise UsageError(f"--background {name} is no colour; type a name or a number, as in white or '#808080'") from None


def run(
    where: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    images: Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="IMAGE [IMAGE ...]")],
    top: int = 3,
    format: Format = "text",
    background: str = "white",
    which: Which = "best_model",
    threads: int | None = None,
) -> int:
    """The label and the confidence for image files of any kind and size; ends with 1 if one of them could not be read.

    An image that has not the data set's size is fitted: its middle square, resized with antialiasing. Of an animation or a
    document of several pages the first is taken. What is unreadable is named on stderr, and the others are answered.

    Args:
        where: A run's folder, its checkpoints/best_model or checkpoints/final, a file of weights, or an export's folder.
        images: Image files, and folders, whose image files are taken, also those in folders below.
        top: How many of the likeliest classes are shown.
        format: Text, CSV with a header, or a list in JSON.
        background: The colour behind transparent pixels: a name, or #rrggbb.
        which: Of a run's folder, the model that validation chose or the last one.
        threads: CPU threads (default: cores of this machine).
    """
    here = trained.alone(threads)
    found = trained.load(where, which, here)
    if not images:
        raise UsageError("no image is named; type the paths of image files or folders after RUN")
    if not 1 <= top <= len(found.classes):
        raise UsageError(f"--top {top} is impossible; type 1 to {len(found.classes)}, the number of classes")
    predictor = Predictor(found, here, top, _colour(background))
    answers = predictor.answers(images)
    if format == "json":
        json.dump([answer.as_dict() for answer in answers], sys.stdout, indent=2)
        print()
    elif format == "csv":
        _write_csv(answers, top)
    else:
        _write_text(answers)
    if predictor.fitted:
        side = f"{predictor.size}x{predictor.size}"
        print(
            f"{predictor.fitted} of {predictor.answered} images had not {side} pixels: of each the middle square, resized"
            f" (bicubic, antialiased) to {side}, was answered",
            file=sys.stderr,
        )
    return 1 if predictor.failed else 0
