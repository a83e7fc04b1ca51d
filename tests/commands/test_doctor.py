"""python -m cifar10 doctor: each failure is provoked, found and comes with a fix, whatever else is missing."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from cifar10.commands import doctor
from cifar10.commands.doctor import CHECKS, FAIL, OK, WARN, Context
from cifar10.data import cifar
from cifar10.data.cifar import CIFAR10
from cifar10.distributed import cpus
from tests.launching import PROJECT, environment, free_port

Disk = namedtuple("Disk", "total used free")
MASTER = ("MASTER_ADDR", "MASTER_PORT", "RANK")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment that says nothing of ranks, W&B, SLURM or data, and a home folder that is empty."""
    for name in [*MASTER, "CIFAR10_DIR", "CIFAR10_URL", "CXX", "NETRC", "TORCH_EXTENSIONS_DIR"]:
        monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        if name.startswith(("WANDB_", "SLURM_")):
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def one(name: str, level: str, *words: str, data_dir: Path = Path("data"), **known: object) -> str:
    """What a check says; it has this level, a fix unless it is OK, and these words."""
    found, says, *cure = CHECKS[name](Context(data_dir, **known))
    assert found == level, says
    assert bool(cure) == (level != OK)
    for word in words:
        assert word in " -> ".join([says, *cure])
    return says


# --- all checks -------------------------------------------------------------------------------------------------------


def doctor_process(*flags: str, cwd: Path = PROJECT, **more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    words = [sys.executable, "-m", "cifar10", "doctor", *flags]
    variables = environment(PYTHONPATH=os.pathsep.join([more.pop("first_on_path", ""), str(PROJECT)]).strip(os.pathsep), **more)
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False)


def raising(folder: Path, *packages: str) -> str:
    """A folder in which importing these packages fails, as a broken installation does."""
    for package in packages:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise ImportError('libcudart.so.11: cannot open shared object file')")
    return str(folder)


def test_a_machine_that_can_train(real_data_dir, tmp_path):
    done = doctor_process("--json", "--data-dir", str(real_data_dir), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert {row["name"] for row in found["findings"] if row["level"] == OK} >= set(
        "python packages torch gloo DeepSpeed".split()
    )
    assert re.fullmatch(r"python main.py will train on 1 rank on the CPU, with \d+ CPU threads?", found["what_will_happen"])


def test_what_is_broken_is_a_line_with_its_fix_and_the_rest_is_checked(tmp_path):
    """Neither tyro nor DeepSpeed nor filelock nor hjson nor psutil can be imported, and gloo has no network."""
    broken = raising(tmp_path / "broken", "tyro", "deepspeed", "filelock", "hjson", "psutil")
    (tmp_path / "empty").mkdir()
    done = doctor_process(cwd=tmp_path / "empty", first_on_path=broken, GLOO_SOCKET_IFNAME="nowhere0")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    fails = [line.split()[1] for line in lines if line.startswith("FAIL")]
    assert fails == ["config", "data", "memory", "W&B", "gloo", "DeepSpeed"]
    assert all(lines[number + 1].lstrip().startswith("-> ") for number, line in enumerate(lines) if line.startswith("FAIL"))
    assert "cannot be imported: ImportError: libcudart.so.11" in done.stdout
    assert "nowhere0" in done.stdout
    assert lines[-1].startswith("fix the 6 FAILs above")
    assert {line[6:19].strip() for line in lines if line.startswith((OK, WARN, FAIL))} >= CHECKS.keys() - {
        "NCCL",
        "GPU work",
        "compiled ops",
    }


def test_flags_without_the_library_that_reads_them(tmp_path):
    done = doctor_process("--json", first_on_path=raising(tmp_path / "broken", "tyro"))
    assert done.returncode == 2
    assert re.fullmatch("error: .*tyro.* uv sync", done.stderr.strip())


def test_a_torch_that_cannot_be_imported(tmp_path):
    done = doctor_process(first_on_path=raising(tmp_path / "broken", "torch"))
    assert done.returncode == 1
    fails = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert [name for name in fails if name not in ("data", "disk", "memory", "config")] == ["torch", "gloo", "DeepSpeed"]
    assert "uv sync --reinstall-package torch" in done.stdout


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def broken(_: Context):
        raise RuntimeError("what\nnow")

    monkeypatch.setattr(doctor, "CHECKS", {"mine": broken, "python": doctor.check_python})
    monkeypatch.setattr(doctor, "PROBES", {})
    first, second = doctor.examine(Context(Path("data")))
    assert (first["name"], first["level"]) == ("mine", FAIL)
    assert first["says"].endswith("RuntimeError: what")
    assert (second["name"], second["level"]) == ("python", OK)


def test_a_process_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.5)
    probe = doctor.Probe("import time; time.sleep(600)")
    assert probe.result() == ("", "it took more than 0.5 seconds")
    probe.end()
    assert probe._process.returncode == -9


