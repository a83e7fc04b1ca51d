"""Locks between processes: a lock names its holder and its file, also where the file system has none."""

import errno
import fcntl
import multiprocessing
import os
import socket
import threading
import time

import pytest

from cifar10 import UsageError
from cifar10.files import Busy, one_process_at_a_time, take_lock
from cifar10.run import folder as run_folder


def hold(path, held) -> None:
    lock = take_lock(path)
    held.set()
    time.sleep(60)
    lock.release()


@pytest.fixture
def another():
    """Starts a process that holds a lock until it is killed."""
    context, processes = multiprocessing.get_context("fork"), []

    def start(path):
        held = context.Event()
        processes.append(context.Process(target=hold, args=(path, held)))
        processes[-1].start()
        assert held.wait(20)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def no_flock(monkeypatch, request):
    """A file system whose flock fails like this."""

    def flock(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


NO_FLOCK = pytest.mark.parametrize("no_flock", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK], indirect=True)


def test_a_lock_names_its_holder_and_its_file(tmp_path, another):
    process = another(tmp_path / "lock")
    with pytest.raises(Busy) as caught:
        take_lock(tmp_path / "lock")
    assert all(words in str(caught.value) for words in (str(process.pid), socket.gethostname(), str(tmp_path / "lock")))


def test_a_killed_process_holds_no_lock(tmp_path, another):
    process = another(tmp_path / "lock")
    process.kill()
    process.join()
    take_lock(tmp_path / "lock").release()


@NO_FLOCK
def test_without_flock_a_file_stands_for_the_lock(tmp_path, no_flock, another):
    another(tmp_path / "lock")
    with pytest.raises(Busy) as caught:
        take_lock(tmp_path / "lock")
    assert f"{tmp_path / 'lock'}.held; if it is gone, delete that file" in str(caught.value)


@NO_FLOCK
def test_without_flock_a_lock_can_be_taken_again_after_its_release(tmp_path, no_flock):
    for _ in range(2):
        with one_process_at_a_time(tmp_path / "lock", "something"):
            assert (tmp_path / "lock.held").exists()
        assert not (tmp_path / "lock.held").exists()


@pytest.mark.parametrize("no_flock", [errno.EIO], indirect=True)
def test_another_fault_is_no_other_process(tmp_path, no_flock, monkeypatch):
    with pytest.raises(OSError, match="Input/output"):
        take_lock(tmp_path / "lock")


def test_a_lock_of_a_node_that_is_gone_names_the_node(tmp_path, another):
    folder = tmp_path / "run"
    folder.mkdir()
    another(folder / run_folder.LOCK)
    (folder / run_folder.LOCK).write_text("process 77 on node-that-is-gone")
    with pytest.raises(UsageError, match=r"process 77 on node-that-is-gone holds .*/run/\.lock; if it is gone, delete"):
        run_folder._hold(folder)


def test_who_waits_says_for_whom_and_goes_on(tmp_path, another, capfd):
    process, waited = another(tmp_path / "lock"), threading.Event()

    def release() -> None:
        while "waiting" not in capfd.readouterr().err:
            time.sleep(0.01)
        waited.set()
        process.kill()

    thread = threading.Thread(target=release)
    thread.start()
    with one_process_at_a_time(tmp_path / "lock", "fetching"):
        assert waited.is_set()
    thread.join()
