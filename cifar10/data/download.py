"""Downloads that are resumed where they broke off, verified by md5, and renamed last.

Network errors are ConnectionErrors, so that any other OSError is the disk's.
"""

from __future__ import annotations

import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cifar10.files import TIMEOUT_SECONDS, file_digest

CHUNK_BYTES = 1 << 18


def has_md5(path: Path, md5: str) -> bool:
    """Whether `path` is a file with this md5. Raises OSError if it is unreadable."""
    return path.exists() and file_digest(path, "md5") == md5


def say(line: str) -> None:
    sys.stderr.write(line + "\n")  # one write, where print makes two: lines of several processes do not mix
    sys.stderr.flush()


@contextmanager
def _network() -> Iterator[None]:
    """Turn errors of network calls into ConnectionErrors with a one-line reason."""
    try:
        yield
    except urllib.error.HTTPError as error:
        raise ConnectionError(f"the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)  # URLError wraps the true one
        if isinstance(reason, TimeoutError):
            reason = f"no answer for {TIMEOUT_SECONDS:g} seconds"
        raise ConnectionError(" ".join(str(reason).split()) or type(error).__name__) from error


@contextmanager
def _progress_bar(done_bytes: int, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal; yields the function to call with each number of new bytes."""
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=total_bytes or None, completed=done_bytes)
        yield lambda num_bytes: progress.advance(bar, num_bytes)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _transfer(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`, or write it again where the server cannot resume.

    Raises ConnectionError if the transfer fails, stalls or ends early; `part` keeps what has arrived.
    """
    done = _size(part)
    headers = {"User-Agent": "cifar10-deepspeed"} | ({"Range": f"bytes={done}-"} if done else {})
    with _network():
        try:
            response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            if done and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # nothing is missing at the end of `part`; its md5 is checked below
            raise
        announced = int(response.headers.get("Content-Length") or 0)
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        done = done if resumed else 0
        total = announced and done + announced
        with open(part, "ab" if resumed else "wb") as file, _progress_bar(done, total) as advance:
            while True:
                with _network():
                    chunk = response.read1(CHUNK_BYTES)  # read() would lose what has arrived if the rest never comes
                if not chunk:
                    break
                file.write(chunk)
                advance(len(chunk))
    if _size(part) < total:
        raise ConnectionError(f"the connection closed after {_size(part)} of {total} bytes")


def download(url: str, archive: Path, md5: str, what: str) -> None:
    """Fetch `what` to a `.part` file beside `archive`, verify its md5, rename it. Raises ConnectionError."""
    part = archive.with_name(archive.name + ".part")
    resuming = f", of which {_size(part) / 1e6:.1f} MB are there" if _size(part) else ""
    say(f"fetching {what} from {url} to {archive}{resuming}")
    began = time.monotonic()
    for _ in range(2):  # a wrong .part is deleted once, and all of it fetched again
        before = _size(part)
        try:
            _transfer(url, part)
        except ConnectionError:
            if _size(part) == before:  # nothing came: a second try would only keep the user waiting
                raise
            _transfer(url, part)
        if has_md5(part, md5):
            break
        part.unlink()
        say(f"{part} was not the archive (its md5 differs) and is deleted")
    else:
        raise ConnectionError(f"what it sends is not {archive.name} (its md5 differs)")
    os.replace(part, archive)
    say(f"fetched {_size(archive) / 1e6:.1f} MB in {time.monotonic() - began:.1f} seconds, md5 verified")
