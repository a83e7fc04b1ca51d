"""python -m cifar10 export: every file answers as the model does, also without DeepSpeed and this program."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from cifar10.commands import export
from cifar10.commands.export import FILES, FORMATS
from cifar10.data import registry, synthetic
from cifar10.data.dataset import stratified_split
from cifar10.data.loader import EvaluationLoader
from cifar10.data.pixels import center
from cifar10.models.registry import build_model, model_names, source_file
from cifar10.run.predictions import TEST_FILE
from cifar10.run.trained import load
from tests.helpers import WORKERS, cut_down, one_rank, same_bits
from tests.small_trained import command

PLAIN = WORKERS / "plain_environment.py"
# Modules that cannot be imported in the processes below.
BLOCKED = ("deepspeed", "cifar10", "cifar10_deepspeed", "recipes")
WITHOUT = """
import runpy, sys
sys.modules.update({name: None for name in %r})
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def exports(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each small run's export, in a folder of its name."""
    base = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "CALIBRATION_IMAGES", 100)
        patch.setattr(export, "BATCHES", 1)
        cut_down(patch)
        for name in ("color", "gray", "resized"):
            assert command("export", trained_once / name, "--output", base / name, "--threads", 1) == 0
    return base


NAMES = ["color", "gray", "resized"]


# --- network.py -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", model_names())
def test_the_source_of_a_network_needs_nothing_of_this_program(model, monkeypatch):
    with torch.device("meta"):
        ours = build_model(model, 0, num_classes=7)
        for name in [*BLOCKED, *(name for name in sys.modules if name.split(".")[0] in BLOCKED)]:
            monkeypatch.setitem(sys.modules, name, None)
        theirs = runpy.run_path(str(source_file(model)))[model](num_classes=7)
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (ours, theirs)]
    assert shapes[0] == shapes[1]


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_all_files_are_written_and_export_json_describes_them(exports, name):
    folder = exports / name
    facts = json.loads((folder / "export.json").read_text())
    assert {path.name for path in folder.iterdir()} == {*FILES.values(), "network.py", "export.json"}
    assert [row["format"] for row in facts["checks"]] == list(FORMATS)
    for row in facts["checks"]:
        assert row["bytes"] == (folder / row["file"]).stat().st_size
        assert row["images"] == 200
        assert row["agrees"] is True
        if row["format"] != "onnx_int8":
            assert row["same_answers"] == 200
            assert row["largest_difference"] <= 1e-4
            assert row["accuracy"] == facts["model"]["accuracy"]
    int8, fp32 = facts["checks"][-1], facts["checks"][-2]
    assert int8["bytes"] < fp32["bytes"] / 2
    assert int8["largest_difference"] > 1e-4  # it is quantized
    assert int8["same_answers"] > 150


@pytest.mark.parametrize("name", NAMES)
def test_an_export_is_loaded_like_a_run(trained, exports, name):
    ours = load(trained / name)
    for place in (exports / name, exports / name / "model.safetensors"):
        found = load(place)
        assert same_bits(found.model.state_dict(), ours.model.state_dict())
        assert found.about == ours.about
        assert found.run is None
    assert same_bits(torch.load(exports / name / "state_dict.pt"), ours.model.state_dict())


def test_no_file_contains_paths_of_this_machine(exports):
    folders = [str(folder).encode() for folder in (WORKERS.parent.parent, Path(torch.__file__).parent.parent, exports)]
    for path in exports.rglob("*.*"):
        assert not any(folder in path.read_bytes() for folder in folders), path


def test_onnx_takes_any_batch_and_describes_itself(trained, exports):
    model = onnx.load(exports / "gray" / "model.onnx")
    (images,), (logits,) = model.graph.input, model.graph.output
    sizes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in (images, logits)]
    assert sizes == [["batch", 1, 28, 28], ["batch", 10]]
    facts = {one.key: one.value for one in model.metadata_props}
    assert json.loads(facts["classes"]) == list("0123456789")
    assert json.loads(facts["about"]) == load(trained / "gray").about
    assert "0..1" in facts["images"]
    assert "normalization is inside" in facts["model.pt2, model.onnx, model_int8.onnx"]


def test_int8_is_calibrated_on_the_training_split_alone(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "CALIBRATION_IMAGES", 50)
    fed: list[np.ndarray] = []
    in_zero_to_one = export.in_zero_to_one

    def watched(images, found, world):
        fed.append(images.pixels)
        return in_zero_to_one(images, found, world)

    monkeypatch.setattr(export, "in_zero_to_one", watched)
    assert command("export", trained / "color", "--output", tmp_path / "e", "--formats", "onnx_int8", "--threads", 1) == 0
    calibration, test = fed
    recipe, images = load(trained / "color").recipe, synthetic.synthetic("train", 600, 0)
    train, _ = stratified_split(images.labels, recipe.val_images, recipe.split_seed)
    assert np.array_equal(calibration, images.pixels[train[:50]])
    assert np.array_equal(test, synthetic.synthetic("test", 200, 0).pixels)
    assert {path.name for path in (tmp_path / "e").iterdir()} == {"model_int8.onnx", "network.py", "export.json"}


