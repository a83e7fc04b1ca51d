"""Whether this machine can train, and what to type where it cannot: `python -m cifar10 doctor`.

Every line is OK, WARN or FAIL and one sentence; a WARN or a FAIL names its cure. Only the standard library is imported before
a check has begun: what else is missing is a finding, and no check that breaks keeps the others from speaking. What could hang
or crash (torch, DeepSpeed, two ranks that meet) is tried in processes of its own, with a deadline.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json as json_format
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from cifar10 import UsageError

PROJECT = Path(__file__).resolve().parents[2]
CGROUP, SHM = Path("/sys/fs/cgroup"), Path("/dev/shm")
OK, WARN, FAIL = "OK", "WARN", "FAIL"
PROBE_SECONDS, CONNECT_SECONDS = 60.0, 3.0
GIB = 1 << 30
RUN_BYTES = {FAIL: 100 << 20, WARN: GIB}  # room on the disk below which a run is in danger
MEMORY_BYTES = {FAIL: 700 << 20, WARN: 3 * GIB // 2}  # a rank of the default recipe takes 0.67 GB at its peak
SHM_BYTES = 256 << 20
DEFAULT_PORT = 29500  # DeepSpeed's and torch's

# The documents' troubleshooting entries that no look at a machine answers: symptom, and what to do here.
ADVICE: tuple[tuple[str, str], ...] = (
    (
        "out of memory",
        "halve --micro-batch-size: the global batch stays; a run that dies of it names the number",
    ),
    ("NaN, exploding loss", "such steps are skipped on all ranks and counted; 25 in a row end the run; lower --lr"),
    ("fp16 errors, AMP underflow", "--precision fp32 (or bf16); a loss scale is kept for fp16, and skipped steps are reported"),
    ("unstable at the beginning", "a longer --warmup-epochs (at most a tenth of the run), or a lower --lr"),
    ("stops too early", "--patience 25, or 0 for never; it watches the validation loss"),
    ("loss does not decrease", "random labels cannot be learned: use --dataset cifar10 or synthetic; else try another --lr"),
    ("low accuracy", "more --epochs; the recipes and what they reach are in docs/recipes.md: python -m cifar10 recipes"),
    (
        "slow training",
        "python -m cifar10 bench measures this machine; fewer --threads where cores are shared; --precision bf16",
    ),
    ("slow data loading", "there is none: images lie on the device and batches are cut there; --num-workers changes nothing"),
    ("uneven batches", "the last partial batch of an epoch is left out in training; evaluation counts every image once"),
    (
        "several GPUs do not work",
        "--num-gpus 1 first; then NCCL_DEBUG=INFO in the environment; doctor's lines on GPU and ports",
    ),
    (
        "hangs at the start",
        "every rank must reach MASTER_ADDR:MASTER_PORT: run doctor inside the job; --timeout-minutes ends it",
    ),
    ("download fails", "put the archive into --data-dir by hand, set CIFAR10_URL to a mirror, or use --dataset synthetic"),
)


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to type if it is not well."""

    name: str
    level: str
    says: str
    cure: str = ""


@dataclass
class Patient:
    """What the checks tell each other, and the processes that were started for them."""

    data_dir: Path
    probes: dict[str, Probe] = field(default_factory=dict)
    gpus: int = 0
    threads: int = 1


Check = Callable[[Patient], Iterator[Finding]]


# --- processes that try what could hang ----------------------------------------------------------------------------------

TORCH_PROBE = """
import json, os, sys, torch
import torch.distributed as dist
gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
nccl = dist.is_nccl_available() if dist.is_available() else False
print(json.dumps({
    "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
    "cuda": torch.version.cuda or torch.version.hip,
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl and gpus else None,
    "gloo": dist.is_available() and dist.is_gloo_available(),
}))
"""

# Two ranks that meet on this machine, as a launcher's would: a sum over both.
GLOO_PROBE = """
import os, sys, torch
from datetime import timedelta
import torch.distributed as dist
def rank(number, port):
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=number, world_size=2, timeout=timedelta(seconds=15))
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    dist.destroy_process_group()
children = []
for number in (0, 1):
    child = os.fork()
    if not child:
        code = 1
        try:
            rank(number, int(sys.argv[1]))
            code = 0
        except Exception as error:
            print(str(error).splitlines()[0], file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children) and 1)
"""

