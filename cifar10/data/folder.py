"""Your own images: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/*, of which a fifth of each class is for the test.

All files are decoded once, in parallel, to small images of one size as `predict` reads them, and kept in DIR/.cifar10 or, where
DIR is not writable, in the user's cache, under the sha256 of the manifest: the size and each file's name and sha256. A file
that is not an image is left out, counted and listed. A file is read again only if its size or time of change differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cifar10 import UsageError
from cifar10.config.recipe import Recipe
from cifar10.data.dataset import DataSet, Description, Images, Split, stratified_split
from cifar10.data.download import say
from cifar10.files import file_digest, one_process_at_a_time, written_whole

WHITE = (255, 255, 255)  # behind transparent pixels, as in predict
TEST_SHARE = 5  # without DIR/test, one image in so many is for the test
LAYOUT = "expected DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/*, with two classes or more"
SHOWN = 5  # files that a note names; all are in the list


@dataclass(frozen=True)
class Folder(DataSet):
    """Images of `size` pixels a side; `seed` chooses those of the test if there is no DIR/test."""

    size: int = 32
    seed: int = 0

    def of(self, recipe: Recipe) -> Folder:
        return replace(self, size=recipe.resize or self.size, seed=recipe.split_seed)

    def describe(self, data_dir: Path) -> Description:
        """Decodes what is new. Raises UsageError if `data_dir` has another layout or a class without an image."""
        store = _stored(data_dir, self.size)
        facts, note = store.facts, None
        if out := facts["left_out"]:
            named = "; ".join(f"{name} ({why})" for name, why in list(out.items())[:SHOWN])
            more = f"; all are listed in {store.place / 'facts.json'}" if len(out) > SHOWN else ""
            note = f"{len(out)} of {len(out) + len(facts['files'])} files are left out: {named}{more}"
        train, test = self._rows(store)
        pixels = len(train) * self.size**2
        sums, squares = store.sums[train].sum(axis=0).reshape(2, 3).tolist()  # of integers, so that nothing is rounded
        mean = tuple(total / pixels / 255 for total in sums)
        std = tuple(max(1e-3, square / pixels / 255**2 - m**2) ** 0.5 for square, m in zip(squares, mean, strict=True))
        mean, std = (tuple(round(value, 4) for value in values) for values in (mean, std))
        classes, digest = tuple(facts["classes"]), f"{'train+test' if facts['has_test'] else 'split'} {store.place.name}"
        return Description(len(train), len(test), self.size, 3, classes, mean, std, note=note, manifest=digest)

    def load(self, split: Split, data_dir: Path, seed: int = 0) -> Images:
        store = _stored(data_dir, self.size)
        rows = self._rows(store)[split == "test"]
        return Images(np.load(store.place / "pixels.npy", mmap_mode="r")[rows], store.labels[rows])

    def _rows(self, store: _Store) -> tuple[np.ndarray, np.ndarray]:
        """Which of the stored images are for training, and which for the test."""
        if store.facts["has_test"]:
            is_test = np.array([name.startswith("test/") for name in store.facts["files"]])
            return np.flatnonzero(~is_test), np.flatnonzero(is_test)
        return stratified_split(store.labels, max(1, len(store.labels) // TEST_SHARE), self.seed)

    def changes(self, data_dir: Path, manifest: str) -> str:
        """What differs from an earlier manifest of this folder, in a few words."""
        here = _stored(data_dir, self.size)
        then, now = here.place.parent / manifest.split()[-1] / "facts.json", _all_files(here.facts)
        if not then.is_file():
            return "the cache no longer has the list of files that it was trained on"
        before = _all_files(json.loads(then.read_text(encoding="utf-8")))
        kinds = {
            "added": [name for name in now if name not in before],
            "removed": [name for name in before if name not in now],
            "changed": [name for name in now if name in before and now[name] != before[name]],
        }
        shown = {kind: ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) for kind, names in kinds.items()}
        return (
            ", ".join(f"{len(names)} {kind} ({shown[kind]})" for kind, names in kinds.items() if names)
            or "another size of images or another layout"
        )


def _all_files(facts: dict[str, Any]) -> dict[str, str]:
    return facts["manifest"]["files"]


@dataclass(frozen=True)
class _Store:
    """A cached data set: pixels.npy uint8 [N, S, S, 3]; facts.json; and, in memory, what is small."""

    place: Path
    facts: dict[str, Any]  # classes, files (those that were read, in order), left_out {file: why}, manifest, has_test
    labels: np.ndarray  # int64 [N]
    sums: np.ndarray  # int64 [N, 6], of each channel's values and of their squares


def _listed(data_dir: Path) -> tuple[list[str], bool, dict[str, str]]:
    """The sorted files in class folders, relative to `data_dir`; if there is train/ and test/; what is left out, and why."""
    if not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir} is not a folder; {LAYOUT}")
    from cifar10.data.image_files import files_in  # which imports Pillow

    found, _, closed = files_in(data_dir)
    above, names = {"train", "test"}, [path.relative_to(data_dir).as_posix() for path in found]
    tops = {name.split("/")[0] for name in names if "/" in name}
    if tops & above and not above <= tops:
        missing = next(iter(above - tops))
        raise UsageError(f"--data-dir {data_dir} has {next(iter(tops & above))}/, but no {missing}/ with images; {LAYOUT}")
    has_test = above <= tops
    depth = 2 if has_test else 1
    inside = [name for name in names if name.count("/") >= depth and (not has_test or name.split("/")[0] in above)]
    out = dict.fromkeys(sorted({*names} - {*inside}), "not in a class's folder")
    return inside, has_test, out | {path.relative_to(data_dir).as_posix(): why for path, why in closed}


def _class_of(name: str, has_test: bool) -> str:
    return name.split("/")[has_test]


def _places(data_dir: Path) -> Path:
    """The folder of everything that is cached of `data_dir`."""
    inside = data_dir / ".cifar10"
    with suppress(OSError):
        inside.mkdir(exist_ok=True)
    if os.access(inside, os.W_OK):
        return inside
    above = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return above / "cifar10-deepspeed" / hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]


def _digests(data_dir: Path, names: list[str], cache: Path) -> dict[str, str]:
    """Each file's sha256, or why it cannot be read; only files whose size or time has changed are read."""
    index = cache / "index.json"
    try:
        known = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}

    def look(name: str) -> list[Any]:
        try:
            about = (data_dir / name).stat()
            stamp = [about.st_size, about.st_mtime_ns]
            if known.get(name, [])[:2] == stamp:
                return known[name]
            return [*stamp, file_digest(data_dir / name, "sha256")]
        except OSError as error:
            return [0, 0, f"unreadable: {error.strerror}"]

    with ThreadPoolExecutor() as pool:
        found = dict(zip(names, pool.map(look, names), strict=True))
    if found != known:
        with written_whole(index) as file:
            file.write(json.dumps(found).encode())
    return {name: values[2] for name, values in found.items()}


