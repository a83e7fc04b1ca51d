"""`python -m cifar10 doctor`: checks whether this machine can train, and says how to fix what it finds.

Each finding is OK, WARN or FAIL with one sentence; WARN and FAIL come with a fix. At the top only the standard library is
imported: a missing package is a finding, and a check that fails does not stop the others. What could hang or crash (torch,
DeepSpeed, two ranks that connect) runs in a process of its own, with a deadline.
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
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cifar10 import UsageError, reason

PROJECT = Path(__file__).resolve().parents[2]
CGROUP, SHM = Path("/sys/fs/cgroup"), Path("/dev/shm")
OK, WARN, FAIL = "OK", "WARN", "FAIL"
PROBE_SECONDS, CONNECT_SECONDS = 60.0, 3.0
GIB = 1 << 30
RUN_BYTES = {FAIL: 100 << 20, WARN: GIB}  # free disk space below which a run is in danger
MEMORY_BYTES = {FAIL: 700 << 20, WARN: 3 * GIB // 2}  # a rank of the default recipe needs 0.67 GB at its peak
GPU_TOLERANCE = 1e-3  # fp32 without TF32 rounds at 1e-6
SHM_BYTES = {WARN: 256 << 20}
DEFAULT_PORT = 29500  # DeepSpeed's and torch's


@dataclass
class Context:
    """What the checks share: the processes that were started for them, and what earlier checks found out."""

    data_dir: Path
    probes: dict[str, Probe] = field(default_factory=dict)
    torch: dict[str, Any] | None = None  # what TORCH_PROBE printed; None if torch cannot be imported
    gpus: int = 0
    global_images: int = 0  # the global batch of ds_config.json
    ranks: int = 0  # that main.py starts on the GPUs
    threads: int = 1


Row = tuple[str, str] | tuple[str, str, str]  # level, what it says, and for WARN and FAIL how to fix it
Finding = dict[str, str]  # name, level, says, cure
Check = Callable[[Context], Row | None]


# --- probes: programs in processes of their own ---------------------------------------------------------------------------

TORCH_PROBE = """
import json, torch
from cifar10 import UsageError
from cifar10.distributed import device
found = {"built": torch.version.cuda or torch.version.hip, "fault": None}
try:
    found |= {"note": device.choose(), **device.facts()}
except UsageError as error:
    found["fault"] = str(error)
print(json.dumps(found))
"""

# A process for each GPU, as ranks are: what it computes beside the CPU, and the sum over all of them.
GPU_PROBE = """
import json, os, sys, torch
import torch.distributed as dist
import torch.nn.functional as F
from datetime import timedelta
count, place = int(sys.argv[1]), sys.argv[2]

def differs(compute, *inputs):
    due, got = compute(*inputs), compute(*(value.cuda() for value in inputs)).cpu()
    return float((got - due).abs().max() / due.abs().max())

def work(index):
    torch.cuda.set_device(index)
    torch.backends.cudnn.allow_tf32 = False
    draw = torch.Generator().manual_seed(index)
    a, b, images, kernel = (torch.randn(s, generator=draw) for s in ((256, 256), (256, 256), (8, 16, 32, 32), (32, 16, 3, 3)))
    yield "product", differs(torch.matmul, a, b)
    yield "convolution", differs(lambda x, w: F.conv2d(x, w, padding=1), images, kernel)
    if dist.is_nccl_available():
        dist.init_process_group("nccl", "file://" + place, timedelta(seconds=40), world_size=count, rank=index)
        total = torch.full((1000,), index + 1.0, device="cuda")
        dist.all_reduce(total)
        yield "all-reduce", float((total.cpu() / (count * (count + 1) / 2) - 1).abs().max())

def rank(index, writer):
    found = {}
    try:
        for name, value in work(index):
            found[name] = value
    except Exception as error:
        found["fault"] = str(error).splitlines()[0][:200]
    os.write(writer, json.dumps(found).encode())
    os._exit(0)

pipes = [os.pipe() for _ in range(count)]
for index, (_, writer) in enumerate(pipes):
    if os.fork() == 0:
        rank(index, writer)
    os.close(writer)
