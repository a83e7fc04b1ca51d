"""main.py --budget: what is chosen on machines of many kinds, what is refused, and a real run."""

import json
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import pytest

import main
from cifar10 import UsageError
from cifar10.commands import frontier as command
from cifar10.launch import budget, supervise
from cifar10.launch.budget import Candidate, Choice, Cost, Point, choose, verdict
from cifar10.launch.command import LaunchOptions, deepspeed_command, split_launch_options
from tests.launching import BIN, PROJECT, run, summary

FRONTIER = budget.read_frontier()
MACHINES = {  # seconds to start, and for a step of 500 images of 4, 21 and 236 MFLOP
    "two cores, fp32": (10.0, (0.12, 0.5, 6.0)),
    "one core, fp32": (14.0, (0.22, 0.9, 11.0)),
    "two cores, bf16": (8.0, (0.05, 0.115, 0.75)),
    "sixteen cores": (5.0, (0.02, 0.03, 0.15)),
    "a GPU": (12.0, (0.004, 0.006, 0.03)),
}


def simulated(machine: str, slowdown: float = 1.0) -> dict[str, Cost]:
    """The costs on a machine that was never measured."""
    start, (small, middle, large) = MACHINES[machine]
    costs = {}
    for candidate in FRONTIER:
        step = small if candidate.flops < 1e7 else middle if candidate.flops < 1e8 else large
        sizes = [step * (side / 32) ** 2 for side in candidate.settings.first_sizes]
        forward = 10_000 / 500 * step / 3  # of all test images
        costs[candidate.recipe] = slower(Cost(start / 4, (*sizes, step), 100, 0.0, forward), slowdown)
    return costs


def slower(cost: Cost, times: float) -> Cost:
    return Cost(cost.start * times, tuple(step * times for step in cost.steps), 100, cost.validation * times, cost.test * times)


def probed(costs: dict[str, Cost], noise: float, rng: random.Random) -> tuple[dict[str, Cost], float]:
    """What a probe of three rounds says of these costs, where a step's time varies by `noise`."""
    rounds = [rng.lognormvariate(0, noise) for _ in range(3)]
    return {name: slower(cost, fmean(rounds)) for name, cost in costs.items()}, stdev(rounds) / fmean(rounds) / 3**0.5


def true_seconds(choice: Choice, costs: dict[str, Cost], gone: float) -> float:
    recipe, epochs = choice.flags[1], float(choice.flags[3])
    [candidate] = [one for one in FRONTIER if one.recipe == recipe]
    return gone + costs[recipe].of(candidate, round(epochs * costs[recipe].steps_per_epoch))


def best_accuracy(costs: dict[str, Cost], limit: float) -> float:
    """Of the recipe and length that one would take who knew the machine, without a probe and a reserve."""
    lengths = {one: costs[one.recipe].most_steps(one, limit) for one in FRONTIER}
    return max(one.accuracy(steps / costs[one.recipe].steps_per_epoch) for one, steps in lengths.items() if steps)


@pytest.mark.parametrize(("machine", "text"), list(product(MACHINES, ("1m", "3m", "10m"))))
def test_on_a_machine_that_was_never_measured_the_time_is_kept_and_used(machine, text):
    costs, gone, given = simulated(machine), MACHINES[machine][0] + 4, budget.seconds(text)
    choices = [choose(text, FRONTIER, *probed(costs, 0.02, random.Random(seed)), gone) for seed in range(20)]
    assert all(0.9 * given <= true_seconds(choice, costs, gone) <= given for choice in choices)
    assert fmean(choice.accuracy for choice in choices) >= best_accuracy(costs, given - gone) - 0.005


