"""python -m cifar10 predict: images in every format become what the model expects, and unreadable files are reported."""

import csv
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifar10.commands.predict import probabilities
from cifar10.data import registry, synthetic
from cifar10.data.image_files import FORMATS, read_image, shown
from cifar10.run.predictions import TEST_FILE, read
from cifar10.run.trained import alone, load
from tests.launching import PROJECT, environment
from tests.small_trained import command

WHITE = (255, 255, 255)


def image(width: int = 32, height: int = 32) -> np.ndarray:
    """A smooth color image, uint8 [height, width, 3]: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.full_like(x, 90)], axis=2).round().astype(np.uint8)


def pixels(path: Path, size: int = 32, channels: int = 3, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    return read_image(path, size, channels, background)[0].astype(int)


def answers(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> list[dict]:
    assert command("predict", *words, "--threads", 1, "--format", "json") == code
    return json.loads(capsys.readouterr().out)


# --- the same answers as evaluate's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["color", "gray", "resized"])
def test_test_images_in_files_are_answered_as_evaluate_answers_them(trained, tmp_path, capsys, name):
    run, world = trained / name, alone(1)
    found = load(run)
    images = registry.images(found.recipe, "test", Path("unused"))
    for number, image in enumerate(images.pixels):
        Image.fromarray(image.squeeze()).save(tmp_path / f"{number:03}.png")
    seen = answers(capsys, run, tmp_path, "--top", 10)
    wanted = read(run / TEST_FILE)
    assert [answer["label"] for answer in seen] == [found.classes[i] for i in wanted.predicted]
    for answer, row in zip(seen, wanted.probabilities, strict=True):
        ranked = {one["label"]: one["confidence"] for one in answer["top"]}
        assert [ranked[label] for label in found.classes] == pytest.approx(list(row), abs=1e-6)
        assert answer["confidence"] == answer["top"][0]["confidence"] == max(ranked.values())
    assert np.allclose(probabilities(found, images.pixels, world), wanted.probabilities, atol=1e-7)


# --- formats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "off_by"), [("png", 0), ("bmp", 0), ("tiff", 0), ("ppm", 0), ("tga", 0), ("jpg", 12), ("webp", 12)]
)
def test_formats(tmp_path, suffix, off_by):
    Image.fromarray(image()).save(tmp_path / f"a.{suffix}", quality=95)
    assert np.abs(pixels(tmp_path / f"a.{suffix}") - image()).max() <= off_by


def test_gray_and_rgb_are_converted_as_the_model_expects(tmp_path):
    Image.fromarray(image()[..., 0]).save(tmp_path / "gray.png")
    assert np.array_equal(pixels(tmp_path / "gray.png"), np.repeat(image()[..., :1], 3, axis=2))
    Image.fromarray(np.full((28, 28, 3), (200, 0, 0), np.uint8)).save(tmp_path / "red.png")
    assert set(pixels(tmp_path / "red.png", 28, 1).ravel()) == {60}  # 0.299 x 200


def test_a_palette_and_one_bit(tmp_path):
    two = np.where(image()[..., :1] > 100, (10, 200, 30), (250, 0, 90)).astype(np.uint8)
    Image.fromarray(two).quantize(2).save(tmp_path / "p.gif")
    assert np.abs(pixels(tmp_path / "p.gif") - two).max() <= 1
    Image.fromarray(image()[..., 0] > 100).save(tmp_path / "1.png")
    assert np.array_equal(pixels(tmp_path / "1.png")[..., 0], np.where(image()[..., 0] > 100, 255, 0))


@pytest.mark.parametrize("background", [WHITE, (10, 20, 30)])
def test_transparent_pixels_show_the_background(tmp_path, background):
    layers = np.dstack([image(), np.where(np.arange(32) < 16, 0, 255)[None].repeat(32, 0)]).astype(np.uint8)
    Image.fromarray(layers).save(tmp_path / "a.png")
    seen = pixels(tmp_path / "a.png", background=background)
    assert np.array_equal(seen[:, 16:], image()[:, 16:])
    assert (seen[:, :16] == background).all()
    Image.fromarray(np.full((32, 32, 4), (0, 0, 0, 128), np.uint8)).save(tmp_path / "half.png")
    assert set(pixels(tmp_path / "half.png").ravel()) == {127}


def test_transparency_in_a_palette_and_in_gray(tmp_path):
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    palette.save(tmp_path / "p.png", transparency=1)
    Image.new("LA", (32, 32), (50, 0)).save(tmp_path / "la.png")
    for name in ("p.png", "la.png"):
        assert (pixels(tmp_path / name, background=(1, 2, 3)) == (1, 2, 3)).all()


def test_cmyk_and_sixteen_bits(tmp_path):
    Image.fromarray(image()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(pixels(tmp_path / "a.jpg") - image()).mean() < 4
    deep = image()[..., 0].astype(np.uint16) * 257
    for name in ("a.png", "a.tiff"):
        Image.fromarray(deep).save(tmp_path / name)
        assert np.array_equal(pixels(tmp_path / name)[..., 0], image()[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path, orientation):
    stored = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1)}
    stored |= {6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: lambda a: np.rot90(a, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = stored.get(orientation, lambda a: a)(image())
    Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), image())


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (32, 32), color) for color in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(tmp_path / "a.gif") == (255, 0, 0)).all()


# --- other sizes --------------------------------------------------------------------------------------------------------


def test_the_middle_square_of_a_wide_and_a_tall_image(tmp_path):
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 200
    for image in (wide, wide.swapaxes(0, 1)):
        Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / "a.png")
        image, was = read_image(tmp_path / "a.png", 32, 3, WHITE)
        assert (image[2:-2, 2:-2] == 200).all()
        assert sorted(was) == [64, 192]


def test_resizing_is_antialiased(tmp_path):
    board = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)  # single pixels, black and white
    Image.fromarray(board).save(tmp_path / "a.png")
    seen = pixels(tmp_path / "a.png")
    assert seen.min() >= 120
    assert seen.max() <= 136


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (31, 33)])
def test_any_size_can_be_fitted(tmp_path, size):
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png") == (9, 8, 7)).all()


def test_resizing_is_reported_once(trained, tmp_path, capsys):
    for number, side in enumerate((32, 40, 300)):
        Image.fromarray(image(side, side)).save(tmp_path / f"{number}.png")
    assert command("predict", trained / "color", tmp_path, "--threads", 1) == 0
    assert capsys.readouterr().err.startswith("2 of 3 images had another size")


# --- what is no image ---------------------------------------------------------------------------------------------------


def png(width: int, height: int, body: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_unreadable_files_are_named_and_the_others_answered(trained, tmp_path, capsys):
    Image.fromarray(image()).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    bad = {
        "empty.png": (b"", "not an image"),
        "text.jpg": (b"hello", "not an image"),
        "cut.png": (whole[:100], "truncated"),
        "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        "large.png": (png(12_000, 12_000, zlib.compress(b"")), "12000x12000 pixels"),
        "bomb.png": (png(60_000, 60_000, zlib.compress(b"")), "too many pixels"),
        "float.tiff": (None, "have no known range"),
    }
    for name, (content, _) in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    Image.fromarray(image()[..., 0].astype(np.float32)).save(tmp_path / "float.tiff")
    os.mkfifo(tmp_path / "pipe.png")
    bad |= {"pipe.png": (None, "not a regular file"), "none.png": (None, "no such file")}
    files = [tmp_path / name for name in (*bad, "good.png")]
    assert command("predict", trained / "color", *files, "--threads", 1) == 1
    printed = capsys.readouterr()
    complaints = printed.err.splitlines()
    assert len(complaints) == len(bad) + 1
    assert complaints[-1].startswith(f"1 of {len(files)} files")
    for line, (name, (_, reason)) in zip(complaints, bad.items(), strict=False):
        assert line.startswith(f"{tmp_path / name}: ")
        assert reason in line
    assert printed.out.startswith(f"{tmp_path / 'good.png'}: ")
    assert len(printed.out.splitlines()) == 1


def saved(kind: str, **how: Any) -> bytes:
    """A file's content; the image is red on its left and blue on its right, 64x48."""
    mode = how.pop("mode", "RGB")
    picture = Image.new("RGB", (64, 48), (220, 30, 30))
    picture.paste((30, 30, 220), (32, 0, 64, 48))
    file = io.BytesIO()
    picture.convert(mode).save(file, kind, **how)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved("JPEG", exif=exif)


