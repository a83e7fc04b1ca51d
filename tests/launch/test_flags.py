"""Launch options, and the deepspeed command line that they become."""

import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import main
from cifar10 import UsageError
from cifar10.config import ds_config
from cifar10.launch.command import (
    SCRIPT,
    LaunchOptions,
    count_ranks,
    deepspeed_command,
    idle_gpus,
    split_launch_options,
    start_command,
)
from tests.launching import run

TWO = LaunchOptions(num_nodes=2, node_rank=1, master_addr="10.0.0.1", master_port=29_501)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "RANK", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)


# --- parsing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "options", "rest"),
    [
        ("", LaunchOptions(), ""),
        ("--epochs 3 words", LaunchOptions(), "--epochs 3 words"),
        ("--num-gpus 2", LaunchOptions(num_gpus=2), ""),
        ("--num_gpus=2 --epochs=3", LaunchOptions(num_gpus=2), "--epochs=3"),
        ("--num-gpus 2 --num-gpus 4", LaunchOptions(num_gpus=4), ""),
        ("--num-nodes 2 --master-addr host", LaunchOptions(num_nodes=2, master_addr="host"), ""),
        ("--seed 1 --num-nodes=3 --node_rank=2 --master_addr=a --master-port 5", LaunchOptions(None, 3, 2, "a", 5), "--seed 1"),
        ("--mean 0.5 -0.4 --seeds 2 --data_dir a_b", LaunchOptions(seeds=2), "--mean 0.5 -0.4 --data_dir a_b"),
        ("--num-gpus-wanted 2 num-gpus", LaunchOptions(), "--num-gpus-wanted 2 num-gpus"),  # refused by the script
    ],
)
def test_launch_options_are_split_from_the_flags_of_the_script(argv, options, rest):
    assert split_launch_options(argv.split()) == (options, rest.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        *[(f"--num-gpus{value}", "--num-gpus") for value in (" 0", " two", "", "=", "=1.5")],
        *[(f"--{name} 0", f"--{name}") for name in ("num-nodes", "master-port", "seeds")],
        ("--node-rank x", "--node-rank"),
        ("--max-restarts -1", "--max-restarts"),
        ("--num-nodes 2 --node-rank 2 --master-addr a", "--node-rank"),
        ("--node-rank 1", "--node-rank"),
        ("--num-nodes 2", "--master-addr 10.0.0.1"),
        ("--num-nodes 2 --master-addr=", "--master-addr"),
        ("--seeds 2 --num-nodes 2 --master-addr a", "--seeds"),
    ],
)
def test_invalid_launch_options_are_refused_in_one_line(argv, message):
    with pytest.raises(UsageError) as caught:
        split_launch_options(argv.split())
    (line,) = str(caught.value).splitlines()
    assert message in line


def test_several_of_main_under_one_srun_step_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UsageError, match=r"srun python cifar10_deepspeed\.py"):
        split_launch_options(["--epochs", "3"])
    assert split_launch_options(["--num-nodes", "2", "--master-addr", "a"])[0].num_nodes == 2  # one on each of two nodes
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert split_launch_options([]) == (LaunchOptions(), [])


def test_several_machines_need_a_shared_folder_and_a_batch_that_divides_over_all_ranks(tmp_path, capsys):
    flags = "--dataset synthetic --num-gpus 2 --num-nodes 3 --master-addr a".split()
    assert main.main([*flags, "--global-batch-size=60"]) == 2
    assert "--output-dir SHARED/run" in capsys.readouterr().err
    assert main.main([*flags, "--global-batch-size=32", f"--output-dir={tmp_path / 'run'}"]) == 2
    assert "--global-batch-size 30" in capsys.readouterr().err


def test_help_lists_launch_options_in_a_table_of_their_own(capsys):
    with pytest.raises(SystemExit) as left:
        main.main(["--num-gpus", "2", "--help"])
    assert left.value.code == 0
    lines = [line.strip(" │╭╮─") for line in capsys.readouterr().out.splitlines()]
    of_launch = lines[lines.index("launch options") : lines.index("run options")]
    listed = {line.split()[0] for line in of_launch if line}
    assert listed >= {"--" + field.name.replace("_", "-") for field in fields(LaunchOptions)}


def test_main_starts_without_torch():
    program = "import main, sys; main.main(['--epochs', '0']); sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", program]).returncode == 0


