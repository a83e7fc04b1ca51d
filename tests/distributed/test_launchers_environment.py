"""Rank, world size, address and port from the variables of srun and mpirun, without a cluster."""

import os
import re
import socket
import sys
from pathlib import Path

import pytest

from cifar10 import UsageError
from cifar10.distributed import launchers
from tests.launching import PROJECT, run

GIVEN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
JOINS = """
from cifar10 import UsageError
from cifar10.distributed import launchers, world
launchers.SECONDS_TO_RESOLVE = 0
try:
    world.join()
except UsageError as error:
    print(error)
"""
DERIVED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SCONTROL = """#!/bin/sh
case "$1 $2 $3" in
    "show hostnames gpu[03-05,09]") printf 'gpu03\\ngpu04\\ngpu05\\ngpu09\\n' ;;
    "show hostnames rack[1-2]n[7-8]") printf 'rack1n7\\nrack1n8\\nrack2n7\\nrack2n8\\n' ;;
    "show node gpu03") echo "NodeName=gpu03 CoresPerSocket=8 NodeAddr=10.1.2.3 NodeHostName=gpu03" ;;
    *) exit 1 ;;
esac
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """os.environ without a launcher and without scontrol; restored afterwards."""
    variables = {"PATH": str(tmp_path)}
    monkeypatch.setattr(os, "environ", variables)
    return variables


@pytest.fixture
def scontrol(tmp_path: Path, environment: dict[str, str]) -> None:
    """SLURM's own answers about two node lists and a node."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The hosts and addresses that resolve; tests change the set."""
    known = {"127.0.0.1", "gpu03", "rack1n7", "a", "login1"}

    def getaddrinfo(host: str, port: None) -> list[None]:
        if host not in known:
            raise OSError("Name or service not known")
        return [None]

    monkeypatch.setattr(launchers.socket, "getaddrinfo", getaddrinfo)
    return known


