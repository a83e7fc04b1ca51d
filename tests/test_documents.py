"""The systems of the reference documents: their recipes hold the documents' numbers, and whole small runs of them end well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar10.config import ds_config
from cifar10.config.recipe import Recipe, load
from cifar10.run import checkpoint
from tests.helpers import WORKERS, launch, same_bits

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def numbers(name: str) -> tuple[Recipe, dict[str, Any]]:
    """A recipe, and its DeepSpeed JSON."""
    experiment = load(name)
    return experiment.recipe, ds_config.read(experiment.deepspeed)


def has(recipe: Recipe, **fields: Any) -> bool:
    return {name: getattr(recipe, name) for name in fields} == fields


def test_lenet():
    recipe, config = numbers("lenet")
    assert has(recipe, model="lenet", dataset="cifar10", epochs=2, val_images=0, patience=0, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert has(recipe, augment="none", resize=0, image_size=0, weights="none", label_smoothing=0)
    params = {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}
    assert config["optimizer"]["type"] == "Adam"
    assert config["optimizer"]["params"].items() >= params.items()
    warmup = {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000}
    assert config["scheduler"] == {"type": "WarmupLR", "params": warmup}
    assert (config["train_batch_size"], config["steps_per_print"], config["wall_clock_breakdown"]) == (4, 2000, False)


def test_mnist():
    recipe, config = numbers("mnist_synthetic")
    assert has(recipe, model="mnist_cnn", dataset="synthetic_mnist", mean=(0.1307,), std=(0.3081,), val_images=1_000)
    assert has(recipe, epochs=50, warmup_epochs=5, lr_moves="per-epoch", patience=15, min_improvement=1e-5)
    assert has(recipe, augment="none", weights="none")
    assert (config["optimizer"]["type"], config["optimizer"]["params"]["lr"]) == ("Adam", 1e-3)
    assert [config[key] for key in ds_config.BATCH_KEYS] == [32, 32, 1]


def test_slurm():
    recipe, config = numbers("slurm_zero2")
    assert has(
        recipe,
        model="bn_cnn_wide",
        dataset="cifar10",
        epochs=100,
        val_images=5_000,
        augment="RandomCrop(4) RandomHorizontalFlip",
    )
    assert config["optimizer"] == {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}}
    assert [config[key] for key in ds_config.BATCH_KEYS] == [128, 64, 1]
    assert config["zero_optimization"]["stage"] == 2
    assert "gradient_clipping" not in config


def test_vgg19():
    recipe, config = numbers("vgg19")
    assert has(recipe, model="vgg19", weights="imagenet", dataset="cifar10", epochs=20, val_images=5_000, **IMAGENET)
    assert has(recipe, resize=256, image_size=224, augment="RandomCrop(0) RandomHorizontalFlip")
    assert config["optimizer"] == {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}}
    assert (config["train_batch_size"], config["gradient_clipping"]) == (256, 1.0)


# --- whole small runs -------------------------------------------------------------------------------------------------

SMALL = "--val-images 100 --test-images 200 --threads 1 --precision fp32"
FINAL = f"checkpoints/final/{checkpoint.PORTABLE_FILE}"
SLOW = "--dataset synthetic --global-batch-size 32 --max-steps 1 --lr 1e-12"  # one step that hardly moves the weights
RUNS = {
    "lenet": f"--recipe lenet {SMALL} --dataset synthetic --max-steps 20",
    "grey": f"--recipe mnist_synthetic {SMALL} --epochs 12",
    "random": f"--recipe mnist_synthetic {SMALL} --epochs 1 --dataset random_mnist",
    "zero": f"--recipe slurm_zero2 {SMALL} --dataset synthetic --max-steps 2",
    "resized": f"--recipe bn_cnn {SMALL} {SLOW} --resize 40 --image-size 32 --augment none",
    "from a file": f"--recipe bn_cnn {SMALL} {SLOW} --seed 5 --weights BASE/resized/{FINAL}",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All of RUNS, carried out one after another -> the folder of their folders, and what they printed."""
    base = tmp_path_factory.mktemp("documents")
    starts = []
    for name, flags in RUNS.items():
        words = [*flags.replace("BASE", str(base)).split(), "--output-dir", str(base / name)]
        starts.append({"ranks": 1, "flags": words, "keep_summary": str(base / f"{name}.json")})
    (base / "starts.json").write_text(json.dumps(starts))
    return base, launch(1, WORKERS / "small_runs.py", str(base / "starts.json"))


def portable(folder: Path, name: str = "final") -> dict[str, Any]:
    return checkpoint.load_portable(folder / "checkpoints" / name)


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_ends_well(runs, name):
    summary = json.loads((runs[0] / f"{name}.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["test_images"], summary["skipped_steps"]) == (200, 0)
    assert all(value.isfinite().all() for value in portable(runs[0] / name)["module"].values())


def test_grey_images_are_learned(runs):
    summary, file = json.loads((runs[0] / "grey.json").read_text()), portable(runs[0] / "grey", "best_model")
    assert summary["train_accuracy"] > 0.3  # 0.1 by chance; 500 images are too few for more than that
    assert summary["quality"] in ("Excellent", "Good", "Fair", "Poor")
    assert file["classes"] == list("0123456789")
    assert file["normalization"] == {"mean": [0.1307], "std": [0.3081]}


def test_random_labels_have_no_tier_and_are_said_to_be_random_at_the_start_and_at_the_end(runs):
    assert json.loads((runs[0] / "random.json").read_text())["quality"] is None
    assert runs[1].count("note: the labels of random_mnist are random") == 2


def test_training_starts_from_the_weights_of_the_file(runs):
    start, end = (portable(runs[0] / name)["module"] for name in ("resized", "from a file"))
    assert not same_bits(start, end)  # a step was taken
    weights = [name for name in start if "running" not in name and "num_batches" not in name]
    assert all(torch.allclose(end[name], start[name], rtol=0, atol=1e-6) for name in weights)
    assert "note: initial weights: " in runs[1]
