"""--lr-schedule: each schedule equals torch's step by step, is spelled in one way, and replaces the flags of 0.2."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler

from cifar10 import UsageError
from cifar10.__main__ import main
from cifar10.commands import lr_finder
from cifar10.config import schedule
from cifar10.config.recipe import Recipe, as_json, load
from cifar10.config.settings import differences
from cifar10.plan import Plan, make_plan
from cifar10_deepspeed import get_lr_schedule, lr_multiplier
from tests.helpers import cut_down, one_rank

EPOCHS, PER_EPOCH = 12, 10
HALVES = 2 * PER_EPOCH  # of a step, in an epoch: a step counts as its middle
TOTAL = EPOCHS * HALVES


def ours(text: str, warmup: float = 0) -> list[float]:
    recipe = Recipe(epochs=EPOCHS, warmup_epochs=warmup, val_images=0, lr_schedule=text)
    return [lr_multiplier(recipe, step, PER_EPOCH) for step in range(EPOCHS * PER_EPOCH)]


def torchs(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]) -> list[float]:
    """The rates of torch's scheduler, which counts half steps, in the middle of each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates[1::2]


PCT = (0.25 * TOTAL + 1) / (TOTAL + 1)  # torch's turns at pct_start * total_steps - 1
SAME = {
    "constant": lambda o: lr_scheduler.ConstantLR(o, factor=1.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL),
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, TOTAL),
    "polynomial(2.5)": lambda o: lr_scheduler.PolynomialLR(o, TOTAL, 2.5),
    "exponential(0.8)": lambda o: lr_scheduler.ExponentialLR(o, 0.8 ** (1 / HALVES)),
    "step(5, 0.3)": lambda o: lr_scheduler.StepLR(o, 5 * HALVES, 0.3),
    "multistep((3, 4.5, 11), 0.2)": lambda o: lr_scheduler.MultiStepLR(o, [3 * HALVES, 4.5 * HALVES, 11 * HALVES], 0.2),
    "one-cycle(0.25, 10, 100)": lambda o: lr_scheduler.OneCycleLR(
        o, 1.0, TOTAL + 1, pct_start=PCT, div_factor=10, final_div_factor=100
    ),
    "restarts(3)": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3 * HALVES),
    "restarts(2, 2)": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2 * HALVES, 2),
}


@pytest.mark.parametrize("text", SAME)
def test_a_schedule_is_torchs_at_every_step(text: str) -> None:
    assert ours(text) == pytest.approx(torchs(SAME[text]), rel=1e-9, abs=1e-12)


def test_every_schedule_is_compared_with_torchs() -> None:
    assert {text.partition("(")[0] for text in SAME} == schedule.values.classes(schedule.Schedule).keys()


@pytest.mark.parametrize("text", ["cosine", "linear", "polynomial(2)", "exponential(0.5)", "restarts(2)", "constant"])
def test_a_warmup_rises_to_where_the_schedule_begins(text: str) -> None:
    found, plain = ours(text, warmup=1.2), ours(text)
    assert found[:12] == pytest.approx([(step + 0.5) / 12 for step in range(12)])
    assert found[12] == pytest.approx(plain[0], rel=0.05)


def test_steps_are_counted_from_the_start_and_one_cycle_is_its_own_warmup() -> None:
    assert ours("multistep((3, 6))", warmup=1)[12:] == ours("multistep((3, 6))")[12:]
    assert ours("one-cycle", warmup=1) == ours("one-cycle")


@pytest.mark.parametrize("warmup", [0, 1.2])
def test_per_epoch_is_the_documents_function(warmup: float) -> None:
    due = [get_lr_schedule(epoch, 1.0, warmup, EPOCHS) for epoch in range(EPOCHS) for _ in range(PER_EPOCH)]
    assert ours("cosine(per_epoch=True)", warmup) == due
    assert len(set(ours("exponential(0.9, per_epoch=True)"))) == EPOCHS


# --- the command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("step(30,0.1)", "step(30)"),
        ("step(step_size=30.0, gamma=0.123456789)", "step(30, 0.123456789)"),
        ("multistep([60, 120], 0.2)", "multistep((60, 120), 0.2)"),
        ("multistep([9])", "multistep((9,))"),
        (" one-cycle () ", "one-cycle"),
        ("linear(per_epoch=True)", "linear(per_epoch=True)"),
    ],
)
def test_a_schedule_has_one_spelling(text: str, due: str) -> None:
    found = str(schedule.parse(text))
    assert found == due == str(schedule.parse(found))
    assert schedule.parse(text).describe()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("cosin", "cosine"),
        ("step", "step(step_size, gamma, per_epoch)"),
        ("step(0)", "above 0"),
        ("step(30, 2)", "at most 1"),
        ("multistep([6, 3])", "rising"),
        ("multistep(3)", "in brackets"),
        ("polynomial(nan)", "a number"),
        ("exponential(0)", "gamma"),
        ("one-cycle(1)", "between 0 and 1"),
        ("restarts(1e999)", "T_0"),
        ("restarts(1, 1.5)", "whole number"),
        ("step(30", "step(30"),
        ("__import__('os')", "__import__"),
    ],
)
def test_an_invalid_schedule_is_refused_in_one_line(text: str, named: str) -> None:
    with pytest.raises(UsageError, match=re.escape(named)) as error:
        make_plan(["--dataset", "synthetic", "--lr-schedule", text], 1, "main.py")
    assert str(error.value).startswith("invalid value for --lr-schedule: ")


def plan_of(flags: str) -> Recipe:
    return make_plan(["--dataset", "synthetic", *flags.split()], 1, "main.py").recipe


