"""Downloads from several sources, good and bad, of a local server."""

import gzip
import hashlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cifar10.data import download
from cifar10.data.download import Archive

CONTENT = gzip.compress(random.Random(0).randbytes(40_000))
PORTAL = b"<html>sign in to this network</html>"
ARCHIVE = Archive("x.gz", len(CONTENT), hashlib.md5(CONTENT).hexdigest())
HALF = len(CONTENT) // 2


# --- a server whose paths are kinds of servers --------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.close_connection = True
        self.start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        kind = urlsplit(self.path).path.rpartition("/")[2]
        self.server.seen.append(f"{kind} {self.start}")
        KINDS[kind](self)

    def answer(self, body: bytes, *, code: int = 200, send: int | None = None, **headers: str) -> None:
        """Answer with this body, of which `send` bytes are sent."""
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[:send])

    def rest(self, send: int | None = None) -> None:
        """What a server does that can resume."""
        if not self.start:
            return self.answer(CONTENT, send=send)
        of = f"bytes {self.start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        return self.answer(CONTENT[self.start :], code=206, send=send, Content_Range=of)

    def chunked(self, body: bytes) -> None:
        """Without a length."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in (body[:HALF], body[HALF:]):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if part else b"")
        self.wfile.write(b"0\r\n\r\n")

    def trickle(self, seconds: float) -> None:
        """10 bytes at a time, at the most 1,000; at full speed when it is asked again."""
        if sum(line.startswith(self.path[1:] + " ") for line in self.server.seen) > 1:
            return self.rest()
        self.rest(send=0)
        for at in range(self.start, self.start + 1_000, 10):
            self.wfile.write(CONTENT[at : at + 10])
            time.sleep(seconds)

    def log_message(self, *args: object) -> None:
        pass


def moved(handler: Handler) -> None:
    handler.answer(b"", code=302, Location="/good")


KINDS: dict[str, Callable[[Handler], None]] = {
    "good": Handler.rest,
    "404": lambda handler: handler.send_error(404),
    "503": lambda handler: handler.send_error(503),
    "no_range": lambda handler: handler.answer(CONTENT),
    "cut": lambda handler: handler.rest(send=1_000),
    "cut_no_range": lambda handler: handler.answer(CONTENT, send=HALF),
    "at_once": lambda handler: handler.connection.close(),
    "portal": lambda handler: handler.answer(PORTAL, Content_Type="text/html"),
    "portal_chunked": lambda handler: handler.chunked(PORTAL),
    "chunked": lambda handler: handler.chunked(CONTENT),
    "altered": lambda handler: handler.answer(CONTENT[:-1] + b"x"),
    "longer": lambda handler: handler.answer(CONTENT + b"x"),
    "elsewhere": lambda handler: handler.answer(CONTENT[:9], code=206, Content_Range=f"bytes 0-8/{len(CONTENT)}"),
    "moved": moved,
    "loop": lambda handler: handler.answer(b"", code=302, Location="/loop"),
    "slow": lambda handler: handler.trickle(0.02),
    "slower": lambda handler: handler.trickle(0.06),
}


class Listener(ThreadingHTTPServer):
    def handle_error(self, *args: object) -> None:
        """A client that leaves is no error."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    with serving() as listener:
        monkeypatch.setenv("no_proxy", "*")
        yield listener


@contextmanager
def serving() -> Iterator[Listener]:
    listener = Listener(("127.0.0.1", 0), Handler)
    listener.daemon_threads, listener.seen = True, []
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield listener
    listener.shutdown()
    thread.join()
    listener.server_close()


def fetch(server: Listener, kinds: str, target: Path) -> None:
    """Download from servers of these kinds, in this order."""
    download.download([f"http://127.0.0.1:{server.server_port}/{kind}" for kind in kinds.split()], target, ARCHIVE, "x")


# --- sources ------------------------------------------------------------------------------------------------------------