def test_a_process_that_cannot_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    probe = doctor.Probe("pass")
    assert probe.result()[1].endswith("No such file or directory")
    probe.end()


# --- one by one -------------------------------------------------------------------------------------------------------


def test_python(monkeypatch):
    one("python", OK)
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.18")
    one("python", FAIL, "3.9.18 is not >=3.10,<3.14", "uv sync")


def test_packages(monkeypatch):
    one("packages", OK)
    assert {"torch", "deepspeed", "tyro"} <= doctor.requirements().keys()
    wanted = {"torch": ">=99", "no-such-package": "", "numpy": ">=1,<1.5", "rich": ">=1"}
    monkeypatch.setattr(doctor, "requirements", lambda: wanted)
    found = one("packages", FAIL, "uv sync", "is not >=99", "no-such-package is missing", "is not >=1,<1.5")
    assert "rich" not in found


class Answered:
    """A probe that has answered."""

    def __init__(self, printed: object = "", fault: str = "") -> None:
        self.result = lambda: (printed if isinstance(printed, str) else json.dumps(printed), fault)


def with_torch(**facts: object) -> dict[str, object]:
    """What the checks know once torch's probe has printed these facts."""
    of_gpus = {"capability": ["9.0"], "driver": "580.1", "cudnn": 92600, "nccl": None} if facts.get("gpus") else {}
    facts = {"built": "13.0", "fault": None, "note": None, **of_gpus, **facts}
    context = Context(Path("data"), probes={"torch": Answered(facts)})
    assert CHECKS["torch"](context)[0] == OK
    return {"torch": context.torch, "gpus": context.gpus}


