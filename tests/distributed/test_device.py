"""Which device a run takes, and what ends in one line: GPUs that PyTorch cannot use, and variables that hide them.

The machine is made of real files: a `nvidia-smi` on PATH, device files below another root. PyTorch's answers are replaced.
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

import pytest
import torch

import main
from cifar10 import UsageError
from cifar10.commands import bench, evaluate, scaling
from cifar10.distributed import device, world
from cifar10.plan import make_plan
from tests.launching import run

SIGNS = ("nvidia-smi", "/dev/nvidiactl", "/proc/driver/nvidia", "/dev/kfd", "/dev/dxg", "/dev/nvmap", "NVIDIA's driver")
TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver."
NONE_THERE = "No CUDA GPUs are available"


class Machine:
    """A machine without a sign of a GPU, to which tests add some."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.monkeypatch = root, monkeypatch
        for name in ("CUDA_VISIBLE_DEVICES", *device.OF_AMD, "DS_ACCELERATOR", "RANK"):
            monkeypatch.setenv(name, "")  # so that it is restored, whatever the program sets
            monkeypatch.delenv(name)
        (root / "bin").mkdir()
        monkeypatch.setenv("PATH", str(root / "bin"))
        monkeypatch.setattr(device, "ROOT", root)
        monkeypatch.setattr(device, "_nvml", lambda: None)
        self.torch()

    def show(self, sign: str) -> None:
        if sign == "NVIDIA's driver":
            self.monkeypatch.setattr(device, "_nvml", lambda: ctypes.CDLL(None))
            return
        path = self.root / ("bin/nvidia-smi" if sign == "nvidia-smi" else sign[1:])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)

    def torch(self, error: str = "", gpus: int = 0, cuda: str | None = "13.2", hip: str | None = None, **facts: object) -> None:
        """What PyTorch is built for, and finds."""

        def init() -> None:
            if error:
                raise RuntimeError(error)

        capabilities, archs = facts.get("capabilities", [(9, 0)] * gpus), facts.get("archs", ["sm_75", "sm_80", "sm_90"])
        self.monkeypatch.setattr(torch.version, "cuda", cuda)
        self.monkeypatch.setattr(torch.version, "hip", hip)
        answers = {"init": init, "device_count": lambda: gpus, "get_arch_list": lambda: archs}
        answers |= {
            "get_device_capability": lambda index=0: capabilities[index],
            "get_device_name": lambda index: f"GPU {index}",
        }
        answers["get_device_properties"] = lambda index: type("", (), {"gcnArchName": "gfx1100:sramecc-"})
        for name, answer in answers.items():
            self.monkeypatch.setattr(torch.cuda, name, answer)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def refused(*words: str, asked: str = "auto") -> str:
    with pytest.raises(UsageError) as caught:
        device.choose(asked)
    assert all(word in str(caught.value) for word in words), caught.value
    return str(caught.value)


# --- never the CPU unasked --------------------------------------------------------------------------------------------


def test_without_any_sign_of_a_gpu_the_cpu_is_taken(machine):
    assert (device.choose(), device.count_gpus(), device.facts()) == (None, 0, {})


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize(
    ("torch_is", "words"),
    [
        ({"error": TOO_OLD}, ("too old (found version 11040); update the driver",)),
        ({"error": "Found no NVIDIA driver on your system. Please check"}, ("Found no NVIDIA driver",)),
        ({"error": NONE_THERE}, (NONE_THERE,)),
        ({"cuda": None}, ("CPUs only", "install its build for")),
    ],
    ids=["old driver", "no driver", "no GPU", "CPU wheel"],
)
def test_a_gpu_that_cannot_be_used_is_refused_with_what_was_found_and_the_ways_out(machine, sign, torch_is, words):
    machine.show(sign)
    machine.torch(**torch_is)
    words = ("built for CUDA 13.2", "ROCm") if sign == "/dev/kfd" and "cuda" not in torch_is else words
    refused(f"found {sign}", torch.__version__, "--device cpu", *words)
    with pytest.raises(UsageError):
        device.count_gpus()
    assert device.choose("cpu") is None
    assert (device.count_gpus(), os.environ["DS_ACCELERATOR"]) == (0, "cpu")


def test_a_rocm_build_beside_an_nvidia_gpu_and_a_container_without_gpus(machine):
    machine.show("/proc/driver/nvidia")
    machine.torch(error="Found no NVIDIA driver on your system. Please")
    refused("--gpus all")
    machine.torch(cuda=None, hip="6.4")
    refused("ROCm 6.4", "install its build for CUDA")