@pytest.mark.parametrize(
    ("flags", "due"),
    [
        ("--lr-shape linear", "linear"),
        ("--lr_moves=per-epoch", "cosine(per_epoch=True)"),
        ("--lr-moves per-epoch --lr-schedule step(3)", "step(3, per_epoch=True)"),
        ("--recipe bn_cnn_fast --lr-shape cosine", "cosine"),
        ("--recipe bn_cnn_document --lr-moves per-step", "cosine"),
    ],
)
def test_the_flags_of_0_2_still_work(flags: str, due: str) -> None:
    assert plan_of(flags).lr_schedule == due


@pytest.mark.parametrize("flags", ["--lr-moves weekly", "--lr-shape square"])
def test_a_value_that_the_flags_of_0_2_did_not_have_is_refused(flags: str) -> None:
    with pytest.raises(UsageError, match=flags.split()[0]):
        plan_of(flags)


@pytest.mark.parametrize(
    ("shape", "moves", "due"), [("linear", "per-step", "linear"), ("cosine", "per-epoch", "cosine(per_epoch=True)")]
)
def test_a_recipe_json_of_0_2_is_the_same_experiment(tmp_path: Path, shape: str, moves: str, due: str) -> None:
    recipe = Recipe(epochs=2, warmup_epochs=0, val_images=0, lr_schedule=due)
    content = json.loads(as_json(recipe, "x", {}))
    del content["settings"]["lr_schedule"]
    content["settings"] |= {"lr_shape": shape, "lr_moves": moves}
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    assert load(str(tmp_path / "recipe.json")).recipe == recipe
    now = json.loads(as_json(recipe, "x", {}))["settings"]
    assert differences({"recipe": content["settings"], "deepspeed": {}}, {"recipe": now, "deepspeed": {}}) == ""


def test_a_schedule_beside_a_scheduler_of_the_config_is_refused_but_the_recipes_own_is_replaced() -> None:
    with pytest.raises(UsageError, match=r"--lr-schedule .* WarmupLR"):
        plan_of("--recipe lenet --dataset synthetic --lr-schedule step(3)")
    assert plan_of("--recipe lenet --dataset synthetic").lr_schedule == "cosine"


# --- python -m cifar10 schedule -------------------------------------------------------------------------------------------


def test_the_command_draws_the_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--lr-schedule", "step(10, 0.1)", "--epochs", "30", "--warmup-epochs", "0", "--lr", "0.5"]
    assert main(["schedule", *flags, "--output", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["0.5", "█" * 24], "a third of the run at the full rate"
    assert "first 0.5, highest 0.5, last 0.005" in printed[-1]


def test_what_the_command_cannot_draw_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, named in ((["--recipe", "lenet"], "WarmupLR"), (["--output", str(tmp_path / "no" / "x.png")], "--output")):
        assert main(["schedule", *flags]) == 2
        assert named in capsys.readouterr().err


# --- lr-finder --------------------------------------------------------------------------------------------------------


def test_the_range_test_finds_the_rates_of_a_known_curve() -> None:
    """A loss that falls fastest at 1e-3, is lowest at 1e-1 and then diverges."""
    rates = [10 ** (-5 + step / 33) for step in range(200)]
    position = [math.log10(rate) for rate in rates]
    curve = [2 - math.tanh(2 * (x + 3)) + max(0.0, x + 1) ** 2 - 1e-3 * x for x in position]
    lowest, steepest = lr_finder.found(rates, curve)
    assert lowest == pytest.approx(0.1, rel=0.1)
    assert steepest == pytest.approx(1e-3, rel=0.3)
    with pytest.raises(UsageError, match="did not fall"):
        lr_finder.found(rates, [2.0 + 0.001 * step for step in range(200)])
    with pytest.raises(UsageError, match="did not fall"):
        lr_finder.found(rates, [])


def test_the_average_ends_where_the_loss_diverges() -> None:
    values = [1.0] * 50 + [math.nan] + [1.0] * 9
    assert list(lr_finder.smoothed(iter(values), 60)) == pytest.approx([1.0] * 50)
    assert len(list(lr_finder.smoothed((2.0**step for step in range(60)), 60))) < 20


def test_the_finder_trains_on_training_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_down(monkeypatch)
    monkeypatch.chdir(tmp_path)
    opened, images = [], Plan.images
    monkeypatch.setattr(Plan, "images", lambda plan, split: opened.append(split) or images(plan, split))
    monkeypatch.setattr(lr_finder.distributed, "join", lambda *_, **__: one_rank())
    monkeypatch.setattr(lr_finder, "leave", lambda: None)  # the world of other tests
    flags = "--dataset synthetic --val-images 100 --global-batch-size 50 --find-steps 60 --start-lr 1e-3 --threads 1"
    assert main(["lr-finder", *flags.split(), "--output", "lr.png"]) == 0
    assert set(opened) == {"train"}
    printed = capsys.readouterr().out
    assert re.search(r"try --lr 0\.\d+, a tenth of \d\S*, where the loss is lowest", printed)
    assert [path.name for path in tmp_path.iterdir()] == ["lr.png"]


@pytest.mark.parametrize("flags", ["--start-lr 1", "--end-lr inf --start-lr 0", "--find-steps 2"])
def test_a_range_that_cannot_be_tried_is_refused(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = flags.split() if "find" in flags else [*flags.split(), *(["--end-lr", "0.5"] if "inf" not in flags else [])]
    assert main(["lr-finder", "--dataset", "synthetic", *words]) == 2
    assert flags.split()[0] in capsys.readouterr().err
