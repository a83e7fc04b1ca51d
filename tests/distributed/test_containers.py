"""What containers limit: CPU quotas of both kinds of cgroups decide the threads, and gloo finds an interface that there is."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cifar10 import UsageError
from cifar10.distributed import cpus, world
from cifar10.launch import command

# --- CPUs -----------------------------------------------------------------------------------------------------------------

V1 = "11:memory:/a\n4:cpu,cpuacct:/a/b\n0::/\n"
QUOTAS = {  # name -> /proc/self/cgroup, files below /sys/fs/cgroup, CPUs
    "none": ("0::/\n", {}, None),
    "version 2, its own namespace": ("0::/\n", {"cpu.max": "50000 100000"}, 0.5),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000"}, None),
    "version 2, below": ("0::/a/b\n", {"a/b/cpu.max": "150000 100000"}, 1.5),
    "version 2, above": ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2.0),
    "version 2, both": ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "400000 100000"}, 2.0),
    "version 1": (V1, {"cpu/a/b/cpu.cfs_quota_us": "50000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 0.5),
    "version 1, a container's view": (V1, {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
    "version 1, no limit": (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000"}, None),
    "version 1, of another controller": ("4:memory:/\n", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, None),
    "junk": ("0::/\n", {"cpu.max": "much"}, None),
    "no period": ("0::/\n", {"cpu.max": "5 0"}, None),
    "no /proc": (None, {"cpu.max": "50000 100000"}, None),
}


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Makes the files that a case names."""

    def make(own: str | None, files: dict[str, str]) -> None:
        monkeypatch.setattr(cpus, "CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(cpus, "OWN_CGROUPS", tmp_path / "own")
        if own is not None:
            (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")

    return make


@pytest.mark.parametrize("name", QUOTAS)
def test_the_quota_of_a_container(cgroups, name):
    own, files, quota = QUOTAS[name]
    cgroups(own, files)
    assert cpus.cpu_quota() == quota


@pytest.mark.parametrize(("quota", "cores"), [(0.1, 1), (1.0, 1), (1.5, 2), (4.0, 4), (99.0, 8)])
def test_cores_are_those_of_the_affinity_and_of_the_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert cpus.cores() == cores


@pytest.mark.parametrize(
    ("variable", "launcher", "ranks", "threads"),
    [
        (None, "python", 1, 8),
        (None, "torchrun", 3, 2),
        (None, "deepspeed", 16, 1),
        ("3", "python", 1, 3),
        ("3", "torchrun", 4, 3),
        ("1", "python", 1, 1),
        ("1", "torchrun", 1, 1),
        ("1", "torchrun", 2, 4),  # torchrun's own, where the user has set none
        ("1", "deepspeed", 2, 1),
        ("4,2", "python", 1, 4),
        ("0", "python", 1, 8),
        ("", "python", 1, 8),
        ("many", "python", 1, 8),
    ],
)
def test_omp_num_threads_decides_the_threads(monkeypatch, variable, launcher, ranks, threads):
    monkeypatch.setattr(cpus, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert cpus.threads(launcher, ranks) == threads


# --- network interfaces ----------------------------------------------------------------------------------------------------


def address(text: str) -> SimpleNamespace:
    return SimpleNamespace(family=socket.AF_INET6 if ":" in text else socket.AF_INET, address=text)


LO4, LO6, ETH = map(address, ("127.0.0.1", "::1", "192.0.2.7"))
LINK = SimpleNamespace(family=17, address="02:00:00:00:00:01")
INTERFACES = {  # interfaces, $GLOO_SOCKET_IFNAME, on one machine -> the variable afterwards, or words of the refusal
    "the usual": ({"lo": [LO4, LO6], "eth0": [ETH]}, None, True, None),
    "the usual, several machines": ({"lo": [LO4, LO6], "eth0": [ETH]}, None, False, None),
    "a right name": ({"lo": [LO4], "eth0": [ETH]}, "eth0", False, "eth0"),
    "two right names": ({"lo": [LO4], "eth0": [ETH]}, "eth0,lo", False, "eth0,lo"),
    "IPv6 only": ({"lo": [LO6], "eth0": [address("fd00::2")]}, None, True, "lo"),
    "IPv6 only, several machines": ({"lo": [LO6], "eth0": [address("fd00::2")]}, None, False, None),
    "no loopback": ({"lo": [LINK], "eth0": [ETH]}, None, True, "eth0"),
    "a wrong name": ({"lo": [LO4], "eth0": [ETH]}, "ib0", False, ("GLOO_SOCKET_IFNAME is ib0", "lo, eth0")),
    "one wrong name of two": ({"lo": [LO4], "eth0": [ETH]}, "eth0,ib0", True, ("GLOO_SOCKET_IFNAME is eth0,ib0", "lo, eth0")),
    "a name without an address": ({"lo": [LO4], "eth0": [LINK]}, "eth0", True, ("GLOO_SOCKET_IFNAME is eth0", "are lo;")),
    "nothing": ({"lo": [LINK]}, None, True, ("ip link set lo up",)),
    "nothing, and a name": ({"lo": [LINK]}, "lo", True, ("ip link set lo up",)),
}


@pytest.mark.parametrize("name", INTERFACES)
def test_an_interface_for_gloo(monkeypatch, name):
    there, asked, one_machine, expected = INTERFACES[name]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: there)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", asked or "")
    if isinstance(expected, tuple):
        with pytest.raises(UsageError) as caught:
            world.choose_interface(one_machine)
        assert all(words in str(caught.value) for words in expected)
    else:
        world.choose_interface(one_machine)
        assert os.environ["GLOO_SOCKET_IFNAME"] == (expected or "")


class Socket:
    """Binds to some addresses only."""

    bindable: tuple[str, ...] = ()

    def __init__(self, family: int = socket.AF_INET) -> None:
        self.family = family

    def __enter__(self):
        return self

    def __exit__(self, *args: object) -> None: ...

    def bind(self, where: tuple[str, int]) -> None:
        if where[0] not in self.bindable:
            raise OSError(99, "Cannot assign requested address")

    def getsockname(self) -> tuple[str, int]:
        return "", 12345


@pytest.mark.parametrize(("bindable", "words"), [(("127.0.0.1", "::1"), []), (("::1",), ["--master_addr=::1"]), ((), None)])
def test_the_launcher_is_told_where_ranks_meet_without_ipv4(monkeypatch, bindable, words):
    monkeypatch.setattr(command.socket, "socket", type("Some", (Socket,), {"bindable": bindable}))
    if words is None:
        with pytest.raises(UsageError, match="ip link set lo up"):
            command.deepspeed_command(command.LaunchOptions(), 2, 0, [], Path())
    else:
        line, _ = command.deepspeed_command(command.LaunchOptions(), 2, 0, [], Path())
        assert [word for word in line if word.startswith("--master_addr")] == words
