"""Two real hosts, one rank on each: every launcher for several machines trains what one machine trains."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import ADDRESSES, Hosts, need_cluster
from tests.launching import BIN, DEADLINE_SECONDS, SHORT, free_port, has_trained, run, summary, wait_until

pytestmark = pytest.mark.slow

DEEPSPEED = str(BIN / "deepspeed")
FIRST, SECOND = ADDRESSES
LONG = ("--dataset", "synthetic", "--log-every-steps", "5", "--test-images", "200", "--threads", "1", "--epochs", "1")
MASTER = ["--master_addr", ADDRESSES[FIRST]]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    need_cluster()
    with Hosts(tmp_path_factory.mktemp("hosts"), 2) as hosts:
        yield hosts


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("".join(f"{name} slots=1\n" for name in ADDRESSES))
    return path


def check_is_the_run_of_one_machine(folder: Path, weights: str) -> None:
    """Finished with two ranks and the same weights, written by one of them."""
    results = summary(folder)
    assert (results["status"], results["world_size"], results["weights_sha256"]) == ("finished", 2, weights)
    assert len((folder / "steps.csv").read_text().splitlines()) == 3
    assert len(json.loads((folder / "environment.json").read_text())["starts"]) == 1


def type_on_each_host(hosts: Hosts, folder: Path, command: list[str]) -> None:
    """Run the short run by a command on every host; RANK in it is the host's number."""
    flags = [*SHORT, "--output-dir", str(folder)]
    words = {name: [word.replace("RANK", str(rank)) for word in command] for rank, name in enumerate(hosts.names)}
    processes = hosts.run_all({name: [*words[name], *flags] for name in hosts.names}, OMP_NUM_THREADS="1")
    for process in processes.values():
        assert process.returncode == 0, process.stdout + process.stderr
    assert "train loss" in processes[FIRST].stdout
    assert "train loss" not in processes[SECOND].stdout


def test_each_host_has_a_name_and_an_address_and_reaches_the_other(hosts) -> None:
    for name, other in ((FIRST, SECOND), (SECOND, FIRST)):
        process = hosts.run(name, ["sh", "-c", f"hostname; hostname -I; ssh {other} hostname"])
        assert process.stdout.split() == [name, ADDRESSES[name], other], process.stderr


def test_a_failed_setup_leaves_no_process(tmp_path, monkeypatch) -> None:
    need_cluster()
    started = []
    monkeypatch.setattr(Hosts, "_wire", lambda self: started.extend(self._process_1.values()) or 1 / 0)
    with pytest.raises(ZeroDivisionError), Hosts(tmp_path, 2):
        pass
    assert len(started) == 2
    assert [pid for pid in started if Path(f"/proc/{pid}").exists()] == []


def test_deepspeed_without_ssh(hosts, hostfile, tmp_path, two_ranks_here) -> None:
    port = ["--master_port", str(free_port())]
    where = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank=RANK", *MASTER, *port]
    type_on_each_host(hosts, tmp_path / "run", [DEEPSPEED, *where, "cifar10_deepspeed.py"])
    check_is_the_run_of_one_machine(tmp_path / "run", two_ranks_here)


def test_torchrun(hosts, tmp_path, two_ranks_here) -> None:
    where = ["--nnodes=2", "--node-rank=RANK", "--nproc-per-node=1", f"--master-addr={FIRST}", f"--master-port={free_port()}"]
    type_on_each_host(hosts, tmp_path / "run", [str(BIN / "torchrun"), *where, "cifar10_deepspeed.py"])
    check_is_the_run_of_one_machine(tmp_path / "run", two_ranks_here)


def test_deepspeed_over_ssh_from_the_first_host(hosts, hostfile, tmp_path, two_ranks_here) -> None:
    """DeepSpeed passes on PYTHON... and NCCL... variables, and those of .deepspeed_env: NAME=VALUE lines, none empty."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    command = [DEEPSPEED, "--hostfile", str(hostfile), f"--master_port={free_port()}", "cifar10_deepspeed.py"]
    process = hosts.run(FIRST, [*command, *SHORT, "--output-dir", str(tmp_path / "run")], HOME=str(home), OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stdout + process.stderr
    check_is_the_run_of_one_machine(tmp_path / "run", two_ranks_here)


def test_the_documents_line_for_two_nodes_needs_a_hostfile() -> None:
    """DeepSpeed's error, which docs/ quotes."""
    line = 'deepspeed --num_gpus=8 --num_nodes=2 --node_rank=0 --master_addr="10.0.0.1" cifar10_deepspeed.py'
    process = run(shlex.split(line))
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == "ValueError: Num nodes is >1 but no extra nodes available via hostfile"


def test_main_on_each_host(hosts, tmp_path, two_ranks_here) -> None:
    where = ["--num-gpus=1", "--num-nodes=2", "--node-rank=RANK", f"--master-addr={FIRST}", f"--master-port={free_port()}"]
    type_on_each_host(hosts, tmp_path / "run", [sys.executable, "main.py", *where])
    check_is_the_run_of_one_machine(tmp_path / "run", two_ranks_here)


def lose_host_b(hosts: Hosts) -> None:
    hosts.kill(SECOND)


def cut_the_wire(hosts: Hosts) -> None:
    hosts.run(SECOND, ["ip", "link", "set", "eth0", "down"]).check_returncode()


@pytest.mark.parametrize(
    ("fault", "words"),
    [(lose_host_b, "error: rank 0 lost another rank at step "), (cut_the_wire, "error: rank 0 timed out at step ")],
)
def test_the_loss_of_one_host_ends_the_run_on_the_other(tmp_path, fault, words) -> None:
    """After --timeout-minutes, not after the half hour or more of sockets and torch."""
    need_cluster()
    folder, flags = tmp_path / "run", [*LONG, "--timeout-minutes", "0.2", "--output-dir", str(tmp_path / "run")]
    where = ["--num-gpus=1", "--num-nodes=2", f"--master-addr={FIRST}", f"--master-port={free_port()}"]
    with Hosts(tmp_path, 2) as hosts:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        commands = ([sys.executable, "main.py", *where, f"--node-rank={rank}", *flags] for rank in (0, 1))
        mains = [hosts.popen(name, command, **pipes) for name, command in zip(hosts.names, commands, strict=True)]
        try:
            wait_until(lambda: has_trained(folder), "the first steps")
            fault(hosts)
            _, errors = mains[0].communicate(timeout=DEADLINE_SECONDS)
        finally:
            for main in mains:
                main.kill()
    assert mains[0].returncode not in (0, 2, 75)
    assert words in errors
    assert summary(folder)["status"] == "failed"
    assert summary(folder)["reason"].startswith(words.removeprefix("error: "))
