"""Hostile and damaged files given to the whole program: refused in one line with exit code 2; nothing in them is executed,
overwritten or deleted. Each case is a start of its own in a folder of its own.
"""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cifar10.config.recipe import FORMAT
from cifar10.data.cifar import CIFAR10
from cifar10.run.checkpoint import PORTABLE_FILE
from tests.data.test_cifar import make_archive, special
from tests.launching import PROJECT, environment

pytestmark = pytest.mark.slow

SMALL = "--dataset synthetic --val-images 100 --test-images 100 --global-batch-size 50 --lr 0.05 --threads 1 --epochs 2".split()


class Program:
    """The program, forked from a process with the slow imports done."""

    def __init__(self) -> None:
        command = [sys.executable, str(PROJECT / "tests" / "workers" / "starts.py")]
        variables = environment(PYTHONPATH=str(PROJECT), OMP_NUM_THREADS="1", no_proxy="*")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=PROJECT, env=variables, **pipes)

    def start(self, folder: Path, *flags: str, **asked: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps({"flags": flags, "folder": str(folder), **asked}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    program = Program()
    yield program
    program._process.communicate()


def made(program: Program, folder: Path, *flags: str) -> Path:
    """A run that --max-steps has ended after its first epoch; the same command without it would resume it."""
    answer = program.start(folder.parent, *SMALL, "--max-steps", "10", *flags, "--output-dir", str(folder))
    assert answer["code"] == 0, answer
    return folder


@pytest.fixture(scope="module")
def intact(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(program, tmp_path_factory.mktemp("intact") / "run")


@pytest.fixture
def run(intact: Path, tmp_path: Path) -> Path:
    """A copy of an intact run, to be damaged."""
    return Path(shutil.copytree(intact, tmp_path / "run"))


@pytest.fixture(scope="module")
def other(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(program, tmp_path_factory.mktemp("other") / "run", "--seed", "7")


TAG = "step_00000010"
MAY_CHANGE = ("environment.json", ".lock")  # a start is recorded before anything is resumed


def tree(folder: Path, *but: str) -> dict[str, Any]:
    """Every path below `folder`: content of a file, target of a link."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.name not in but:
            kind = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(folder))] = kind
    return found


def refusal(program: Program, base: Path, *flags: str, but: tuple[str, ...] = MAY_CHANGE, **asked: Any) -> str:
    """The line with which the program refuses; everything below `base` is unchanged."""
    before = tree(base, *but)
    answer = program.start(base, *flags, **asked)
    lines = answer["stderr"].splitlines()
    assert answer["code"] == 2, answer
    assert [line[:7] for line in lines if line.startswith("error:")] == ["error: "], answer
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in answer["stderr"]
    assert tree(base, *but) == before
    return lines[-1]


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._marker),)


# --- the checkpoint that a run resumes from -----------------------------------------------------------------------------


def sealed(tag: Path) -> None:
    """Write the manifest for the present state.pt."""
    content = (tag / "state.pt").read_bytes()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tag / "manifest.json").write_text(json.dumps({"state.pt": facts}))


def flipped(path: Path, at: float) -> None:
    """Flip one bit, at this share of the file."""
    content = bytearray(path.read_bytes())
    content[min(int(at * len(content)), len(content) - 1)] ^= 4
    path.write_bytes(content)


def cut(path: Path, share: float, less: int = 0) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content)) - less])


def folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


def file_for(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("a file")


def link_for(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def not_a_file(tag: Path, make: Callable[[Path], Any]) -> None:
    """A device or a pipe in place of a state, with a manifest that says it is empty."""
    (tag / "state.pt").unlink()
    make(tag / "state.pt")
    (tag / "manifest.json").write_text(json.dumps({"state.pt": {"bytes": 0, "sha256": "0" * 64}}))


DEEP = "[" * 200_000
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "state without its last byte": lambda tag: cut(tag / "state.pt", 1, less=1),
    "state too long": lambda tag: (tag / "state.pt").open("ab").write(bytes(1 << 20)),
    "state a folder": lambda tag: folder_for(tag / "state.pt"),
    "state a link to nothing": lambda tag: link_for(tag / "state.pt", "nowhere"),
    "state an endless device": lambda tag: not_a_file(tag, lambda path: path.symlink_to("/dev/zero")),
    "state a silent pipe": lambda tag: not_a_file(tag, os.mkfifo),
    "a bit of the manifest": lambda tag: flipped(tag / "manifest.json", 0.7),
    "manifest a folder": lambda tag: folder_for(tag / "manifest.json"),
    "manifest of digits": lambda tag: (tag / "manifest.json").write_text('{"state.pt": {"bytes": 1' + "0" * 9_999 + "}}"),
    "manifest that names another folder": lambda tag: (tag / "manifest.json").write_text('{"../../recipe.json": {"bytes": 1}}'),
    "tag a file": file_for,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused(program: Program, run: Path, tmp_path: Path, name: str) -> None:
    DAMAGE[name](run / "checkpoints" / TAG)
    line = refusal(program, tmp_path, *SMALL, "--output-dir", str(run))
    assert f"{TAG} is damaged: " in line


def changed(*keys: Any, to: Any) -> Callable[[dict[str, Any]], Any]:
    """Replace a value deep in a checkpoint, or delete it if `to` is DELETED."""

    def change(content: dict[str, Any]) -> dict[str, Any]:
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        if to is DELETED:
            del inner[keys[-1]]
        return content

    return change


DELETED = object()
CONTENT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda content: [1, 2],
    "nothing": lambda content: {},
    "settings that are a number": changed("settings", to=5),
    "a step in words": changed("run_state", "step", to="ten"),
    "a step that is not finite": changed("run_state", "step", to=float("nan")),
    "a negative step": changed("run_state", "step", to=-10),
    "a huge step": changed("run_state", "epoch_step", to=10**30),
    "sums of words": changed("run_state", "epoch_sums", "loss", to="much"),
    "a field too many": lambda content: {**content, "run_state": {**content["run_state"], "extra": 1}},
    "a list that is none": changed("run_state", "resumed_at_steps", to="ten"),
    "an lr that is not finite": changed("run_state", "lr_factor", to=float("nan")),
    "weights of another shape": changed("engine", "parameters", "fc2.bias", to=torch.zeros(11)),
    "a weight missing": changed("engine", "parameters", "fc2.bias", to=DELETED),
    "momentum of another shape": changed("engine", "optimizer", "momentum_buffer", "fc2.bias", to=torch.zeros(1)),
    "momentum of nothing": changed("engine", "optimizer", to={"momentum_buffer": {"nothing": torch.zeros(1)}}),
    "momentum that is words": changed("engine", "optimizer", "momentum_buffer", "fc2.bias", to="zeros"),
    "another optimizer": changed("engine", "optimizer_name", to="Adam"),
    "no buffers": changed("engine", "buffers", to=[]),
    "no counters": changed("engine", "counters", to={}),
    "counters in words": changed("engine", "counters", to={"global_steps": "many"}),
    "pointers that are a number": changed("pointers", to=5),
}


@pytest.mark.parametrize("name", CONTENT)
def test_a_checkpoint_with_a_valid_manifest_and_foreign_content_is_refused(
    program: Program, run: Path, tmp_path: Path, name: str
) -> None:
    state = run / "checkpoints" / TAG / "state.pt"
    torch.save(CONTENT[name](torch.load(state, weights_only=True)), state)
    sealed(state.parent)
    assert "checkpoint" in refusal(program, tmp_path, *SMALL, "--output-dir", str(run))


@pytest.mark.parametrize("how", ["copied", "linked"])
def test_a_checkpoint_of_another_run_is_refused_by_its_settings(
    program: Program, run: Path, other: Path, tmp_path: Path, how: str
) -> None:
    tag = run / "checkpoints" / TAG
    shutil.rmtree(tag)
    theirs = other / "checkpoints" / TAG
    shutil.copytree(theirs, tag) if how == "copied" else tag.symlink_to(theirs)
    line = refusal(program, tmp_path, *SMALL, "--output-dir", str(run))
    assert "is a checkpoint of another experiment (seed 7 there, 0 here)" in line


def test_pointers_that_a_checkpoint_asks_for_stay_in_its_folder(program: Program, run: Path, tmp_path: Path) -> None:
    state = run / "checkpoints" / TAG / "state.pt"
    content = torch.load(state, weights_only=True)
    names = ["../../escaped", str(tmp_path / "absolute"), "final", "best_model", ".lock", "epoch_001"]
    torch.save({**content, "pointers": names}, state)
    sealed(state.parent)
    answer = program.start(tmp_path, *SMALL, "--max-steps", "11", "--output-dir", str(run))
    assert answer["code"] == 0, answer
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert {path.name for path in (run / "checkpoints").iterdir() if path.is_file()} == {"latest", "best", "epoch_001"}


# --- the model that is tested, and the weights that training starts from --------------------------------------------------

WEIGHTS: dict[str, Callable[[Path, Path], Any]] = {
    "hostile": lambda file, marker: torch.save({"module": Bomb(marker)}, file),
    "hostile, plain": lambda file, marker: file.write_bytes(pickle.dumps({"module": Bomb(marker)})),
    "half": lambda file, marker: cut(file, 0.5),
    "empty": lambda file, marker: cut(file, 0),
    "a folder": lambda file, marker: folder_for(file),
    "of other shapes": lambda file, _: torch.save({"format": FORMAT, "module": {"fc2.bias": torch.zeros(3)}, "step": 10}, file),
    "no dict": lambda file, marker: torch.save([torch.zeros(3)], file),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_damaged_best_model_is_not_tested(program: Program, run: Path, tmp_path: Path, name: str) -> None:
    """The run has no step left, and tests its best model."""
    (run / "summary.json").unlink()
    WEIGHTS[name](run / "checkpoints" / "best_model" / PORTABLE_FILE, tmp_path / "exploded")
    flags = [*SMALL, "--max-steps", "10", "--output-dir", str(run), "--no-tensorboard"]
    made_anew = ("summary.json", "steps.csv", "metrics.csv", "chain.jsonl", "final", PORTABLE_FILE)
    before = {} if name == "a folder" else tree(run / "checkpoints" / "best_model")
    line = refusal(program, tmp_path, *flags, but=(*MAY_CHANGE, *made_anew))
    assert "best_model" in line
    assert not (tmp_path / "exploded").exists()
    assert name == "a folder" or tree(run / "checkpoints" / "best_model") == before


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights_are_not_trained(program: Program, intact: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "mine.pt"
    shutil.copy(intact / "checkpoints" / "best_model" / PORTABLE_FILE, file)
    WEIGHTS[name](file, tmp_path / "exploded")
    line = refusal(program, tmp_path, *SMALL, "--weights", str(file), "--output-dir", str(tmp_path / "run"))
    assert f"--weights {file}" in line
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["hostile", "half", "a folder", "no dict"])
def test_another_runs_damaged_best_model_is_not_copied(program: Program, run: Path, tmp_path: Path, name: str) -> None:
    WEIGHTS[name](run / "checkpoints" / "best_model" / PORTABLE_FILE, tmp_path / "exploded")
    before = tree(run)
    flags = [*SMALL, "--resume", str(run), "--output-dir", str(tmp_path / "new")]
    answer = program.start(tmp_path, *flags)
    assert answer["code"] == 2, answer
    (line,) = answer["stderr"].splitlines()
    assert line.startswith("error: ")
    assert "best_model" in line
    assert tree(run) == before
    assert not (tmp_path / "exploded").exists()


# --- the files of a run's folder, and those that a command names ------------------------------------------------------------

SETTINGS = f'{{"format": "{FORMAT}", "settings": '
NESTED = '{"a": ' * 700 + "1" + "}" * 700
JSONS = {
    "recipe.json nested without end": ("recipe.json", DEEP),
    "recipe.json nested deep": ("recipe.json", SETTINGS + NESTED + "}"),
    "recipe.json of lines": ("recipe.json", SETTINGS + '{"model": "a\\nerror: b\\u001b[2J"}}'),
    "recipe.json of a huge number": ("recipe.json", SETTINGS + '{"seed": 1' + "0" * 4_000 + "}}"),
    "ds_config.json nested without end": ("ds_config.json", DEEP),
    "ds_config.json of NaN": ("ds_config.json", '{"train_batch_size": NaN}'),
    "summary.json of no steps": ("summary.json", '{"status": "finished", "ended_by": "max_steps"}'),
    "summary.json of words": ("summary.json", '{"status": "finished", "ended_by": "max_steps", "steps": "ten"}'),
    "environment.json nested without end": ("environment.json", DEEP),
    "environment.json of a number": ("environment.json", '{"starts": 5}'),
    "environment.json not an object": ("environment.json", "[]"),
}


@pytest.mark.parametrize("name", JSONS)
def test_a_damaged_file_of_the_runs_folder_is_refused(program: Program, run: Path, tmp_path: Path, name: str) -> None:
    file, content = JSONS[name]
    (run / file).write_bytes(content.encode(errors="surrogateescape"))
    flags = [*SMALL, "--max-steps", "10"] if file == "summary.json" else SMALL
    line = refusal(program, tmp_path, *flags, "--output-dir", str(run), but=(".lock",))
    assert str(run) in line
    assert line.isprintable()
    assert len(line) < 1_000


def test_a_lock_that_is_a_folder(program: Program, run: Path, tmp_path: Path) -> None:
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").mkdir()
    assert str(run) in refusal(program, tmp_path, *SMALL, "--output-dir", str(run))


RECIPES = {
    "nested.json": SETTINGS + NESTED + "}",
    "huge.json": SETTINGS + '{"epochs": 1' + "0" * 400 + ', "warmup_epochs": 5, "val_images": 5}}',
    "lines.json": SETTINGS + '{"a\\nerror: b": 1}}',
    "nan.json": SETTINGS + '{"epochs": NaN, "warmup_epochs": 5, "val_images": 5}}',
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_damaged_recipe_json_is_refused(program: Program, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(RECIPES[name])
    line = refusal(program, tmp_path, "--recipe", str(tmp_path / name), "--output-dir", "run")
    assert line.isprintable()
    assert "--recipe" in line or "--epochs" in line


CONFIGS = {
    "nested deep": ('{"optimizer": {"type": "SGD", "params": ' + NESTED + "}}").encode(),
    "huge": b'{"train_batch_size": 1' + b"0" * 400 + b', "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}',
    "a section nested deep": ('{"comms_logger": ' + NESTED + ', "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}').encode(),
    "huge lr": b'{"train_batch_size": 50, "optimizer": {"type": "SGD", "params": {"lr": 1' + b"0" * 400 + b"}}}",
    "digits": b'{"train_batch_size": 1' + b"0" * 9_999 + b"}",
    "lines": b'{"a\\nerror: b": 1}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_deepspeed_config_is_refused(program: Program, tmp_path: Path, name: str) -> None:
    (tmp_path / "mine.json").write_bytes(CONFIGS[name])
    flags = [word for word in SMALL if word not in ("--global-batch-size", "50", "--lr", "0.05")]
    line = refusal(program, tmp_path, *flags, "--deepspeed_config", "mine.json", "--output-dir", "run")
    assert line.isprintable()
    assert len(line) < 2_000


@pytest.mark.parametrize("flags", ["--epochs 1e308", "--epochs 1e30", "--warmup-epochs 1e999", "--seed 99999999999999999999"])
def test_a_number_out_of_range_is_refused(program: Program, tmp_path: Path, flags: str) -> None:
    assert flags.split()[0] in refusal(program, tmp_path, *SMALL, *flags.split(), "--output-dir", "run")


# --- the data set -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches() -> dict[str, bytes]:
    """Small files in CIFAR-10's format."""
    rng = np.random.default_rng(0)
    return {
        name: pickle.dumps({"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]})
        for name in CIFAR10.files
    }


def known(batches: dict[str, bytes], archive: bytes) -> dict[str, Any]:
    """Facts of the data set for the program."""
    files = {name: hashlib.md5(content).hexdigest() for name, content in batches.items()}
    return {"files": files, "archive": [len(archive), hashlib.md5(archive).hexdigest()]}


MEMBER = f"{CIFAR10.folder}/data_batch_2"
MEMBERS = {
    "a device": special(MEMBER, tarfile.CHRTYPE),
    "a pipe": special(MEMBER, tarfile.FIFOTYPE),
    "a hard link": special(MEMBER, tarfile.LNKTYPE, "/etc/passwd"),
    "a symbolic link": special(MEMBER, tarfile.SYMTYPE, "/etc/passwd"),
    "a folder": special(MEMBER, tarfile.DIRTYPE),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_an_archive_with_something_else_in_place_of_a_file_is_refused(
    program: Program, batches: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    files = {f"{CIFAR10.folder}/{one}": content for one, content in batches.items() if one != "data_batch_2"}
    evil = {f"{CIFAR10.folder}/../../escaped": b"1", str(tmp_path / "absolute"): b"2"}
    archive = make_archive({**evil, **files}, MEMBERS[name])
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / CIFAR10.archive).write_bytes(archive)
    written = ("run", CIFAR10.folder, ".cifar10.lock", *batches)
    flags = ["--data-dir", str(folder), "--output-dir", "run"]
    line = refusal(program, tmp_path, *flags, but=written, cifar10=known(batches, archive))
    assert "has no intact data_batch_2" in line
    assert not os.path.lexists(folder / CIFAR10.folder / "data_batch_2")


def placed(batches: dict[str, bytes], base: Path) -> Path:
    folder = base / "data" / CIFAR10.folder
    folder.mkdir(parents=True)
    for name, content in batches.items():
        (folder / name).write_bytes(content)
    return folder


def made_folder(data_dir: Path) -> Path:
    (data_dir / CIFAR10.archive).mkdir()
    return data_dir / CIFAR10.archive


PLACES: dict[str, Callable[[Path, Path], Any]] = {
    "a hostile file": lambda folder, marker: (folder / "data_batch_2").write_bytes(pickle.dumps(Bomb(marker))),
    "a bit": lambda folder, marker: flipped(folder / "data_batch_2", 0.5),
    "a folder for a file": lambda folder, marker: folder_for(folder / "data_batch_2"),
    "a link to a device": lambda folder, marker: link_for(folder / "data_batch_2", "/dev/null"),
    "a link to nothing": lambda folder, marker: link_for(folder / "data_batch_2", "nowhere"),
    "a file for the folder": lambda folder, marker: file_for(folder),
    "a folder for the archive": lambda folder, marker: shutil.move(folder / "data_batch_2", made_folder(folder.parent)),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_damaged_data_folder_without_a_network(
    program: Program, batches: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    PLACES[name](placed(batches, tmp_path), tmp_path / "exploded")
    flags = ["--data-dir", "data", "--output-dir", "run"]
    nobody = {"CIFAR10_URL": "http://127.0.0.1:9/"}
    line = refusal(program, tmp_path, *flags, but=(".cifar10.lock",), environment=nobody, cifar10=known(batches, b"no archive"))
    assert "data" in line
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("answer", [b"", b"<html>not found</html>", b"\x1f\x8b" + bytes(1000)])
def test_an_address_that_answers_with_junk(program: Program, batches: dict[str, bytes], tmp_path: Path, answer: bytes) -> None:
    (tmp_path / "junk").write_bytes(answer)
    flags = ["--data-dir", "data", "--output-dir", "run"]
    where = {"CIFAR10_URL": (tmp_path / "junk").as_uri()}
    written = ("data", ".cifar10.lock")
    line = refusal(program, tmp_path, *flags, but=written, environment=where, cifar10=known(batches, b"no archive"))
    assert "cannot be fetched" in line
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".cifar10.lock"]
