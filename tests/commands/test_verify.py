"""verify: edited files, exchanged weights and other trainings are found, and honest runs and their copies pass."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar10.run import chain
from cifar10.run.state import RunState
from tests.helpers import WORKERS, launch
from tests.launching import COMMANDS, PROJECT, SHORT, run
from tests.small_trained import command

RECORDS = sorted(path.parent for path in (PROJECT / "records").glob("*/*/summary.json"))


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    content.get("settings", content).update(values)
    file.write_text(json.dumps(content))


def test_the_projects_records_agree_with_their_logs(capsys):
    assert command("verify", *RECORDS, "--segments", 0) == 0
    printed = capsys.readouterr().out
    assert printed.count("no more can be shown") + printed.count(": passes") == len(RECORDS) > 30


@pytest.mark.parametrize(
    ("field", "value"),
    [("train_accuracy", 0.9), ("val_accuracy", 0.9), ("test_accuracy", 0.9), ("best_step", 703), ("steps", 99), ("seed", 7)],
)
def test_an_edited_summary_of_an_old_record_is_found(tmp_path, capsys, field, value):
    folder = shutil.copytree(PROJECT / "records" / "2026-11-21_bn_cnn_cpu" / "seed_0", tmp_path / "record")
    edit(folder / "summary.json", **{field: value})
    assert command("verify", folder) == 1
    assert f"summary.json: {field} is {value}" in capsys.readouterr().out


def test_what_is_no_run_cannot_be_checked(tmp_path, capsys):
    assert command("verify", tmp_path) == 2
    assert command("verify", RECORDS[0], "--segments", "some") == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_copy_passes_and_each_edited_file_is_found(trained, tmp_path, capsys):
    folder = shutil.copytree(trained / "color", tmp_path / "elsewhere" / "copy")
    assert command("verify", folder, "--segments", 0) == 0
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    rows = (folder / "steps.csv").read_text()
    last = sorted((folder / "checkpoints").glob("step_*"))[-1]

    def found(file: Path, content: bytes | None) -> str:
        capsys.readouterr()
        file.unlink() if content is None else file.write_bytes(content)
        assert command("verify", folder, "--segments", 0) == 1
        file.write_bytes(whole[file])
        return capsys.readouterr().out

    assert "steps.csv row 2 (" in found(folder / "steps.csv", rows.replace("0.", "1.", 1).encode())
    assert "steps.csv row 4 is missing" in found(folder / "steps.csv", "".join(rows.splitlines(keepends=True)[:3]).encode())
    metrics = (folder / "metrics.csv").read_text()
    assert "metrics.csv row 3 (1,val): throughput is 1.0" in found(
        folder / "metrics.csv",
        "\n".join([*(m := metrics.splitlines())[:2], f"{m[2].rpartition(',')[0]},1.0", *m[3:], ""]).encode(),
    )
    edit(folder / "recipe.json", label_smoothing=0.3)
    assert "settings.label_smoothing is 0.3" in found(folder / "recipe.json", (folder / "recipe.json").read_bytes())
    edit(folder / "summary.json", peak_memory_mib=[1])
    assert "peak_memory_mib is [1]" in found(folder / "summary.json", (folder / "summary.json").read_bytes())
    assert "is no link" in found(folder / chain.FILE, whole[folder / chain.FILE].replace(b'"prev"', b'"p"', 1))
    assert "its hash is" in found(
        folder / chain.FILE, whole[folder / chain.FILE].replace(b'"skipped_steps": 0', b'"skipped_steps": 1', 1)
    )
    assert chain.FILE in found(folder / chain.FILE, None), "the checkpoints say that there was one"
    assert f"checkpoints/{last.name}" in found(last / "state.pt", whole[last / "state.pt"][:-1])
    best = folder / "checkpoints" / "best_model" / "mp_rank_00_model_states.pt"
    content = torch.load(best, weights_only=True)
    next(iter(content["module"].values())).mul_(1.0001)
    torch.save(content, tmp_path / "other.pt")
    assert "checkpoints/best_model: parameters is" in found(best, (tmp_path / "other.pt").read_bytes())
    assert command("verify", folder, "--segments", 0) == 0


def test_a_hash_is_of_names_types_shapes_and_bytes():
    values = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, 3), 0, 0.0, "0", None]
    states = [*({"a": value} for value in values), {"b": values[0]}, {"a": [values[0]]}, {"a": {"a": values[0]}}, {}]
    assert len({chain.hash_of(state) for state in states}) == len(states)
    assert chain.hash_of({"a": torch.arange(6).view(2, 3).T}) == chain.hash_of({"a": torch.arange(6).view(2, 3).T.contiguous()})


def test_rows_that_a_resume_has_cut_are_not_expected():
    links = [{"kind": "start", "step": 0, "epoch": 0}]
    links += [{"kind": "epoch", "step": 8, "epoch": 0, "steps.csv": ["4,1", "8,1"], "metrics.csv": ["1,train", "1,val"]}]
    links += [{"kind": "end", "step": 8, "epoch": 0, "metrics.csv": ["1,test"]}]
    assert chain.rows_of(links)["metrics.csv"] == ["1,train", "1,val", "1,test"]
    links += [{"kind": "start", "step": 6, "epoch": 0}, {"kind": "epoch", "step": 15, "epoch": 1, "metrics.csv": ["1,train"]}]
    assert chain.rows_of(links) == {"metrics.csv": ["1,train"], "steps.csv": ["4,1"]}


def test_a_checkpoint_from_before_there_were_chains_is_resumed():
    values = RunState(step=3).as_dict()
    del values["chain"]
    assert RunState.from_dict(values).chain == ""


@pytest.mark.slow
def test_honest_runs_pass_and_forgeries_are_caught_when_all_is_trained_again(tmp_path):
    """One of each kind of forgery; the whole campaign is python tests/workers/verify_runs.py FOLDER."""
    honest = "EMA,stopped twice,killed in its test,extended,from two ranks to one,from another run,stopped"
    launch(1, WORKERS / "verify_runs.py", str(tmp_path), "--honest", honest, "--forgeries", "15")
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert {name: found for name, (found, _) in outcomes["honest"].items()} == {name: [] for name in honest.split(",")}
    assert [name for name, (found, _) in outcomes["forged"].items() if not found or found[0].startswith("error")] == []
    assert len(outcomes["forged"]) == 15
    told = {name: " ".join(told) for name, (_, told) in outcomes["honest"].items()}
    for name in ("EMA", "stopped twice", "killed in its test", "extended"):
        assert "trained again from the seed, the same to the bit: epochs 1 to 3" in told[name]
    assert "otherwise than the run (other ranks" in told["from two ranks to one"]
    assert "missed with probability 100% at most, 1 cannot be trained again" in told["from another run"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_real_run_is_launched_again(tmp_path, capsys, ranks):
    flags = [*SHORT, "--max-steps", "4", "--output-dir", str(tmp_path / "run")]
    started = run([*(COMMANDS["python"] if ranks == 1 else COMMANDS["torchrun, 2 ranks"]), *flags])
    assert started.returncode == 0, started.stderr
    checked = run([sys.executable, "-m", "cifar10", "verify", str(tmp_path / "run"), "--segments", "all"])
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "trained again from the seed, the same to the bit: epochs 1 to 1" in checked.stdout
    assert (tmp_path / "run" / "test_ledger.jsonl").read_text().count('"command"') == 1, "the test split stays closed"