# --- without DeepSpeed and this program -------------------------------------------------------------------------------


def plainly(folder: Path, images: Path, predictions: Path) -> subprocess.CompletedProcess[str]:
    """The worker in a process that can import neither DeepSpeed nor anything of this project."""
    words = [sys.executable, "-I", "-c", WITHOUT % (BLOCKED,), str(PLAIN), *map(str, (folder, images, predictions))]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def as_the_network_sees_them(run: Path, file: Path) -> Path:
    """The test images of a run as uint8 [N, C, S, S], resized and cut as its recipe says, in an .npz."""
    found = load(run)
    images = registry.images(found.recipe, "test", Path("unused"))
    store = EvaluationLoader.of(images.pixels, images.labels, found.recipe, one_rank()).store
    np.savez(file, images=center(store, torch.arange(len(images))).numpy())
    return file


@pytest.mark.parametrize("name", ["color", "gray"])
def test_all_files_work_without_deepspeed_and_this_program(trained, exports, tmp_path, name):
    images = as_the_network_sees_them(trained / name, tmp_path / "images.npz")
    done = plainly(exports / name, images, trained / name / TEST_FILE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["imported"] == []
    assert set(found["files"]) == set(FILES.values())
    for file, row in found["files"].items():
        assert row["images"] == 200
        assert "int8" in file or (row["same answers"] == 200 and row["largest difference"] <= 1e-4)


# --- checks that fail, and refusals -----------------------------------------------------------------------------------


def test_a_file_with_other_answers_fails_the_command_and_is_named(trained, tmp_path, monkeypatch, capsys):
    def altered(job: export.Job) -> None:
        torch.save({name: value * 1.01 for name, value in job.weights.items()}, job.path("state_dict"))

    monkeypatch.setitem(export.WRITERS, "state_dict", altered)
    words = ("--output", tmp_path / "e", "--formats", "safetensors", "state_dict", "--test-images", 50, "--threads", 1)
    assert command("export", trained / "color", *words) == 1
    assert "state_dict.pt does not agree with the model" in capsys.readouterr().out
    checks = json.loads((tmp_path / "e" / "export.json").read_text())["checks"]
    assert [(row["agrees"], row["images"]) for row in checks] == [(True, 50), (False, 50)]


def test_an_earlier_export_is_replaced_as_a_whole_and_other_folders_are_left_alone(trained, tmp_path, capsys):
    folder, words = tmp_path / "e", ("--test-images", 10, "--threads", 1)
    assert command("export", trained / "color", "--output", folder, "--formats", "safetensors", "state_dict", *words) == 0
    assert command("export", trained / "gray", "--output", folder, "--formats", "state_dict", *words) == 0
    assert {path.name for path in folder.iterdir()} == {"state_dict.pt", "network.py", "export.json"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.onnx").write_text("precious")
    assert command("export", trained / "color", "--output", tmp_path / "mine", *words) == 2
    assert f"--output {tmp_path / 'mine'} is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["model.onnx"]


def test_a_full_disk_leaves_the_earlier_export_as_it_was(trained, tmp_path, monkeypatch, capsys):
    words = ("--output", tmp_path / "e", "--formats", "state_dict", "--test-images", 10, "--threads", 1)
    assert command("export", trained / "color", *words) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()}

    def full(job: export.Job) -> None:
        job.path("state_dict").write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export.WRITERS, "state_dict", full)
    assert command("export", trained / "color", *words) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "e").iterdir()} == before


def test_a_missing_library_is_named(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert command("export", trained / "color", "--output", tmp_path / "e", "--formats", "safetensors", "--threads", 1) == 2
    assert "safetensors.torch is not installed, and --formats safetensors needs it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["--test-images 0", "--test-images 201", "--formats", f"--output {__file__}", f"--output {__file__}/below"]
)
def test_invalid_values_are_refused(trained, capsys, words):
    assert command("export", trained / "color", *words.split(), "--threads", 1) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words.split())
    assert not (trained / "color" / "export").exists()


def test_a_file_outside_a_run_needs_an_output_folder(exports, capsys):
    assert command("export", exports / "color" / "model.safetensors") == 2
    assert "--output" in capsys.readouterr().err