print(json.dumps([json.loads(os.read(reader, 10_000) or b'{"fault": "its process died"}') for reader, _ in pipes]))
"""

# Two ranks on this machine connect as a launcher's would, and add up a tensor.
GLOO_PROBE = """
import os, socket, sys, torch
from datetime import timedelta
import torch.distributed as dist
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    where = f"tcp://127.0.0.1:{free.getsockname()[1]}"
child, code = os.fork(), 1
try:
    dist.init_process_group("gloo", where, timedelta(seconds=15), world_size=2, rank=int(not child))
    total = torch.ones(1)
    dist.all_reduce(total)
    code = int(total.item() != 2)
    dist.destroy_process_group()
except Exception as error:
    print(str(error).splitlines()[0], file=sys.stderr, flush=True)
if child:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or code
os._exit(code)
"""

DEEPSPEED_PROBE = """
import os
from cifar10 import UsageError
from cifar10.distributed import device
from cifar10.engine.engine import prepare
try:
    device.choose()
except UsageError:  # a finding of its own
    os.environ["DS_ACCELERATOR"] = "cpu"
print(prepare().__version__)
"""
PROBES = {"torch": TORCH_PROBE, "gloo": GLOO_PROBE, "deepspeed": DEEPSPEED_PROBE}


class Probe:
    """A small Python program in a process of its own."""

    def __init__(self, source: str, *arguments: str) -> None:
        ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {key: value for key, value in os.environ.items() if key not in ranks}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(PROJECT))))
        self._fault, words = "", [sys.executable, "-c", source, *arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            self._process = subprocess.Popen(words, **pipes, env=environment, start_new_session=True)
        except OSError as error:
            self._fault = f"no process can be started: {error.strerror}"

    def result(self) -> tuple[str, str]:
        """(the last line it printed, "") or ("", why it failed)."""
        if self._fault:
            return "", self._fault
        try:
            streams = self._process.communicate(timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            return "", f"it took more than {PROBE_SECONDS:g} seconds"
        printed, errors = (stream.decode(errors="replace").strip().splitlines() for stream in streams)
        if code := self._process.returncode:
            why = errors[-1].strip() if errors else f"it ended with code {code}"
            return "", re.sub(r"^\[enforce fail at \S+\] ", "", why)[:300]  # gloo's messages begin with its source file
        return (printed[-1].strip() if printed else ""), ""

    def end(self) -> None:
        """Kill it and whatever it has started, if it still runs."""
        if not self._fault and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, 9)
            self._process.communicate()


# --- the program and its libraries --------------------------------------------------------------------------------------


def _is_within(installed: str, versions: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(versions).contains(installed, prereleases=True)


def requirements() -> dict[str, str]:
    """Package -> the versions that pyproject.toml asks for: {"torch": ">=2.11,<2.16", ...}."""
    pyproject = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    block = pyproject.partition("\ndependencies = [")[2].partition("\n]")[0]
    return dict(re.findall(r'^\s*"([\w-]+)([^"]*)"', block, re.M))


def check_python(_: Context) -> Row:
    pyproject = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    installed, wanted = platform.python_version(), re.search(r'requires-python = "(.*)"', pyproject)[1]
    if _is_within(installed, wanted):
        return OK, f"{installed}, {sys.executable}"
    return FAIL, f"{installed} is not {wanted}", "uv sync, which installs a Python that fits"


def check_packages(_: Context) -> Row:
    faults, wanted = [], requirements()
    for name, versions in wanted.items():
        try:
            if not _is_within(version(name), versions):
                faults.append(f"{name} {version(name)} is not {versions}")
        except PackageNotFoundError:
            faults.append(f"{name} is missing")
    if faults:
        return FAIL, "; ".join(faults), "uv sync (or pip install -r requirements.txt)"
    return OK, f"all {len(wanted)} are installed in the versions that pyproject.toml asks for"


def check_config(context: Context) -> Row:
    from cifar10.config import ds_config

    path = PROJECT / "ds_config.json"
    try:
        _, batch, _ = ds_config.resolve(ds_config.read(path), 1)
        context.global_images = batch.global_images
        return OK, f"{path.name} is valid: global batch {batch.global_images}"
    except UsageError as error:
        return FAIL, str(error), f"git checkout {path.name}, or choose another file with --deepspeed_config"


def check_compiler(_: Context) -> Row:
    compiler, users = os.environ.get("CXX") or "c++", "only DeepSpeed's compiled ops need them"
    if missing := [name for name in (compiler, "ninja") if not shutil.which(name)]:
        cure = "nothing, unless your JSON asks for such an op: then apt install g++ ninja-build"
        return WARN, f"no {' and no '.join(missing)}: {users}", cure
    return OK, f"{shutil.which(compiler)} and ninja; {users}"


def check_builds(_: Context) -> Row | None:
    builds = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    if locks := sorted(builds.glob("**/lock")):
        said = f"{locks[0]} exists: a build is running or was killed, and the next build waits for it without end"
        return WARN, said, f"if no build is running: rm {' '.join(map(str, locks))}"
    return None


def check_torch(context: Context) -> Row:
    printed, fault = context.probes["torch"].result()
    if fault:
        return FAIL, f"cannot be imported: {fault}", "uv sync --reinstall-package torch"
    context.torch = json_format.loads(printed)
    context.gpus, built = len(context.torch.get("gpus", ())), context.torch["built"]
    return OK, f"{version('torch')}, {f'CUDA {built}' if built else 'a CPU build'}"


def check_gpu(context: Context) -> Row | None:
    if context.torch is None:
        return None
    if fault := context.torch["fault"]:
        says, _, cure = fault.rpartition("; ")
        return FAIL, says, cure
    if context.gpus:
        from cifar10.launch.command import count_ranks

        facts, context.ranks = context.torch, count_ranks(None, context.gpus, context.global_images or None)
        of_both = f"{facts['gpus'][0]}, capability {facts['capability'][0]}, driver {facts['driver']}, cuDNN {facts['cudnn']}"
        return OK, f"{context.gpus} x {of_both}"
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return OK, "not used: --device or DS_ACCELERATOR is cpu"
    return OK, context.torch["note"] or "no sign of a GPU: training runs on the CPU, over gloo"


def check_nccl(context: Context) -> Row | None:
    if context.gpus > 1 and not context.torch["nccl"]:
        return FAIL, "this torch has no NCCL, and several GPUs need it", "install torch's build for CUDA on Linux"
    return (OK, context.torch["nccl"] or "none, and one GPU needs none") if context.gpus else None


def check_gpu_work(context: Context) -> Row | None:
    """What each GPU computes, relative to the largest value of the CPU's result."""
    if not context.gpus:
        return None
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(GPU_PROBE, str(context.gpus), f"{folder}/meeting")
        try:
            printed, fault = probe.result()
        finally:
            probe.end()
    cure = "run nvidia-smi, and dmesg for Xid errors; CUDA_VISIBLE_DEVICES leaves a GPU out; NCCL_DEBUG=INFO says more of NCCL"
    if fault:
        return FAIL, f"the GPUs do not compute: {fault}", cure
    found = json_format.loads(printed)
    wrong = [
        f"GPU {index}: {what if name == 'fault' else f'its {name} differs from the CPU by {what:.1e}'}"
        for index, work in enumerate(found)
        for name, what in work.items()
        if name == "fault" or not what < GPU_TOLERANCE
    ]
    if wrong:
        return FAIL, "; ".join(wrong), cure
    done = (f"{name} within {max(work[name] for work in found):.0e}" for name in found[0])
    return OK, f"each GPU against the CPU: {', '.join(done)}"


