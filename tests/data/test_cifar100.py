"""CIFAR-100 on a tiny archive of its format: torchvision's facts, a download, and a run that is trained, tested and used."""

import json
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torchvision
from PIL import Image

from cifar10.data.cifar100 import CIFAR100
from cifar10.data.download import Archive
from cifar10.data.registry import DATASETS
from tests.data.test_cifar import assert_torchvisions_facts, make_archive, md5
from tests.launching import PROJECT, environment
from tests.small_trained import command

IMAGES = {"train": 200, "test": 100}
TRAIN = """
import json, sys
from dataclasses import replace
from cifar10.data.download import Archive
from cifar10.data.registry import DATASETS
from cifar10_deepspeed import run
facts, flags = map(json.loads, sys.argv[1:])
small = replace(DATASETS["cifar100"].description, **facts.pop("description"))
known = {"files": facts["files"], "archives": (Archive(*facts["archive"]),), "sources": ()}
DATASETS["cifar100"] = replace(DATASETS["cifar100"], **known, description=small)
run(flags)
"""


@pytest.fixture(scope="module")
def archive() -> tuple[dict[str, bytes], bytes]:
    """Files in CIFAR-100's format, two training images and one test image of each class, and their archive."""
    rng, files = np.random.default_rng(0), {"meta": pickle.dumps({"fine_label_names": list(CIFAR100.description.classes)})}
    for split, count in IMAGES.items():
        fine = [number % 100 for number in range(count)]
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        files[split] = pickle.dumps({"data": pixels, "fine_labels": fine, "coarse_labels": [0] * count})
    return files, make_archive({f"{CIFAR100.folder}/{name}": content for name, content in files.items()})


@pytest.fixture
def facts(archive, tmp_path, monkeypatch) -> dict:
    """What is changed of CIFAR-100 to make it this archive, which lies on a server at CIFAR100_URL."""
    files, content = archive
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / CIFAR100.archive).write_bytes(content)
    small = {f"{split}_images": count for split, count in IMAGES.items()}
    known = {name: md5(file) for name, file in files.items()}
    facts = {"files": known, "archive": [CIFAR100.archive, len(content), md5(content)], "description": small}
    description, archives = replace(CIFAR100.description, **small), (Archive(*facts["archive"]),)
    changed = {"files": known, "archives": archives, "description": description, "sources": ()}
    monkeypatch.setitem(DATASETS, "cifar100", replace(CIFAR100, **changed))
    listener = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path / "server"))
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("CIFAR100_URL", f"http://127.0.0.1:{listener.server_port}/{CIFAR100.archive}")
    yield facts
    listener.shutdown()
    thread.join()
    listener.server_close()


def test_the_facts_are_torchvisions():
    assert_torchvisions_facts(CIFAR100, torchvision.datasets.CIFAR100)
    assert CIFAR100.label_key + "_names" == torchvision.datasets.CIFAR100.meta["key"].replace("label", "labels")
    assert len(CIFAR100.description.classes) == 100
    assert list(CIFAR100.description.classes) == sorted(CIFAR100.description.classes)


def test_it_is_fetched_verified_and_read_with_its_fine_labels(facts, archive, tmp_path):
    DATASETS["cifar100"].ensure(tmp_path / "data", need_test=True)
    for split, count in IMAGES.items():
        images, file = DATASETS["cifar100"].load(split, tmp_path / "data", 0), pickle.loads(archive[0][split])
        assert images.labels.tolist() == [number % 100 for number in range(count)]
        assert np.array_equal(images.pixels.transpose(0, 3, 1, 2).reshape(count, -1), file["data"])
    assert {path.name for path in (tmp_path / "data" / CIFAR100.folder).iterdir()} == archive[0].keys()


def test_a_run_is_trained_tested_reported_and_used_with_100_classes(facts, tmp_path, monkeypatch, capsys):
    run, data = tmp_path / "run", tmp_path / "data"
    monkeypatch.setenv("CIFAR10_DIR", str(data))
    flags = "--dataset cifar100 --val-images 100 --max-steps 3 --global-batch-size 20 --threads 1 --no-tensorboard --wandb off"
    words = [sys.executable, "-c", TRAIN, json.dumps(facts), json.dumps([*flags.split(), "--output-dir", str(run)])]
    variables = environment(PYTHONPATH=str(PROJECT), CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "100 classes" in done.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["test_images"], summary["quality"]) == ("finished", 100, None)
    assert command("evaluate", run, "--threads", 1, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == summary["test_accuracy"]
    assert [row["class"] for row in found["per_class"]] == list(CIFAR100.description.classes)
    assert command("report", run) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert sum(name in page for name in CIFAR100.description.classes if len(name) > 7) > 3  # of the sheets of images
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "black.png")
    capsys.readouterr()
    assert command("predict", run, tmp_path / "black.png", "--top", 100, "--threads", 1, "--format", "json") == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert {one["label"] for one in answer["top"]} == {*CIFAR100.description.classes}
