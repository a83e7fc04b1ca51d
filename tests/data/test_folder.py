"""A user's own images: layouts, orientation, damaged files, the cache, the split, normalization, changes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar10 import UsageError
from cifar10.data import folder, image_files
from cifar10.data.folder import FOLDER
from cifar10.data.image_files import read_image
from cifar10.plan import make_plan


def save(path: Path, seed: int = 0, size: tuple[int, int] = (40, 50), **how: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **how)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images of one class, twenty of another, of all sizes, and below other folders."""
    for number in range(30):
        name = "ant" if number % 3 == 0 else "bee/deep"
        save(tmp_path / "photos" / name / f"{number:02}.{('png', 'jpg')[number % 2]}", number, (33 + number, 90 - number))
    return tmp_path / "photos"


FLAGS = "--dataset folder --val-images 4 --global-batch-size 4 --max-steps 1"


def plan(photos: Path, flags: str = ""):
    return make_plan([*FLAGS.split(), "--data-dir", str(photos), *flags.split()], 1, "x")


def test_a_fifth_of_each_class_is_the_test_chosen_by_the_seed(photos):
    found, other = plan(photos), plan(photos, "--split-seed 1")
    assert (found.dataset.train_images, found.dataset.test_images, found.dataset.classes) == (24, 6, ("ant", "bee"))
    train, test = found.images("train"), found.images("test")
    assert np.bincount(test.labels).tolist() == [2, 4]
    assert train.pixels.shape == (24, 32, 32, 3)
    rows = {image.tobytes() for images in (train, test) for image in images.pixels}
    assert len(rows) == 30, "each image is in one split, once"
    assert {image.tobytes() for image in other.images("test").pixels} != {image.tobytes() for image in test.pixels}


def test_folders_of_train_and_test_are_used_as_they_are_and_images_are_read_as_predict_reads_them(tmp_path):
    files = [save(tmp_path / split / name / "1.png", seed) for seed, (split, name) in enumerate(SPLITS)]
    found = plan(tmp_path, "--val-images 0 --global-batch-size 2 --resize 24")
    for split, some in (("train", files[:2]), ("test", files[2:])):
        expected = [read_image(file, 24, 3, (255, 255, 255))[0] for file in some]
        assert np.array_equal(found.images(split).pixels, expected)
    assert found.image_shape == (3, 24, 24)


SPLITS = [("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")]


def test_normalization_is_that_of_the_training_images_unless_it_is_given(photos):
    found = plan(photos)
    values = found.images("train").pixels.astype(np.float64) / 255
    assert found.recipe.mean == pytest.approx(values.mean(axis=(0, 1, 2)), abs=1e-4)
    assert found.recipe.std == pytest.approx(values.std(axis=(0, 1, 2)), abs=1e-4)
    assert plan(photos, "--mean 0.1 0.2 0.3 --std 1 1 1").recipe.mean == (0.1, 0.2, 0.3)


def test_a_photo_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for name in ("a", "b"):
        for number in range(3):
            save(tmp_path / name / f"{number}.png", number, (32, 32), exif=exif)
    images = plan(tmp_path, "--val-images 0").images("train").pixels
    turned = np.rot90(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8), 3)
    assert any(np.array_equal(image, turned) for image in [*images, *plan(tmp_path, "--val-images 0").images("test").pixels])


def test_files_that_cannot_be_used_are_named_with_the_reason_and_left_out(photos, capfd):
    whole = (photos / "ant" / "00.png").read_bytes()
    (photos / "ant" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "bee" / "empty.jpg").touch()
    (photos / "bee" / "notes.txt").write_text("bees")
    (photos / "loose.png").write_bytes(whole)
    (photos / "bee" / ".hidden").touch()
    found = plan(photos)
    said = capfd.readouterr().err
    for name in ("ant/cut.png", "bee/empty.jpg", "bee/notes.txt"):
        assert name in said
        assert name in found.dataset.note
    assert "loose.png" in found.dataset.note
    assert found.dataset.note.startswith("4 of 34 files are left out")
    assert any("left out" in note for note in found.notes)
    assert found.dataset.train_images + found.dataset.test_images == 30


def test_files_are_decoded_once_and_only_changed_ones_are_read_again(photos, monkeypatch):
    first = plan(photos).dataset
    read = []
    monkeypatch.setattr(image_files, "read_image", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr(folder, "file_digest", lambda path, _: read.append(path.name) or "x")
    assert plan(photos).dataset == first
    assert read == []
    os.utime(photos / "ant" / "00.png", (1, 1))
    with pytest.raises(pytest.fail.Exception):
        plan(photos)
    assert read == ["00.png"]


def test_without_write_access_the_users_cache_is_used(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: ".cifar10" not in str(path))
    assert plan(photos).dataset.train_images == 24
    assert list((tmp_path / "cache").rglob("pixels.npy"))


@pytest.mark.parametrize("change", ["added", "removed", "changed"])
def test_a_run_whose_images_have_changed_is_refused_with_what_changed(photos, tmp_path, change):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_1").mkdir(parents=True)
    found = plan(photos)
    content = {"format": "cifar10-deepspeed/2", "settings": found.settings["recipe"]}
    (run / "recipe.json").write_text(json.dumps({**content, "dataset": {"manifest": found.dataset.manifest}}))
    (run / "ds_config.json").write_text(json.dumps(found.ds_config))
    assert plan(photos, f"--output-dir {run}").settings == found.settings
    file = photos / "ant" / "00.png"
    file.unlink() if change == "removed" else save(photos / "ant" / ("new.png" if change == "added" else "00.png"), 99)
    with pytest.raises(UsageError, match=rf"1 {change} \(ant/(new|00)\.png\)"):
        plan(photos, f"--output-dir {run}")
    assert plan(photos).settings != found.settings


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "two classes"),
        (["a/1.png"], "a in it"),
        (["1.png", "2.png"], "no class"),
        (["train/a/1.png", "train/b/1.png"], "no test/"),
        (["train/a/1.png", "train/b/1.png", "test/c/1.png"], "train/c holds no image"),
    ],
)
def test_another_layout_is_refused_with_the_right_one(tmp_path, files, says):
    for name in files:
        save(tmp_path / "photos" / name)
    with pytest.raises(UsageError, match=says):
        plan(tmp_path / "photos")


def test_the_split_is_the_same_wherever_the_folder_lies(photos, tmp_path):
    before = plan(photos)
    labels = before.images("test").labels.tolist()
    moved = photos.rename(tmp_path / "elsewhere")
    assert plan(moved).dataset == before.dataset
    assert FOLDER.of(before.recipe).load("test", moved).labels.tolist() == labels
