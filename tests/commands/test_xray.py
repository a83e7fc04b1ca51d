"""python -m cifar10 xray: what ranks hold and send, predicted and measured."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar10.__main__ import main
from cifar10.commands import xray as command
from cifar10.engine import footprint, xray
from tests.helpers import SGD, cut_down, make_engine, one_rank

STAGES = range(4)
BUCKETS = "zero_optimization.reduce_bucket_size=20000"  # elements, fewer than lenet's largest parameter has
RUNS = {  # bf16 last: DeepSpeed 0.19.8 never turns autocast off
    "bn_cnn": (),
    "lenet": ("--recipe", "lenet"),
    "lenet in small buckets": ("--recipe", "lenet", "--set", BUCKETS),
    "bn_cnn in bf16": ("--precision", "bf16"),
}


def flags_of(run: str, stage: int) -> list[str]:
    where = ["--dataset", "synthetic", "--threads", "1", "--set", f"zero_optimization.stage={stage}"]
    return ["--global-batch-size", "8", *where, *RUNS[run]]


EXPERTS = ["ZeRO 0", "ZeRO 2", "undivided experts"]
SCALARS = 64  # bytes of norms, flags and losses, which are not predicted


def differs(measured: float, predicted: float) -> bool:
    """Whether a measured number of bytes is more than 5% from the predicted one."""
    return abs(measured - predicted) > 0.05 * predicted + SCALARS


def test_the_papers_formulas():
    sizes, adam = (10, 3), {"type": "Adam", "params": {}}
    seen = footprint.Footprint(sizes, (4, 4), (), buffers=0, activations=7, linear_casts=0, states=footprint.states(adam))
    held = {}
    for stage in STAGES:
        config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100}, "gradient_accumulation_steps": 1}
        found, _ = footprint.memory(seen, config, 4)
        held[stage] = [found[kind] // 4 for kind in xray.KINDS[:3]]  # elements
    assert held == {0: [13, 13, 26], 1: [16, 13, 8], 2: [16, 4, 8], 3: [4, 4, 8]}  # 13 padded to 16, or 10 to 12 and 3 to 4
    assert [footprint.paper_bytes(seen, stage, 4) for stage in STAGES] == [78, 78, 78, 117]


def test_activations_are_counted_without_computing():
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 10))

    seen = footprint.footprint(build, (6, 3, 2, 2), {"optimizer": SGD}, torch.device("cpu"))
    relu, logits, probabilities, losses = 6 * 5, 6 * 10, 6 * 10, 2  # cross_entropy keeps its total weight, and the loss is one
    flat = 6 * 12  # a copy, because the images are channels last
    assert seen.activations == 4 * (flat + relu + logits + probabilities + losses)
    assert seen.sizes == (60, 5, 50, 10)


@pytest.mark.parametrize("stage", [0, 2])
def test_one_rank_holds_what_is_predicted(stage, monkeypatch):
    cut_down(monkeypatch)
    plan = command.plan_of([*flags_of("lenet in small buckets", stage), "--val-images", "0"], 1)
    batches = command.batches_of(plan, one_rank(), command.TRAINING_STEPS + 2)
    measured, predicted = command.measure(plan, one_rank(), batches), command.predict(plan)
    assert [kind for kind in xray.KINDS if differs(measured["memory"][kind], predicted["memory"][kind])] == []


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--columns", "ZeRO 9"), "ZeRO 9"),
        (("--ranks", "0"), "--ranks"),
        (("--ranks", "1", "--columns", "pipeline"), "at least 2 for pipeline"),
        (("--columns", "ZeRO 0", "undivided experts"), "has no experts"),
        (("--xray-steps", "0"), "--xray-steps"),
        (("--ranks", "3", "--global-batch-size", "8"), "3 ranks"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, named, capsys):
    assert main(["xray", "--dataset", "synthetic", *flags]) == 2
    assert named in capsys.readouterr().err


def test_a_prediction_is_the_same_after_zero_3_in_its_process(monkeypatch):
    monkeypatch.setattr(F, "linear", torch._C._nn.linear)
    plan = command.plan_of(flags_of("bn_cnn in bf16", 0), 2)
    before = command.predict(plan)
    make_engine(one_rank(), nn.Linear(4, 4), zero_optimization={"stage": 3})
    assert F.linear is not torch._C._nn.linear, "DeepSpeed has replaced it"
    assert command.predict(plan) == before


@pytest.fixture(scope="module", params=[2, 4])
def launched(request):
    """What each run's ranks have measured at each stage, all in one launch, and what was predicted."""
    runs = list(RUNS)[: {2: 4, 4: 1}[request.param]]
    columns = {f"{run}, ZeRO {stage}": flags_of(run, stage) for run in runs for stage in STAGES}
    measured = command.start(request.param, columns, steps=1)["columns"]
    predicted = {name: command.predict(command.plan_of(flags, request.param)) for name, flags in columns.items()}
    return {name: (measured[name], predicted[name]) for name in columns}


