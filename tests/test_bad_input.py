"""Bad input is refused in one clear line before anything starts, and nothing is left behind.

Single values and keys are tried in test_recipe.py and test_ds_config.py; whole command lines meet the disk in this file.
"""

import dataclasses
import hashlib
import json
import pickle
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cifar10 import UsageError
from cifar10.data.cifar import CIFAR10
from cifar10.data.registry import DATASETS
from cifar10.plan import Plan, make_plan
from tests.launching import PROJECT, run

SOUND = {"train_batch_size": 32, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


@pytest.fixture
def base(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty working folder, without a data set and without a network: connections are refused."""
    folder = tmp_path / "base"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("CIFAR10_URL", f"http://127.0.0.1:{bound.getsockname()[1]}/cifar-10-python.tar.gz")
        yield folder


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`, with its content if it is a file."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def plan(*argv: str, world_size: int = 1) -> Plan:
    return make_plan(list(argv), world_size, "cifar10_deepspeed.py")


def refusal(base: Path, *argv: str, world_size: int = 1, may_add: tuple[str, ...] = ()) -> str:
    """The one line that refuses a command line; nothing on the disk has changed but what `may_add` names."""
    before = tree(base)
    with pytest.raises(UsageError) as caught:
        plan(*argv, world_size=world_size)
    assert {path: content for path, content in tree(base).items() if path not in may_add} == before
    message = str(caught.value)
    assert message.strip()
    assert len(message.splitlines()) == 1
    return message


def test_sound_input_is_accepted(base):
    for world_size in (1, 2, 4):
        plan("--dataset", "synthetic", "--output-dir", "run", "--global-batch-size", "128", world_size=world_size)
    assert plan("--dataset", "synthetic", "--global-batch-size", "45000").batch.global_images == 45_000  # the whole split
    assert tree(base) == {}


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--recipe resnet99", "resnet99"),
        ("--dataset imagenet", "cifar10"),
        ("--model bn_cmm", "did you mean bn_cnn?"),
        ("--global-batch-size -32", "--global-batch-size"),
        ("--val-images 50000", "49999"),
        ("--test-images 10001", "10000"),
        ("--resume elsewhere", "--resume elsewhere"),
        ("--deepspeed_config absent.json", "absent.json"),
    ],
)
def test_an_invalid_command_line(base, argv, says):
    assert says in refusal(base, "--dataset", "synthetic", "--output-dir", "run", *argv.split())


@pytest.mark.parametrize(
    ("batch", "val_images", "world_size"),
    [
        *[(32, 5_000, ranks) for ranks in (3, 6, 7)],  # does not divide
        *[(45_001, 5_000, 1), (45_003, 5_000, 3), (50_001, 0, 3), (12, 49_990, 3)],  # too large
    ],
)
def test_an_impossible_batch_is_refused_with_one_that_is_possible(base, batch, val_images, world_size):
    flags = ["--dataset", "synthetic", "--val-images", str(val_images)]
    message = refusal(base, *flags, "--global-batch-size", str(batch), world_size=world_size)
    advice = message.split("try ")[1].split()
    assert plan(*flags, *advice, world_size=world_size).batch.global_images <= 50_000 - val_images


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps(SOUND)[:40], "mine.json"),
        (json.dumps({**SOUND, "gradient_cliping": 1}), "did you mean 'gradient_clipping'?"),
        (json.dumps({**SOUND, "zero_optimization": {"stage": 7}}), "zero_optimization.stage"),
        (json.dumps({"optimizer": SOUND["optimizer"]}), "--global-batch-size 128"),
    ],
)
def test_an_invalid_json(base, content, says):
    (base / "mine.json").write_text(content, encoding="utf-8")
    assert says in refusal(base, "--dataset", "synthetic", "--deepspeed_config", "mine.json")


@pytest.mark.parametrize("folder", ["--output-dir file", "--output-dir file/run", "--output-dir file/a/run", "--data-dir file"])
def test_a_folder_that_is_a_file(base, folder):
    (base / "file").write_text("a file")
    assert "file is " in refusal(base, *folder.split())


# --- the data set -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sound_data(base, monkeypatch) -> Path:
    """A data folder with small files whose checksums are taken for CIFAR-10's -> the folder of the files."""
    rng = np.random.default_rng(0)
    files = {}
    for name in CIFAR10.files:
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        files[name] = pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3]})
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setitem(DATASETS, "cifar10", dataclasses.replace(CIFAR10, files=md5))
    folder = base / "data" / CIFAR10.folder
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


LOCK = str(Path("data") / ".cifar10.lock")
WAYS_OUT = ("Connection refused", "--data-dir", "CIFAR10_DIR", "CIFAR10_URL", "--dataset synthetic")


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "corrupt":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif how == "unreadable":
        path.mkdir()  # permissions would not stop root


@pytest.mark.parametrize("how", ["missing", "corrupt", "unreadable"])
@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch"])
def test_a_damaged_data_file_without_a_network_is_named_with_the_ways_out(base, sound_data, name, how):
    before = tree(base)
    plan()
    assert tree(base) == before  # sound files are only read
    damage(sound_data / name, how)
    message = refusal(base, may_add=(LOCK,))
    assert all(part in message for part in (name, how, *WAYS_OUT)), message


def test_a_damaged_test_file_does_not_matter_where_nothing_is_tested(base, sound_data):
    damage(sound_data / "test_batch", "altered")
    plan("--test-images", "0")


# --- whole programs ---------------------------------------------------------------------------------------------------


def run_script(base: Path, *argv: str, **environment: str) -> tuple[int, str, list[str]]:
    """Run the script with these flags and no network -> exit code, stdout, the lines on stderr. It writes nothing."""
    before = tree(base)
    result = run([sys.executable, str(PROJECT / "cifar10_deepspeed.py"), *argv], **environment)
    assert {path: content for path, content in tree(base).items() if path not in ("data", LOCK)} == before
    assert "Traceback" not in result.stderr
    return result.returncode, result.stdout, result.stderr.splitlines()


def test_the_program_refuses_to_start_without_data(base):
    code, printed, errors = run_script(base, "--data-dir", str(base / "data"), "--output-dir", str(base / "run"))
    assert (code, printed) == (2, "")
    *announced, error = errors
    assert error.startswith("error: no CIFAR-10 in ")
    assert {line.split()[0] for line in announced} == {"fetching", "leaving"}


MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("rank", ["0", "2"])
def test_a_rank_of_another_launcher_refuses_before_it_waits_for_others_and_only_rank_0_prints(base, rank):
    flags = ["--dataset", "synthetic", "--global-batch-size", "32", "--output-dir", str(base / "run")]
    code, printed, errors = run_script(base, *flags, RANK=rank, WORLD_SIZE="3", LOCAL_RANK=rank, **MASTER)
    assert (code, printed) == (2, "")
    assert [error.endswith("--global-batch-size 33") for error in errors] == ([True] if rank == "0" else [])