def _stored(data_dir: Path, size: int) -> _Store:
    """The cached images of a folder, decoded now if they are new."""
    names, has_test, out = _listed(data_dir)
    cache = _places(data_dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with one_process_at_a_time(cache / ".lock", f"reading the images in {data_dir}"):
            manifest = {"size": size, "files": _digests(data_dir, names, cache)}
            place = cache / hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
            if not (place / "facts.json").is_file():
                _decode(data_dir, place, manifest, has_test, out)
    except OSError as error:
        raise UsageError(f"the images in {data_dir} cannot be kept in {cache}: {error.strerror or error}; make room") from None
    facts = json.loads((place / "facts.json").read_text(encoding="utf-8"))
    classes = {name: number for number, name in enumerate(facts["classes"])}
    labels = np.array([classes[_class_of(name, has_test)] for name in facts["files"]], np.int64)
    return _Store(place, facts, labels, np.load(place / "sums.npy"))


def _decode(data_dir: Path, place: Path, manifest: dict[str, Any], has_test: bool, out: dict[str, str]) -> None:
    """Fill `place`, which gets its name last. Raises UsageError if a class has no image to train on, or there is no test."""
    from cifar10.data.image_files import read_image, shown

    size, names = manifest["size"], list(manifest["files"])
    say(f"reading {len(names):,} images in {data_dir} to {size}x{size} pixels, once")
    draft, rows = place.with_name(".draft"), 0
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()

    def read(name: str) -> np.ndarray | str:
        try:
            return read_image(data_dir / name, size, 3, WHITE)[0]
        except ValueError as error:
            return str(error)

    kept, sums = [], np.empty((len(names), 6), np.int64)
    pixels = np.lib.format.open_memmap(draft / "all.npy", "w+", np.uint8, (max(1, len(names)), size, size, 3))
    with ThreadPoolExecutor() as pool:
        for name, image in zip(names, pool.map(read, names), strict=True):
            if isinstance(image, str):
                out[name] = shown(image)
                say(f"left out: {shown(name)}: {out[name]}")
                continue
            pixels[rows], values = image, image.reshape(-1, 3).astype(np.int64)
            sums[rows], rows = np.concatenate([values.sum(axis=0), (values**2).sum(axis=0)]), rows + 1
            kept.append(name)
    classes = sorted({_class_of(name, has_test) for name in names})
    for split in ("train/", "test/") if has_test else ("",):
        there = {_class_of(name, has_test) for name in kept if name.startswith(split)}
        if split != "test/" and (empty := [name for name in classes if name not in there]):
            raise UsageError(f"{data_dir}/{split}{empty[0]} holds no image that can be read; add some, or remove that class")
        if not there or (len(there) < 2 and split != "test/"):
            raise UsageError(f"--data-dir {data_dir}: {', '.join(sorted(there)) or 'no class'} in {split or 'it'}; {LAYOUT}")
    np.save(draft / "pixels.npy", pixels[:rows])
    del pixels
    (draft / "all.npy").unlink()
    np.save(draft / "sums.npy", sums[:rows])
    facts = {"classes": classes, "has_test": has_test, "files": kept, "left_out": out, "manifest": manifest}
    (draft / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    os.rename(draft, place)


FOLDER = Folder()