CASES = {  # kinds of sources in order: the requests that are made, with the byte at which each begins
    "good 404": "good 0",
    "404 good": "404 0, good 0",
    "503 404 good": "503 0, 404 0, good 0",
    "at_once good": "at_once 0, good 0",
    "portal good": "portal 0, good 0",
    "portal_chunked good": "portal_chunked 0, good 0",
    "altered good": "altered 0, good 0",
    "longer good": "longer 0, good 0",
    "loop good": None,
    "cut good": "cut 0, cut 1000, cut 2000, good 3000",
    "cut no_range": "cut 0, cut 1000, cut 2000, no_range 3000",
    "cut elsewhere good": "cut 0, cut 1000, cut 2000, elsewhere 3000, good 3000",
    "cut portal good": "cut 0, cut 1000, cut 2000, portal 3000, good 3000",
    "cut portal_chunked good": "cut 0, cut 1000, cut 2000, portal_chunked 3000, good 3000",
    "cut chunked": "cut 0, cut 1000, cut 2000, chunked 3000",
    "cut_no_range good": f"cut_no_range 0, cut_no_range {HALF}, good {HALF}",
    "chunked": "chunked 0",
    "moved": "moved 0, good 0",
    "cut moved": "cut 0, cut 1000, cut 2000, moved 3000, good 3000",
}


@pytest.mark.parametrize("kinds", CASES)
def test_sources_are_tried_in_order_and_resumed_by_one_another(server, tmp_path, kinds):
    fetch(server, kinds, tmp_path / "x.gz")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.gz", CONTENT)]
    assert CASES[kinds] in (None, ", ".join(server.seen))


@pytest.mark.parametrize("kind", ["404", "503", "at_once", "portal", "portal_chunked", "altered", "longer", "loop"])
def test_a_source_without_another_is_named_with_its_fault_and_nothing_is_left(server, tmp_path, kind):
    with pytest.raises(ConnectionError, match=f"/{kind}: ."):
        fetch(server, kind, tmp_path / "x.gz")
    assert list(tmp_path.iterdir()) == []


def test_all_faults_are_named(server, tmp_path):
    with pytest.raises(ConnectionError) as caught:
        fetch(server, "404 portal cut", tmp_path / "x.gz")
    for fault in ("/404: the server answered 404", "/portal: ", "/cut: the connection closed after 3000"):
        assert fault in str(caught.value)
    assert (tmp_path / "x.gz.part").read_bytes() == CONTENT[:3_000]


@pytest.mark.parametrize("kinds", ["good", "no_range"])
def test_wrong_bytes_that_were_there_are_thrown_away(server, tmp_path, kinds):
    (tmp_path / "x.gz.part").write_bytes(b"x" * 500)
    fetch(server, kinds, tmp_path / "x.gz")
    assert (tmp_path / "x.gz").read_bytes() == CONTENT
    assert server.seen == [f"{kinds} 500", f"{kinds} 0"]


def test_a_slow_source_is_left_for_the_next(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(download, "SECONDS_TO_JUDGE", 0.1)
    fetch(server, "slow good", tmp_path / "x.gz")
    assert (tmp_path / "x.gz").read_bytes() == CONTENT
    (first, second), begins = server.seen, int(server.seen[1].split()[1])
    assert (first, second) == ("slow 0", f"good {begins}")
    assert 0 < begins < 1_000
    assert "kB/s" in capfd.readouterr().err


def test_the_fastest_is_used_if_all_are_slow(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SECONDS_TO_JUDGE", 0.2)
    fetch(server, "slower slow 404", tmp_path / "x.gz")
    assert [line.split()[0] for line in server.seen] == ["slower", "slow", "404", "slow"]
    assert (tmp_path / "x.gz").read_bytes() == CONTENT


def test_the_only_source_may_be_slow(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SECONDS_TO_JUDGE", 0.0)
    monkeypatch.setattr(download, "SLOW", 1e12)
    fetch(server, "good", tmp_path / "x.gz")
    assert server.seen == ["good 0"]


def test_without_a_terminal_lines_show_progress_rate_and_time_left(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(download, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(download, "CHUNK_BYTES", 10_000)
    fetch(server, "good", tmp_path / "x.gz")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("x.gz: ")]
    assert lines
    assert all("of 0.0 MB, " in line and " MB/s, 0:00:0" in line and line.endswith(" left") for line in lines)


def test_a_proxy_of_the_environment_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    download.download(["http://data.invalid/good"], tmp_path / "x.gz", ARCHIVE, "x")
    assert (tmp_path / "x.gz").read_bytes() == CONTENT


def test_a_file_can_be_a_source(tmp_path):
    (tmp_path / "there").write_bytes(CONTENT)
    download.download(["file:///no/such", (tmp_path / "there").as_uri()], tmp_path / "x.gz", ARCHIVE, "x")
    assert (tmp_path / "x.gz").read_bytes() == CONTENT


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk_is_not_the_networks_fault(server, tmp_path):
    (tmp_path / "x.gz.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        fetch(server, "good good", tmp_path / "x.gz")
    assert not isinstance(caught.value, ConnectionError)
    assert server.seen == ["good 0"]