def slurm_step(rank: int, tasks: int, nodes: int, node: int, local: int, per_node: str, listed: str) -> dict[str, str]:
    """The variables of a task that srun started."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURM_STEP_NODELIST": listed,
    }


def derived(environment: dict[str, str], variables: dict[str, str]) -> dict[str, str]:
    """What a process with these variables derives from them."""
    before = dict(environment)
    environment.update(variables)
    size = launchers.world_size()
    found = {name: environment[name] for name in DERIVED if name in environment}
    assert size == int(found.get("WORLD_SIZE", "1"))
    environment.clear()
    environment.update(before)
    return found


# --- srun -------------------------------------------------------------------------------------------------------------


def test_a_step_on_one_node(environment):
    found = [derived(environment, slurm_step(rank, 4, 1, 0, rank, "4", "gpu03")) for rank in range(4)]
    for rank, place in enumerate(found):
        assert (place["RANK"], place["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (place["WORLD_SIZE"], place["LOCAL_WORLD_SIZE"], place["MASTER_ADDR"]) == ("4", "4", "127.0.0.1")
        assert 1024 < int(place["MASTER_PORT"]) < 65536
    assert len({place["MASTER_PORT"] for place in found}) == 1


SEVEN = [(rank, node, local) for rank, (node, local) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)])]


@pytest.mark.parametrize("asked", ["scontrol", "no scontrol"])
def test_a_step_on_several_nodes(environment, request, asked):
    if asked == "scontrol":
        request.getfixturevalue("scontrol")
    steps = [slurm_step(rank, 7, 4, node, local, "2(x3),1", "gpu[03-05,09]") for rank, node, local in SEVEN]
    found = [derived(environment, step) for step in steps]
    assert [place["RANK"] for place in found] == list("0123456")
    assert [place["LOCAL_RANK"] for place in found] == list("0101010")
    assert [place["LOCAL_WORLD_SIZE"] for place in found] == list("2222221")
    assert {(place["MASTER_ADDR"], place["WORLD_SIZE"]) for place in found} == {("gpu03", "7")}
    assert len({place["MASTER_PORT"] for place in found}) == 1


@pytest.mark.parametrize(
    ("listed", "first"),
    [("gpu[03-05,09]", "gpu03"), ("gpu[03,09]", "gpu03"), ("a,b", "a"), ("login1", "login1"), ("a,gpu[03-04]", "a")],
)
def test_the_first_of_a_node_list_without_scontrol(environment, listed, first):
    assert derived(environment, slurm_step(0, 2, 2, 0, 0, "1(x2)", listed))["MASTER_ADDR"] == first


def test_scontrol_reads_what_we_cannot_and_knows_the_address_of_a_name_that_does_not_resolve(environment, scontrol, names):
    assert derived(environment, slurm_step(3, 4, 4, 3, 0, "1(x4)", "rack[1-2]n[7-8]"))["MASTER_ADDR"] == "rack1n7"
    names -= {"gpu03"}
    names |= {"10.1.2.3"}
    assert derived(environment, slurm_step(0, 4, 4, 0, 0, "1(x4)", "gpu[03-05,09]"))["MASTER_ADDR"] == "10.1.2.3"


@pytest.mark.parametrize("asked", ["scontrol", "no scontrol"])
def test_a_host_without_any_address_is_refused_with_what_to_set(environment, request, names, asked):
    if asked == "scontrol":
        request.getfixturevalue("scontrol")
    names.clear()
    step = slurm_step(0, 4, 4, 0, 0, "1(x4)", "gpu[03-05,09]")
    with pytest.raises(UsageError, match=r"gpu03; set MASTER_ADDR"):
        derived(environment, step)
    environment.clear()
    assert derived(environment, {**step, "MASTER_ADDR": "10.0.0.1"})["MASTER_ADDR"] == "10.0.0.1"


@pytest.mark.parametrize(
    ("listed", "counts"),
    [("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("1(x2)", [1, 1]), ("1,3(x2),2", [1, 3, 3, 2]), ("16(x2)", [16, 16])],
)
def test_tasks_per_node_are_run_lengths(environment, listed, counts):
    for node, count in enumerate(counts):
        step = slurm_step(0, sum(counts), len(counts), node, 0, listed, "a,b")
        assert derived(environment, step)["LOCAL_WORLD_SIZE"] == str(count)


def test_jobs_and_steps_have_ports_of_their_own_and_a_given_one_is_kept(environment):
    step, ports = slurm_step(0, 2, 1, 0, 0, "2", "a"), set()
    for job in (4711, 4712, 9_999_999):
        for number in (0, 1, 2):
            more = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(number)}
            ports.add(derived(environment, {**step, **more})["MASTER_PORT"])
    assert len(ports) == 9
    assert all(int(port) in launchers.PORTS for port in ports)
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345"}
    assert given.items() <= derived(environment, {**step, **given}).items()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},  # a batch script
        slurm_step(0, 1, 1, 0, 0, "1", "gpu03"),
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
    ],
    ids=["no launcher", "batch script", "srun -n 1", "mpirun -n 1"],
)
def test_what_is_alone_is_a_world_of_one(environment, variables):
    assert derived(environment, variables) == {}
    environment.update(variables)
    assert launchers.world_size() == 1
    assert launchers.name(environment) == "python"


def test_what_torchrun_and_deepspeed_set_is_left_alone_inside_a_step(environment):
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert derived(environment, {**slurm_step(1, 2, 2, 1, 0, "1(x2)", "a,b"), **given}) == given


# --- mpirun -----------------------------------------------------------------------------------------------------------


def mpi(rank: int, size: int, local: int, local_size: int) -> dict[str, str]:
    """The variables of a process that Open MPI's mpirun started."""
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
    }


