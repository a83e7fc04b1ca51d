"""Files that are seen whole or not at all, and are fetched by one process while the others wait."""

import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

TIMEOUT_SECONDS = 10.0  # without an answer, or in the middle of a transfer without a byte


def file_digest(path: Path, algorithm: str) -> str:
    """A file's hex digest, read in pieces. (hashlib.file_digest needs Python 3.11.)"""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, where its file system can say so."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name when all of it is on the disk; a failure or power cut leaves what was there.

    One process writes a given path at a time.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one fixed name, so that no garbage can pile up
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def one_process_at_a_time(lock_file: Path, what: str) -> Iterator[None]:
    """Hold `lock_file`: one process of a node (of a cluster, on a shared file system) works, the others say so and wait."""
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.stderr.write(f"waiting for another process that is {what}\n")
        sys.stderr.flush()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def talking_to_stderr_and_not_for_ever() -> Iterator[None]:
    """For downloads by other libraries, which print to stdout and wait for a silent server for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)
