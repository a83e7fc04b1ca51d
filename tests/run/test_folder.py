"""A run's folder: which one it is, whether a command may use it, and its settings."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cifar10 import UsageError
from cifar10.config.cli import parse
from cifar10.config.recipe import as_json, load
from cifar10.plan import Plan, make_plan
from cifar10.run import folder as run_folder
from cifar10.run.summary import Summary

PROJECT = Path(__file__).resolve().parents[2]
BASE = ["--dataset", "synthetic"]


def plan(*argv: str, world_size: int = 1) -> Plan:
    return make_plan([*BASE, *argv], world_size, "a test")


def refusal(*argv: str, world_size: int = 1) -> str:
    """The message, one line, with which `argv` is refused."""
    with pytest.raises(UsageError) as caught:
        plan(*argv, world_size=world_size)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def begin(folder: Path, *argv: str, world_size: int = 1, resume: str = "auto") -> Plan:
    """Open a run in `folder`, as the script does."""
    begun = plan(*argv, world_size=world_size)
    settings = as_json(begun.recipe, begun.options.recipe, {})
    run_folder.open_run(folder, settings, begun.ds_config, resume, ["cifar10_deepspeed.py", *argv], world_size=world_size)
    (folder / "checkpoints" / "step_00000001").mkdir(exist_ok=True)  # something is saved
    return begun


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("CIFAR10_DIR", "CIFAR10_STARTED_BY", "UV_RUN_RECURSION_DEPTH"):
        monkeypatch.delenv(name, raising=False)


# --- which folder -----------------------------------------------------------------------------------------------------


def test_a_new_folder_is_named_after_recipe_and_time_and_did_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda pattern: "20260101-120000")
    folders = [run_folder.choose(None, "bn_cnn") for _ in range(3)]
    assert [str(folder) for folder in folders] == [f"runs/bn_cnn-20260101-120000{more}" for more in ("", "-2", "-3")]
    assert all(folder.is_dir() for folder in folders)  # so that a run started in the same second does not choose it
    assert run_folder.choose(None, "runs/first/recipe.json").name.startswith("first-")
    assert run_folder.choose(Path("mine"), "bn_cnn") == Path("mine")


# --- whether it may be used -------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "new", tmp_path / "new" / "below"):
        run_folder.refuse_unwritable(folder)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert "a link to nothing" in refusal("--output-dir", str(tmp_path / "dangling" / "below"))
    for place in ("file", "file/below", "file/far/below", "dangling", "x" * 300, "y" * 300 + "/below"):
        assert "--output-dir" in refusal("--output-dir", str(tmp_path / place))
    for place in ("file", "file/below"):
        with pytest.raises(UsageError, match="--output-dir"):
            begin(tmp_path / place)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--epochs 2 --seed 1", ["seed 0 there, 1 here"]),
        ("--epochs 2 --lr 0.5", ["optimizer.params.lr", "0.5 here"]),
        ("--epochs 2 --global-batch-size 32", ["train_batch_size", "32 here"]),
        ("--epochs 2 --augment none", ["augment RandomCrop(3) RandomHorizontalFlip there, none here"]),
    ],
)
def test_other_settings_are_refused_with_the_difference(tmp_path, argv, named):
    begin(tmp_path / "run", "--epochs", "2")
    message = refusal(*argv.split(), "--output-dir", str(tmp_path / "run"))
    assert all(words in message for words in named), message


def test_what_does_not_change_the_experiment_may_differ(tmp_path):
    begin(tmp_path / "run", "--epochs", "2")
    for other in ("", "--max-steps 5 --test-images 0 --log-every-steps 7 --threads 1"):
        plan("--epochs", "2", *other.split(), "--output-dir", str(tmp_path / "run"))


def test_another_number_of_ranks_may_resume_with_the_same_global_batch(tmp_path):
    begin(tmp_path / "run", "--global-batch-size", "32", world_size=1)
    for world_size in (1, 2, 4, 8):
        plan("--global-batch-size", "32", "--output-dir", str(tmp_path / "run"), world_size=world_size)
    saved = json.loads((tmp_path / "run" / "ds_config.json").read_text(encoding="utf-8"))
    saved.update(train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=4)
    (tmp_path / "run" / "ds_config.json").write_text(json.dumps(saved), encoding="utf-8")
    plan("--global-batch-size", "32", "--output-dir", str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["recipe.json", "ds_config.json", "summary.json"])
@pytest.mark.parametrize("content", [b"", b'{"recipe": ', b"[]", b"5", b"null", b"\xff\xfe", "folder"])
def test_a_damaged_file_in_the_folder_is_refused_by_name(tmp_path, name, content):
    begin(tmp_path / "run")
    run_folder.write_json(tmp_path / "run" / "summary.json", {"status": "running"})
    plan("--output-dir", str(tmp_path / "run"))
    (tmp_path / "run" / name).unlink()
    if content == "folder":
        (tmp_path / "run" / name).mkdir()
    else:
        (tmp_path / "run" / name).write_bytes(content)
    assert name in refusal("--output-dir", str(tmp_path / "run"))


def test_resume_never_refuses_a_folder_with_anything_in_it_and_no_other(tmp_path):
    folder = tmp_path / "run"
    argv = ["--resume", "never", "--output-dir", str(folder)]
    plan(*argv)
    folder.mkdir()
    plan(*argv)
    (folder / "anything").write_text("")
    assert "--resume never" in refusal(*argv)
    with pytest.raises(UsageError, match="--resume never"):
        begin(folder, resume="never")
    assert [path.name for path in folder.iterdir()] == ["anything"]


def test_a_checkpoint_is_found_by_its_runs_folder_or_by_its_name(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "best_model").mkdir(parents=True)
    (checkpoints / "step_00000005").mkdir()
    for name in ("latest", "best", "epoch_001"):
        (checkpoints / name).write_text("step_00000005")
        for suffix in ("", ".pth", ".pt"):
            assert run_folder.find_checkpoint(str(checkpoints / f"{name}{suffix}")) == (checkpoints, name)
    assert run_folder.find_checkpoint(str(tmp_path / "run")) == (checkpoints, "latest")


@pytest.mark.parametrize("name", ["epoch_002", "epoch_002.pth", "best_model", "step_00000005"])
def test_a_checkpoint_that_does_not_exist_is_refused_with_those_that_do(tmp_path, name):
    begin(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for place in ("run", "absent", "run/checkpoints/epoch_001", "x" * 300):
        assert "--resume" in refusal("--resume", str(tmp_path / place))
    (checkpoints / "best_model").mkdir()
    for pointer in ("latest", "best", "epoch_001"):
        (checkpoints / pointer).write_text("step_00000005")
    message = refusal("--resume", str(checkpoints / name))
    assert f"named {name.removesuffix('.pth')}" in message
    assert "there are best, epoch_001, latest" in message


# --- its files --------------------------------------------------------------------------------------------------------


def test_an_opened_folder_holds_settings_that_run_again_and_every_start(tmp_path):
    folder = tmp_path / "a run" / "below"
    begun = begin(folder, "--epochs", "2")
    files = {".lock", "checkpoints", "ds_config.json", "environment.json", "recipe.json"}
    assert {path.name for path in folder.iterdir()} == files
    recipe, options = parse(["--recipe", str(folder / "recipe.json")])
    assert recipe == begun.recipe
    assert json.loads(load(options.recipe).deepspeed.read_text(encoding="utf-8")) == begun.ds_config

    before = (folder / "recipe.json").read_bytes()
    begin(folder, "--epochs", "2", "--max-steps", "3", world_size=2)
    assert (folder / "recipe.json").read_bytes() == before
    starts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["starts"]
    assert [start["world_size"] for start in starts] == [1, 2]
    assert shlex.split(starts[1]["command"]) == ["cifar10_deepspeed.py", "--epochs", "2", "--max-steps", "3"]
    for key in ("torch", "torchvision", "deepspeed", "python", "commit", "processor", "time"):
        assert key in starts[0]


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "summary.json"
    assert run_folder.read_json(path) is None
    run_folder.write_json(path, {"steps": 1})
    with path.open(encoding="utf-8") as reader:  # has the old file open while the new one is written
        run_folder.write_json(path, {"steps": 2})
        assert json.load(reader) == {"steps": 1}
    assert run_folder.read_json(path) == {"steps": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_is_not_json_leaves_the_old_file_and_nothing_else(tmp_path, value):
    path = tmp_path / "summary.json"
    run_folder.write_json(path, {"steps": 1})
    with pytest.raises((ValueError, TypeError)):
        run_folder.write_json(path, {"steps": value})
    assert run_folder.read_json(path) == {"steps": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


# --- whether the run is complete --------------------------------------------------------------------------------------


def summary(**values: Any) -> Summary:
    return Summary(**{"status": "finished", "ended_by": "epochs", "steps": 100, **values})


@pytest.mark.parametrize(
    ("content", "max_steps", "complete"),
    [
        (summary(status="stopped"), 50, False),
        (summary(status="failed"), None, False),
        (summary(), None, True),
        (summary(), 200, True),  # its schedule has ended: more steps cannot help
        (summary(ended_by="early_stopping"), 200, True),
        (summary(ended_by="max_steps"), 50, True),
        (summary(ended_by="max_steps"), 100, True),
        (summary(ended_by="max_steps"), 101, False),
        (summary(ended_by="max_steps"), None, False),
    ],
)
def test_a_finished_run_is_complete_unless_max_steps_ended_it_and_more_are_allowed(content, max_steps, complete):
    assert content.is_complete(max_steps) is complete


# --- how to continue --------------------------------------------------------------------------------------------------

OTHERS = ["--recipe", "bn_cnn_document", "--epochs=2.5", "--augment=none", "--data-dir", "a folder/of $mine"]


@pytest.mark.parametrize(
    "given", [[], ["--output_dir", "old"], ["--output-dir=an old 'run'"], ["--output-dir", "older", "--output_dir=old"]]
)
@pytest.mark.parametrize("folder", ["an old 'run'", '$HOME; echo "x"'])
def test_the_command_to_continue_is_the_command_with_the_runs_folder(given, folder):
    for argv in ([*given, *OTHERS], [*OTHERS, *given]):
        words = shlex.split(run_folder.command_to_continue("deepspeed --num_gpus=2 cifar10_deepspeed.py", argv, Path(folder)))
        assert words[:3] == ["deepspeed", "--num_gpus=2", "cifar10_deepspeed.py"]
        assert [word for word in words if word.replace("_", "-").startswith("--output-dir")] == ["--output-dir"]
        recipe, options = parse(words[3:])
        recipe_before, options_before = parse(OTHERS)
        assert recipe == recipe_before != load("bn_cnn").recipe
        assert options == replace(options_before, output_dir=Path(folder))


def test_the_command_to_continue_is_not_refused_by_its_own_resume_never(tmp_path):
    folder = tmp_path / "run"
    for never in (["--resume", "never"], ["--resume=never"]):
        argv = [*BASE, *never, "--epochs", "2"]
        begin(folder, "--epochs", "2")
        words = shlex.split(run_folder.command_to_continue("python cifar10_deepspeed.py", argv, folder))
        assert make_plan(words[2:], 1, "a test").options.output_dir == folder


def test_the_command_to_continue_starts_as_the_program_was_started(monkeypatch):
    monkeypatch.setenv("CIFAR10_STARTED_BY", "python main.py --num-gpus 2")
    assert run_folder.command_to_continue("python x.py", [], Path("r")) == "python main.py --num-gpus 2 --output-dir r"
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert run_folder.command_to_continue("python x.py", [], Path("r")).startswith("uv run python main.py ")
    for start in ("uv run python main.py", "sbatch run_deepspeed.sh"):
        monkeypatch.setenv("CIFAR10_STARTED_BY", start)
        assert run_folder.command_to_continue("python x.py", [], Path("r")) == f"{start} --output-dir r"


def test_a_second_process_may_not_train_in_the_same_folder(tmp_path):
    folder = tmp_path / "run"
    begin(folder, "--epochs", "2")  # this process holds it now
    code = f"from cifar10.run import folder as run_folder; from pathlib import Path; run_folder._hold(Path({str(folder)!r}))"
    other = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert "another process is training in" in other.stderr


def test_a_run_can_start_from_another_only_if_its_position_fits(tmp_path):
    begin(tmp_path / "run", "--epochs", "2")
    settings = plan("--epochs", "9", "--lr", "0.5").settings
    run_folder.refuse_other_position(tmp_path / "run", settings)  # a longer run at another learning rate
    for flags, named in (("--global-batch-size 32", "train_batch_size"), ("--seed 1", "seed is 0"), ("--val-images 0", "val")):
        with pytest.raises(UsageError, match=named):
            run_folder.refuse_other_position(tmp_path / "run", plan(*flags.split()).settings)


def test_the_title_of_a_seeds_run_has_its_campaign():
    assert run_folder.title(Path("a/three/seed_0")) == "three/seed_0"
    assert run_folder.title(Path("a/three/mine")) == "mine"