def animated(kind: str) -> bytes:
    return saved(kind, save_all=True, append_images=[Image.new("RGB", (64, 48), color) for color in ("green", "white")])


def deep() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((48, 64), 40_000, np.uint16)).save(file, "PNG")
    return file.getvalue()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
# a file's name -> its content, and why it is left out, if it is
PHONES = {
    "browser.jfif": (lambda: saved("JPEG"), None),
    "IMG_0001.JPG": (turned, None),
    "IMG_0002.JPEG": (lambda: saved("MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))]), None),
    "image.webp": (lambda: saved("WEBP"), None),
    "image.WEBP": (lambda: saved("WEBP", lossless=True), None),
    "animated.webp": (lambda: animated("WEBP"), None),
    "animated.gif": (lambda: animated("GIF"), None),
    "animated.png": (lambda: animated("PNG"), None),
    "web.avif": (lambda: saved("AVIF"), None),
    "print.jpg": (lambda: saved("JPEG", mode="CMYK"), None),
    "deep.png": (deep, None),
    "deep.ppm": (lambda: b"P6 8 8 65535\n" + bytes(8 * 8 * 6), None),
    "palette.png": (lambda: saved("PNG", mode="P", transparency=0), None),
    "gray alpha.png": (lambda: saved("PNG", mode="LA"), None),
    "scan.tif": (lambda: saved("TIFF", compression="tiff_lzw"), None),
    "no suffix": (lambda: saved("PNG"), None),
    "really a png.jpg": (lambda: saved("PNG"), None),
    "really a jpeg.HEIC": (lambda: saved("JPEG"), None),
    "a\udcffb.png": (lambda: saved("PNG"), None),
    "IMG_0003.HEIC": (lambda: HEIC, "a HEIC image; save it as"),
    "IMG_0004.heif": (lambda: HEIC.replace(b"heic", b"mif1"), "a HEIC image; save it as"),
    "half.jpg": (lambda: saved("JPEG")[:400], "truncated"),
    "half.png": (lambda: saved("PNG")[:80], "truncated"),
    "half.webp": (lambda: saved("WEBP")[:40], ""),
    "empty.jpg": (lambda: b"", "not an image"),
    "page.html": (lambda: b"<html>404</html>", "not an image"),
    "page.jpg": (lambda: b"<html>404</html>", "not an image"),
    "drawing.svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "notes.txt": (lambda: b"notes", "not an image"),
    "Thumbs.db": (lambda: bytes(64), "not an image"),
    "clip.mov": (lambda: b"\0\0\0\x14ftypqt  " + bytes(64), "not an image"),
}
NEEDS_AVIF = [name for name in PHONES if name.endswith("avif") and "AVIF" not in FORMATS]


def test_of_a_folder_every_file_is_answered_or_named(trained, tmp_path, capsys):
    folder = tmp_path / "DCIM"
    (folder / "100APPLE").mkdir(parents=True)
    for name, (content, _) in PHONES.items():
        if name not in NEEDS_AVIF:
            (folder / "100APPLE" / name).write_bytes(content())
    (folder / "linked.png").symlink_to(folder / "100APPLE" / "no suffix")
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "up").symlink_to(folder)
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "1.png").write_bytes(saved("PNG"))
    (folder / "._IMG_0001.JPG").write_bytes(b"Mac OS X")
    os.mkfifo(folder / "pipe.png")
    due = {f"100APPLE/{name}": why for name, (_, why) in PHONES.items() if name not in NEEDS_AVIF}
    due |= {"linked.png": None, "dangling.png": "no such file", "up": "a link to a folder", "pipe.png": "not a regular file"}
    due = {shown(folder / name): why for name, why in due.items()}
    assert command("predict", trained / "color", folder, "--threads", 1, "--format", "csv") == 1
    printed = capsys.readouterr()
    answered = {row["file"] for row in csv.DictReader(io.StringIO(printed.out))}
    assert answered == {name for name, why in due.items() if why is None}
    errors = printed.err.splitlines()
    for name, why in due.items():
        if why is not None:
            (line,) = (line for line in errors if line.startswith(f"{name}: "))
            assert why.lower() in line.lower()
    assert any(f"{len(answered)} of {len(due)} files" in line for line in errors)
    (hidden,) = (line for line in errors if "hidden" in line)
    assert hidden.startswith("2 ")
    assert str(folder / ".thumbnails") in hidden
    assert str(folder / "._IMG_0001.JPG") in hidden