# --- how many ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "images", "machines", "due", "to_use_all"),
    [
        *[(gpus, 64, 1, due, larger) for gpus, due, larger in ((1, 1, 0), (2, 2, 0), (3, 2, 63), (4, 4, 0))],
        *[(gpus, 64, 1, 4, 16 * gpus) for gpus in (5, 6, 7, 8)],
        (6, 66, 1, 3, 96),
        (8, 512, 1, 8, 0),
        (7, 500, 1, 5, 497),
        (3, 7, 1, 1, 48),
        (4, 64, 2, 2, 128),
        (3, None, 1, 3, 0),  # a batch that grows with the ranks
    ],
)
def test_the_most_ranks_that_divide_the_batch_and_leave_each_sixteen_images(gpus, images, machines, due, to_use_all):
    ranks = count_ranks(None, gpus, images, machines)
    assert ranks == due
    batch = ds_config.batch({"train_batch_size": images or 16 * ranks}, ranks * machines)
    line = idle_gpus(None, gpus, batch, machines)
    assert (line is None) == (ranks == gpus)
    if line:
        assert f" {', '.join(map(str, range(ranks, gpus)))} stay idle" in line
        assert f"--global-batch-size {to_use_all}" in line
        assert count_ranks(None, gpus, to_use_all, machines) == gpus
        assert (f"--num-gpus {gpus}" in line) == (images % (gpus * machines) == 0)
    assert idle_gpus(1, gpus, batch) is None


def test_idle_gpus_are_named_as_the_environment_names_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a1,3")
    assert " 3 stay idle" in idle_gpus(None, 3, ds_config.batch({"train_batch_size": 64}, 2))


def test_ranks_on_this_machine():
    cases = [(None, 0), (None, 4), (2, 4), (4, 4), (3, 0)]
    assert [count_ranks(asked, gpus) for asked, gpus in cases] == [1, 4, 2, 4, 3]
    with pytest.raises(UsageError, match=r"--num-gpus: 3, .* for example --num-gpus 2"):
        count_ranks(3, 2)


# --- the command line -----------------------------------------------------------------------------------------------------


def built(options: LaunchOptions, ranks: int, gpus: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The words between `deepspeed -q` and the script, and the environment."""
    command, environment = deepspeed_command(options, ranks, gpus, ["--epochs", "3"], folder / "hostfile")
    assert command[-3:] == [str(SCRIPT), "--epochs", "3"]
    return command[command.index("-q") + 1 : -3], environment


def test_on_one_machine_ranks_are_counted_and_the_port_is_free(tmp_path):
    (number, port), environment = built(LaunchOptions(), 2, 0, tmp_path)
    assert (number, port.partition("=")[0], environment["DS_ACCELERATOR"]) == ("--num_gpus=2", "--master_port", "cpu")
    assert not (tmp_path / "hostfile").exists()
    ports = {built(LaunchOptions(), 2, 0, tmp_path)[0][1] for _ in range(5)}
    assert len(ports) > 1


def test_several_machines_are_listed_in_the_hostfile_and_ssh_is_not_used(tmp_path):
    words, environment = built(TWO, 4, 0, tmp_path)
    due = ["--no_ssh", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29501"]
    assert words == [f"--hostfile={tmp_path / 'hostfile'}", *due]
    assert (tmp_path / "hostfile").read_text() == "node0 slots=4\nnode1 slots=4\n"
    assert environment["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize("options", [LaunchOptions(), TWO])
@pytest.mark.parametrize("visible", ["2,5,7", "7,2", "GPU-5e2a,GPU-01", "MIG-7a/1/0"])
def test_ranks_inherit_the_visible_gpus_that_deepspeed_would_renumber(tmp_path, monkeypatch, options, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    words, environment = built(options, 2, 2, tmp_path)
    assert words[-4:] == ["env", f"CUDA_VISIBLE_DEVICES={visible}", sys.executable, "-u"]
    assert {"--no_python", "--no_local_rank"} <= set(words)
    assert not any(word.startswith("--include") for word in words)
    assert not {"CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"} & set(environment)


def test_without_gpus_cuda_visible_devices_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    words, environment = built(LaunchOptions(), 2, 0, tmp_path)
    assert words[0] == "--num_gpus=2"
    assert not any(word.startswith("--include") for word in words)
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize("options", [LaunchOptions(seeds=4), TWO, LaunchOptions(4, 3, 2, "a host", 29_500)])
def test_the_command_that_starts_it_again_has_the_same_options(options, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--epochs", "3"])
    words = shlex.split(start_command(options))
    assert words[:2] == ["python", "main.py"]
    assert split_launch_options(words[2:]) == (options, [])
