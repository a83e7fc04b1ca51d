"""A job of run_deepspeed.sh that SLURM requeues, for whatever reason, ends with the weights of an undisturbed run.

`pytest -n 0 -s -m slow tests/launch/test_requeue.py` shows each job, as in records/2026-11-21_slurm.
"""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import ENDED, PREEMPTING, WITH_USER_SIGNAL, Hosts, Slurm, need_cluster
from tests.launching import BIN, COMMANDS, has_trained, run, summary, wait_until

COMMON = ("--dataset", "synthetic", "--test-images", "200", "--threads", "1", "--log-every-steps", "10")
SECONDS_LONG = (*COMMON, "--max-steps", "300")
MINUTE_LONG = (*COMMON, "--max-steps", "300", "--global-batch-size", "256")  # 175 steps an epoch
ONE_RANK = ("--gres=gpu:1", "--cpus-per-task=2", "--mem=8G")
EXPORTED = {"OMP_NUM_THREADS": "1", "VENV": str(BIN.parent)}

pytestmark = pytest.mark.slow


@contextmanager
def one_node(folder: Path, **more: str) -> Iterator[Slurm]:
    need_cluster()
    with Hosts(folder, 1) as hosts, Slurm(folder, hosts, **more) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with one_node(tmp_path_factory.mktemp("cluster")) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """weights_sha256 of an undisturbed run of these flags outside SLURM; each is run once."""
    known: dict[tuple[str, ...], str] = {}

    def undisturbed(ranks: int, *flags: str) -> str:
        key = (str(ranks), *flags)
        if key not in known:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            own = ["--num-gpus", str(ranks), "--output-dir", str(folder)]
            process = run([*COMMANDS["main.py"], *own, *flags], OMP_NUM_THREADS="1")
            assert process.returncode == 0, process.stderr
            known[key] = summary(folder)["weights_sha256"]
        return known[key]

    return undisturbed


def submit(slurm: Slurm, folder: Path, requests: tuple[str, ...], *flags: str) -> str:
    """sbatch run_deepspeed.sh, with its log beside the run's folder."""
    requests = (f"--output={folder}.log", *requests)
    return slurm.submit(*requests, "run_deepspeed.sh", *flags, "--output-dir", str(folder), **EXPORTED)


def follow(slurm: Slurm, number: str) -> dict[str, str]:
    """Wait for the end of a job, and print its state whenever that changes."""
    states: list[str] = []

    def has_ended() -> bool:
        job = slurm.job(number)
        state = " ".join(f"{key}={job.get(key)}" for key in ("JobState", "Reason", "Restarts", "ExitCode"))
        if state not in states[-1:]:
            print(f"job {number} {state}", flush=True)
            states.append(state)
        return job.get("JobState") in ENDED

    wait_until(has_ended, f"job {number}")
    return slurm.job(number)


def check_finished(job: dict[str, str], folder: Path, ranks: int, weights: str) -> dict[str, Any]:
    """The job was requeued, its run resumed each time, and it ended with these weights."""
    log = folder.with_name(f"{folder.name}.log").read_text()
    print(log)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
    results = summary(folder)
    assert (results["status"], results["world_size"], results["weights_sha256"]) == ("finished", ranks, weights)
    assert 0 < len(results["resumed_at_steps"]) <= int(job["Restarts"])
    assert results["resumed_at_steps"] == sorted(set(results["resumed_at_steps"]))
    return results


def test_scontrol_requeue(cluster, weights, tmp_path) -> None:
    """Without a warning, SIGTERM to all processes."""
    folder = tmp_path / "run"
    number = submit(cluster, folder, (), *SECONDS_LONG)
    wait_until(lambda: has_trained(folder), "the first steps")
    assert cluster.run("scontrol", "requeue", number).returncode == 0
    results = check_finished(follow(cluster, number), folder, 2, weights(2, *SECONDS_LONG))
    assert 0 < results["resumed_at_steps"][0] < 300


@pytest.mark.parametrize(("signal", "ranks", "requests"), [("SIGTERM", 1, ONE_RANK), ("user signal", 2, ())])
def test_preemption(signal, ranks, requests, weights, tmp_path) -> None:
    """With a grace time: SIGTERM goes to the job's steps, not to its script, or the script gets the user's signal."""
    folder = tmp_path / "run"
    with one_node(tmp_path, partitions=PREEMPTING + WITH_USER_SIGNAL * (signal != "SIGTERM")) as slurm:
        number = submit(slurm, folder, ("--partition=low", *requests), *SECONDS_LONG)
        wait_until(lambda: has_trained(folder), "the first steps")
        other = slurm.submit("--partition=high", "--gres=gpu:2", "--output=/dev/null", "--wrap", "sleep 1")
        assert slurm.wait(other)["JobState"] == "COMPLETED"
        results = check_finished(follow(slurm, number), folder, ranks, weights(ranks, *SECONDS_LONG))
    assert 0 < results["resumed_at_steps"][0] < 300


