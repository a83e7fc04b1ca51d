"""The leaderboard: which runs form a row, the order of rows, and the escaping of names."""

import json
import sys
from pathlib import Path

import pytest

from cifar10 import UsageError
from cifar10.__main__ import main
from cifar10.commands import leaderboard
from tests.report.test_report import make_run


def rows(folder: Path) -> list[list[str]]:
    lines = leaderboard.page([folder]).splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| [")]


def test_the_seeds_of_a_campaign_are_a_row_and_the_best_comes_first(tmp_path):
    for seed, accuracy in enumerate([0.5, 0.6, 0.7]):
        make_run(tmp_path / "three" / f"seed_{seed}", seed=seed, test=accuracy)
    make_run(tmp_path / "one" / "deeper" / "run", test=0.9, name="other")
    make_run(tmp_path / "none" / "seed_0", test=0.95, status="stopped")
    make_run(tmp_path / "untested" / "seed_0", test=None, val_images=0)
    (best, three, untested) = rows(tmp_path)
    assert best[:6] == ["[other](one/deeper/)", "synthetic", "2", "1", "**90.00%**", "–"]
    assert three[3:7] == ["3", "**60.00 ± 10.00%**", "35.16 to 84.84%", "62.00 ± 0.00%"]
    assert three[7:] == ["1.5", "None, 1 rank of 1 thread", "c0ffee"]
    assert untested[4:7] == ["**–**", "–", "none held out"]


def test_campaigns_apart_stay_apart(tmp_path):
    for campaign in "ab":
        make_run(tmp_path / campaign / "seed_0")
    assert [row[3] for row in rows(tmp_path)] == ["1", "1"]


def test_names_are_escaped(tmp_path):
    make_run(tmp_path / "a (b)" / "seed_0", name="x | y\n<b> \\| ](javascript:1)")
    (row,) = rows(tmp_path)
    assert row[0] == r"[x \| y &lt;b> \\\| \](javascript:1)](a%20%28b%29/)"


def test_links_are_relative_to_the_page(tmp_path):
    assert rows(make_run(tmp_path / "run", test=0.9))[0][0] == "[bn_cnn](../)"
    make_run(tmp_path / "runs" / "three" / "seed_0")
    assert "| [bn_cnn](../runs/three/) |" in leaderboard.page([tmp_path / "runs"], tmp_path / "docs" / "page.md")


def test_a_damaged_run_and_no_folder_are_refused(tmp_path):
    (make_run(tmp_path / "run") / "summary.json").write_text("{")
    with pytest.raises(UsageError, match=r"summary\.json is damaged"):
        leaderboard.page([tmp_path])
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        leaderboard.page([tmp_path / "nowhere"])


def test_the_command_prints_or_writes_the_same(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "runs" / "seed_0")
    monkeypatch.setattr(sys, "argv", ["cifar10", "leaderboard", str(tmp_path / "runs")])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "| [bn_cnn](./) |" in printed
    sys.argv += ["--output", str(tmp_path / "page.md")]
    assert main() == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == printed.replace("](./)", "](runs/)")
    sys.argv[-1] = str(tmp_path / "new" / "page.md")
    assert main() == 0
    sys.argv[-1] = str(tmp_path / "page.md" / "page.md")
    assert main() == 2, "a file is in the way"


def test_the_commits_of_a_row_are_all_named(tmp_path):
    for seed, commit in enumerate(["a" * 40, "b" * 40 + "-dirty"]):
        folder = make_run(tmp_path / f"seed_{seed}", seed=seed)
        content = json.loads((folder / "environment.json").read_text())
        content["starts"][0]["commit"] = commit
        (folder / "environment.json").write_text(json.dumps(content))
    assert rows(tmp_path)[0][-1] == "aaaaaaa, bbbbbbb-dirty"
