"""Downloads from several sources: resumed where they broke off, by whichever source is next, verified by md5, renamed last.

Of the downloaders at hand (torch.hub's, torchvision's, pooch) none resumes, and none leaves a source that is slow.
Network errors are ConnectionErrors, so that any other OSError is the disk's.
"""

import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path

from cifar10.files import TIMEOUT_SECONDS, file_digest

CHUNK_BYTES = 1 << 18
SLOW = 500_000  # bytes per second below which a source is left while there is another
SECONDS_TO_JUDGE = 10.0
SECONDS_BETWEEN_LINES = 10.0  # of progress, where stderr is not a terminal
TRIES = 3  # of a source whose connection breaks, as long as each brings some bytes


@dataclass(frozen=True)
class Archive:
    """A file whose content is known; any server that has it will do."""

    name: str
    num_bytes: int
    md5: str
    begins: bytes = b"\x1f\x8b"  # a .gz file's first bytes; no web page has them


class TooSlow(ConnectionError):
    """A source is left for another; `rate` is in bytes per second."""

    def __init__(self, rate: float) -> None:
        super().__init__(f"only {rate / 1e3:.0f} kB/s")
        self.rate = rate


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
def _progress(archive: Archive, done_bytes: int) -> Iterator[Callable[[int], float]]:
    """Show progress, rate and time left: a bar on a terminal, else a line every few seconds.

    Yields the function to call with each number of new bytes; it returns the rate of the last half minute in bytes per second.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns, on_terminal = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()), sys.stderr.isatty()
    shown = time.monotonic()

    def advance(num_bytes: int) -> float:
        nonlocal shown
        progress.advance(task.id, num_bytes)
        if not on_terminal and time.monotonic() > shown + SECONDS_BETWEEN_LINES and task.speed:
            shown = time.monotonic()
            left = timedelta(seconds=round((archive.num_bytes - task.completed) / task.speed))
            of = f"{task.completed / 1e6:.1f} of {archive.num_bytes / 1e6:.1f} MB"
            say(f"{archive.name}: {of}, {task.speed / 1e6:.2f} MB/s, {left} left")
        return task.speed or 0.0

    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not on_terminal) as progress:
        progress.add_task("", total=archive.num_bytes, completed=done_bytes)
        (task,) = progress.tasks
        yield advance


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _transfer(url: str, part: Path, archive: Archive, slow: float) -> None:
    """Append to `part` what it lacks of the archive; from a server that cannot resume, what is there is read again and skipped.

    Raises ConnectionError if the transfer fails, stalls, ends early or is another file's, and TooSlow below `slow` bytes per
    second; `part` keeps what has arrived.
    """
    done, began = _size(part), time.monotonic()
    headers = {"User-Agent": "cifar10-deepspeed"} | ({"Range": f"bytes={done}-"} if done else {})
    with _network():  # an opener of our own, because urlopen's keeps the proxies of its first call
        opener = urllib.request.build_opener()
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
        resumed = response.status == HTTPStatus.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            raise ValueError("it resumes at another place")
        announced = int(response.headers.get("Content-Length") or 0)
    skip, position = (0, done) if resumed else (done, 0)
    with response:
        if announced and position + announced != archive.num_bytes:
            raise ConnectionError(f"it has {position + announced} bytes, and {archive.name} has {archive.num_bytes}")
        with open(part, "ab") as file, _progress(archive, position) as advance:
            while True:
                with _network():
                    chunk = response.read1(CHUNK_BYTES)  # read() would lose what has arrived if the rest never comes
                if not chunk:
                    break
                if position == 0 and not chunk.startswith(archive.begins[: len(chunk)]):
                    raise ConnectionError(f"it sends something else ({response.headers.get_content_type()})")
                file.write(chunk[skip:])
                skip, position = max(0, skip - len(chunk)), position + len(chunk)
                rate = advance(len(chunk))
                if rate < slow and time.monotonic() > began + SECONDS_TO_JUDGE:
                    raise TooSlow(rate)
    if _size(part) < archive.num_bytes:
        raise ConnectionError(f"the connection closed after {_size(part)} of {archive.num_bytes} bytes")


def _fetch(url: str, part: Path, archive: Archive, slow: float) -> None:
    """Complete `part` from one source, in several tries if its connection breaks. Raises ConnectionError; see _transfer."""
    for tries_left in reversed(range(TRIES)):
        before = _size(part)
        try:
            return _transfer(url, part, archive, slow)
        except TooSlow:
            raise
        except ConnectionError:
            if _size(part) == before or not tries_left:  # without a new byte, another try would only keep the user waiting
                raise


def download(sources: Sequence[str], target: Path, archive: Archive, what: str) -> None:
    """Fetch `what` to a `.part` file beside `target`, verify its md5, rename it. Raises ConnectionError: each source's fault.

    Sources are tried in order. If all that work are slow, the fastest of them is used after all.
    """
    part, began = target.with_name(target.name + ".part"), time.monotonic()
    left, faults, rates = list(sources), {}, {}
    while left or rates:
        slow = SLOW if left and (len(left) > 1 or rates) else 0.0
        url = left.pop(0) if left else max(rates, key=rates.get)
        rates.pop(url, None)
        kept = _size(part)
        say(f"fetching {what} from {url} to {target}{f', of which {kept / 1e6:.1f} MB are there' if kept else ''}")
        try:
            if kept < archive.num_bytes:
                _fetch(url, part, archive, slow)
            if has_md5(part, archive.md5):
                os.replace(part, target)
                return say(f"fetched {_size(target) / 1e6:.1f} MB in {time.monotonic() - began:.1f} seconds, md5 verified")
            part.unlink()
            if kept:  # it may be what was there before that is wrong
                say(f"{part} was not the archive (its md5 differs) and is deleted")
                left.insert(0, url)
                continue
            raise ConnectionError(f"what it sends is not {archive.name} (its md5 differs)")
        except ConnectionError as error:
            if isinstance(error, TooSlow):
                rates[url] = error.rate
            faults[url] = str(error)
            if not _size(part):
                part.unlink(missing_ok=True)
            say(f"leaving {url}: {error}")
    raise ConnectionError("; ".join(f"{url}: {fault}" for url, fault in faults.items()))
