"""Data sets of files with known md5s: verified, restored from archives that lie beside them, or downloaded.

Importing this file needs neither torch nor torchvision: the launcher checks the data before it starts any rank.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cifar10 import UsageError
from cifar10.data.dataset import DataSet, Description, Split
from cifar10.data.download import Archive, download, has_md5, say
from cifar10.files import one_process_at_a_time, written_whole


def _listed(faults: dict[str, str]) -> str:
    return ", ".join(f"{name} ({fault})" for name, fault in faults.items())


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Archived(DataSet):
    """A data set with torchvision's files, in `folder` of the data folder. A kind of it says how its archives are unpacked."""

    name: str  # cifar10: of the lock, and of the environment variable with one more source, CIFAR10_URL
    title: str
    folder: str
    archives: tuple[Archive, ...]
    archives_in: str  # their folder in the data folder
    sources: tuple[str, ...]  # folders on servers that have all archives, in the order in which they are tried
    page: str  # where a person finds the archives
    files: dict[str, str]  # name -> md5; those in no split are for torchvision
    split_files: dict[Split, tuple[str, ...]]
    description: Description

    def describe(self, data_dir: Path) -> Description:
        return self.description

    def archive_of(self, file: str) -> Archive:
        """The archive that holds `file`: itself, of a data set whose files are used as they were downloaded."""
        return next(archive for archive in self.archives if archive.name == file)

    def unpacked(self, archive: Path) -> Iterator[tuple[str, bytes]]:
        """The names and contents of the files in an archive, one after another."""
        yield archive.name, archive.read_bytes()

    def urls(self, archive: Archive) -> list[str]:
        """Where an archive can be had: what the environment says, a file's URL or a folder's, then the known sources."""
        own = os.environ.get(f"{self.name.upper()}_URL", "")
        if own and not own.endswith(archive.name) and len(self.archives) > 1:
            own = f"{own.rstrip('/')}/{archive.name}"
        return [*([own] if own else []), *(f"{source}/{archive.name}" for source in self.sources)]

    def place(self, data_dir: Path) -> tuple[Path, Path]:
        """The folders of the files and of the archives, for a `data_dir` that holds `folder`, is it or lies within it, holds
        intact files themselves, or is an archive."""
        if any(data_dir.name == archive.name for archive in self.archives) and os.path.isfile(data_dir):
            data_dir = data_dir.parent
        inner, given = Path(self.folder).parts, data_dir.absolute().parts
        if not os.path.isdir(data_dir / self.folder):  # unlike Path's, these answer False where they may not look
            for depth in range(len(inner), 0, -1):
                if given[-depth:] == inner[:depth]:
                    root = data_dir.absolute().parents[depth - 1]
                    return data_dir.joinpath(*inner[depth:]), root / self.archives_in
            if any(os.path.isfile(data_dir / name) and not self._read(data_dir / name)[1] for name in self.files):
                return data_dir, data_dir
        return data_dir / self.folder, data_dir / self.archives_in

    def _read(self, path: Path) -> tuple[bytes, str]:
        """The content of a file, and what is wrong with it; "" if these very bytes have the known md5."""
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b"", "missing"
        except OSError as error:
            return b"", f"unreadable: {error.strerror}"
        return content, "" if _md5(content) == self.files[path.name] else f"corrupt: {len(content)} bytes with another md5"

    def intact(self, path: Path) -> bytes:
        """The content of a file. Raises UsageError unless its md5 is right."""
        content, fault = self._read(path)
        if fault:
            raise UsageError(f"{path} is {fault}; run the same command again to restore it, or {self._instead}")
        return content

    @property
    def _instead(self) -> str:
        return f"use --dataset synthetic{'' if self.description.channels == 3 else '_mnist'}"

    def faulty_files(self, data_dir: Path, names: Iterable[str]) -> dict[str, str]:
        """Name -> fault of those files that cannot be used."""
        folder, _ = self.place(data_dir)
        found = {name: self._read(folder / name)[1] for name in names}
        return {name: fault for name, fault in found.items() if fault}

    def whereabouts(self, data_dir: Path) -> str:
        folder, size = self.place(data_dir)[0], sum(archive.num_bytes for archive in self.archives) / 1e6
        faults = self.faulty_files(data_dir, [name for names in self.split_files.values() for name in names])
        damaged = _listed({name: fault for name, fault in faults.items() if fault != "missing"})
        if not faults:
            return f"in {folder}, every md5 is right"
        return f"not all in {folder}{f': {damaged}' if damaged else ''}; a run would restore or download it ({size:.0f} MB)"

    def _extract(self, archive: Path, folder: Path, names: set[str]) -> None:
        """Write the named files from the archive, and nothing else. Raises UsageError unless all are there and intact."""
        folder.mkdir(parents=True, exist_ok=True)
        wanted = set(names)
        for name, content in self.unpacked(archive):
            if name in wanted and _md5(content) == self.files[name]:
                with written_whole(folder / name) as file:
                    file.write(content)
                wanted.remove(name)
            if not wanted:
                return
        raise UsageError(f"{archive} has no intact {', '.join(sorted(wanted))}; delete it to download it again")

    def _repair(self, data_dir: Path, faults: dict[str, str]) -> None:
        """Restore files from their archives, which are downloaded if there is no intact one. Raises ConnectionError."""
        folder, beside = self.place(data_dir)
        absent = {name for name in self.files if not os.path.lexists(folder / name)}  # torchvision and a later test need them
        if damaged := {name: fault for name, fault in faults.items() if name not in absent}:
            say(f"{folder}: restoring {_listed(damaged)}")
        for archive in self.archives:
            names = {name for name in {*faults, *absent} if self.archive_of(name) == archive}
            if not names:
                continue
            there = beside / archive.name, folder / archive.name, data_dir / archive.name
            file = next((path for path in there if has_md5(path, archive.md5)), there[0])
            if not has_md5(file, archive.md5):
                if file.exists():
                    say(f"{file} is damaged (its md5 differs)")
                file.parent.mkdir(parents=True, exist_ok=True)
                download(self.urls(archive), file, archive, self.title)
            self._extract(file, folder, names)
            say(f"{folder}: {len(names)} files written from {archive.name}, md5 verified")

    def ensure(self, data_dir: Path, *, need_test: bool) -> None:
        """Return once `data_dir` holds intact files, without `need_test` only those of train; else raise UsageError.

        Intact files are only read, without a lock; others are restored. Interrupted downloads can be resumed.
        """
        names = self.split_files["train"] + (self.split_files["test"] if need_test else ())
        faults = self.faulty_files(data_dir, names)
        if not faults:
            return
        trouble = f"no {self.title} in {data_dir}"
        if set(faults.values()) != {"missing"} or len(faults) < len(names):
            trouble = f"{self.title} in {data_dir} is damaged: {_listed(faults)}"
        remedy, beside = "point --data-dir / CIFAR10_DIR at", self.place(data_dir)[1]
        try:
            if data_dir.exists() and not data_dir.is_dir() and beside == data_dir / self.archives_in:
                raise UsageError(f"{data_dir} is not a folder; {remedy} one")
            beside.mkdir(parents=True, exist_ok=True)
            with one_process_at_a_time(beside / f".{self.name}.lock", f"fetching {self.title} to {data_dir}"):
                if faults := self.faulty_files(data_dir, names):  # else another process was faster
                    self._repair(data_dir, faults)
        except ConnectionError as error:
            raise UsageError(
                f"{trouble}, and it cannot be fetched: {error}; put {self.archives[0].name} of {self.page} into {beside}, or"
                f" {remedy} a folder that holds it, or set {self.name.upper()}_URL to a mirror, or {self._instead}"
            ) from error
        except OSError as error:
            raise UsageError(
                f"{trouble}, and it cannot be written: {error.strerror or error} ({error.filename or data_dir}); make room or"
                f" make the folder writable, or {remedy} another, or {self._instead}"
            ) from error