DEEPSPEED_PROBE = """
from cifar10.engine.engine import prepare
print(prepare().__version__)
"""


class Probe:
    """A small program in a process of its own."""

    def __init__(self, source: str, *words: str) -> None:
        ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {key: value for key, value in os.environ.items() if key not in ranks}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(PROJECT))))
        self._fault = ""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", source, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._fault = f"no process can be started: {error.strerror}"

    def result(self) -> tuple[str, str]:
        """(what it printed last, "") or ("", why it failed)."""
        if self._fault:
            return "", self._fault
        try:
            printed = self._process.communicate(timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            return "", f"it took more than {PROBE_SECONDS:g} seconds"
        said, complaint = ([line.strip() for line in text.decode(errors="replace").splitlines()] for text in printed)
        if code := self._process.returncode:
            why = next((line for line in reversed(complaint) if line), f"it ended with code {code}")
            return "", re.sub(r"^\[enforce fail at \S+\] ", "", why)[:300]  # gloo begins with its source file
        return (said[-1] if said else ""), ""

    def end(self) -> None:
        """Kill what is left of it and of what it has started."""
        if not self._fault and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, 9)
            self._process.communicate()


# --- the program and its libraries --------------------------------------------------------------------------------------


def _pyproject() -> str:
    return (PROJECT / "pyproject.toml").read_text(encoding="utf-8")


def check_python(_: Patient) -> Iterator[Finding]:
    here, asked = platform.python_version(), re.search(r'requires-python = ">=(\d+)\.(\d+),<(\d+)\.(\d+)"', _pyproject())
    least, below = (tuple(map(int, asked.groups()[at : at + 2])) for at in (0, 2))
    if least <= sys.version_info[:2] < below:
        yield Finding("python", OK, f"{here}, {sys.executable}")
    else:
        wanted = f"{least[0]}.{least[1]} up to below {below[0]}.{below[1]}"
        yield Finding("python", FAIL, f"{here} is not {wanted}", f"uv python install {least[0]}.{below[1] - 1} && uv sync")


def requirements() -> dict[str, str]:
    """Package -> the versions that pyproject.toml asks for: {"torch": ">=2.11,<2.16", ...}."""
    block = _pyproject().partition("\ndependencies = [")[2].partition("\n]")[0]
    return dict(re.findall(r'^\s*"([\w-]+)([^"]*)"', block, re.M))


def check_packages(_: Patient) -> Iterator[Finding]:
    faults, asked = [], requirements()
    for name, versions in asked.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            faults.append(f"{name} is missing")
            continue
        if not _is_within(installed, versions):
            faults.append(f"{name} {installed} is not {versions}")
    if faults:
        yield Finding("packages", FAIL, "; ".join(faults), "uv sync (or pip install -r requirements.txt)")
    else:
        yield Finding("packages", OK, f"all {len(asked)} are there in the versions that pyproject.toml asks for")


