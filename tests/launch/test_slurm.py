"""run_deepspeed.sh and srun on a real SLURM: the ranks asked for, the weights of a plain run, and a requeued job."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Hosts, Slurm, need_cluster
from tests.launching import BIN, PROJECT, SHORT, has_trained, summary, wait_until

pytestmark = pytest.mark.slow

LONG = ("--dataset", "synthetic", "--max-steps", "120", "--log-every-steps", "5", "--test-images", "200", "--threads", "1")
EXPORTED = {"OMP_NUM_THREADS": "1", "VENV": str(BIN.parent)}


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need_cluster()
    folder = tmp_path_factory.mktemp("one_node")
    with Hosts(folder, 1) as hosts, Slurm(folder, hosts) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need_cluster()
    folder = tmp_path_factory.mktemp("two_nodes")
    with Hosts(folder, 2) as hosts, Slurm(folder, hosts) as slurm:
        yield slurm


def submit(slurm: Slurm, log: Path, requests: list[str], *flags: str) -> str:
    return slurm.submit(f"--output={log}", *requests, "run_deepspeed.sh", *flags, **EXPORTED)


def check_is_the_run_of_one_machine(folder: Path, weights: str) -> None:
    results = summary(folder)
    assert (results["status"], results["world_size"], results["weights_sha256"]) == ("finished", 2, weights)


def test_the_batch_script_is_clean() -> None:
    for checker in (["bash", "-n"], ["shellcheck"]):
        if shutil.which(checker[0]):
            process = subprocess.run([*checker, "run_deepspeed.sh"], cwd=PROJECT, capture_output=True, text=True, check=False)
            assert process.returncode == 0, process.stdout + process.stderr


def test_a_request_that_the_cluster_cannot_meet_is_refused(one_node) -> None:
    for requests in (["--gres=gpu:3"], ["--mem=64G"], ["--partition=cpu"]):
        assert one_node.run("sbatch", *requests, "run_deepspeed.sh").returncode == 1, requests


def test_sbatch_as_the_document_types_it_trains_on_both_gpus(one_node, tmp_path, two_ranks_here) -> None:
    log, folder = tmp_path / "log", tmp_path / "run"
    job = one_node.wait(submit(one_node, log, [], *SHORT, "--output-dir", str(folder)))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
    check_is_the_run_of_one_machine(folder, two_ranks_here)
    asked = {key: job[key] for key in ("JobName", "Partition", "TimeLimit", "CPUs/Task", "TresPerNode")}
    assert list(asked.values()) == ["cifar10", "gpu", "02:00:00", "8", "gres:gpu:2"]


def test_a_job_that_is_warned_saves_is_requeued_and_finishes(one_node, tmp_path) -> None:
    log, folder = tmp_path / "log", tmp_path / "run"
    number = submit(one_node, log, ["--gres=gpu:1"], *LONG, "--output-dir", str(folder))
    wait_until(lambda: has_trained(folder), "the first steps")
    assert one_node.run("scancel", "--batch", "--signal=USR1", number).returncode == 0
    job = one_node.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    results = summary(folder)
    assert (results["status"], results["world_size"], results["steps"]) == ("finished", 1, 120)
    (resumed_at,) = results["resumed_at_steps"]
    assert 0 < resumed_at < 120
    assert f"requeued: job {number} resumes in {folder} from step_" in log.read_text()


def srun(slurm: Slurm, folder: Path, *requests: str) -> subprocess.CompletedProcess[str]:
    command = ["srun", "--ntasks=2", *requests, sys.executable, "cifar10_deepspeed.py", *SHORT, "--output-dir", str(folder)]
    return slurm.run(*command, **EXPORTED)


@pytest.mark.parametrize("cluster", ["one_node", "two_nodes"])
def test_srun_python_is_one_rank_per_task(cluster, request, tmp_path, two_ranks_here) -> None:
    requests = ["--gres=gpu:2"] if cluster == "one_node" else ["--nodes=2", "--ntasks-per-node=1", "--gres=gpu:1"]
    process = srun(request.getfixturevalue(cluster), tmp_path / "run", *requests)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("train loss") == 1
    check_is_the_run_of_one_machine(tmp_path / "run", two_ranks_here)


def test_sbatch_on_two_nodes(two_nodes, tmp_path, two_ranks_here) -> None:
    log, folder = tmp_path / "log", tmp_path / "run"
    job = two_nodes.wait(submit(two_nodes, log, ["--nodes=2", "--gres=gpu:1"], *SHORT, "--output-dir", str(folder)))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
    check_is_the_run_of_one_machine(folder, two_ranks_here)


def test_deepspeeds_own_launcher_for_slurm(two_nodes, tmp_path, two_ranks_here) -> None:
    """It runs srun with a task for each slot of the hostfile, and the tasks do not know their ranks."""
    folder, hostfile = tmp_path / "run", tmp_path / "hostfile"
    hostfile.write_text("hostA slots=1\nhostB slots=1\n")
    deepspeed = [str(BIN / "deepspeed"), "--launcher=slurm", f"--hostfile={hostfile}", "--no_ssh_check"]
    in_allocation = ["salloc", "--nodes=2", "--ntasks-per-node=1", "--gres=gpu:1"]
    command = [*in_allocation, *deepspeed, "cifar10_deepspeed.py", *SHORT, "--output-dir", str(folder)]
    process = two_nodes.run(*command, **EXPORTED)
    assert process.returncode == 0, process.stdout + process.stderr
    check_is_the_run_of_one_machine(folder, two_ranks_here)
