"""Mixture of experts: one rank and two, against plain PyTorch; whole runs, what is saved of them, and what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cifar10 import UsageError
from cifar10.commands import export
from cifar10.commands.export import FORMATS
from cifar10.models.moe import MixtureOfExperts
from cifar10.models.registry import build_model
from cifar10.plan import make_plan
from cifar10.run import checkpoint
from tests.helpers import WORKERS, cut_down, largest_difference, launch, same_bits
from tests.small_trained import command
from tests.workers.experts import CASES, CLIP, STEPS

MEASURED_ON = {ranks: [name for name, case in CASES.items() if case[0] == ranks] for ranks in (1, 2)}


# --- the same training on any number of ranks ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank has measured, by the number of ranks."""
    folder = tmp_path_factory.mktemp("experts")
    for number in (1, 2):
        launch(number, WORKERS / "experts.py", str(folder))
    return {number: [torch.load(folder / f"{number}_{rank}.pt") for rank in range(number)] for number in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_case_trains_as_plain_pytorch_does(ranks: dict[int, list[dict[str, Any]]], name: str) -> None:
    """Losses, gradient norms (every expert counted once), clipped steps and weights, of all ranks."""
    plain, number = ranks[1][0]["plain"][CASES[name][1]], CASES[name][0]
    assert max(plain["norms"]) > CLIP, "clipping has something to do"
    for rank in ranks[number]:
        ours = rank[name]
        assert ours["losses"] == pytest.approx(plain["losses"], abs=1e-5)
        assert len(ours["losses"]) == STEPS
        assert ours["norms"] == pytest.approx(plain["norms"], rel=1e-5)
        assert largest_difference(ours["weights"], plain["weights"]) < 1e-5
        assert ours["norms"] == ranks[number][0][name]["norms"], "the same bits on every rank"
        assert same_bits(ours["weights"], ranks[number][0][name]["weights"])
        assert same_bits(ours["initial"], build_model("moe_cnn", 0, 10).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tokens_are_counted_and_none_is_dropped(ranks: dict[int, list[dict[str, Any]]], name: str) -> None:
    _, top_k, _, _ = CASES[name]
    alone = ranks[1][0][f"top-{top_k}"]["routed"]
    for rank in ranks[CASES[name][0]]:
        for (balance, dropped, *chosen), (theirs, _, *_) in zip(rank[name]["routed"], alone, strict=True):
            assert balance == pytest.approx(theirs, abs=1e-4)
            assert balance >= 1 - 0.05
            assert dropped == 0
            assert sum(chosen) == top_k * 32 * 64
    ours, deepspeeds = ranks[1][0][f"top-{top_k}"]["auxiliary"]
    assert ours == pytest.approx(deepspeeds, rel=1e-6), "on one rank"


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED_ON[2])
def test_a_rank_holds_its_experts_and_a_bad_step_of_one_is_skipped_by_all(
    ranks: dict[int, list[dict[str, Any]]], name: str
) -> None:
    size = CASES[name][2]
    for number, rank in enumerate(ranks[2]):
        experts = {int(parameter.split(".")[2]) for parameter in rank[name]["own"]}
        assert experts == ({0, 1, 2, 3} if size == 1 else {2 * number, 2 * number + 1})
        bad = rank[name]["bad"]
        assert bad["skipped"] == 1
        assert same_bits(bad["before"], bad["after"])


@pytest.mark.slow
def test_a_resume_is_exact_on_as_many_ranks_and_right_on_others(ranks: dict[int, list[dict[str, Any]]]) -> None:
    for name, (number, *_) in CASES.items():
        for rank in ranks[number]:
            resumed = rank[name]["resumed"]
            assert resumed["again"]["losses"] == resumed["went on"]["losses"]
            assert same_bits(resumed["again"]["weights"], resumed["went on"]["weights"])
    for rank in ranks[2]:
        expected = ranks[1][0]["top-1"]["resumed"]["went on"]
        for way in rank["from one rank"].values():
            assert way["losses"] == pytest.approx(expected["losses"], abs=1e-5)
            assert largest_difference(way["weights"], expected["weights"]) < 1e-5
        expected = rank["from zero 2"]["went on"]
        for way in (rank["from zero 2"][name] for name in ("copied", "divided", "zero 1", "zero 2")):
            assert largest_difference(way["weights"], expected["weights"]) < 1e-5


@pytest.mark.slow
def test_a_full_expert_drops_tokens_by_seed_and_step(ranks: dict[int, list[dict[str, Any]]]) -> None:
    """With room for half of the 4,096 choices, at least half are dropped, and the same ones when it is done again."""
    for rank in (*ranks[1], *ranks[2]):
        assert all(2048 <= dropped < 4096 for _, dropped, *_ in rank["full"]["routed"])
        assert rank["full"]["losses"] == rank["full again"]["losses"]
        assert same_bits(rank["full"]["weights"], rank["full again"]["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_bf16_trains_as_fp32_does_but_for_its_rounding(ranks: dict[int, list[dict[str, Any]]], stage: int) -> None:
    plain = ranks[1][0]["plain"][1]
    for rank in (*ranks[1], *ranks[2]):
        assert rank[f"bf16, zero {stage}"]["losses"] == pytest.approx(plain["losses"][:5], rel=0.01)
    ours, theirs = (rank[f"bf16, zero {stage}"] for rank in ranks[2])
    assert ours["norms"] == theirs["norms"]
    assert same_bits(ours["weights"], theirs["weights"])


# --- whole runs --------------------------------------------------------------------------------------------------------

FLAGS = "--recipe moe --top-k 2 --dataset synthetic --val-images 100 --test-images 200 --global-batch-size 32 --epochs 2"
FLAGS += " --warmup-epochs 0 --log-every-steps 4 --ema 0.9 --threads 1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks, the same stopped in its second epoch and resumed on two, and another resumed on one."""
    base = tmp_path_factory.mktemp("runs")

    def start(folder: str, ranks: int, **more: Any) -> dict[str, Any]:
        flags = [*FLAGS.split(), "--output-dir", str(base / folder)]
        return {"ranks": ranks, "flags": flags, "keep_summary": str(base / "kept.json"), **more}

    stopped = [start(name, 2, stop_after=20) for name in ("again", "alone")]
    starts = [start("whole", 2), *stopped, start("again", 2), start("alone", 1)]
    (base / "starts.json").write_text(json.dumps(starts))
    launch(1, WORKERS / "small_runs.py", str(base / "starts.json"))
    return base


def final(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_portable(folder / "checkpoints" / "final")["module"]


@pytest.mark.slow
def test_a_run_of_experts_says_where_its_tokens_went_and_resumes_exactly(runs: Path) -> None:
    whole, again, alone = (json.loads((runs / name / "summary.json").read_text()) for name in ("whole", "again", "alone"))
    for name in ("balance_loss", "dropped_tokens", "expert_shares", "weights_sha256", "test_accuracy"):
        assert again[name] == whole[name]
    assert whole["dropped_tokens"] == 0
    assert whole["expert_shares"] == pytest.approx(alone["expert_shares"], abs=1e-3)
    assert sum(whole["expert_shares"]) == pytest.approx(1)
    assert same_bits(final(runs / "again"), final(runs / "whole"))
    assert largest_difference(final(runs / "alone"), final(runs / "whole")) < 1e-4
    assert (runs / "again" / "experts.csv").read_bytes() == (runs / "whole" / "experts.csv").read_bytes()
    rows = [*csv.DictReader((runs / "whole" / "experts.csv").open(newline=""))]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [float(rows[-1][f"share_{expert}"]) for expert in range(4)] == pytest.approx(whole["expert_shares"], abs=1e-5)


@pytest.mark.slow
def test_what_two_ranks_trained_is_evaluated_used_and_exported_by_one_process(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_down(monkeypatch)
    monkeypatch.setattr(export, "CALIBRATION_IMAGES", 100)
    monkeypatch.setattr(export, "BATCHES", 1)
    assert command("evaluate", runs / "whole", "--json", "--threads", 1) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["accuracy"] == json.loads((runs / "whole" / "summary.json").read_text())["test_accuracy"]
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "teal.png")
    assert command("predict", runs / "whole", tmp_path / "teal.png", "--threads", 1) == 0
    assert command("export", runs / "whole", "--output", tmp_path / "exported", "--threads", 1) == 0
    checks = json.loads((tmp_path / "exported" / "export.json").read_text())["checks"]
    assert [row["agrees"] for row in checks] == [True] * len(FORMATS)


# --- the plain layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_plain_layer_is_each_tokens_experts_weighted_by_the_gate(top_k: int) -> None:
    torch.manual_seed(0)
    layer, tokens = MixtureOfExperts(8, 4, top_k, 0.0, 0.01), torch.randn(5, 8)
    for token, output in zip(tokens, layer(tokens), strict=True):
        probabilities = layer.gate(token).softmax(dim=0)
        chosen = probabilities.argsort(descending=True)[:top_k].tolist()
        whole = probabilities[chosen].sum() if top_k > 1 else 1.0
        expected = sum(probabilities[expert] / whole * layer.experts[expert](token) for expert in chosen)
        assert torch.allclose(output, expected, atol=1e-6)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "ranks", "words"),
    [
        ("--recipe bn_cnn --expert-parallel 2", 2, ["--expert-parallel", "bn_cnn", "--recipe moe"]),
        ("--recipe bn_cnn --top-k 2", 1, ["--top-k", "bn_cnn", "moe_cnn"]),
        ("--recipe moe --expert-parallel 2", 1, ["--expert-parallel 2", "ranks, 1;"]),
        ("--recipe moe --expert-parallel 4", 2, ["--expert-parallel 4", "ranks, 2;"]),
        ("--recipe moe --set zero_optimization.stage=3", 1, ["stage 3", "moe_cnn", "zero_optimization.stage to 0, 1 or 2"]),
        ("--recipe moe --set zero_optimization.stage=2 zero_optimization.reduce_scatter=false", 1, ["reduce_scatter false"]),
        ("--recipe moe --precision fp16", 2, ["fp16", "--precision bf16", "--expert-parallel 1"]),
        ("--recipe moe --engine-level compile", 1, ["--engine-level compile", "--engine-level eager"]),
    ],
)
def test_what_experts_do_not_support_is_one_line(flags: str, ranks: int, words: list[str], monkeypatch) -> None:
    monkeypatch.setattr("cifar10.distributed.device.missing_for_compiling", lambda: "")
    with pytest.raises(UsageError) as caught:
        make_plan([*flags.split(), "--dataset", "synthetic"], ranks, "main.py")
    assert len(str(caught.value).splitlines()) == 1
    assert all(word in str(caught.value) for word in words)


def test_what_experts_support_is_planned() -> None:
    for flags in ("--precision fp16 --expert-parallel 1", "--precision fp16 --set zero_optimization.stage=2", "--top-k 2"):
        make_plan(["--recipe", "moe", *flags.split(), "--dataset", "synthetic"], 2, "main.py")
