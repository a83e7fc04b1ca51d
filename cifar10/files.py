"""Atomic writes, and downloads by one process while the others wait."""

import errno
import hashlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

TIMEOUT_SECONDS = 10.0  # without a response, or without a byte during a transfer


NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # of file systems without, or of NFS without lockd


def data_folder() -> Path:
    """$CIFAR10_DIR, else data/."""
    return Path(os.environ.get("CIFAR10_DIR") or "data").expanduser()


def file_digest(path: Path, algorithm: str) -> str:
    """A file's hex digest, read in pieces. (hashlib.file_digest needs Python 3.11.)"""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """fsync a directory, so that new names in it survive a power cut; best effort."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Atomic write: the file replaces `path` once it is on disk; a failure or power cut leaves the old content.

    Only one process may write a given path at a time.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # a fixed name, so that crashes leave at most one
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


class Busy(Exception):
    """A lock is held: by whom, and in which file."""


def _has_flock(path: Path) -> bool:
    import fcntl

    try:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_FLOCK
    return True


def take_lock(path: Path) -> BaseFileLock:
    """Lock `path` against other processes, those of other machines too, until the lock is released or this process ends.

    On a file system without locks a second file stands for the lock, and stays if its process is killed. Raises Busy.
    """
    has_flock, who = _has_flock(path), ""
    lock = FileLock(path) if has_flock else SoftFileLock(path.with_name(f"{path.name}.held"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with suppress(OSError):
            who = " ".join(Path(lock.lock_file).read_text(errors="replace").split()[:4])
        raise Busy(f"{who or 'another process'} holds {lock.lock_file}; if it is gone, delete that file") from None
    if has_flock:  # the other writes its own
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return lock


@contextmanager
def one_process_at_a_time(lock_file: Path, what: str) -> Iterator[None]:
    """Hold `lock_file`; processes that wait for it print a message."""
    lock, told = None, False
    while lock is None:
        try:
            lock = take_lock(lock_file)
        except Busy as busy:
            if not told:
                sys.stderr.write(f"waiting for another process: {what}: {busy}\n")
                sys.stderr.flush()
            told = True
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def download_limits() -> Iterator[None]:
    """A timeout, and stderr for output: other libraries' downloads print to stdout and never time out."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)