def _is_within(installed: str, versions: str) -> bool:
    """Whether 2.15.0+cpu satisfies >=2.11,<2.16. Only >= and < are used in our pyproject.toml."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3]]

    at_least, below = (re.search(sign + r"\s*([\d.]+)", versions) for sign in (">=", "<(?!=)"))
    return (not at_least or numbers(installed) >= numbers(at_least[1])) and (
        not below or numbers(installed) < numbers(below[1])
    )


def _has_gpu_driver() -> bool:
    return bool(shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists() or Path("/dev/kfd").exists())


def check_torch(patient: Patient) -> Iterator[Finding]:
    printed, fault = patient.probes["torch"].result()
    if fault:
        yield Finding("torch", FAIL, f"cannot be imported: {fault}", "uv sync --reinstall-package torch")
        return
    facts = json_format.loads(printed)
    yield Finding("torch", OK, f"{version('torch')}, {'CUDA ' + facts['cuda'] if facts['cuda'] else 'a build for CPUs'}")
    patient.gpus = len(facts["gpus"])
    if patient.gpus:
        yield Finding("GPU", OK, f"{patient.gpus} x {facts['gpus'][0]}")
    elif os.environ.get("DS_ACCELERATOR") == "cpu":
        yield Finding("GPU", OK, "none is used: DS_ACCELERATOR is cpu")
    elif not _has_gpu_driver():
        yield Finding("GPU", OK, "none, and no driver: training runs on the CPU, over gloo")
    elif facts["cuda"]:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else "nvidia-smi should list one"
        cure = "unset CUDA_VISIBLE_DEVICES" if hidden is not None else "update the driver for the CUDA version of torch above"
        yield Finding("GPU", WARN, f"there is a driver, but torch sees no GPU ({why})", cure)
    else:
        cure = "install a torch for its CUDA version, from pytorch.org's own index: https://pytorch.org/get-started/locally"
        yield Finding("GPU", WARN, "there is a driver, but this torch is a build for CPUs", cure)
    if patient.gpus > 1 and not facts["nccl"]:
        yield Finding("NCCL", FAIL, "this torch has none, and several GPUs need it", "install torch's build for CUDA on Linux")
    elif patient.gpus:
        yield Finding("NCCL", OK, facts["nccl"] or "none, and one GPU needs none")


def check_gloo(patient: Patient) -> Iterator[Finding]:
    _, fault = patient.probes["gloo"].result()
    if fault:
        cure = "unset GLOO_SOCKET_IFNAME, or export it as lo (several machines: their network); put this host into /etc/hosts"
        yield Finding("gloo", FAIL, f"two ranks on this machine do not meet: {fault}", cure)
    else:
        yield Finding("gloo", OK, "two ranks on this machine have met and added up")


def check_deepspeed(patient: Patient) -> Iterator[Finding]:
    printed, fault = patient.probes["deepspeed"].result()
    asked = requirements().get("deepspeed", "")
    if fault:
        cure = "uv sync; neither DS_BUILD_OPS nor another index is needed"
        yield Finding("DeepSpeed", FAIL, f"cannot be imported: {fault}", cure)
    elif not _is_within(printed, asked):
        cure = "uv sync: cifar10/engine/engine.py knows the inside of these versions only"
        yield Finding("DeepSpeed", FAIL, f"{printed} is imported, and {asked} is needed", cure)
    else:
        yield Finding("DeepSpeed", OK, f"{printed} can be imported, and builds nothing")


def check_compiler(_: Patient) -> Iterator[Finding]:
    compiler = os.environ.get("CXX") or "c++"
    found = {name: shutil.which(name) for name in (compiler, "ninja")}
    missing = [name for name, path in found.items() if not path]
    if missing:
        cure = "nothing, unless your JSON asks for such an op: then apt install g++ ninja-build"
        yield Finding("compiler", WARN, f"no {' and no '.join(missing)}: only DeepSpeed's compiled ops need them", cure)
    else:
        yield Finding("compiler", OK, f"{found[compiler]} and ninja; only DeepSpeed's compiled ops need them")
    builds = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    if locks := sorted(builds.glob("**/lock")) if builds.is_dir() else []:
        said = f"{locks[0]} is there: a build is running, or was killed, and the next one waits for it for ever"
        yield Finding("compiler", WARN, said, f"if none is running: rm {' '.join(map(str, locks))}")


def check_config(_: Patient) -> Iterator[Finding]:
    try:
        from cifar10.config import ds_config
    except ImportError as error:
        yield Finding("config", FAIL, f"DeepSpeed's JSON cannot be read: {error}", "uv sync")
        return
    path = PROJECT / "ds_config.json"
    try:
        _, batch, _ = ds_config.resolve(ds_config.read(path), 1)
        yield Finding("config", OK, f"{path.name} is read: global batch {batch.global_images}")
    except UsageError as error:
        yield Finding("config", FAIL, str(error), f"git checkout {path.name}, or name another with --deepspeed_config")


# --- the machine --------------------------------------------------------------------------------------------------------


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def _level(num_bytes: float, bounds: dict[str, int]) -> str:
    return next((level for level in (FAIL, WARN) if num_bytes < bounds[level]), OK)


def check_disk(_: Patient) -> Iterator[Finding]:
    runs = Path("runs").absolute()
    there = next(place for place in (runs, *runs.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:  # a quota or a read-only mount shows only now
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(there).free
    except OSError as error:
        cure = "make room or make it writable, start from another folder, or name an --output-dir elsewhere"
        yield Finding("disk", FAIL, f"{there} takes no file: {error.strerror}", cure)
        return
    level = _level(free, RUN_BYTES)
    cure = "make room, or name an --output-dir on another disk" if level != OK else ""
    yield Finding("disk", level, f"{_gib(free)} free where runs go, {there}", cure)


def check_shm(patient: Patient) -> Iterator[Finding]:
    if not SHM.is_dir():
        yield Finding("shared memory", OK, f"there is no {SHM} on this system")
        return
    status = os.statvfs(SHM)
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    if free < SHM_BYTES:
        who = "NCCL between GPUs, and the bench's loader workers, use it" if patient.gpus > 1 else "the bench's workers use it"
        cure = "docker run --shm-size=1g or --ipc=host; else mount -o remount,size=1G /dev/shm, or delete what fills it"
        yield Finding("shared memory", WARN, f"{SHM} has {free >> 20} of {size >> 20} MiB free; {who}", cure)
    else:
        yield Finding("shared memory", OK, f"{_gib(free)} free in {SHM}")


def _cgroup_number(name: str) -> float | None:
    """A limit of the container, by the name of its file; None where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = (CGROUP / name).read_text().split()
        if words[0] != "max":
            return float(words[0]) / (float(words[1]) if len(words) > 1 else 1)
    return None