ENTRIES = {
    "main.py": lambda flags: main.main(["--num-gpus", "2", *flags]),
    "the plan": lambda flags: make_plan(["--dataset", "synthetic", *flags], 1, "a test"),
    "a world": lambda _: world._device(0, 1, "python"),
    "evaluate": lambda _: evaluate.run(Path("nowhere")),
    "bench": lambda _: bench.run("synthetic"),
    "bench --gpu": lambda _: bench.run("synthetic", gpu=True),
    "scaling": lambda _: scaling.run("synthetic"),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_way_to_start_refuses_it(machine, entry, capsys):
    machine.show("/dev/nvidiactl")
    machine.torch(error=TOO_OLD)
    if entry == "main.py":
        assert ENTRIES[entry]([]) == 2
        (line,) = capsys.readouterr().err.splitlines()
    else:
        with pytest.raises(UsageError) as caught:
            ENTRIES[entry]([])
        line = str(caught.value)
    assert "/dev/nvidiactl" in line
    assert "--device cpu" in line


@pytest.mark.slow
def test_the_program_refuses_it_as_a_whole(tmp_path):
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    command = [sys.executable, "cifar10_deepspeed.py", "--dataset", "synthetic", "--output-dir", str(tmp_path / "run")]
    program = "import torch; torch.version.cuda = torch.version.hip = None; import runpy, sys; del sys.argv[0];"
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    ended = run([sys.executable, "-c", program, *command[1:]], DS_ACCELERATOR="auto", PATH=str(tmp_path))
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: found nvidia-smi")
    assert "--device cpu" in line
    assert not (tmp_path / "run").exists()


# --- what the environment asks for ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("CUDA_VISIBLE_DEVICES", value) for value in ("", " ", "-1", "-1,0")), *((n, "-1") for n in device.OF_AMD)],
)
def test_a_variable_that_hides_all_gpus_asks_for_the_cpu_and_a_line_says_so(machine, name, value):
    machine.show(device.AMD if name in device.OF_AMD else "nvidia-smi")
    machine.torch(gpus=2, hip="6.4", archs=["sm_90", "gfx1100"])
    machine.monkeypatch.setenv(name, value)
    note = device.choose()
    assert f"{name}={value.strip()}" in note
    assert device.count_gpus() == 0
    assert note in make_plan(["--dataset", "synthetic"], 1, "a test").notes
    refused(name, asked="cuda")


@pytest.mark.parametrize(
    ("value", "word"), [("7", "CUDA_VISIBLE_DEVICES=7"), ("GPU-0", "unset"), ("NoDevFiles", "--gres=gpu:1")]
)
def test_a_variable_that_selects_no_gpu_is_named(machine, value, word):
    machine.show("nvidia-smi")
    machine.torch(error=NONE_THERE)
    machine.monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    refused(word, "--device cpu")


def test_ds_accelerator_asks_for_the_cpu_and_the_flag_goes_first(machine):
    machine.show("nvidia-smi")
    machine.torch(gpus=2)
    machine.monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "DS_ACCELERATOR=cpu" in device.choose()
    assert device.count_gpus() == 0
    assert device.choose("cuda") is None
    assert device.count_gpus() == 2
    machine.monkeypatch.setenv("DS_ACCELERATOR", "")
    assert (device.choose(), "DS_ACCELERATOR" in os.environ) == (None, False)
    machine.monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    refused("xpu", "--device cpu")


def test_a_gpu_that_was_asked_for_and_is_not_there(machine):
    refused("no sign of one", "--device cpu", asked="cuda")


# --- architectures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((6, 1), ["sm_75", "sm_80"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 9), ["sm_75", "sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((12, 1), ["sm_90", "sm_120"], True),
        ((10, 0), ["sm_90"], False),
        ((10, 0), ["sm_90", "compute_90"], True),
        ((8, 0), ["sm_75", "compute_90"], False),
        ((9, 0), ["sm_80", "sm_90a"], True),
    ],
)
def test_a_gpu_without_kernels_in_this_pytorch_is_refused(machine, capability, archs, runs):
    machine.show("nvidia-smi")
    machine.torch(gpus=2, capabilities=[(9, 0) if "sm_90" in archs else capability, capability], archs=archs)
    if runs:
        assert device.choose() is None
        assert device.count_gpus() == 2
    else:
        refused("GPU ", "sm_{}{}".format(*capability), archs[0], "--device cpu")


def test_the_gpus_that_can_be_used_are_named_and_amds_are_known_by_name(machine):
    machine.show("nvidia-smi")
    machine.torch(gpus=3, capabilities=[(9, 0), (6, 1), (8, 0)])
    refused("has no kernels for GPU 1", "CUDA_VISIBLE_DEVICES=0,2")
    machine.monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-c,GPU-a,GPU-b")
    refused("CUDA_VISIBLE_DEVICES=GPU-c,GPU-b")
    machine.torch(gpus=1, cuda=None, hip="6.4", archs=["gfx90a", "gfx1100"])
    (machine.root / "bin" / "nvidia-smi").unlink()
    machine.show("/dev/kfd")
    assert (device.choose(), device.count_gpus()) == (None, 1)
    machine.torch(gpus=1, cuda=None, hip="6.4", archs=["gfx90a"])
    refused("gfx90a", "--device cpu")


# --- the CPU's memory -------------------------------------------------------------------------------------------------

COUNT = """
import resource
import torch
from cifar10.run import trained
from cifar10.distributed import world

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(20_000_000)  # 80 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

HOW
faults(30)  # the heap finds its size
print(faults(20))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has the setting")
@pytest.mark.parametrize("how", ["world.join(1)", "trained.alone(1)", ""])
def test_a_step_takes_no_new_pages_for_what_the_last_one_freed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 times 80 MB are 800 huge pages of 2 MB, or more small ones: what a process takes without the setting."""
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name in ("LD_PRELOAD", "GLIBC_TUNABLES")]:
        monkeypatch.delenv(name)
    ended = run([sys.executable, "-c", COUNT.replace("HOW", how)], DS_ACCELERATOR="cpu")
    assert ended.returncode == 0, ended.stderr
    taken = int(ended.stdout.split()[-1])
    assert taken < 100 if how else taken >= 700