def test_mpirun_on_one_machine(environment):
    found = [derived(environment, mpi(rank, 3, rank, 3)) for rank in range(3)]
    for rank, place in enumerate(found):
        assert [place[name] for name in DERIVED[:5]] == [str(rank), "3", str(rank), "3", "127.0.0.1"]
    assert len({place["MASTER_PORT"] for place in found}) == 1
    assert int(found[0]["MASTER_PORT"]) in launchers.PORTS


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "10.0.0.1"}, {"MASTER_PORT": "29500"}])
def test_mpirun_on_several_machines_is_refused_without_an_address_and_a_port(environment, given):
    with pytest.raises(UsageError, match=r"mpirun -x MASTER_ADDR=.* -x MASTER_PORT="):
        derived(environment, {**mpi(2, 4, 0, 2), **given})


def test_mpirun_on_several_machines_counts_ranks_not_its_own_daemons(environment):
    """In a SLURM job it starts its daemons with srun, a task on each node, whose variables its ranks inherit."""
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    due = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **given}
    for daemon in ({}, slurm_step(1, 2, 2, 1, 0, "1(x2)", "a,b")):
        assert derived(environment, {**daemon, **mpi(3, 4, 1, 2), **given}) == due


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_the_program_refuses_it_in_one_line_from_one_rank_of_each_machine(local_rank, tmp_path):
    variables = {**mpi(2, 4, int(local_rank), 2), "OMPI_COMM_WORLD_RANK": str(2 + int(local_rank))}
    command = [sys.executable, "cifar10_deepspeed.py", "--dataset", "synthetic", "--output-dir", str(tmp_path / "run")]
    process = run(command, **variables)
    assert (process.returncode, process.stdout) == (2, "")
    assert re.fullmatch("error: .* MASTER_ADDR .*\n" if local_rank == "0" else "", process.stderr)
    assert not (tmp_path / "run").exists()


# --- other MPI libraries -----------------------------------------------------------------------------------------------

