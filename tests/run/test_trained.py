"""Loading a trained model, and refusing anything else in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from cifar10 import UsageError
from cifar10.run.checkpoint import PORTABLE_FILE
from cifar10.run.trained import alone, load
from tests.helpers import same_bits

BEST = Path("checkpoints") / "best_model" / PORTABLE_FILE


def content_of(run: Path) -> dict:
    return torch.load(run / BEST)


def written(folder: Path, content: object) -> Path:
    """A file like best_model's with this content."""
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / PORTABLE_FILE)
    return folder


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/best_model", str(BEST)])
def test_a_run_its_best_model_and_the_file_are_the_same_model(trained, place):
    found = load(trained / "color" / place)
    assert same_bits(found.model.state_dict(), content_of(trained / "color")["module"])
    assert not found.model.training
    assert {value.dtype for value in found.model.parameters()} == {torch.float32}
    summary = json.loads((trained / "color.json").read_text())
    assert (found.step, found.val_accuracy) == (summary["best_step"], summary["val_accuracy"])
    assert (found.run, found.which) == (trained / "color", "best_model")


def test_a_copy_of_the_file_elsewhere_belongs_to_no_run(trained, tmp_path):
    shutil.copy(trained / "color" / BEST, tmp_path / "mine.pt")
    assert load(tmp_path / "mine.pt").run is None


def test_the_final_model_can_be_loaded(trained):
    run = trained / "color"
    final = torch.load(run / "checkpoints" / "final" / PORTABLE_FILE)
    for found in (load(run, "final"), load(run / "checkpoints" / "final")):
        assert same_bits(found.model.state_dict(), final["module"])
        assert (found.which, found.step, found.val_accuracy) == ("final", 250, None)


@pytest.mark.parametrize(
    ("name", "shape", "image"),
    [
        ("color", (3, 32, 32), {"channels": 3, "size": 32, "resize": 0, "dataset_size": 32}),
        ("gray", (1, 28, 28), {"channels": 1, "size": 28, "resize": 0, "dataset_size": 28}),
        ("resized", (3, 32, 32), {"channels": 3, "size": 32, "resize": 40, "dataset_size": 32}),
    ],
)
def test_a_model_knows_its_input(trained, name, shape, image):
    found = load(trained / name)
    assert found.image_shape == shape
    assert found.about["image"] == image
    assert found.about["classes"] == content_of(trained / name)["classes"]
    assert found.about["normalization"] == content_of(trained / name)["normalization"]
    assert found.model(torch.zeros(2, *shape)).shape == (2, 10)


# --- refusals ---------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def changed(run: Path, **values: object) -> dict:
    return {**content_of(run), **values}


def with_weight(run: Path, name: str, value: object) -> dict:
    return changed(run, module={**content_of(run)["module"], name: value})


REFUSED = {
    "code": (lambda run: changed(run, extra=Evil()), "cannot be read as weights"),
    "nothing": (lambda run: {}, "holds no state dict"),
    "another format": (lambda run: changed(run, format="cifar10-deepspeed/1"), "has format 'cifar10-deepspeed/1', expected"),
    "no image": (lambda run: changed(run, image=None), "not a trained model"),
    "an image of no size": (lambda run: changed(run, image={"channels": 3, "dataset_size": 10**9}), "pixels a side"),
    "a plain state dict": (lambda run: content_of(run)["module"], "a plain state dict does not say"),
    "no recipe": (lambda run: changed(run, recipe=None), "not a trained model"),
    "an unknown field": (lambda run: changed(run, recipe={"surprise": 1}), "surprise"),
    "an impossible field": (lambda run: changed(run, recipe={**content_of(run)["recipe"], "resize": -1}), "--resize: -1"),
    "an unknown model": (lambda run: changed(run, recipe={**content_of(run)["recipe"], "model": "../x"}), "unknown"),
    "another model": (lambda run: changed(run, recipe={**content_of(run)["recipe"], "model": "lenet"}), "weights of lenet"),
    "too few classes": (lambda run: changed(run, classes=["cat"]), r"fc2.weight is \[10, 128\] there, \[1, 128\] here"),
    "classes that are no names": (lambda run: changed(run, classes=list(range(10))), "classes are not names"),
    "a weight that is none": (lambda run: with_weight(run, "fc2.bias", [0.0] * 10), "holds no state dict"),
    "NaN": (lambda run: with_weight(run, "fc2.bias", torch.full((10,), torch.nan)), "values that are not finite"),
    "an accuracy in words": (lambda run: changed(run, val_accuracy="good"), "val_accuracy is not a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_something_else_is_refused_in_a_line_and_executes_nothing(trained, tmp_path, monkeypatch, name):
    make, reason = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=reason) as refusal:
        load(written(tmp_path / "file", make(trained / "color")))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "executed").exists()


def test_damaged_bytes_are_refused(trained, tmp_path):
    whole = (trained / "color" / BEST).read_bytes()
    for number, content in enumerate((b"", b"PK\x03\x04", whole[: len(whole) // 2], b"\x80\x04" + whole)):
        for suffix in (".pt", ".safetensors"):
            file = tmp_path / f"{number}{suffix}"
            file.write_bytes(content)
            with pytest.raises(UsageError, match="cannot be read as weights"):
                load(file)


def test_places_without_a_model_are_refused_with_what_to_choose(trained, tmp_path):
    places = {tmp_path / "nowhere": "does not exist", tmp_path: "holds no trained model", Path("x" * 300): "too long"}
    for place, reason in {**places, Path("zero\0byte"): "does not exist"}.items():
        with pytest.raises(UsageError, match=f"{reason}; choose the folder of a run"):
            load(place)
    started = tmp_path / "started"
    started.mkdir()
    (started / "recipe.json").touch()
    with pytest.raises(UsageError, match="without a trained model yet"):
        load(started)
    shutil.copytree(trained / "color" / "checkpoints" / "best_model", started / "checkpoints" / "best_model")
    assert load(started).run == started
    with pytest.raises(UsageError, match="has no final yet; use --which best_model"):
        load(started, "final")


def test_zero_threads_are_refused():
    with pytest.raises(UsageError, match="--threads: 0"):
        alone(0)