@pytest.mark.parametrize("text", ["3m", "10m"])
def test_beside_a_busy_neighbour_more_is_held_in_reserve(text):
    costs, given = simulated("two cores, fp32", slowdown=2.0), budget.seconds(text)
    used = []
    for seed in range(100):
        found, spread = probed(costs, 0.1, random.Random(seed))
        choice = choose(text, FRONTIER, found, spread, 25.0)
        assert choice.reserve == budget.reserve(spread)
        used.append(true_seconds(choice, costs, 25.0) / given)
    assert sum(share <= 1 for share in used) >= 90
    assert budget.reserve(0.0) < budget.reserve(0.05) < budget.reserve(1.0) < 0.2


def test_a_candidate_that_was_not_measured_here_is_not_chosen():
    costs = simulated("a GPU")
    widest = FRONTIER[-1].recipe
    assert choose("10m", FRONTIER, costs, 0.0, 10.0).flags[1] == widest
    assert choose("10m", FRONTIER, {k: v for k, v in costs.items() if k != widest}, 0.0, 10.0).flags[1] != widest


def test_a_longer_budget_is_never_expected_to_be_worse():
    for machine in MACHINES:
        expected = [choose(f"{s}s", FRONTIER, simulated(machine), 0.0, 15.0).accuracy for s in (60, 90, 180, 600, 3600)]
        assert expected == sorted(expected)


def test_too_short_a_budget_is_refused_with_the_least_that_is_enough():
    costs = simulated("one core, fp32")
    with pytest.raises(UsageError, match="--budget 5s is too short for this machine") as caught:
        choose("5s", FRONTIER, costs, 0.0, 14.0)
    least = str(caught.value).rpartition(" ")[2]
    assert choose(least, FRONTIER, costs, 0.0, 14.0)
    with pytest.raises(UsageError):
        choose(f"{budget.seconds(least) - 2:g}s", FRONTIER, costs, 0.0, 14.0)


def test_sizes_of_images_keep_their_shares_of_a_run():
    recipe = Candidate("speedrun94_cpu", 1.0, (), (Point(2, 0.8, 1, "val", 2.0), Point(10, 0.9, 1, "val", 1.0)))
    assert [recipe.first_epochs(epochs) for epochs in (1, 5, 10, 20)] == [(1, 1), (1, 2), (3, 4), (6, 8)]
    assert recipe.flags_for(20)[:7] == ["--recipe", "speedrun94_cpu", "--epochs", "20", "--first-epochs", "6", "8"]
    cost = Cost(1.0, (1.0, 10.0, 100.0), 10, 0.0, 5.0)
    assert cost.of(recipe, 100) == 1 + 30 * 1 + 40 * 10 + 30 * 100 + (1 + 1.0) * 5
    assert recipe.accuracy(1e6) == 0.9
    assert 0.8 < recipe.accuracy(5) < 0.9


