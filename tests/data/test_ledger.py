"""The ledger of the test set: each opening is one look, in the run's folder and the user's ledger; --sealed refuses any."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cifar10 import UsageError
from cifar10.data import ledger
from cifar10.data.ledger import FILE, Look
from cifar10.plan import make_plan
from tests.launching import PROJECT
from tests.small_trained import command


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's ledger, empty."""
    monkeypatch.setenv("CIFAR10_LEDGER", str(tmp_path / "ledger"))
    monkeypatch.setattr(ledger, "_shown", set())
    return tmp_path / "ledger"


def final_test(run: Path) -> ledger.Entry:
    """The first opening that the run's folder knows of; the tests that share the folder may have added others."""
    return ledger.read([run / FILE])[0]


@pytest.fixture
def copied(trained: Path, tmp_path: Path):
    def copy(name: str) -> Path:
        run = Path(shutil.copytree(trained / name, tmp_path / name))
        (run / FILE).write_text(json.dumps(final_test(run)) + "\n")
        return run

    return copy


def test_a_training_is_one_look_and_its_report_says_which(trained, copied):
    entry = final_test(trained / "color")
    assert (entry["dataset"], entry["images"], entry["runs"]) == ("synthetic", 200, [str((trained / "color").resolve())])
    assert entry["learned"] == {"accuracy": json.loads((trained / "color" / "summary.json").read_text())["test_accuracy"]}
    run = copied("color")
    (run / FILE).write_text(json.dumps({**entry, "recipes": {"bn_cnn": 22}}))
    assert command("report", run, "--sealed") == 0
    assert "200 images, the 22nd look at them by runs of this recipe" in (run / "report.html").read_text(encoding="utf-8")


def test_evaluations_ensembles_reports_and_exports_count_and_val_does_not(copied, users, capsys):
    run, other = copied("color"), copied("resized")
    for words in (["evaluate", run], ["evaluate", run, "--split", "val"], ["evaluate", run, run, "--images", 50]):
        assert command(*words, "--threads", 1) == 0
    assert command("export", run, "--formats", "state_dict", "--test-images", 20, "--threads", 1) == 0
    found = ledger.read([users])
    assert [(entry["images"], entry["recipes"]) for entry in found] == [
        (200, {"bn_cnn": 1}),
        (50, {"bn_cnn": 2}),
        (20, {"bn_cnn": 3}),
    ]
    assert all(entry["learned"]["accuracy"] > 0 for entry in found)
    assert [entry["id"] for entry in ledger.read([run / FILE])][1:] == [entry["id"] for entry in found]
    assert command("report", other) == 0
    assert ledger.read([users])[-1]["recipes"] == {"bn_cnn": 4}
    capsys.readouterr()
    assert command("ledger", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 4
    assert command("ledger", other.parent) == 0
    assert "synthetic, test split, recipe bn_cnn: 6 looks, of" in capsys.readouterr().out  # with the two final tests


def test_nothing_opens_a_sealed_test_split(copied, users, capsys, monkeypatch):
    run = copied("color")
    assert command("evaluate", run, "--sealed", "--threads", 1) == 2
    assert "the test split is sealed" in capsys.readouterr().err
    monkeypatch.setenv("CIFAR10_SEALED", "1")
    assert command("evaluate", run, "--threads", 1) == 2
    assert command("evaluate", run, "--split", "val", "--threads", 1) == 0
    assert command("report", run) == 0
    assert "the test split is sealed" in (run / "report.html").read_text(encoding="utf-8")
    small = ["--dataset", "synthetic", "--val-images", "100"]
    assert make_plan(small, 1, "test").options.test_images == 0
    with pytest.raises(UsageError, match="--test-images opens the test split"):
        make_plan([*small, "--test-images", "5"], 1, "test")
    assert not users.exists()


def test_it_is_beside_the_data_or_in_the_state_folder_or_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CIFAR10_LEDGER")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    data, state = tmp_path / "data", tmp_path / "state" / "cifar10-deepspeed" / FILE
    Look().opens(data, "cifar10", None, 100)  # a folder that is not there is not made
    assert len(ledger.read([state])) == 1
    data.mkdir()
    Look().opens(data, "cifar10", None, 100)
    assert len(ledger.read([data / FILE])) == 1
    assert len(ledger.read([state])) == 1
    assert capsys.readouterr().err == ""
    for file in (data / FILE, state):
        file.unlink()
        file.mkdir()
    Look().opens(data, "cifar10", None, 100)
    assert len(capsys.readouterr().err.splitlines()) == 1


WRITES = """
from pathlib import Path
from cifar10.data.ledger import Look
for n in range(50):
    Look().opens(Path("."), "x", None, n + 1)
"""


def test_lines_of_several_processes_do_not_mix(users):
    def write(_: int) -> int:
        return subprocess.run([sys.executable, "-c", WRITES], cwd=PROJECT, env=dict(os.environ), check=False).returncode

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, range(4))) == [0] * 4
    assert len(ledger.read([users])) == 200
    users.write_text(users.read_text() + '{"id": "torn\n[]\n{"id": []}\nnull\n')
    assert len(ledger.read([users])) == 200


def test_a_recipe_keeps_its_name_through_the_recipe_json_of_an_earlier_run(tmp_path):
    for name, recipe in (("first", "bn_cnn"), ("second", str(tmp_path / "first" / "recipe.json"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text(json.dumps({"recipe": recipe}))
    assert ledger.recipe_of(tmp_path / "second") == "bn_cnn"