def check_memory(_: Patient) -> Iterator[Finding]:
    try:
        import psutil
    except ImportError as error:
        yield Finding("memory", FAIL, f"not known: {error}", "uv sync")
        return
    free, where = psutil.virtual_memory().available, ""
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current") or 0
    if limit is not None and limit - used < free:
        free, where = limit - used, f" of the container's {_gib(limit)}"
    level = _level(free, MEMORY_BYTES)
    cure = "end other programs, ask for more (docker run --memory, #SBATCH --mem), or start fewer ranks" if level != OK else ""
    yield Finding("memory", level, f"{_gib(free)} available{where}; a rank of the default recipe takes 0.7", cure)


def check_cpu(patient: Patient) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    patient.threads = max(1, cores // max(1, patient.gpus))
    quota = _cgroup_number("cpu.max")
    if quota is not None and quota < cores:
        fewer = max(1, int(quota))
        said = f"{cores} cores are seen, but the container may use {quota:g} of them, so threads would wait for each other"
        yield Finding("CPU", WARN, said, f"--threads {fewer}, or docker run --cpuset-cpus in place of --cpus")
    else:
        yield Finding("CPU", OK, f"{cores} core{'s' if cores > 1 else ''}, {platform.machine()}")


# --- what a run needs from elsewhere ------------------------------------------------------------------------------------


def _reaches(host: str, port: int) -> str:
    """ "" if a connection can be made, else why not."""
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except TimeoutError:
        return f"no answer for {CONNECT_SECONDS:g} seconds"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def check_data(patient: Patient) -> Iterator[Finding]:
    try:
        from cifar10.data.cifar import CIFAR10
    except ImportError as error:
        yield Finding("data", FAIL, f"cannot be read: {error}", "uv sync")
        return
    names = [name for split in CIFAR10.split_files.values() for name in split]
    faults, folder = CIFAR10.faulty_files(patient.data_dir, names), patient.data_dir / CIFAR10.folder
    if not faults:
        yield Finding("data", OK, f"CIFAR-10 in {folder}: {len(names)} files, every md5 is right")
        return
    missing = set(faults.values()) == {"missing"} and len(faults) == len(names)
    listed = ", ".join(f"{name} ({fault})" for name, fault in faults.items())
    said = f"no CIFAR-10 in {patient.data_dir}" if missing else f"CIFAR-10 in {folder} is damaged: {listed}"
    if (patient.data_dir / CIFAR10.archive).is_file():
        yield Finding("data", WARN, said, f"any run restores it from {CIFAR10.archive} there; or --dataset synthetic")
        return
    parts = urlsplit(CIFAR10.source)
    fault = _reaches(parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    if fault:
        said = f"{said}, and {parts.hostname} cannot be reached: {fault}"
        cure = f"put {CIFAR10.archive} into {patient.data_dir}, point --data-dir / CIFAR10_DIR at it, set CIFAR10_URL"
        yield Finding("data", FAIL, said, f"{cure}; or --dataset synthetic")
    else:
        yield Finding("data", WARN, said, f"any run fetches it (170 MB) from {parts.hostname}; or --dataset synthetic")


def _is_here(address: str) -> bool:
    """Whether an address is one of this machine's: something can be bound to it."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _is_free(address: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def check_ports(_: Patient) -> Iterator[Finding]:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None and port is None:
        if _is_free("127.0.0.1", DEFAULT_PORT):
            yield Finding("ports", OK, "MASTER_ADDR and MASTER_PORT are not set: each launcher chooses; 29500 is free")
        else:
            cure = "main.py takes a free one; else: deepspeed --master_port=29501, torchrun --standalone"
            yield Finding("ports", WARN, f"another program has {DEFAULT_PORT}, which launchers take unless told", cure)
        return
    host, port = host or "127.0.0.1", port or str(DEFAULT_PORT)
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        yield Finding("ports", FAIL, f"MASTER_PORT is {port!r}, no port", "export MASTER_PORT=29500, or unset it")
        return
    try:
        address = socket.getaddrinfo(host, int(port), proto=socket.IPPROTO_TCP)[0][4][0]
    except OSError as error:
        cure = "export MASTER_ADDR with an address of the first machine that all machines can reach"
        yield Finding("ports", FAIL, f"MASTER_ADDR {host} does not resolve: {error.strerror}", cure)
        return
    if _is_here(address) and os.environ.get("RANK", "0") == "0":
        if _is_free(address, int(port)):
            yield Finding("ports", OK, f"{host}:{port} is on this machine and free for rank 0")
        else:
            cure = f"end the program that has it (ss -ltnp 'sport = :{port}'), or export another MASTER_PORT"
            yield Finding("ports", FAIL, f"{host}:{port} is on this machine, and another program has it", cure)
    elif fault := _reaches(address, int(port)):
        cure = "start rank 0 first; let the firewall pass the port; check MASTER_ADDR with getent hosts"
        yield Finding("ports", FAIL, f"{host}:{port} cannot be reached: {fault}", cure)
    else:
        yield Finding("ports", OK, f"{host}:{port} can be reached")


def check_wandb(_: Patient) -> Iterator[Finding]:
    if importlib.util.find_spec("wandb") is None:
        yield Finding("W&B", WARN, "wandb is not installed: runs are not logged there", "uv sync, if they should be")
        return
    try:
        from cifar10.metrics.wandb_sink import choose_mode, find_key, has_login
    except ImportError as error:
        yield Finding("W&B", FAIL, f"not known: {error}", "uv sync")
        return
    mode, (key, source) = choose_mode("auto", os.environ), find_key(os.environ)
    if mode == "offline":
        yield Finding("W&B", OK, f"WANDB_MODE is {os.environ['WANDB_MODE']}: runs are recorded for wandb sync")
    elif mode == "off" and has_login(os.environ):
        yield Finding("W&B", OK, "WANDB_MODE or WANDB_DISABLED switches it off")
    elif mode == "off":
        yield Finding("W&B", OK, "nobody is logged in, so runs are not logged there; wandb login would change that")
    elif not has_login(os.environ):
        cure = "wandb login, or export WANDB_MODE=offline; a run trains on without it"
        yield Finding("W&B", WARN, "WANDB_MODE is online, and there is no key", cure)
    elif key and len(key) < 40:
        cure = "wandb login --relogin with a key from https://wandb.ai/authorize, or unset WANDB_API_KEY"
        yield Finding("W&B", WARN, f"the key in {source} has {len(key)} characters; wandb takes none below 40", cure)
    else:
        yield Finding("W&B", OK, f"a key is in {source or 'WANDB_IDENTITY_TOKEN_FILE'}: runs are logged there")


def check_slurm(_: Patient) -> Iterator[Finding]:
    job = os.environ.get("SLURM_JOB_ID")
    there = [name for name in ("sbatch", "srun") if shutil.which(name)]
    if job and "srun" not in there:
        cure = "put SLURM's programs on PATH (module load slurm), or start with python main.py on one machine"
        yield Finding("SLURM", WARN, f"this is job {job}, but srun is not on PATH", cure)
    elif job:
        place = f"{os.environ.get('SLURM_JOB_NUM_NODES', '1')} nodes, {os.environ.get('SLURM_NTASKS', '1')} tasks"
        yield Finding("SLURM", OK, f"in job {job}: {place}; srun is there")
    else:
        yield Finding("SLURM", OK, f"not in a job; {'sbatch run_deepspeed.sh queues one' if there else 'none on this machine'}")


CHECKS: dict[str, Check] = {
    "python": check_python,
    "packages": check_packages,
    "config": check_config,
    "compiler": check_compiler,
    "disk": check_disk,
    "data": check_data,
    "memory": check_memory,
    "ports": check_ports,
    "W&B": check_wandb,
    "SLURM": check_slurm,
    "torch": check_torch,
    "CPU": check_cpu,
    "shared memory": check_shm,
    "gloo": check_gloo,
    "DeepSpeed": check_deepspeed,
}


# --- all of it ----------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def examine(patient: Patient) -> Iterator[Finding]:
    """Every check's findings; one that breaks is a finding itself."""
    sources = {"torch": (TORCH_PROBE,), "gloo": (GLOO_PROBE, str(free_port())), "deepspeed": (DEEPSPEED_PROBE,)}
    try:
        patient.probes = {name: Probe(*words) for name, words in sources.items()}
        for name, check in CHECKS.items():
            try:
                yield from check(patient)
            except Exception as error:
                said = f"the check itself broke: {type(error).__name__}: {error}".splitlines()[0]
                yield Finding(name, FAIL, said, "uv sync; if it stays, report this line")
    finally:
        for probe in patient.probes.values():
            probe.end()


def what_will_happen(patient: Patient, findings: list[Finding]) -> str:
    """In a line, what `python main.py` would do now."""
    fails = sum(finding.level == FAIL for finding in findings)
    if fails:
        return f"mend {'the FAIL' if fails == 1 else f'the {fails} FAILs'} above first; then: python main.py"
    alone = f"1 rank on the {'GPU' if patient.gpus else 'CPU'}"
    ranks = f"{patient.gpus} ranks, one on each GPU" if patient.gpus > 1 else alone
    threads = f"{patient.threads} CPU thread{'s' if patient.threads > 1 else ''}{' each' if patient.gpus > 1 else ''}"
    return f"python main.py will train on {ranks}, with {threads}"


def _lines(finding: Finding) -> str:
    colour = {OK: "32", WARN: "33", FAIL: "31"}[finding.level]
    level = f"\033[{colour}m{finding.level:4}\033[0m" if sys.stdout.isatty() else f"{finding.level:4}"
    cure = f"\n{'':20}-> {finding.cure}" if finding.cure else ""
    return f"{level}  {finding.name:13} {finding.says}{cure}"


def run(data_dir: Path | None = None, json: bool = False, advice: bool = False) -> int:
    """Look at Python, libraries, GPU, disk, memory, network, data, W&B and SLURM; ends with 1 if something is a FAIL.

    Args:
        data_dir: Where CIFAR-10 lies (default: $CIFAR10_DIR, else data/).
        json: Print JSON, and nothing else.
        advice: What to do about trouble that no look at a machine finds: accuracy, speed, stopping, NaN.
    """
    if advice:
        width = max(len(symptom) for symptom, _ in ADVICE)
        print("\n".join(f"{symptom:{width}}  {answer}" for symptom, answer in ADVICE))
        return 0
    patient, findings = Patient(data_dir or Path(os.environ.get("CIFAR10_DIR") or "data")), []
    for finding in examine(patient):
        findings.append(finding)
        if not json:
            print(_lines(finding), flush=True)
    end = what_will_happen(patient, findings)
    failed = any(finding.level == FAIL for finding in findings)
    if json:
        content = {"findings": [asdict(finding) for finding in findings], "ok": not failed, "what_will_happen": end}
        print(json_format.dumps(content, indent=2))
    else:
        print(f"\n{end}")
    return 1 if failed else 0