def test_gpus(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    one("GPU", OK, "2 x A", "9.0", "580.1", "92600", **with_torch(gpus=["A", "A"]))
    one("NCCL", OK, "2.27.5", **with_torch(gpus=["A", "A"], nccl="2.27.5"))
    one("NCCL", FAIL, **with_torch(gpus=["A", "A"]))
    one("NCCL", OK, **with_torch(gpus=["A"]))


def test_gpus_that_torch_cannot_use_are_a_fault_and_hidden_ones_are_not(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    one(
        "GPU",
        FAIL,
        "found /dev/kfd",
        "-> update it, or use --device cpu",
        **with_torch(fault="found /dev/kfd; update it, or use --device cpu"),
    )
    one("GPU", OK, "is hidden", **with_torch(note="device: all is hidden"))
    one("GPU", OK, "no sign of a GPU", **with_torch())
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    one("GPU", OK, "DS_ACCELERATOR is cpu", **with_torch())


RIGHT = {"product": 1e-6, "convolution": 2e-6, "all-reduce": 0.0}


@pytest.mark.parametrize(
    ("works", "level", "words"),
    [
        ([RIGHT, RIGHT], OK, ["product", "convolution", "all-reduce"]),
        ([RIGHT, {**RIGHT, "convolution": 0.5}], FAIL, ["GPU 1: its convolution", "5.0e-01"]),
        ([{**RIGHT, "product": float("nan")}, RIGHT], FAIL, ["GPU 0: its product"]),
        ([RIGHT, {"product": 0.0, "fault": "CUDA error: ECC"}], FAIL, ["GPU 1: CUDA error: ECC"]),
    ],
)
def test_what_each_gpu_computes_is_compared_with_the_cpu(monkeypatch, works, level, words):
    probe = Answered(works)
    probe.end = lambda: None
    monkeypatch.setattr(doctor, "Probe", lambda *_: probe)
    one("GPU work", level, *words, gpus=2)
    assert CHECKS["GPU work"](Context(Path("data"))) is None


def test_another_deepspeed_than_ours():
    one("DeepSpeed", OK, probes={"deepspeed": Answered("0.19.9")})
    one("DeepSpeed", FAIL, "0.21.0", ">=0.19.8,<0.20", "uv sync", probes={"deepspeed": Answered("0.21.0")})


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    one("compiler", WARN, "no c++ and no ninja", "apt install g++ ninja-build")
    for name in ("my++", "ninja"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CXX", "my++")
    one("compiler", OK, "my++")


def test_a_build_that_was_killed_left_its_lock(monkeypatch, tmp_path):
    lock = tmp_path / "home" / ".cache" / "torch_extensions" / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    one("compiled ops", WARN, f"rm {lock}")
    lock.unlink()
    assert CHECKS["compiled ops"](Context(tmp_path)) is None


def test_a_damaged_ds_config(monkeypatch, tmp_path):
    one("config", OK, "global batch 64")
    monkeypatch.setattr(doctor, "PROJECT", tmp_path)
    one("config", FAIL, "ds_config.json", "git checkout ds_config.json")
    (tmp_path / "ds_config.json").write_text('{"train_batch_size": 64, "gradient_cliping": 1}')
    one("config", FAIL, "gradient_cliping", "git checkout ds_config.json")


def test_disks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    one("disk", OK, str(tmp_path))
    for free, level in ((50 << 20, FAIL), (500 << 20, WARN)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Disk(1 << 40, 0, free))
        one("disk", level, "make room")


def test_a_full_disk_and_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path):
    monkeypatch.chdir("/proc/self")  # not even root may make a file there
    one("disk", FAIL, "cannot be written to", "--output-dir")
    (tmp_path / "runs").touch()
    monkeypatch.chdir(tmp_path)
    one("disk", FAIL, "cannot be written to", "--output-dir")
    (tmp_path / "runs").unlink()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    one("disk", FAIL, "No space left on device", "--output-dir")


def test_shared_memory_is_small(monkeypatch, tmp_path):
    real = os.statvfs(tmp_path)
    small = os.statvfs_result([1 << 20, 1 << 20, 64, 60, 60, *tuple(real)[5:]])  # docker's 64 MiB
    monkeypatch.setattr(doctor, "SHM", tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    one("shared memory", WARN, "0.1 GiB free", "--shm-size=1g")
    assert "NCCL" in one("shared memory", WARN, gpus=2)
    monkeypatch.setattr(doctor, "SHM", tmp_path / "none")
    one("shared memory", OK)


def test_the_limits_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path)
    one("CPU", OK)
    one("memory", OK)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2 << 30}\n")
    one("CPU", OK, "1 core, ", "the container may use 0.5")
    for used, level in ((0, OK), (1 << 30, WARN), (1948 << 20, FAIL)):
        (tmp_path / "memory.current").write_text(str(used))
        one("memory", level, "of the container's 2.0 GiB")
    for name in ("cpu.max", "memory.max"):
        (tmp_path / name).write_text("max 100000\n")
    one("CPU", OK)
    assert "container" not in one("memory", OK)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a whole data set of six small files, whose md5 are taken to be the known ones."""
    folder = tmp_path / "data" / CIFAR10.folder
    folder.mkdir(parents=True)
    known = {}
    for name in (*CIFAR10.split_files["train"], *CIFAR10.split_files["test"]):
        (folder / name).write_bytes(name.encode() * 9)
        known[name] = hashlib.md5(name.encode() * 9).hexdigest()
    monkeypatch.setattr(cifar, "CIFAR10", replace(CIFAR10, files=known, sources=()))
    return tmp_path / "data"


def test_data(tiny, monkeypatch):
    one("data", OK, "6 files, every md5 is right", data_dir=tiny)
    monkeypatch.setenv("CIFAR10_URL", f"http://127.0.0.1:{free_port()}/x.tar.gz")
    (tiny / CIFAR10.folder / "data_batch_3").write_bytes(b"short")
    one("data", FAIL, "data_batch_3 (corrupt: 5 bytes", "cannot be reached", CIFAR10.archive, data_dir=tiny)
    (tiny / CIFAR10.archive).touch()
    one("data", WARN, "any run restores it", data_dir=tiny)


def test_no_data_and_a_server_that_can_be_reached_or_not(monkeypatch, tmp_path):
    monkeypatch.setattr(cifar, "CIFAR10", replace(CIFAR10, sources=()))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setenv("CIFAR10_URL", f"http://127.0.0.1:{listener.getsockname()[1]}/x.tar.gz")
        one("data", WARN, f"no CIFAR-10 in {tmp_path}", "any run downloads it (170 MB)", data_dir=tmp_path)
    one("data", FAIL, f"no CIFAR-10 in {tmp_path}", "Connection refused", "--dataset synthetic", data_dir=tmp_path)
    monkeypatch.setenv("CIFAR10_URL", "http://no-such-host.invalid/x.tar.gz")
    one("data", FAIL, "no-such-host.invalid cannot be reached", data_dir=tmp_path)


@pytest.fixture
def taken():
    """A port on which another program listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_the_launchers_port(monkeypatch, taken):
    monkeypatch.setattr(doctor, "DEFAULT_PORT", free_port())
    one("ports", OK, "each launcher chooses")
    monkeypatch.setattr(doctor, "DEFAULT_PORT", taken)
    one("ports", WARN, f"another program uses {taken}", "--master_port=29501")


@pytest.mark.parametrize(
    ("address", "port", "rank", "level", "words"),
    [
        ("127.0.0.1", "free", "0", OK, "free for rank 0"),
        ("localhost", "free", None, OK, "free for rank 0"),
        ("127.0.0.1", "taken", "0", FAIL, "another program uses it"),
        ("127.0.0.1", "taken", "1", OK, "can be reached"),
        ("127.0.0.1", "free", "1", FAIL, "start rank 0 first"),
        (None, "taken", None, FAIL, "another program uses it"),
        ("no-such-host.invalid", "29500", "1", FAIL, "does not resolve"),
        ("127.0.0.1", "many", "0", FAIL, "MASTER_PORT is 'many', expected a number"),
        ("127.0.0.1", "70000", "0", FAIL, "MASTER_PORT is '70000', expected a number"),
    ],
)
def test_the_port_of_a_run(monkeypatch, taken, address, port, rank, level, words):
    port = {"taken": str(taken), "free": str(free_port())}.get(port, port)
    for name, value in zip(MASTER, (address, port, rank), strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    one("ports", level, words)


def test_wandb(monkeypatch, tmp_path):
    one("W&B", OK, "not logged in")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    one("W&B", WARN, "the key in WANDB_API_KEY has 5 characters", "wandb login --relogin")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert "0" * 40 not in one("W&B", OK, "WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    one("W&B", OK, "WANDB_MODE is offline")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    one("W&B", OK, "switched off")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY")
    one("W&B", WARN, "WANDB_MODE is online, and there is no key", "WANDB_MODE=offline")
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "home" / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'1' * 40}\n")
    (tmp_path / "home" / ".netrc").chmod(0o600)
    one("W&B", OK, ".netrc: runs are logged there")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    one("W&B", WARN, "wandb is not installed", "uv sync")


def test_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    one("SLURM", OK, "not installed")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    one("SLURM", WARN, "job 17, but srun is not on PATH", "module load slurm")
    (tmp_path / "srun").write_text("")
    (tmp_path / "srun").chmod(0o755)
    one("SLURM", OK, "in job 17: 1 nodes, 1 tasks")


@pytest.mark.parametrize(
    ("gpus", "ranks", "threads", "fails", "line"),
    [
        (0, 0, 2, 0, "python main.py will train on 1 rank on the CPU, with 2 CPU threads"),
        (1, 1, 1, 0, "python main.py will train on 1 rank on the GPU, with 1 CPU thread"),
        (4, 4, 8, 0, "python main.py will train on 4 ranks, one on each GPU, with 8 CPU threads each"),
        (8, 4, 8, 0, "python main.py will train on 4 ranks, on 4 of the 8 GPUs, with 8 CPU threads each"),
        (4, 4, 8, 1, "fix the FAIL above first; then: python main.py"),
    ],
)
def test_what_will_happen(gpus, ranks, threads, fails, line):
    context = Context(Path("data"), gpus=gpus, ranks=ranks, threads=threads)
    assert doctor.what_will_happen(context, fails) == line


def test_advice_is_the_table_of_the_troubleshooting_page(capsys):
    assert doctor.run(advice=True) == 0
    printed = capsys.readouterr().out.splitlines()
    page = (PROJECT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(printed) == page.count("\n| ") - 1
    assert printed[0].startswith("out of memory  ")
    assert "`" not in "".join(printed)
