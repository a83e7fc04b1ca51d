"""Real clusters inside a test run: hosts with a wire between them, and SLURM on such hosts.

    with Hosts(folder, 2) as hosts, Slurm(folder, hosts) as slurm:
        hosts.run("hostB", ["hostname"]).stdout             # "hostB\\n"
        job = slurm.submit("run_deepspeed.sh", "--epochs", "1")
        slurm.wait(job)["JobState"]                         # "COMPLETED"

A host is a set of unnamed Linux namespaces (network, hostname, mounts, processes, shared memory) around one sshd, its process
1: test runs cannot collide, and the kernel ends a host when its process 1 ends. All hosts share the files of this machine.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launching import DEADLINE_SECONDS, PROJECT, environment, wait_until

ADDRESSES = {"hostA": "10.77.0.1", "hostB": "10.77.0.2"}
PACKAGES = {  # what must be on PATH, and the Debian package that has it
    **{"ip": "iproute2", "sshd": "openssh-server", "ssh-keygen": "openssh-client", "pdsh": "pdsh"},
    **dict.fromkeys(("nsenter", "setpriv", "unshare"), "util-linux"),
    **{"munged": "munge", "sbatch": "slurm-client", "slurmctld": "slurmctld", "slurmd": "slurmd"},
}
NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")
WITH_SBIN = {"PATH": os.pathsep.join([environment()["PATH"], "/usr/sbin", "/sbin"])}
SECONDS_TO_START = 60


# --- can this machine do it? ------------------------------------------------------------------------------------------


@functools.cache
def what_is_missing() -> str:
    """Why no cluster can be created, and what would help; empty if one can."""
    if os.geteuid() != 0:
        return "creating hosts needs root"
    absent = sorted({package for command, package in PACKAGES.items() if not shutil.which(command, path=WITH_SBIN["PATH"])})
    if absent:
        return f"needs packages: apt-get install --no-install-recommends {' '.join(absent)}"
    try_out = "mount -t tmpfs tmpfs /dev/shm && ip link add eth0 type veth peer name eth1"
    command = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c", try_out]
    attempt = subprocess.run(command, env=environment(**WITH_SBIN), capture_output=True, text=True, check=False)
    return f"hosts cannot be created: {attempt.stderr.strip()}" if attempt.returncode else ""


def need_cluster() -> None:
    """Skip the test where no cluster can be created; with CIFAR10_TESTS_NEED_CLUSTER set, as in .ci/run, fail it."""
    reason = what_is_missing()
    if reason and os.environ.get("CIFAR10_TESTS_NEED_CLUSTER"):
        pytest.fail(f"{reason}; and CIFAR10_TESTS_NEED_CLUSTER is set")
    if reason:
        pytest.skip(reason)


# --- hosts ------------------------------------------------------------------------------------------------------------

PROCESS_1 = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /dev/shm  # ranks find each other in it, and must not find those of another host
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh" /etc/ssh
ip link set lo up
exec "$(command -v sshd)" -D -e
"""
SSHD_CONFIG = """
HostKey /etc/ssh/key
AuthorizedKeysFile /etc/ssh/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
PidFile none
"""
SSH_CONFIG = """
Host *
    IdentityFile /etc/ssh/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


class Hosts:
    """One host ("hostA"), or two on one wire ("hostA", "hostB"), that reach each other by name and by ssh.

    Each resolves its own hostname to its own address, by which gloo finds the right interface.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.names = list(ADDRESSES)[:count]
        self.addresses = {name: ADDRESSES[name] for name in self.names}
        self._folder = folder / "hosts"
        self._process_1: dict[str, int] = {}  # as this machine numbers it
        self._undo = ExitStack()

    def __enter__(self) -> Hosts:
        with ExitStack() as undo:  # also where only half of it could be set up
            self._undo = undo
            self._write_etc()
            for name in self.names:
                self._boot(name)
            self._wire()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _write_etc(self) -> None:
        ssh = self._folder / "ssh"
        ssh.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"{self.addresses[name]} {name}" for name in self.names)]
        (self._folder / "hosts").write_text("\n".join(lines) + "\n")
        (ssh / "sshd_config").write_text(SSHD_CONFIG)
        (ssh / "ssh_config").write_text(SSH_CONFIG)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / "key")], check=True)

    def _boot(self, name: str) -> None:
        """Start a host and wait until its process 1 answers. If this test run is killed, the kernel ends the host."""
        log = self._folder / f"{name}.log"
        outside = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        command = [*outside, "sh", "-c", PROCESS_1, "process 1", name, str(self._folder)]
        with log.open("wb") as output:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            unshare = subprocess.Popen(command, env=environment(**WITH_SBIN), **pipes)
        self._undo.callback(self._halt, name, unshare)
        answers = lambda: unshare.poll() is not None or "Server listening" in log.read_text()  # noqa: E731
        wait_until(answers, f"{name} to start", SECONDS_TO_START)
        assert unshare.poll() is None, f"{name} did not start: {log.read_text()}"
        (child,) = psutil.Process(unshare.pid).children()
        self._process_1[name] = child.pid

    def _halt(self, name: str, unshare: subprocess.Popen[bytes]) -> None:
        """End process 1, and with it the host, and wait for that."""
        self._process_1.pop(name, None)
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(unshare.pid).children():
                child.kill()
        try:
            unshare.wait(10)
        except subprocess.TimeoutExpired:  # it had no child yet
            unshare.kill()
            unshare.wait()

    def _wire(self) -> None:
        """A wire from eth0 to eth0, or both ends on a single host, since SLURM needs a network to resolve names."""
        first, last = self.names[0], self.names[-1]
        ends = ("eth0", "eth0") if first != last else ("eth0", "eth1")
        one, other = ([end, "netns", str(self._process_1[name])] for end, name in zip(ends, (first, last), strict=True))
        command = ["ip", "link", "add", *one, "type", "veth", "peer", "name", *other]
        subprocess.run(command, check=True, env=environment(**WITH_SBIN))
        for name, address in self.addresses.items():
            for words in (f"address add {address}/24 dev eth0", "link set eth0 up"):
                self.run(name, ["ip", *words.split()]).check_returncode()

    def kill(self, name: str) -> None:
        os.kill(self._process_1[name], signal.SIGKILL)

    def popen(self, name: str, command: list[str], more: dict[str, str] | None = None, **options: Any) -> subprocess.Popen:
        """Start a command in the project's folder on a host, with `more` variables.

        nsenter forwards no signal; when it ends, the command gets SIGTERM.
        """
        enter = ["nsenter", "--target", str(self._process_1[name]), *NAMESPACES]
        inside = ["setpriv", "--pdeathsig", "TERM", "env", f"--chdir={PROJECT}", *command]
        ours = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_")  # if this test run is itself a job
        variables = {k: v for k, v in environment(**WITH_SBIN, **(more or {})).items() if not k.startswith(ours)}
        return subprocess.Popen([*enter, *inside], env=variables, stdin=subprocess.DEVNULL, **options)

    def run(self, name: str, command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        return self.run_all({name: command}, **more)[name]

    def run_all(self, commands: dict[str, list[str]], **more: str) -> dict[str, subprocess.CompletedProcess[str]]:
        """Run a command on each host named, at the same time, to the end of the last."""
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = {name: self.popen(name, command, more, **pipes) for name, command in commands.items()}
        try:
            printed = {name: process.communicate(timeout=DEADLINE_SECONDS) for name, process in started.items()}
        finally:
            for process in started.values():
                process.kill()
        return {name: subprocess.CompletedProcess(commands[name], started[name].returncode, *printed[name]) for name in printed}


# --- SLURM ------------------------------------------------------------------------------------------------------------

CPUS, MEGABYTES, GPUS = 8, 40_000, 2  # of each node, whatever this machine has: enough for the document's requests
SLURM_CONF = """
ClusterName=test
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5  # a requeued job waits a little longer than this; two minutes by default
CredType=cred/munge
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile={logs}/slurmctld.log
SlurmdLogFile={logs}/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides  # nodes have the cores and the memory configured here
ReturnToService=2
GresTypes=gpu
"""
NODE = "NodeName={name} NodeAddr={address} CPUs={cpus} CoresPerSocket={cpus} RealMemory={megabytes} Gres=gpu:{gpus}\n"
PARTITION = "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
PREEMPTING = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""  # a job in `high` preempts one in `low`, after SIGTERM and a minute of grace
WITH_USER_SIGNAL = "SlurmctldParameters=preempt_send_user_signal  # the signal of sbatch --signal, instead of SIGTERM\n"
# This plugin starts without control groups: jobs have no limits.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


class Slurm:
    """SLURM on hosts: the controller on the first, a node on each, with two GPUs that are not real."""

    def __init__(self, folder: Path, hosts: Hosts, partitions: str = PARTITION) -> None:
        self._hosts, self._partitions = hosts, partitions
        self._folder, self._logs = folder / "slurm", folder / "slurm" / "logs"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        with ExitStack() as undo:
            undo.callback(self._stop)
            self._write_etc()
            for name in self._hosts.names:
                self._prepare(name)
                self._start(name, "munged", "--foreground", "--force", "--key-file=/etc/slurm/munge.key")
            wait_until(self._munge_answers, "munged", SECONDS_TO_START)
            self._start(self._hosts.names[0], "slurmctld", "-D", "-c")
            for name in self._hosts.names:
                self._start(name, "slurmd", "-D", "-N", name)
            wait_until(self._is_up, "SLURM to start", SECONDS_TO_START)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        """End the daemons; running jobs end with their host."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()

    def _write_etc(self) -> None:
        etc, names, addresses = self._folder / "etc", self._hosts.names, self._hosts.addresses
        etc.mkdir(parents=True)
        self._logs.mkdir()
        size = {"cpus": CPUS, "megabytes": MEGABYTES, "gpus": GPUS}
        conf = SLURM_CONF.format(controller=names[0], address=addresses[names[0]], logs=self._logs)
        nodes = [NODE.format(name=name, address=addresses[name], **size) for name in names]
        (etc / "slurm.conf").write_text(conf + "".join(nodes) + self._partitions)
        (etc / "cgroup.conf").write_text(CGROUP_CONF)
        for number in range(GPUS):  # device files, or SLURM would not set CUDA_VISIBLE_DEVICES
            (self._folder / f"gpu{number}").symlink_to("/dev/null")
        (etc / "gres.conf").write_text(f"Name=gpu File={self._folder}/gpu[0-{GPUS - 1}]\n")
        (etc / "munge.key").write_bytes(os.urandom(1024))
        (etc / "munge.key").chmod(0o400)

    def _prepare(self, name: str) -> None:
        folders = ["/run/munge", "/run/slurm/state", "/run/slurm/spool", "/var/lib/munge", "/var/log/munge", "/etc/slurm"]
        self._hosts.run(name, ["mkdir", "-p", *folders]).check_returncode()
        for private in ("/var/lib/munge", "/var/log/munge"):
            self._hosts.run(name, ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", private]).check_returncode()
        self._hosts.run(name, ["mount", "--bind", str(self._folder / "etc"), "/etc/slurm"]).check_returncode()

    def _start(self, name: str, *command: str) -> None:
        with (self._logs / f"{command[0]}-{name}.out").open("wb") as output:
            self._daemons.append(self._hosts.popen(name, list(command), stdout=output, stderr=subprocess.STDOUT))

    def _check_daemons(self) -> None:
        dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
        logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self._logs.iterdir()))
        assert not dead, f"{dead} ended\n{logs}"

    def _munge_answers(self) -> bool:
        self._check_daemons()
        return all(self._hosts.run(name, ["munge", "--no-input"]).returncode == 0 for name in self._hosts.names)

    def _is_up(self) -> bool:
        self._check_daemons()
        return self.run("sinfo", "--noheader", "--states=idle", "--format=%D").stdout.strip() == str(len(self._hosts.names))

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the first host."""
        return self._hosts.run(self._hosts.names[0], list(command), **more)

    def submit(self, *words: str, **more: str) -> str:
        """sbatch; returns the job's number."""
        process = self.run("sbatch", "--parsable", *words, **more)
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """JobState, ExitCode, Restarts and so on of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str) -> dict[str, str]:
        wait_until(lambda: self.job(number).get("JobState") in ENDED, f"job {number}")
        return self.job(number)