@pytest.mark.parametrize("name", [name for name, (_, why) in PHONES.items() if why is None and name not in NEEDS_AVIF])
def test_a_phones_or_browsers_image_is_what_it_shows(tmp_path, name):
    """Its first frame, upright, on white: red before blue, or gray."""
    (tmp_path / name).write_bytes(PHONES[name][0]())
    seen = pixels(tmp_path / name)
    first, last = (seen[4], seen[-5]) if name == "IMG_0001.JPG" else (seen[:, 4], seen[:, -5])
    if name in ("deep.png", "deep.ppm", "gray alpha.png"):
        assert np.ptp(seen, axis=2).max() == 0
        assert name != "deep.png" or set(seen.ravel()) == {156}  # 40,000 / 257
    else:
        (red, _, blue), (red_last, _, blue_last) = first.mean(axis=0), last.mean(axis=0)
        assert red > blue + 50 or name == "palette.png"
        assert blue_last > red_last + 50


def test_folders_without_a_file(trained, tmp_path, capsys):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    assert command("predict", trained / "color", tmp_path / "empty", "--threads", 1) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"{tmp_path / 'empty'}: no file in this folder")
    assert printed.out == ""


def test_strange_names_stay_one_line(trained, tmp_path, capsys):
    names = [b"a\nb.png", b"\xff.png", "ü.png".encode(), b"-x.png"]
    for name in names:
        Image.fromarray(image()).save(io.FileIO(os.path.join(os.fsencode(tmp_path), name), "w"), "PNG")
    assert command("predict", trained / "color", tmp_path, "--threads", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0].rpartition("/")[2] for line in lines] == ["-x.png", r"a\nb.png", "ü.png", r"\xff.png"]
    assert shown("plain") == "plain"