def check_gloo(context: Context) -> Row:
    _, fault = context.probes["gloo"].result()
    if not fault:
        return OK, "two ranks on this machine connected and added up a tensor"
    cure = "unset GLOO_SOCKET_IFNAME, or set it to lo (several machines: their network); add this host to /etc/hosts"
    return FAIL, f"two ranks on this machine cannot connect: {fault}", cure


def check_deepspeed(context: Context) -> Row:
    printed, fault = context.probes["deepspeed"].result()
    wanted = requirements().get("deepspeed", "")
    if fault:
        return FAIL, f"cannot be imported: {fault}", "uv sync; neither DS_BUILD_OPS nor another index is needed"
    if not _is_within(printed, wanted):
        cure = "uv sync: cifar10/engine/engine.py relies on the internals of these versions"
        return FAIL, f"{printed} is installed, and {wanted} is needed", cure
    return OK, f"{printed} can be imported, and builds nothing"


def _free_space(num_bytes: float, bounds: dict[str, int], where: str, cure: str) -> Row:
    level, says = next((level for level in bounds if num_bytes < bounds[level]), OK), f"{num_bytes / GIB:.1f} GiB {where}"
    return (OK, says) if level == OK else (level, says, cure)


def check_disk(_: Context) -> Row:
    folder = next(path for path in (Path("runs").absolute(), *Path("runs").absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # only writing shows a quota or a read-only mount
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        cure = "make room or make it writable, start from another folder, or choose an --output-dir elsewhere"
        return FAIL, f"{folder} cannot be written to: {error.strerror}", cure
    return _free_space(free, RUN_BYTES, f"free for runs, in {folder}", "make room, or choose an --output-dir on another disk")


def check_shm(context: Context) -> Row:
    if not SHM.is_dir():
        return OK, f"this system has no {SHM}"
    status, users = os.statvfs(SHM), f"{'NCCL between GPUs and ' if context.gpus > 1 else ''}bench's loader workers"
    cure = "docker run --shm-size=1g or --ipc=host; else mount -o remount,size=1G /dev/shm, or delete what fills it"
    return _free_space(status.f_bavail * status.f_frsize, SHM_BYTES, f"free in {SHM}, for {users}", cure)


def _cgroup_number(name: str) -> float | None:
    """A limit of the container, by the name of its file; None if there is no limit."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = (CGROUP / name).read_text(encoding="utf-8").split()
        if words[0] != "max":
            return float(words[0]) / (float(words[1]) if len(words) > 1 else 1)
    return None


def check_memory(_: Context) -> Row:
    import psutil

    free, where = psutil.virtual_memory().available, ""
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current") or 0
    if limit is not None and limit - used < free:
        free, where = limit - used, f" of the container's {limit / GIB:.1f} GiB"
    cure = "end other programs, ask for more (docker run --memory, #SBATCH --mem), or start fewer ranks"
    return _free_space(free, MEMORY_BYTES, f"available{where}; a rank of the default recipe needs 0.7", cure)


def check_cpu(context: Context) -> Row:
    from cifar10.distributed import cpus

    cores, quota = cpus.cores(), cpus.cpu_quota()
    context.threads = cpus.threads(ranks=max(1, context.ranks))
    of = "" if quota is None else f", since the container may use {quota:g}"
    return OK, f"{cores} core{'s' if cores > 1 else ''}, {platform.machine()}{of}"


# --- what a run needs from elsewhere ------------------------------------------------------------------------------------


def _connection_error(host: str, port: int) -> str:
    """ "" if a connection can be made, else why not."""
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _can_bind(address: str, port: int) -> bool:
    """Whether the port is free; with port 0, whether the address is one of this machine's."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
        return True
    return False


def check_data(context: Context) -> Row:
    from cifar10.data.cifar import CIFAR10

    names = [name for split in CIFAR10.split_files.values() for name in split]
    faults, (folder, beside) = CIFAR10.faulty_files(context.data_dir, names), CIFAR10.place(context.data_dir)
    if not faults:
        return OK, f"CIFAR-10 in {folder}: {len(names)} files, every md5 is right"
    said = f"no CIFAR-10 in {context.data_dir}"
    if list(faults.values()) != ["missing"] * len(names):
        said = f"CIFAR-10 in {folder} is damaged: {', '.join(f'{name} ({fault})' for name, fault in faults.items())}"
    if (beside / CIFAR10.archive).is_file():
        return WARN, said, f"any run restores it from {CIFAR10.archive} there; or --dataset synthetic"
    for parts in map(urlsplit, CIFAR10.urls(CIFAR10.archives[0])):
        fault = _connection_error(parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
        if not fault:
            return WARN, said, f"any run downloads it (170 MB) from {parts.hostname}; or --dataset synthetic"
        said += f", and {parts.hostname} cannot be reached: {fault}"
    cure = f"put {CIFAR10.archive} into {beside}, point --data-dir / CIFAR10_DIR at it, set CIFAR10_URL"
    return FAIL, said, f"{cure}; or --dataset synthetic"


def check_ports(_: Context) -> Row:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None and port is None:
        if _can_bind("127.0.0.1", DEFAULT_PORT):
            return OK, f"MASTER_ADDR and MASTER_PORT are not set: each launcher chooses; {DEFAULT_PORT} is free"
        cure = "main.py picks a free one; else: deepspeed --master_port=29501, torchrun --standalone"
        return WARN, f"another program uses {DEFAULT_PORT}, the launchers' default", cure
    host, port = host or "127.0.0.1", port or str(DEFAULT_PORT)
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        return FAIL, f"MASTER_PORT is {port!r}, expected a number from 1 to 65535", "export MASTER_PORT=29500, or unset it"
    try:
        address = socket.getaddrinfo(host, int(port), proto=socket.IPPROTO_TCP)[0][4][0]
    except OSError as error:
        cure = "export MASTER_ADDR with an address of the first machine that all machines can reach"
        return FAIL, f"MASTER_ADDR {host} does not resolve: {error.strerror}", cure
    if _can_bind(address, 0) and os.environ.get("RANK", "0") == "0":
        if _can_bind(address, int(port)):
            return OK, f"{host}:{port} is on this machine and free for rank 0"
        cure = f"end the program that uses it (ss -ltnp 'sport = :{port}'), or export another MASTER_PORT"
        return FAIL, f"{host}:{port} is on this machine, and another program uses it", cure
    if fault := _connection_error(address, int(port)):
        cure = "start rank 0 first; open the port in the firewall; check MASTER_ADDR with getent hosts"
        return FAIL, f"{host}:{port} cannot be reached: {fault}", cure
    return OK, f"{host}:{port} can be reached"


def check_wandb(_: Context) -> Row:
    if importlib.util.find_spec("wandb") is None:
        return WARN, "wandb is not installed: runs are not logged there", "uv sync, if they should be"
    from cifar10.metrics.wandb_sink import choose_mode, find_key, has_login

    mode, (key, source), login = choose_mode("auto", os.environ), find_key(os.environ), has_login(os.environ)
    if mode == "offline":
        return OK, f"WANDB_MODE is {os.environ['WANDB_MODE']}: runs are recorded for wandb sync"
    if mode == "off":
        return OK, "switched off by WANDB_MODE or WANDB_DISABLED" if login else "not logged in: runs are not logged there"
    if not login:
        cure = "wandb login, or export WANDB_MODE=offline; a run trains on without it"
        return WARN, "WANDB_MODE is online, and there is no key", cure
    if key and len(key) < 40:
        cure = "wandb login --relogin with a key from https://wandb.ai/authorize, or unset WANDB_API_KEY"
        return WARN, f"the key in {source} has {len(key)} characters; wandb requires at least 40", cure
    return OK, f"key found in {source or 'WANDB_IDENTITY_TOKEN_FILE'}: runs are logged there"


def check_slurm(_: Context) -> Row:
    job = os.environ.get("SLURM_JOB_ID")
    if job and not shutil.which("srun"):
        cure = "put SLURM's programs on PATH (module load slurm), or start with python main.py on one machine"
        return WARN, f"this is job {job}, but srun is not on PATH", cure
    if job:
        size = f"{os.environ.get('SLURM_JOB_NUM_NODES', '1')} nodes, {os.environ.get('SLURM_NTASKS', '1')} tasks"
        return OK, f"in job {job}: {size}; srun is available"
    has_slurm = shutil.which("sbatch") or shutil.which("srun")
    return OK, f"not in a job; {'sbatch run_deepspeed.sh queues one' if has_slurm else 'not installed on this machine'}"


CHECKS: dict[str, Check] = {  # those that wait for a probe come last
    "python": check_python,
    "packages": check_packages,
    "config": check_config,
    "compiler": check_compiler,
    "compiled ops": check_builds,
    "disk": check_disk,
    "data": check_data,
    "memory": check_memory,
    "ports": check_ports,
    "W&B": check_wandb,
    "SLURM": check_slurm,
    "torch": check_torch,
    "GPU": check_gpu,
    "NCCL": check_nccl,
    "GPU work": check_gpu_work,
    "CPU": check_cpu,
    "shared memory": check_shm,
    "gloo": check_gloo,
    "DeepSpeed": check_deepspeed,
}


# --- the command --------------------------------------------------------------------------------------------------------


def examine(context: Context) -> Iterator[Finding]:
    """What all checks find; an exception in one of them is a finding itself."""
    try:
        context.probes = {name: Probe(source) for name, source in PROBES.items()}
        for name, check in CHECKS.items():
            try:
                row = check(context)
            except ImportError as error:
                row = FAIL, f"cannot be checked: {error}", "uv sync"
            except Exception as error:
                row = FAIL, f"the check itself failed: {reason(error)}", "uv sync; if it stays, report this line"
            if row:
                yield dict(zip(("name", "level", "says", "cure"), (name, *row, ""), strict=False))
    finally:
        for probe in context.probes.values():
            probe.end()


def what_will_happen(context: Context, fails: int) -> str:
    """In a line, what `python main.py` would do now."""
    if fails:
        return f"fix {'the FAIL' if fails == 1 else f'the {fails} FAILs'} above first; then: python main.py"
    number, places = context.ranks or 1, f"on {context.ranks} of the {context.gpus} GPUs"
    if context.ranks == context.gpus:
        places = "one on each GPU" if number > 1 else f"on the {'GPU' if context.gpus else 'CPU'}"
    ranks = f"{number} ranks, {places}" if number > 1 else f"1 rank {places}"
    threads = f"{context.threads} CPU thread{'s' if context.threads > 1 else ''}{' each' if number > 1 else ''}"
    return f"python main.py will train on {ranks}, with {threads}"


def _lines(finding: Finding) -> str:
    level, color = f"{finding['level']:4}", {OK: "32", WARN: "33", FAIL: "31"}[finding["level"]]
    if sys.stdout.isatty():
        level = f"\033[{color}m{level}\033[0m"
    cure = f"\n{'':20}-> {finding['cure']}" if finding["cure"] else ""
    return f"{level}  {finding['name']:13} {finding['says']}{cure}"


def _advice() -> str:
    """The table of docs/troubleshooting.md, as plain text."""
    page = (PROJECT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").replace("`", "")
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", page, re.M)[1:]
    width = max(len(symptom) for symptom, _ in rows)
    return "\n".join(f"{symptom:{width}}  {answer}" for symptom, answer in rows)


def run(
    data_dir: Path | None = None,
    json: bool = False,
    advice: bool = False,
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> int:
    """Check Python, libraries, GPU, disk, memory, network, data, W&B and SLURM; the exit code is 1 if any check is a FAIL.

    Args:
        data_dir: Where CIFAR-10 is (default: $CIFAR10_DIR, else data/).
        json: Print JSON, and nothing else.
        advice: Print advice on problems that no check can find: accuracy, speed, stopping, NaN.
        device: Where runs are to train, as in main.py --device.
    """
    if advice:
        print(_advice())
        return 0
    if device != "auto":
        os.environ["DS_ACCELERATOR"] = device
    context, found = Context(data_dir or Path(os.environ.get("CIFAR10_DIR") or "data").expanduser()), []
    for finding in examine(context):
        found.append(finding)
        if not json:
            print(_lines(finding), flush=True)
    fails = sum(finding["level"] == FAIL for finding in found)
    end = what_will_happen(context, fails)
    if json:
        print(json_format.dumps({"findings": found, "ok": not fails, "what_will_happen": end}, indent=2))
    else:
        print(f"\n{end}")
    return 1 if fails else 0