# --- the command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "due"), [("60s", 60), ("3m", 180), ("0.5h", 1800)])
def test_a_time_has_a_unit(text, due):
    options, flags = split_launch_options(["--budget", text, "--seed", "3", "--data-dir", "d", "--num-gpus", "2"])
    assert (budget.seconds(options.budget), flags) == (due, ["--seed", "3", "--data-dir", "d"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        *[(f"--budget {text}", "60s, 3m or 1h") for text in ("60", "0s", "x", "-3m", "1d")],
        *[
            (f"--budget 60s {flag}", flag.split("=")[0].split()[0])
            for flag in ("--recipe lenet", "--epochs=3", "--lr 1", "--set a=1")
        ],
        ("--budget 60s --global_batch_size 3", "--global-batch-size"),
        ("--budget 60s --no-sync-bn", "--sync-bn"),
        ("--budget 60s --seeds 2", "--seeds"),
    ],
)
def test_what_the_budget_decides_is_refused_in_one_line(argv, message, capsys):
    assert main.main(argv.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_one_rank_starts_without_the_launcher_and_several_with_it(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    options = LaunchOptions(budget="60s")
    program = [sys.executable, "-u", "-m", "cifar10.commands.budget", "--budget", "60s", "--seed", "1"]
    one, environment = deepspeed_command(options, 1, 0, ["--seed", "1"], tmp_path / "hostfile")
    two, _ = deepspeed_command(options, 2, 0, ["--seed", "1"], tmp_path / "hostfile")
    assert one == program
    assert float(environment["CIFAR10_BUDGET_BEGAN"]) > 1e9
    assert two[-len(program) :] == program
    assert {"--num_gpus=2", "--no_python", "--no_local_rank"} < set(two)


def test_main_checks_the_flags_and_leaves_the_choice_to_the_ranks(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(supervise, "train_once", lambda options, ranks, flags, folder: started.append((options, flags)) or 0)
    flags = ["--dataset", "synthetic", "--seed", "2", "--output-dir", str(tmp_path / "run")]
    assert main.main(["--budget", "60s", *flags]) == 0
    [(options, given)] = started
    assert (options.budget, given) == ("60s", [*flags, "--output-dir", str(tmp_path / "run")])
    assert main.main(["--budget", "60s", "--dataset", "nowhere"]) == 2
    Choice("60s", ("--recipe", "lenet"), 0.5, "half", 58.0, 0.04).write(tmp_path / "run")
    assert main.main(["--budget", "3m", *flags]) == 2
    assert "--budget 60s" in capsys.readouterr().err.splitlines()[-1]
    assert len(started) == 1


def test_an_earlier_choice_is_kept_and_only_for_the_same_budget(tmp_path):
    choice = Choice("60s", ("--recipe", "lenet"), 0.5, "half", 58.0, 0.05)
    assert Choice.read(tmp_path, "60s") is None
    choice.write(tmp_path, began=1.0)
    assert Choice.read(tmp_path, "60s") == choice
    with pytest.raises(UsageError, match="--budget 60s"):
        Choice.read(tmp_path, "3m")
    (tmp_path / budget.FILE).write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        Choice.read(tmp_path, "60s")
    (tmp_path / budget.FILE).unlink()
    (tmp_path / "summary.json").write_text('{"status": "stopped", "steps": 3}')
    with pytest.raises(UsageError, match="started without --budget"):
        Choice.read(tmp_path, "60s")


# --- the frontier ---------------------------------------------------------------------------------------------------------


def test_the_frontier_is_what_the_command_makes_of_the_records(tmp_path):
    command.run((PROJECT / "records",), tmp_path / "frontier.json")
    assert (tmp_path / "frontier.json").read_bytes() == budget.FRONTIER.read_bytes()


def test_only_runs_of_a_recipe_as_it_is_count(tmp_path):
    source = PROJECT / "records" / "2026-11-21_speedrun81_cpu" / "seed_0"
    record = command.finished_runs(source)[0]
    assert command.is_of_its_recipe(record)
    other_rate = json.loads(json.dumps(record.ds_config))
    other_rate["optimizer"]["params"]["lr"] = 0.1
    for change in (
        {"ds_config": other_rate},
        {"recipe": "bn_cnn"},
        {"settings": {**record.settings, "label_smoothing": 0.1}},
        {"settings": {**record.settings, "dataset": "synthetic"}},
        {"summary": {**record.summary, "ended_by": "max_steps"}},
    ):
        assert not command.is_of_its_recipe(replace(record, **change)), change


def test_validation_images_decide_and_recipes_that_others_outdo_are_left_out():
    [record] = command.finished_runs(PROJECT / "records" / "2026-11-21_speedrun81_cpu" / "seed_0")
    held_out = replace(record, summary={**record.summary, "val_accuracy": 0.8})
    assert command.point_of([record]).split == "test"
    point = command.point_of([record, held_out])
    assert (point.split, point.accuracy, point.n) == ("val", 0.8, 1)
    names = [candidate.recipe for candidate in FRONTIER]
    assert {"bn_cnn_document", "lenet"} & {*names} == set()
    assert [candidate.flops for candidate in FRONTIER] == sorted(candidate.flops for candidate in FRONTIER)


# --- real runs ------------------------------------------------------------------------------------------------------------

START = ["tests/workers/short_budget.py", "--budget", "10m"]
FLAGS = ["--dataset", "synthetic", "--threads", "1", "--no-report", "--test-images", "500"]


def short(folder: Path, *flags: str, start: Sequence[str] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    return run([*start, *START, *FLAGS, *flags, "--output-dir", str(folder)], PYTHONPATH=str(PROJECT), OMP_NUM_THREADS="1")


@pytest.mark.slow
def test_a_choice_is_an_ordinary_run_which_the_same_command_continues(tmp_path):
    first = short(tmp_path / "run", "--max-minutes", "0.0001")
    assert (first.returncode, first.stderr) == (0, "")
    assert "budget 10m: chosen --recipe bn_cnn_fast --epochs 0.1" in first.stdout
    written = json.loads((tmp_path / "run" / budget.FILE).read_text())
    assert (summary(tmp_path / "run")["status"], summary(tmp_path / "run")["steps"] < 9) == ("stopped", True)
    again = short(tmp_path / "run")
    assert (again.returncode, again.stderr) == (0, "")
    assert "budget 10m: chosen" not in again.stdout
    assert json.loads((tmp_path / "run" / budget.FILE).read_text()) == written
    words = shlex.split(written["command"])
    assert words[:4] == ["python", "main.py", "--recipe", "bn_cnn_fast"]
    rest = [word for word in words[2:-2] if word not in ("--max-minutes", "0.0001")]
    plain = run([sys.executable, "cifar10_deepspeed.py", *rest, "--output-dir", str(tmp_path / "plain")], OMP_NUM_THREADS="1")
    assert plain.returncode == 0, plain.stderr
    results = [summary(tmp_path / name) for name in ("run", "plain")]
    assert [result["status"] for result in results] == ["finished", "finished"]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]


@pytest.mark.slow
def test_two_ranks_choose_together(tmp_path):
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]
    process = short(tmp_path / "run", start=torchrun)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("budget 10m: chosen --recipe bn_cnn_fast --epochs 0.1") == 1
    assert Choice.read(tmp_path / "run", "10m")
    assert not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.parametrize(("ranks", "code", "launches"), [(1, 0, 1), (2, 0, 2), (2, 2, 1)])
def test_several_ranks_choose_in_one_launch_and_train_in_a_second(ranks, code, launches, tmp_path, monkeypatch):
    commands = []

    class Launch:
        signalled = False

        def __init__(self, command: list[str], environment: dict[str, str]) -> None:
            commands.append(command)
            Choice("60s", ("--recipe", "lenet"), 0.5, "half", 58.0, 0.04).write(tmp_path)

        def wait(self, *_: object) -> int:
            return code

    monkeypatch.setattr(supervise, "Launch", Launch)
    flags = ["--seed", "1", "--output-dir", str(tmp_path)]
    assert supervise.launched(LaunchOptions(budget="60s"), ranks, flags) == (code, False)
    assert ["cifar10.commands.budget" in command for command in commands] == [True, False][:launches]
    assert code or ranks == 1 or commands[1][-6:] == ["--recipe", "lenet", *flags]


def test_a_run_that_took_too_long_says_so(tmp_path):
    file, text = tmp_path / "summary.json", {"status": "finished", "steps": 9}
    file.write_text(json.dumps(text))
    written = file.stat().st_mtime
    assert verdict("60s", tmp_path, written - 58) == "budget 60s: the test accuracy was known after 58.0 s, 97% of the budget"
    late = verdict("60s", tmp_path, written - 67)
    assert "after 67.0 s, 7.0 s too late" in late
    assert "not cut short" in late
    file.write_text(json.dumps(text | {"resumed_at_steps": [3]}))
    assert verdict("60s", tmp_path, written) is None