# --- what is printed ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "a, b.png", tmp_path / "c.png"]
    for file, image in zip(files, synthetic.synthetic("test", 2, 0).pixels, strict=True):
        Image.fromarray(image).save(file)
    return files


def test_text_csv_and_json_say_the_same(trained, two, capsys):
    found = answers(capsys, trained / "color", *two, "--top", 2)
    assert command("predict", trained / "color", *two, "--threads", 1, "--top", 2) == 0
    for answer, line in zip(found, capsys.readouterr().out.splitlines(), strict=True):
        (first, share), (second, less) = ((one["label"], one["confidence"]) for one in answer["top"])
        assert line == f"{answer['file']}: {first} {share:.1%}  ({second} {less:.1%})"
    assert command("predict", trained / "color", *two, "--threads", 1, "--top", 1) == 0
    assert all(line.endswith("%") for line in capsys.readouterr().out.splitlines())
    assert command("predict", trained / "color", *two, "--threads", 1, "--top", 2, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["file"] for row in rows] == [str(file) for file in two]
    for answer, row in zip(found, rows, strict=True):
        assert (row["label"], row["label_2"]) == tuple(one["label"] for one in answer["top"])
        assert float(row["confidence_2"]) == pytest.approx(answer["top"][1]["confidence"], abs=1e-6)


@pytest.mark.parametrize(("flag", "value"), [("--top", "0"), ("--top", "11"), ("--background", "sky")])
def test_invalid_values_are_refused(trained, two, capsys, flag, value):
    assert command("predict", trained / "color", *two, flag, value) == 2
    assert f"{flag}: {value}, expected" in capsys.readouterr().err


def test_no_image_at_all_is_refused(trained, capsys):
    assert command("predict", trained / "color") == 2
    assert "no IMAGE" in capsys.readouterr().err


def test_a_closed_pipe_gives_no_traceback(trained, tmp_path):
    for number in range(40):
        Image.fromarray(image()).save(tmp_path / f"{'long' * 40}{number}.png")
    words = [sys.executable, "-m", "cifar10", "predict", str(trained / "color"), *[str(tmp_path)] * 40, "--threads", "1"]
    process = subprocess.Popen(words, cwd=PROJECT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    assert process.wait() == 1