def test_a_time_limit(cluster, tmp_path) -> None:
    """Half a minute to a minute and a half from now, so that it comes while the run trains, on a machine of any speed."""
    folder, endless = tmp_path / "run", (*COMMON, "--epochs", "100")
    number = submit(cluster, folder, (*ONE_RANK, "--time=60", "--signal=B:USR1@60"), *endless)
    wait_until(lambda: has_trained(folder), "the first steps")
    hours, minutes, seconds = map(int, cluster.job(number)["RunTime"].split(":"))
    limit = 60 * hours + minutes + (1 if seconds < 30 else 2)
    assert cluster.run("scontrol", "update", f"jobid={number}", f"timelimit={limit}").returncode == 0
    wait_until(lambda: cluster.job(number)["Restarts"] != "0", "the job to be requeued")
    assert summary(folder)["status"] == "stopped"
    assert cluster.run("scontrol", "update", f"jobid={number}", "timelimit=60").returncode == 0
    wait_until(lambda: summary(folder)["status"] == "running" and summary(folder)["resumed_at_steps"], "the run to go on")
    assert cluster.run("scancel", number).returncode == 0
    assert (follow(cluster, number)["JobState"], summary(folder)["status"]) == ("CANCELLED", "stopped")


def test_a_node_fails(cluster, weights, tmp_path) -> None:
    """It resumes from the last checkpoint."""
    folder = tmp_path / "run"
    number = submit(cluster, folder, ONE_RANK, *MINUTE_LONG)
    wait_until((folder / "checkpoints" / "latest").exists, "a checkpoint")
    # the node comes back by itself; SLURM then holds the job, whose processes may not have ended
    assert cluster.run("scontrol", "update", "nodename=hostA", "state=down", "reason=test").returncode == 0
    going_on = ("RUNNING", "1"), ("PENDING", "2")
    wait_until(lambda: (cluster.job(number)["JobState"], cluster.job(number)["Restarts"]) in going_on, "the node to be back")
    cluster.run("scontrol", "release", number)
    cluster.run("scontrol", "update", "nodename=hostA", "state=resume")  # refused if it is back
    results = check_finished(follow(cluster, number), folder, 1, weights(1, *MINUTE_LONG))
    assert results["resumed_at_steps"][0] >= 175  # a node that is only marked as down still saves


@pytest.mark.parametrize("warned", [False, True])
def test_scancel(warned, cluster, weights, tmp_path) -> None:
    """It is saved, not requeued, and the printed command continues it."""
    folder = tmp_path / "run"
    number = submit(cluster, folder, ONE_RANK, *SECONDS_LONG)
    wait_until(lambda: has_trained(folder), "the first steps")
    if warned:
        assert cluster.run("scancel", "--batch", "--signal=USR1", number).returncode == 0
    assert cluster.run("scancel", number).returncode == 0
    job = follow(cluster, number)
    log = (tmp_path / "run.log").read_text()
    print(log)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert summary(folder)["status"] == "stopped"
    (command,) = (line.removeprefix("to continue: ") for line in log.splitlines() if line.startswith("to continue: "))
    sbatch, *words = shlex.split(command)
    assert sbatch == "sbatch"
    number = cluster.submit(f"--output={folder}-2.log", *words, **EXPORTED)
    assert follow(cluster, number)["JobState"] == "COMPLETED", (tmp_path / "run-2.log").read_text()
    print((tmp_path / "run-2.log").read_text())
    results = summary(folder)
    assert (results["status"], len(results["resumed_at_steps"])) == ("finished", 1)
    assert results["weights_sha256"] == weights(1, *SECONDS_LONG)


def test_an_array(cluster, weights, tmp_path) -> None:
    """Two tasks on one node, %a in a flag; the task that is warned is the one with the array's own number."""
    requests = ("--array=0-1", f"--output={tmp_path}/%a.log", *ONE_RANK)
    flags = (*SECONDS_LONG, "--seed", "%a", "--output-dir", f"{tmp_path}/%a")
    array = cluster.submit(*requests, "run_deepspeed.sh", *flags, **EXPORTED)
    folders = {task: tmp_path / str(task) for task in (0, 1)}
    wait_until(lambda: all(has_trained(folder) for folder in folders.values()), "the first steps of both")
    (named_as_array,) = [task for task in folders if cluster.job(f"{array}_{task}")["JobId"] == array]
    print(f"job {array} is the array and its task {named_as_array}")
    assert cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_{named_as_array}").returncode == 0
    jobs = {task: follow(cluster, f"{array}_{task}") for task in folders}
    for task, folder in folders.items():
        print((tmp_path / f"{task}.log").read_text())
        assert jobs[task]["JobState"] == "COMPLETED"
        assert int(jobs[task]["Restarts"]) == (task == named_as_array), "the other task was disturbed"
        assert summary(folder)["weights_sha256"] == weights(
            1, *SECONDS_LONG, *(["--seed", "1"] if task else [])
        )  # 0 is default