FAMILIES = {
    "Intel MPI, MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "MVAPICH": tuple(f"MV2_COMM_WORLD_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "Cray": ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_of_other_mpi_libraries(environment, family):
    names = FAMILIES[family]
    for rank in range(3):
        found = derived(environment, dict(zip(names, (str(rank), "3", str(rank), "3"), strict=True)))
        assert [found[name] for name in DERIVED[:5]] == [str(rank), "3", str(rank), "3", "127.0.0.1"]
    several = dict(zip(names, ("3", "4", "1", "2"), strict=True))
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        derived(environment, several)
    environment.clear()
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    inside = {**slurm_step(1, 2, 2, 1, 0, "1(x2)", "a,b"), **several, **given}  # Hydra starts its proxies with srun
    assert derived(environment, inside)["RANK"] == "3"
    assert derived(environment, dict(zip(names, ("0", "1", "0", "1"), strict=True))) == {}


def test_pmi_variables_of_srun_are_left_to_slurm(environment):
    found = derived(environment, {**slurm_step(1, 2, 1, 0, 1, "2", "a"), "PMI_RANK": "1", "PMI_SIZE": "2"})
    assert (found["RANK"], found["LOCAL_RANK"]) == ("1", "1")
    with pytest.raises(UsageError, match="torchrun"):  # not one run of two ranks, and not two runs in silence
        derived(environment, {"PMI_RANK": "1", "PMI_SIZE": "2"})


# --- what a shell has left over, and what contradicts itself ----------------------------------------------------------------

STEP = slurm_step(0, 4, 1, 0, 0, "4", "gpu03")
ALONE = {  # variables -> a part of the note
    "nothing": ({}, None),
    "WORLD_SIZE": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2"),
    "WORLD_SIZE of one": ({"WORLD_SIZE": "1"}, None),
    "all but RANK": ({name: value for name, value in GIVEN.items() if name != "RANK"}, "WORLD_SIZE=2"),
    "LOCAL_RANK": ({"LOCAL_RANK": "3"}, None),
    "MASTER_ADDR": ({"MASTER_ADDR": "nowhere", "MASTER_PORT": "29500"}, None),
    "a shell in a step of one": ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PTY_PORT": "5"}, None),
    "a shell in a step of four": ({**STEP, "SLURM_PTY_PORT": "5"}, "srun --pty"),
    "a shell in an allocation": ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, None),
    "PMI of one": ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
    "one rank of a launcher": ({**GIVEN, "WORLD_SIZE": "1"}, None),
    "one rank without an address": ({"RANK": "0", "WORLD_SIZE": "1"}, None),
    "torchrun's restart": ({**GIVEN, "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "1"}, "--output-dir"),
    "torchrun's first start": ({**GIVEN, "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}, None),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_process_alone(environment, name):
    variables, note = ALONE[name]
    environment.update(variables)
    assert launchers.world_size() == 1
    found = launchers.notes(None)
    assert note in found[0] if note else found == []
    assert not launchers.notes(Path("run")) or "TORCHELASTIC_RESTART_COUNT" not in variables
    assert "RANK" in environment or "LOCAL_RANK" not in environment


CONTRADICTIONS = {
    "RANK alone": ({"RANK": "0"}, "WORLD_SIZE"),
    "RANK empty": ({**GIVEN, "RANK": ""}, "RANK"),
    "RANK beyond": ({**GIVEN, "RANK": "2"}, "RANK is 2"),
    "RANK negative": ({**GIVEN, "RANK": "-1"}, "RANK is -1"),
    "RANK in words": ({**GIVEN, "RANK": "zero"}, "RANK is zero"),
    "WORLD_SIZE in words": ({**GIVEN, "WORLD_SIZE": "two"}, "two"),
    "LOCAL_RANK beyond": ({**GIVEN, "LOCAL_RANK": "2"}, "LOCAL_RANK is 2"),
    "LOCAL_RANK beyond its machine": (
        {**GIVEN, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "3"},
        "LOCAL_RANK is 3",
    ),
    "LOCAL_WORLD_SIZE beyond": ({**GIVEN, "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is 8"),
    "no address": ({**GIVEN, "MASTER_ADDR": ""}, "MASTER_ADDR"),
    "no port": ({name: value for name, value in GIVEN.items() if name != "MASTER_PORT"}, "MASTER_PORT"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_itself_is_refused(environment, name):
    variables, words = CONTRADICTIONS[name]
    environment.update(variables)
    with pytest.raises(UsageError, match=words):
        launchers.world_size()


def test_an_address_that_does_not_resolve(names, monkeypatch):
    monkeypatch.setattr(launchers, "SECONDS_TO_RESOLVE", 1)
    monkeypatch.setattr(launchers.time, "sleep", lambda _: names.add("late"))
    launchers.wait_for_name("late")
    launchers.wait_for_name("127.0.0.1")
    with pytest.raises(UsageError, match="MASTER_ADDR=nowhere"):
        launchers.wait_for_name("nowhere")


@pytest.mark.parametrize(("address", "words"), [("127.0.0.1", "MASTER_PORT="), ("nowhere.invalid", "MASTER_ADDR=nowhere")])
def test_a_port_in_use_and_a_wrong_address_end_in_one_line(address, words):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        variables = {**GIVEN, "LOCAL_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": str(taken.getsockname()[1])}
        process = run([sys.executable, "-c", JOINS], PYTHONPATH=str(PROJECT), **variables)
    assert (process.returncode, len(process.stdout.splitlines())) == (0, 1), process.stderr
    assert words in process.stdout


# --- the launcher's name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "due"),
    [
        ({}, "python"),
        ({**GIVEN}, "python"),
        ({**GIVEN, "TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({**GIVEN, "CROSS_SIZE": "1", "LOCAL_SIZE": "2"}, "deepspeed"),
        (slurm_step(0, 2, 1, 0, 0, "2", "a"), "srun"),
        (mpi(0, 2, 0, 2), "mpirun"),
        ({**slurm_step(0, 2, 1, 0, 0, "2", "a"), **GIVEN, "TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
    ],
)
def test_the_launcher_by_name(environment, variables, due):
    environment.update(variables)
    launchers.world_size()
    assert launchers.name(environment) == due
