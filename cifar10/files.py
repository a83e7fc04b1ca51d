"""Atomic writes, and downloads by one process while the others wait."""

import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

TIMEOUT_SECONDS = 10.0  # without a response, or without a byte during a transfer


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


@contextmanager
def one_process_at_a_time(lock_file: Path, what: str) -> Iterator[None]:
    """Hold `lock_file`, which works across nodes on a shared file system; processes that wait for it print a message."""
    lock = FileLock(lock_file)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        sys.stderr.write(f"waiting for another process: {what}\n")
        sys.stderr.flush()
        held = lock.acquire()
    with held:
        yield


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