@pytest.mark.slow
def test_ranks_hold_and_send_what_is_predicted(launched):
    wrong = []
    for name, (ranks, predicted) in launched.items():
        for kind, expected in predicted["memory"].items():
            most = command.largest(ranks, kind)
            wrong += [f"{name}: {kind} {most}, predicted {expected}"] if differs(most, expected) else []
        for collective in {*ranks[0]["traffic"], *predicted["traffic"]}:
            moved = ranks[0]["traffic"].get(collective, {"payload": 0})["payload"]
            expected = predicted["traffic"].get(collective, 0)
            scalars = 64  # bytes: norms and flags
            wrong += [f"{name}: {collective} {moved}, predicted {expected}"] * (
                abs(moved - expected) > 0.05 * expected + scalars
            )
    assert wrong == []


@pytest.mark.slow
def test_tables_a_picture_and_a_json(tmp_path, capfd):
    given = ["--ranks", "2", "--columns", "ZeRO 0", "ZeRO 3", "--xray-steps", "1", "--output-dir", str(tmp_path / "out")]
    assert main(["xray", *flags_of("lenet", 0), *given]) == 0
    printed = capfd.readouterr().out
    assert "reduce-scatter" in printed
    assert "parameters" in printed
    found = json.loads((tmp_path / "out" / "xray.json").read_text())
    assert found["ranks"]["2"]["columns"]["ZeRO 3"]["measured"][1]["memory"]["parameters"] > 0
    assert (tmp_path / "out" / "xray.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "columns", "ranks", "batch"),
    [("vgg_pipeline", ["ZeRO 0", "pipeline"], ["1", "2"], ["4", "--micro-batch-size", "1"]), ("moe", EXPERTS, ["2"], ["8"])],
)
def test_pipelines_and_experts_beside_the_plain_run(recipe, columns, ranks, batch, tmp_path):
    where = ["--dataset", "synthetic", "--threads", "1", "--ranks", *ranks, "--xray-steps", "1", "--output-dir", str(tmp_path)]
    assert main(["xray", "--recipe", recipe, "--columns", *columns, "--global-batch-size", *batch, *where]) == 0
    found = json.loads((tmp_path / "xray.json").read_text())["ranks"]
    assert list(found["2"]["columns"]) == columns
    for name, one in found["2"]["columns"].items():
        expected = one["predicted"]["memory"]
        wrong = [kind for kind in expected if differs(command.largest(one["measured"], kind), expected[kind])]
        assert (name, wrong) == (name, [])
        if recipe == "moe" or name == "pipeline":  # compared with a run on as many ranks that have images of their own
            assert one["difference"] < 1e-6
    if recipe == "vgg_pipeline":
        assert list(found["1"]["columns"]) == ["ZeRO 0"]
        sent = found["2"]["columns"]["pipeline"]
        assert sent["measured"][0]["traffic"]["send"]["payload"] == sent["predicted"]["traffic"]["send"] > 0
