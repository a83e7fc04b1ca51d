"""main.py and doctor on machines with GPUs that compute nothing (see tests/stand_in.py)."""

import json
from pathlib import Path

import pytest

from tests.launching import SHORT, summary
from tests.stand_in import StandIn

pytestmark = pytest.mark.slow
UUID = "GPU-00000000-0000-0000-0000-00000000000"


@pytest.mark.parametrize(
    ("flags", "visible", "words"),
    [
        ("--num-gpus 1 --device cpu", "0,1", "1 rank on cpu"),
        ("", "", "device: the CPU, since CUDA_VISIBLE_DEVICES= hides all GPUs"),
    ],
    ids=["by flag", "by variable"],
)
def test_main_trains_on_the_cpu_if_it_was_asked_for(tmp_path: Path, flags: str, visible: str, words: str) -> None:
    command = ["main.py", *flags.split(), *SHORT, "--no-report", "--output-dir", str(tmp_path / "run")]
    ended = StandIn.or_skip()(*command, gpus=2, CUDA_VISIBLE_DEVICES=visible)
    assert ended.returncode == 0, ended.stderr
    assert words in ended.stdout
    assert summary(tmp_path / "run")["world_size"] == 1
    (start,) = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert start["device"] == "cpu"
    assert "gpus" not in start
    for command in (["evaluate", "--split", "val"], ["predict", "docs/images"]) if flags else ():  # its model is used on a GPU
        ended = StandIn.or_skip()("-m", "cifar10", command[0], str(tmp_path / "run"), *command[1:])
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    "command", ["main.py --dataset synthetic", "cifar10_deepspeed.py --dataset synthetic", "-m cifar10 bench"]
)
def test_a_gpu_that_is_too_old_is_refused_before_anything_starts(command: str) -> None:
    ended = StandIn.or_skip()(*command.split(), FAKE_CAPABILITY="6.1", FAKE_QUIET="1")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "sm_61" in line
    assert "--device cpu" in line


def test_doctor_computes_on_each_gpu_and_notices_what_is_wrong() -> None:
    """Here everything is, because kernels do nothing."""
    ended = StandIn.or_skip()("-m", "cifar10", "doctor", "--json", gpus=2)
    assert ended.returncode == 1
    found = {row["name"]: row for row in json.loads(ended.stdout)["findings"]}
    assert found["GPU"]["says"].startswith("2 x Stand-in H100, capability 9.0")
    assert found["GPU work"]["level"] == "FAIL"
    assert {f"GPU {gpu}: its {what}" in found["GPU work"]["says"] for gpu in (0, 1) for what in ("product", "convolution")} == {
        True
    }


def test_scaling_measures_as_many_ranks_as_there_are_gpus() -> None:
    flags = "--dataset synthetic --rounds 1 --run-steps 2 --steps 2 --warmup-steps 1 --precisions fp32"
    ended = StandIn.or_skip()("-m", "cifar10", "scaling", *flags.split(), gpus=1)
    assert ended.returncode == 0, ended.stderr
    assert "more ranks than GPUs (1): 2, 4" in ended.stdout


def test_two_of_three_gpus_train_stop_and_resume(tmp_path: Path) -> None:
    """Nothing is on another device than it should be; what the values are, only a GPU can say."""
    python, folder = StandIn.or_skip(), tmp_path / "run"
    flags = ["main.py", *SHORT, "--no-report", "--output-dir", str(folder)]
    first = python(*flags, "--max-steps", "4", gpus=3)
    again = python(*flags, "--max-steps", "8", gpus=3, CUDA_VISIBLE_DEVICES=f"{UUID}2,{UUID}0")
    for ended in (first, again):
        assert ended.returncode == 0, ended.stderr
    assert all(word in first.stdout for word in ("device: 2 of 3 GPUs", " 2 stay idle", "--global-batch-size 63"))
    results = summary(folder)
    assert (results["steps"], results["world_size"], results["resumed_at_steps"]) == (8, 2, [4])
    for start in json.loads((folder / "environment.json").read_text())["starts"]:
        assert (start["device"], start["gpus"], start["capability"]) == ("Stand-in H100", ["Stand-in H100"] * 2, ["9.0"] * 2)
        assert {"driver", "cuda", "cudnn", "nccl"} <= start.keys()
