"""Image files: any of them becomes an image like the data set's, the same way in training and in prediction.

Only plain image formats are opened, none that can carry a program (EPS, PDF), and none that decompresses to more than
MAX_PIXELS.
"""

import os
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cifar10 import reason

Image.init()
FORMATS = tuple(name for name in "PNG JPEG BMP GIF TIFF WEBP AVIF PPM TGA".split() if name in Image.OPEN)  # AVIF: Pillow 11.3
MAX_PIXELS = 100_000_000  # of one image


def _converted(image: Image.Image, channels: int, background: tuple[int, int, int]) -> Image.Image:
    """Upright, opaque, 8 bits, grayscale or RGB. Raises ValueError for values without a known range."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image)
        if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 65_535:
            raise ValueError(
                f"its values, {pixels.min():g} to {pixels.max():g}, have no known range; save it with 8 or 16 bits"
            )
        image = Image.fromarray((pixels.astype(np.float64) / 257).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def read_image(path: Path, size: int, channels: int, background: tuple[int, int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """A file as uint8 [size, size, channels], and its own width and height. Raises ValueError with the reason.

    Only the first of several frames or pages is read. A square of `size` pixels is taken as it is, bit for bit.
    """
    try:
        if not path.is_file():
            raise ValueError("not a regular file" if path.exists() else "no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            with Image.open(path, formats=FORMATS) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise ValueError(f"it has {file.width}x{file.height} pixels, more than the limit of {MAX_PIXELS:,}")
                image = _converted(file, channels, background)
        was = image.size
        if was != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(size, size, channels), was
    except UnidentifiedImageError:
        with path.open("rb") as file:
            kind = (
                "a HEIC image"
                if re.match(b"....ftyp(hei|hev|mif1|msf1)", file.read(12), re.S)
                else "not an image in a supported format"
            )
        raise ValueError(f"{kind}; save it as one of {', '.join(FORMATS)}, for example as JPEG") from None
    except Image.DecompressionBombError:
        raise ValueError(f"it has too many pixels, more than the limit of {MAX_PIXELS:,}") from None
    except ValueError:
        raise
    except Exception as error:  # a corrupt or foreign file
        raise ValueError(reason(error)) from None


def files_in(folder: Path) -> tuple[list[Path], list[Path], list[tuple[Path, str]]]:
    """The files in a folder and below it, sorted; hidden files and folders; folders that are not searched, and why."""
    found, hidden, closed, errors = [], [], [], []
    for place, names, files in os.walk(folder, onerror=errors.append):
        linked = [name for name in names if Path(place, name).is_symlink() and name[0] != "."]
        closed += [(Path(place, name), "a link to a folder, which is not followed") for name in linked]
        hidden += [Path(place, name) for name in (*names, *files) if name[0] == "."]
        found += [Path(place, name) for name in files if name[0] != "."]
        names[:] = [name for name in names if name[0] != "." and name not in linked]
    closed += [(Path(error.filename), error.strerror) for error in errors]
    return sorted(found), sorted(hidden), sorted(closed)


def shown(path: Path | str) -> str:
    """A path or a reason as printable text on one line: other bytes and characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
