"""The published numbers are those of the runs in records/, recomputed from what each run wrote."""

import json
import re
from pathlib import Path
from statistics import mean, median, stdev

import pytest

from cifar10.commands import leaderboard
from cifar10.commands import recipes as catalogue
from cifar10.commands.export import times_as_fast

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
PERFORMANCE, PRECISION, RECIPES, USE_A_MODEL = (
    (PROJECT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for page in ("performance", "precision_and_zero", "recipes", "use_a_model")
)
CAMPAIGNS = sorted(folder for folder in (PROJECT / "records").iterdir() if list(folder.glob("seed_*/summary.json")))


def percent(values: list[float]) -> str:
    """Mean and standard deviation as the pages write them."""
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{spread}"


def table_rows(page: str) -> list[list[str]]:
    """The cells of each row of all tables."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in page.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("folder", CAMPAIGNS, ids=lambda folder: folder.name)
def test_a_row_of_results_is_what_the_runs_measured(folder: Path) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("seed_*/summary.json"))]
    recipes = [json.loads(path.read_text()) for path in sorted(folder.glob("seed_*/recipe.json"))]
    all_images = recipes[0]["dataset"]["test_images"]
    assert len({run["seed"] for run in runs}) == len(runs)
    assert {(run["status"], run["test_images"], run["recipe"]) for run in runs} == {("finished", all_images, runs[0]["recipe"])}
    test, minutes = f"**{percent([run['test_accuracy'] for run in runs])}**", [run["train_seconds"] / 60 for run in runs]
    val = percent([run["val_accuracy"] for run in runs]) if runs[0]["val_accuracy"] is not None else "none held out"
    times = " to ".join(dict.fromkeys(f"{number:.1f}" for number in (min(minutes), max(minutes))))
    views = [run["test_accuracy_tta"] for run in runs if run.get("test_accuracy_tta") is not None]
    [full] = [row for row in table_rows(PERFORMANCE) if f"(../records/{folder.name}/)" in row[0]]
    assert full[1:5] == [str(len(runs)), percent([run["train_accuracy"] for run in runs]), val, test]
    assert full[5].split(";")[0] == times
    short = [row[1:] for row in table_rows(README) if f"(records/{folder.name}/)" in row[0]]
    assert short in ([], [[str(len(runs)), test, percent(views) if views else "", times]])


def test_more_ranks_reach_the_same_accuracy() -> None:
    folder, means = PROJECT / "records" / "2026-11-21_ranks_cpu", {}
    page = (folder / "README.md").read_text(encoding="utf-8")
    for ranks in (1, 2, 4):
        runs = [json.loads(path.read_text()) for path in sorted(folder.glob(f"ranks_{ranks}_seed_*/summary.json"))]
        assert [(run["seed"], run["world_size"], run["test_images"]) for run in runs] == [(s, ranks, 10_000) for s in (0, 1, 2)]
        accuracies = [run["test_accuracy"] for run in runs]
        assert f"| {ranks} | {', '.join(percent([accuracy]) for accuracy in accuracies)} | {percent(accuracies)} |" in page
        assert percent(accuracies) in PRECISION
        means[ranks] = mean(accuracies)
    assert max(means.values()) - min(means.values()) < 0.005


@pytest.mark.parametrize("record", sorted(path.parent.name for path in (PROJECT / "records").glob("*/bench.json")))
def test_a_published_benchmark_is_one_that_was_run(record: str) -> None:
    measured = json.loads((PROJECT / "records" / record / "bench.json").read_text())
    assert f"records/{record}/" in PERFORMANCE
    for name, row in measured["rows"].items():
        assert f"| {name} | {row['median']:,.0f} |" in PERFORMANCE
    for ratio in measured["ratios"]:
        assert re.search(rf"{ratio['of']}.{{0,80}}{ratio['ratio']:.2f}", PERFORMANCE, re.S), ratio
    for name, recipe in (("this program", "bn_cnn_document"), ("bn_cnn_fast", "bn_cnn_fast")):
        files = sorted((PROJECT / "records" / f"2026-11-21_{recipe}_cpu").glob("seed_*/summary.json"))
        accuracies = [json.loads(file.read_text())["test_accuracy"] for file in files]
        assert re.search(rf"\| {name} \| [\d,]+ \| {percent(accuracies)} \(.*n = {len(accuracies)}\)", PERFORMANCE), name


def test_the_published_scaling_is_what_was_measured() -> None:
    folder = PROJECT / "records" / "2026-11-21_scaling_cpu"
    measured, page = json.loads((folder / "scaling.json").read_text()), (folder / "README.md").read_text(encoding="utf-8")
    one = measured["ranks"]["1"]
    for ranks, row in measured["ranks"].items():
        times, efficiency = median(row["images_per_second"]) / median(one["images_per_second"]), f"{row['efficiency']:.2f}"
        rounds = [this / that for this, that in zip(row["images_per_second"], one["images_per_second"], strict=True)]
        assert row["efficiency"] == pytest.approx(times / min(int(ranks), measured["environment"]["cores"]))
        cells = f"{times:.2f} | {min(rounds):.2f} .. {max(rounds):.2f} | {efficiency} | {max(row['peak_memory_mib']):,} |"
        assert f"| {ranks} | {median(row['images_per_second']):,.0f} | {cells}" in page
    times = [f"{row['times']:.2f}" for row in measured["ranks"].values()]
    assert f"{times[1]} and {times[2]} times the images per second of one" in " ".join(PERFORMANCE.split())
    for precision, rows in measured["engine"].items():
        plain, stages = rows.pop("plain PyTorch")["cpu_seconds"], []
        for row in rows.values():
            ratios = [that / this for that, this in zip(plain, row["cpu_seconds"], strict=True)]
            stages.append((f"{median(ratios):.2f}", f"{median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"))
        assert f"| {precision} | {' | '.join(cell for _, cell in stages)} |" in page
        assert f"| {precision} | {' | '.join(short for short, _ in stages)} |" in PERFORMANCE


def test_the_tables_of_recipes_and_of_runs_are_what_the_commands_print() -> None:
    """python -m cifar10 recipes; python -m cifar10 leaderboard --output records/README.md"""
    assert catalogue.table() in RECIPES
    page = (PROJECT / "records" / "README.md").read_text(encoding="utf-8")
    assert page == leaderboard.page([PROJECT / "records"])
    rows = [line for line in page.splitlines() if line.startswith("| [")]
    for folder in CAMPAIGNS:
        assert sum(f"({folder.name}/)" in row for row in rows) == 1


def test_the_published_export_is_what_was_measured() -> None:
    folder = PROJECT / "records" / "2026-11-21_export_cpu"
    facts, page = json.loads((folder / "export.json").read_text()), (folder / "README.md").read_text(encoding="utf-8")
    plain, log = json.loads((folder / "plain.json").read_text()), (folder / "console.log").read_text(encoding="utf-8")
    for row in facts["checks"]:
        sizes = f"| {row['file']} | {row['bytes'] / 1e3:,.0f} | {100 * row['accuracy']:.2f} | {row['same_answers']:,} |"
        speed = spread = "-"
        if rounds := row["images_per_second"]:
            times, least, most = times_as_fast(rounds, facts["model"]["images_per_second"])
            speed, spread = f"{times:.2f}", f"{times:.2f}, {least:.2f} .. {most:.2f}"
        assert f"{sizes} {speed} |" in USE_A_MODEL
        assert f"{sizes} {row['largest_difference']:.1e} | {spread} |" in page
        found = plain["files"][row["file"]]
        assert (found["images"], found["same answers"]) == (10_000, row["same_answers"])
        assert row["format"] == "onnx_int8" or (row["same_answers"] == 10_000 and found["largest difference"] <= 1e-4)
    assert plain["imported"] == []
    for tta in ("mirror", "mirror+translate"):
        accuracy = re.search(rf"test accuracy (\S+)%  loss \S+  with --tta {re.escape(tta)} ", log)[1]
        assert f"| `--tta {tta}` | {accuracy} |" in page
        assert f"{accuracy}% with" in USE_A_MODEL
