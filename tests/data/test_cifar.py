"""CIFAR-10: verification, restoring and download from a local server; validation splits."""

import hashlib
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from cifar10 import UsageError
from cifar10.data import download
from cifar10.data.archived import Archived
from cifar10.data.cifar import CIFAR10
from cifar10.data.dataset import Images, Split, stratified_split
from cifar10.data.download import Archive
from cifar10.data.registry import DATASETS

ROOT = Path(__file__).resolve().parents[2]
IMAGES_PER_FILE = 4
PATIENCE_SECONDS = 60  # after which a broken test ends


# --- a tiny CIFAR-10, and a server that has it ------------------------------------------------------------------------


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def make_files() -> dict[str, bytes]:
    """Name -> content of a data set in CIFAR-10's format with a few random images per file."""
    rng = np.random.default_rng(0)
    files = {"batches.meta": pickle.dumps({"label_names": list(CIFAR10.description.classes)})}
    for name in (*CIFAR10.split_files["train"], *CIFAR10.split_files["test"]):
        pixels = rng.integers(0, 256, (IMAGES_PER_FILE, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, IMAGES_PER_FILE).tolist()
        files[name] = pickle.dumps({"data": pixels, "labels": labels})
    return files


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A member that is not a file."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.devmajor, member.devminor = kind, target, 1, 5
    return member


def make_archive(members: dict[str, bytes], *first: tarfile.TarInfo) -> bytes:
    """A .tar.gz of these paths, in this order, after these special members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in first:
            tar.addfile(member)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def in_folder(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{CIFAR10.folder}/{name}": content for name, content in files.items()}


@dataclass
class Tiny:
    """The tiny data set in place of CIFAR-10."""

    files: dict[str, bytes]
    archive: bytes

    def write(self, data_dir: Path, *, leave_out: tuple[str, ...] = ()) -> Path:
        """Put the files into `data_dir` -> their folder."""
        folder = data_dir / CIFAR10.folder
        folder.mkdir(parents=True)
        for name in self.files.keys() - {*leave_out}:
            (folder / name).write_bytes(self.files[name])
        return folder

    def assert_whole(self, data_dir: Path) -> None:
        """Every file is there with the right bytes, and no temporary file is left."""
        found = {path.name: path.read_bytes() for path in (data_dir / CIFAR10.folder).iterdir()}
        assert found == self.files


def believe(monkeypatch: pytest.MonkeyPatch, archive: bytes, **facts: Any) -> None:
    """Replace facts of CIFAR-10, its archive's among them."""
    facts |= {"archives": (Archive(CIFAR10.archive, len(archive), md5(archive)),)}
    monkeypatch.setitem(DATASETS, "cifar10", replace(DATASETS["cifar10"], **facts))


def ensure(data_dir: Path, *, need_test: bool) -> None:
    DATASETS["cifar10"].ensure(data_dir, need_test=need_test)


def load(data_dir: Path, split: Split) -> Images:
    return DATASETS["cifar10"].load(split, data_dir, 0)


@pytest.fixture
def tiny(monkeypatch) -> Tiny:
    files = make_files()
    archive = make_archive(in_folder(files))
    believe(monkeypatch, archive, files={name: md5(content) for name, content in files.items()}, sources=())
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("CIFAR10_URL", raising=False)
    return Tiny(files, archive)


@dataclass
class Server:
    """What the server sends, and what it saw."""

    url: str
    bodies: list[bytes]  # one per request; the last one for all further requests
    honours_range: bool = True
    stall_after: int | None = None  # bytes of each answer, then silence
    close_after: int | None = None  # bytes of each answer, then the connection is closed
    gate: threading.Event = field(default_factory=threading.Event)  # a stalled or held answer goes on when it is set
    held: bool = False  # answers wait for the gate
    ranges: list[str | None] = field(default_factory=list)  # each request's Range header
    sent: list[int] = field(default_factory=list)  # bytes of body sent in answer to each


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        state: Server = self.server.state
        body = state.bodies.pop(0) if len(state.bodies) > 1 else state.bodies[0]
        wanted = self.headers.get("Range")
        state.ranges.append(wanted)
        if state.held:
            state.gate.wait(PATIENCE_SECONDS)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.honours_range else 0
        if start and start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = next((start + n for n in (state.stall_after, state.close_after) if n is not None), len(body))
        self.wfile.write(body[start:end])
        state.sent.append(len(body[start:end]))
        if state.stall_after is not None:
            state.gate.wait(PATIENCE_SECONDS)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(tiny, monkeypatch) -> Iterator[Server]:
    """A server of the tiny archive, at CIFAR10_URL."""
    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    state = listener.state = Server(f"http://127.0.0.1:{listener.server_port}/{CIFAR10.archive}", [tiny.archive])
    monkeypatch.setenv("CIFAR10_URL", state.url)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    state.gate.set()
    listener.shutdown()
    thread.join()
    listener.server_close()


@pytest.fixture
def no_network(tiny, monkeypatch) -> Iterator[None]:
    """CIFAR10_URL is a port that nobody listens on."""
    with socket.socket() as bound:  # and that nobody else can take meanwhile
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("CIFAR10_URL", f"http://127.0.0.1:{bound.getsockname()[1]}/{CIFAR10.archive}")
        yield


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """An empty folder that any user can reach; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as outer:
        os.chmod(outer, 0o755)
        (Path(outer) / "data").mkdir()
        yield Path(outer) / "data"


@contextmanager
def read_only(folder: Path, mode: int = 0o555) -> Iterator[None]:
    """Nothing below `folder` (of `open_folder`) is writable, even by root; mode 0: nor readable."""
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    for path in reversed(folders):
        path.chmod(mode)
    if is_root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path in folders:
            path.chmod(0o755)


def refusal(data_dir: Path, need_test: bool = True) -> str:
    """The message, one line, with which `ensure` refuses."""
    with pytest.raises(UsageError) as error:
        ensure(data_dir, need_test=need_test)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def assert_remedies(line: str, data_dir: Path) -> None:
    for words in (CIFAR10.archive, f"into {data_dir}", "CIFAR10_DIR", "--data-dir", "CIFAR10_URL", "--dataset synthetic"):
        assert words in line


def leftovers(data_dir: Path) -> set[str]:
    """Names of the files under `data_dir`, without the lock."""
    return {p.name for p in data_dir.rglob("*") if p.is_file()} - {".cifar10.lock"}


CHILD = """
import ast, dataclasses, sys
from pathlib import Path
from cifar10.data import cifar, download
from cifar10.data.download import Archive
settings = ast.literal_eval(sys.argv[1])
download.TIMEOUT_SECONDS = settings["timeout"]
if settings["print_opened"]:
    sys.addaudithook(lambda event, args: print(args[0]) if event == "open" else None)
archives = (Archive(*settings["archive"]),)
tiny = dataclasses.replace(cifar.CIFAR10, files=settings["files"], archives=archives, sources=())
tiny.ensure(Path(settings["data_dir"]), need_test=settings["need_test"])
"""


def child(data_dir: Path, need_test: bool = True, print_opened: bool = False, **popen) -> subprocess.Popen:
    """`ensure` on the tiny data set in a process of its own."""
    settings = {
        "files": DATASETS["cifar10"].files,
        "archive": list(vars(DATASETS["cifar10"].archives[0]).values()),
        "timeout": PATIENCE_SECONDS,
        "print_opened": print_opened,
        "data_dir": str(data_dir),
        "need_test": need_test,
    }
    return subprocess.Popen([sys.executable, "-c", CHILD, repr(settings)], cwd=ROOT, text=True, **popen)


def assert_torchvisions_facts(ours: Archived, theirs: Any) -> None:
    """`theirs` is a class of torchvision.datasets."""
    assert (theirs.base_folder, theirs.filename) == (ours.folder, ours.archive)
    assert (theirs.url, theirs.tgz_md5) == (ours.urls(ours.archives[0])[-1], ours.archives[0].md5)
    known = [list(pair) for pair in ours.files.items()]
    assert known == [*theirs.train_list, *theirs.test_list, [theirs.meta["filename"], theirs.meta["md5"]]]
    assert ours.split_files["train"] == tuple(name for name, _ in theirs.train_list)
    assert ours.split_files["test"] == tuple(name for name, _ in theirs.test_list)


def test_the_facts_are_torchvisions():
    assert_torchvisions_facts(CIFAR10, torchvision.datasets.CIFAR10)


def test_importing_it_does_not_import_torch():
    heavy = "{'torch', 'torchvision', 'deepspeed', 'rich'}"
    code = f"import sys, cifar10.data.cifar; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"


# --- files on disk ----------------------------------------------------------------------------------------------------


def test_loads_what_the_files_hold(tiny, tmp_path):
    tiny.write(tmp_path)
    for split, num_files in (("train", 5), ("test", 1)):
        images = load(tmp_path, split)
        batches = [pickle.loads(tiny.files[name]) for name in CIFAR10.split_files[split]]
        assert len(images) == num_files * IMAGES_PER_FILE
        assert images.pixels.shape == (len(images), 32, 32, 3)
        assert images.pixels.dtype == np.uint8
        assert images.pixels.flags.c_contiguous
        assert images.labels.dtype == np.int64
        assert images.labels.tolist() == [label for batch in batches for label in batch["labels"]]
        planes = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(images.pixels.transpose(0, 3, 1, 2), planes)


def test_good_files_in_a_read_only_folder(tiny, open_folder, no_network):
    tiny.write(open_folder)
    with read_only(open_folder):
        ensure(open_folder, need_test=True)
        assert len(load(open_folder, "train")) == 5 * IMAGES_PER_FILE
    assert not (open_folder / ".cifar10.lock").exists()


def test_without_need_test_the_test_file_is_neither_required_nor_opened(tiny, tmp_path, no_network):
    folder = tiny.write(tmp_path)
    for need_test in (False, True):
        with child(tmp_path, need_test, print_opened=True, stdout=subprocess.PIPE) as process:
            opened = process.stdout.read()
        assert process.returncode == 0
        assert "data_batch_5" in opened
        assert ("test_batch" in opened) == need_test
    (folder / "test_batch").unlink()
    ensure(tmp_path, need_test=False)
    assert len(load(tmp_path, "train")) == 5 * IMAGES_PER_FILE
    assert "test_batch (missing)" in refusal(tmp_path)


def test_restoring_train_does_not_touch_the_test_file(tiny, server, tmp_path):
    folder = tiny.write(tmp_path, leave_out=("data_batch_1",))
    (folder / "test_batch").write_bytes(b"not looked at")
    ensure(tmp_path, need_test=False)
    assert (folder / "test_batch").read_bytes() == b"not looked at"
    assert (folder / "data_batch_1").read_bytes() == tiny.files["data_batch_1"]


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("split", ["train", "test"])
def test_wrong_bytes_are_never_unpickled(tiny, tmp_path, split):
    folder = tiny.write(tmp_path)
    name = CIFAR10.split_files[split][-1]
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UsageError, match=f"{name} is corrupt"):
        load(tmp_path, split)
    assert not (tmp_path / "exploded").exists()
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"{name} is missing"):
        load(tmp_path, split)


# --- where the files are ------------------------------------------------------------------------------------------------

HERE = {  # --data-dir -> where the files are, and where they would be restored from the archive
    "data": "data/cifar-10-batches-py",
    "data/cifar-10-batches-py": "data/cifar-10-batches-py",
    "data/cifar-10-batches-py/": "data/cifar-10-batches-py",
    "data/../data/cifar-10-batches-py": "data/cifar-10-batches-py",
    "data/cifar-10-python.tar.gz": "data/cifar-10-batches-py",
}


@pytest.mark.parametrize("given", HERE)
def test_the_inner_folder_and_the_archive_are_understood(tiny, server, tmp_path, given):
    data_dir, folder = tmp_path / given, tmp_path / HERE[given]
    if not given.endswith(".gz"):
        tiny.write(folder.parent)
        ensure(data_dir, need_test=True)
        assert len(load(data_dir, "train")) == 5 * IMAGES_PER_FILE
        (folder / "data_batch_4").unlink()
    else:
        folder.parent.mkdir()
    (folder.parent / CIFAR10.archive).write_bytes(tiny.archive)
    ensure(data_dir, need_test=True)
    assert len(load(data_dir, "test")) == IMAGES_PER_FILE
    tiny.assert_whole(folder.parent)
    assert server.ranges == []


def test_the_folder_that_one_stands_in_is_understood(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.write(tmp_path))
    ensure(Path(), need_test=True)
    assert len(load(Path(), "train")) == 5 * IMAGES_PER_FILE


def test_files_in_a_folder_of_another_name_are_found(tiny, server, tmp_path):
    folder = tiny.write(tmp_path).rename(tmp_path / "mine")
    ensure(folder, need_test=True)
    (folder / "data_batch_4").unlink()
    ensure(folder, need_test=True)
    assert {path.name for path in folder.iterdir() if path.is_file()} == {*tiny.files, CIFAR10.archive, ".cifar10.lock"}
    assert len(load(folder, "train")) == 5 * IMAGES_PER_FILE


def test_foreign_files_of_the_same_names_are_left_alone(tiny, server, tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"mine")
    ensure(tmp_path, need_test=True)
    assert (tmp_path / "data_batch_1").read_bytes() == b"mine"
    tiny.assert_whole(tmp_path)


def test_an_inner_folder_that_is_not_there_yet_is_made(tiny, server, tmp_path):
    ensure(tmp_path / CIFAR10.folder, need_test=True)
    tiny.assert_whole(tmp_path)
    assert (tmp_path / CIFAR10.archive).exists()


# --- repair -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_a_damaged_file_is_restored_from_the_archive_without_a_request(tiny, server, tmp_path, capfd, damage, name):
    path = tiny.write(tmp_path) / name
    good = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": good[:100], "altered": good[:-1] + b"!"}[damage])
    (tmp_path / CIFAR10.archive).write_bytes(tiny.archive)
    ensure(tmp_path, need_test=True)
    tiny.assert_whole(tmp_path)
    assert server.ranges == []
    assert (name in capfd.readouterr().err) == (damage != "missing")


@pytest.mark.parametrize(("content", "fault"), [(None, "missing"), (b"x", "corrupt: 1 bytes with another md5")])
def test_what_cannot_be_restored_is_named(tiny, tmp_path, no_network, content, fault):
    path = tiny.write(tmp_path) / "data_batch_2"
    path.unlink() if content is None else path.write_bytes(content)
    before = leftovers(tmp_path)
    line = refusal(tmp_path)
    assert f"data_batch_2 ({fault})" in line
    assert "data_batch_1" not in line
    assert_remedies(line, tmp_path)
    assert leftovers(tmp_path) == before


def test_a_hostile_member_is_never_written(tiny, server, tmp_path, monkeypatch):
    data_dir = tmp_path / "a" / "data"
    evil = {f"{CIFAR10.folder}/../../evil": b"1", "../evil": b"2", str(tmp_path / "evil"): b"3", "data_batch_1": b"4"}
    links = {f"{CIFAR10.folder}/data_batch_2": "/etc/passwd", CIFAR10.folder: str(tmp_path)}
    archive = make_archive(
        evil | in_folder(tiny.files), *(special(name, tarfile.SYMTYPE, target) for name, target in links.items())
    )
    believe(monkeypatch, archive)
    server.bodies = [archive]
    ensure(data_dir, need_test=True)
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.is_dir()}
    files = {f"a/data/{CIFAR10.folder}/{name}" for name in tiny.files}
    assert written == files | {f"a/data/{CIFAR10.archive}", "a/data/.cifar10.lock"}
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))
    tiny.assert_whole(data_dir)


def test_an_archive_with_a_wrong_member_is_refused(tiny, server, tmp_path, monkeypatch):
    archive = make_archive(in_folder(tiny.files | {"data_batch_4": b"wrong"}))
    believe(monkeypatch, archive)
    server.bodies = [archive]
    assert "data_batch_4" in refusal(tmp_path)
    assert "data_batch_4" not in leftovers(tmp_path)


# --- download ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_test", [True, False])
def test_a_fresh_download_is_complete(tiny, server, tmp_path, capfd, need_test):
    data_dir = tmp_path / "made" / "new"
    ensure(data_dir, need_test=need_test)
    tiny.assert_whole(data_dir)
    assert (data_dir / CIFAR10.archive).read_bytes() == tiny.archive
    assert server.ranges == [None]
    assert leftovers(data_dir) == {CIFAR10.archive, *tiny.files}
    assert f"{server.url} to {data_dir / CIFAR10.archive}" in capfd.readouterr().err
    ensure(data_dir, need_test=True)  # the second time nothing happens
    assert server.ranges == [None]
    assert capfd.readouterr().err == ""


def test_a_terminal_sees_a_progress_bar(tiny, server, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    ensure(tmp_path, need_test=True)
    tiny.assert_whole(tmp_path)
    assert "━" in terminal.getvalue()


@pytest.mark.parametrize(
    ("kept", "honours_range", "ranges", "sent"),
    [
        *[(1000, True, ["bytes=1000-"], 1000), (1000, False, ["bytes=1000-"], 0), (-1000, True, ["bytes=1000-", None], None)],
        (10**9, True, None, None),  # complete
    ],
)
def test_a_partial_download_is_resumed_if_server_and_content_allow(tiny, server, tmp_path, kept, honours_range, ranges, sent):
    server.honours_range = honours_range
    part = tmp_path / f"{CIFAR10.archive}.part"
    part.write_bytes(tiny.archive[:kept] if kept > 0 else b"x" * -kept)
    ensure(tmp_path, need_test=True)
    tiny.assert_whole(tmp_path)
    assert server.sent == [] if ranges is None else server.ranges == ranges
    assert sent is None or server.sent == [len(tiny.archive) - sent]
    assert leftovers(tmp_path) == {CIFAR10.archive, *tiny.files}


def test_a_server_that_sends_something_else_is_refused(tiny, server, tmp_path):
    server.bodies = [tiny.archive[:-1] + b"x"]
    line = refusal(tmp_path)
    assert server.url in line
    assert "md5" in line
    assert_remedies(line, tmp_path)
    assert leftovers(tmp_path) == set()


def test_a_corrupt_archive_is_downloaded_again(tiny, server, tmp_path):
    (tmp_path / CIFAR10.archive).write_bytes(tiny.archive[:-1] + b"x")
    ensure(tmp_path, need_test=True)
    tiny.assert_whole(tmp_path)
    assert (tmp_path / CIFAR10.archive).read_bytes() == tiny.archive
    assert server.ranges == [None]


def test_a_closed_connection_is_resumed(tiny, server, tmp_path):
    server.close_after = 1000
    line = refusal(tmp_path)
    kept = 1000 * download.TRIES
    assert f"closed after {kept} of {len(tiny.archive)} bytes" in line
    assert server.ranges == [None, *(f"bytes={1000 * n}-" for n in range(1, download.TRIES))]
    assert (tmp_path / f"{CIFAR10.archive}.part").read_bytes() == tiny.archive[:kept]
    server.close_after = None
    ensure(tmp_path, need_test=True)
    tiny.assert_whole(tmp_path)
    assert server.ranges[-1] == f"bytes={kept}-"


def test_a_stalled_transfer_ends_and_can_be_resumed(tiny, server, tmp_path, monkeypatch):
    server.stall_after = 500
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.5)
    line = refusal(tmp_path)
    assert "no answer for 0.5 seconds" in line
    assert_remedies(line, tmp_path)
    part = (tmp_path / f"{CIFAR10.archive}.part").read_bytes()
    assert part == tiny.archive[: len(part)]
    assert len(part) == 500 * download.TRIES
    assert leftovers(tmp_path) == {f"{CIFAR10.archive}.part"}
    server.stall_after = None
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", PATIENCE_SECONDS)
    ensure(tmp_path, need_test=True)
    tiny.assert_whole(tmp_path)


def test_a_server_that_never_answers_is_asked_once(tiny, server, tmp_path, monkeypatch):
    server.held = True
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    assert_remedies(refusal(tmp_path), tmp_path)
    assert len(server.ranges) <= 1


@pytest.mark.parametrize("address", ["nonsense", "http://", "http://127.0.0.1:1/x y"])
def test_an_invalid_mirror_is_refused(tiny, tmp_path, monkeypatch, address):
    monkeypatch.setenv("CIFAR10_URL", address)
    assert_remedies(refusal(tmp_path), tmp_path)


def test_a_missing_page_is_refused(tiny, server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(404))
    assert "404" in refusal(tmp_path)


def test_without_a_network_the_remedies_are_listed(tiny, no_network, tmp_path):
    line = refusal(tmp_path)
    assert f"no CIFAR-10 in {tmp_path}, and " in line
    assert os.environ["CIFAR10_URL"] in line
    assert_remedies(line, tmp_path)
    assert leftovers(tmp_path) == set()


def test_two_processes_download_once(tiny, server, tmp_path):
    server.held = True  # the answer waits until the other process stands before the lock
    read_end, write_end = os.pipe()
    processes = [child(tmp_path, stderr=write_end) for _ in range(2)]
    os.close(write_end)
    with open(read_end) as both:
        lines = []
        for line in both:
            lines.append(line)
            if line.startswith("waiting for another process"):
                server.gate.set()
    assert [process.wait(PATIENCE_SECONDS) for process in processes] == [0, 0], "".join(lines)
    assert server.ranges == [None]
    assert sum(line.startswith("waiting for another process") for line in lines) == 1, "".join(lines)
    assert sum("files written" in line for line in lines) == 1  # the one that waited verifies again
    tiny.assert_whole(tmp_path)


# --- unusable folders -------------------------------------------------------------------------------------------------


def test_a_file_is_not_a_folder(tiny, no_network, tmp_path):
    path = tmp_path / "data"
    path.write_text("")
    for data_dir in (path, path / "below"):
        assert "--data-dir" in refusal(data_dir)


@pytest.mark.parametrize(("below", "mode"), [("", 0o555), ("deeper/still", 0o555), ("below", 0)])
def test_a_folder_without_permission(tiny, no_network, open_folder, below, mode):
    if not mode:
        tiny.write(open_folder / below)
    with read_only(open_folder, mode):
        line = refusal(open_folder / below)
    assert "Permission denied" in line
    assert "--data-dir" in line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(tiny, server, tmp_path):
    part = tmp_path / f"{CIFAR10.archive}.part"
    part.symlink_to("/dev/full")
    line = refusal(tmp_path)
    assert "No space left" in line
    assert "--data-dir" in line
    assert part.is_symlink()  # kept for the next try
    assert leftovers(tmp_path) == set()


# --- splits -----------------------------------------------------------------------------------------------------------


def test_the_split_of_cifar_is_stratified_and_fixed_by_its_seed():
    labels = np.arange(50_000) % 10
    train, val = stratified_split(labels, 5000, seed=0)
    assert train.dtype == val.dtype == np.int64
    assert (len(train), len(val)) == (45_000, 5_000)
    assert np.bincount(labels[val]).tolist() == [500] * 10
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(50_000))
    again = stratified_split(labels, 5000, seed=0)
    np.testing.assert_array_equal(again[1], val)
    other = stratified_split(labels, 5000, seed=1)[1]
    assert len(np.intersect1d(other, val)) < 1000
    assert val[:5].tolist() == [0, 21, 38, 43, 54]  # the same on every platform and in every version of NumPy


@pytest.mark.parametrize("val_images", [0, 7, 10, 99])
def test_other_sizes_have_nearly_equal_classes(val_images):
    labels = np.arange(100) % 10
    train, val = stratified_split(labels, val_images, seed=3)
    counts = np.bincount(labels[val], minlength=10)
    assert len(val) == val_images
    assert len(train) == 100 - val_images
    assert counts.max() - counts.min() <= 1


def test_unequal_classes_keep_their_proportions():
    labels = np.repeat([0, 1, 2], [800, 150, 50])
    _, val = stratified_split(labels, 100, seed=0)
    assert np.bincount(labels[val]).tolist() == [80, 15, 5]


@pytest.mark.parametrize("val_images", [-1, 100, 101])
def test_an_invalid_split_is_refused_with_the_range(val_images):
    with pytest.raises(UsageError, match=f"--val-images: {val_images}, .* from 0 to 99"):
        stratified_split(np.arange(100) % 10, val_images, seed=0)


# --- the real data set ------------------------------------------------------------------------------------------------


def test_the_real_data_set_is_torchvisions(real_data_dir):
    ensure(real_data_dir, need_test=True)
    for split, num_images in (("train", 50_000), ("test", 10_000)):
        images = load(real_data_dir, split)
        assert len(images) == num_images
        theirs = torchvision.datasets.CIFAR10(real_data_dir, train=split == "train")
        np.testing.assert_array_equal(images.pixels, theirs.data)
        np.testing.assert_array_equal(images.labels, theirs.targets)
        assert tuple(theirs.classes) == CIFAR10.description.classes
