"""main.py's own flags: how many ranks and machines, and the deepspeed command line that they become."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

import main
from cifar10 import UsageError
from main import Machines, launch_command, ranks_wanted, split_flags, started_by
from tests.launching import run

TWO = Machines(num_nodes=2, node_rank=1, master_addr="10.0.0.1", master_port=29_501)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "RANK", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)


# --- which flags are whose ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "machines", "rest"),
    [
        ("", Machines(), ""),
        ("--epochs 3 words", Machines(), "--epochs 3 words"),
        ("--num-gpus 2", Machines(num_gpus=2), ""),
        ("--num_gpus=2 --epochs=3", Machines(num_gpus=2), "--epochs=3"),
        ("--num-gpus 2 --num-gpus 4", Machines(num_gpus=4), ""),
        ("--num-nodes 2 --master-addr host", Machines(num_nodes=2, master_addr="host"), ""),
        (
            "--seed 1 --num-nodes=3 --node_rank=2 --master_addr=a --master-port 5 --lr 2",
            Machines(None, 3, 2, "a", 5),
            "--seed 1 --lr 2",
        ),
        ("--num-gpus-wanted 2 num-gpus", Machines(), "--num-gpus-wanted 2 num-gpus"),  # the program refuses these itself
    ],
)
def test_mains_own_flags_are_taken_out_and_the_rest_is_passed_on(argv, machines, rest):
    assert split_flags(argv.split()) == (machines, rest.split())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--num-gpus 0", "--num-gpus '0' is impossible; type a whole number from 1 up, as in --num-gpus 1"),
        ("--num-gpus -1", "--num-gpus '-1' is impossible"),
        ("--num-gpus two", "--num-gpus 'two' is impossible"),
        ("--num-gpus", "--num-gpus '' is impossible"),
        ("--num-gpus=1.5", "--num-gpus '1.5' is impossible"),
        ("--num-nodes 0", "--num-nodes '0' is impossible"),
        ("--node-rank x", "--node-rank 'x' is impossible; type a whole number from 0 up, as in --node-rank 0"),
        ("--master-port 0", "--master-port '0' is impossible"),
        ("--num-nodes 2 --node-rank 2 --master-addr a", "--node-rank 2 of --num-nodes 2 is impossible; type 0 to 1"),
        ("--node-rank 1", "--node-rank 1 of --num-nodes 1 is impossible; type 0 to 0"),
        ("--num-nodes 2", "--num-nodes needs --master-addr, the first machine's address, as in --master-addr 10.0.0.1"),
        ("--num-nodes 2 --master-addr=", "--num-nodes needs --master-addr"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_type(argv, says):
    with pytest.raises(UsageError) as caught:
        split_flags(argv.split())
    assert str(caught.value).startswith(says)
    assert len(str(caught.value).splitlines()) == 1


def test_several_of_main_under_one_srun_step_are_refused_with_what_to_type(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UsageError, match=r"srun has started several of main.py.*srun python cifar10_deepspeed.py"):
        split_flags(["--epochs", "3"])
    assert split_flags(["--num-nodes", "2", "--master-addr", "a"])[0].num_nodes == 2  # one on each of two nodes
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert split_flags([]) == (Machines(), [])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num-nodes", "2"], "--num-nodes needs --master-addr"),
        (["--num-nodes", "2", "--master-addr", "127.0.0.1"], "--num-nodes needs --output-dir, a folder that all machines see"),
        (["--num-nodes", "3", "--master-addr", "127.0.0.1", "--node-rank", "3"], "type 0 to 2"),
    ],
)
def test_the_program_refuses_in_one_line_before_anything_starts(flags, says):
    process = run([sys.executable, "main.py", "--dataset", "synthetic", "--global-batch-size", "96", *flags])
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("error: ")
    assert says in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_the_batch_must_divide_over_the_ranks_of_all_machines(tmp_path):
    flags = "--dataset synthetic --global-batch-size 32 --num-gpus 2 --num-nodes 3 --master-addr a".split()
    with pytest.raises(UsageError, match="global batch 32 does not divide over 6 ranks; try --global-batch-size 30"):
        main.check([*flags, "--output-dir", str(tmp_path / "run")])


# --- how many ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "gpus", "ranks"), [(None, 0, 1), (None, 4, 4), (2, 4, 2), (4, 4, 4), (3, 0, 3)])
def test_ranks_on_this_machine(asked, gpus, ranks):
    assert ranks_wanted(asked, gpus) == ranks


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(UsageError, match="--num-gpus 3, but this machine has 2; type --num-gpus 2 or fewer"):
        ranks_wanted(3, 2)


# --- the command line -----------------------------------------------------------------------------------------------------


def built(machines: Machines, ranks: int, gpus: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The words between `deepspeed -q` and the script, and the environment."""
    command, environment = launch_command(machines, ranks, gpus, ["--epochs", "3"], folder / "hostfile")
    assert command[-3:] == [str(main.SCRIPT), "--epochs", "3"]
    return command[command.index("-q") + 1 : -3], environment


def test_on_one_machine_ranks_are_counted_and_the_port_is_free(tmp_path):
    words, environment = built(Machines(), 2, 0, tmp_path)
    assert words[0] == "--num_gpus=2"
    assert words[1].startswith("--master_port=")
    assert len(words) == 2
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert not (tmp_path / "hostfile").exists()
    ports = {built(Machines(), 2, 0, tmp_path)[0][1] for _ in range(5)}
    assert len(ports) > 1


def test_on_several_machines_each_is_named_in_the_hostfile_and_none_is_logged_in_to(tmp_path):
    words, environment = built(TWO, 4, 0, tmp_path)
    due = ["--no_ssh", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29501"]
    assert words == [f"--hostfile={tmp_path / 'hostfile'}", *due]
    assert (tmp_path / "hostfile").read_text() == "node0 slots=4\nnode1 slots=4\n"
    assert environment["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(
    ("machines", "include"), [(Machines(), "--include=localhost:2,5"), (TWO, "--include=node0:2,5@node1:2,5")]
)
def test_the_gpus_that_are_visible_are_named_because_deepspeed_would_not_look(tmp_path, monkeypatch, machines, include):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    words, environment = built(machines, 2, 3, tmp_path)
    assert include in words
    assert not any(word.startswith("--num_gpus") for word in words)
    assert "CUDA_VISIBLE_DEVICES" not in environment
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,5,7"
    assert "DS_ACCELERATOR" not in environment


def test_without_gpus_what_is_visible_plays_no_part(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    words, environment = built(Machines(), 2, 0, tmp_path)
    assert words[0] == "--num_gpus=2"
    assert not any(word.startswith("--include") for word in words)
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize("machines", [Machines(), Machines(num_gpus=2), TWO, Machines(4, 3, 2, "a host", 29_500)])
def test_the_words_that_start_it_again_are_read_as_the_same(machines, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--epochs", "3"])
    words = shlex.split(started_by(machines))
    assert words[:2] == ["python", "main.py"]
    assert split_flags(words[2:]) == (machines, [])
