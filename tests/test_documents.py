"""The reference documents' systems: their recipes hold the documents' numbers, and small runs of them end well."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cifar10.config import ds_config
from cifar10.config.recipe import load
from cifar10.run import checkpoint
from tests import small_trained
from tests.helpers import same_bits
from tests.launching import summary


def config_of(name: str, **fields: Any) -> dict[str, Any]:
    """The DeepSpeed JSON of a recipe, whose fields have these values."""
    experiment = load(name)
    assert {field: getattr(experiment.recipe, field) for field in fields} == fields
    return ds_config.read(experiment.deepspeed)


def test_lenet():
    half, plain = (0.5,) * 3, {"augment": "none", "resize": 0, "image_size": 0, "weights": "none", "label_smoothing": 0}
    fields = {"model": "lenet", "dataset": "cifar10", "epochs": 2, "val_images": 0, "patience": 0, "mean": half, "std": half}
    config = config_of("lenet", **fields, **plain)
    params = {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}
    assert config["optimizer"]["type"] == "Adam"
    assert config["optimizer"]["params"].items() >= params.items()
    warmup = {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000}
    assert config["scheduler"] == {"type": "WarmupLR", "params": warmup}
    assert (config["train_batch_size"], config["steps_per_print"], config["wall_clock_breakdown"]) == (4, 2000, False)


def test_mnist():
    data = {"dataset": "synthetic_mnist", "mean": (0.1307,), "std": (0.3081,), "val_images": 1_000, "augment": "none"}
    schedule = {
        "epochs": 50,
        "warmup_epochs": 5,
        "lr_schedule": "cosine(per_epoch=True)",
        "patience": 15,
        "min_improvement": 1e-5,
    }
    config = config_of("mnist_synthetic", model="mnist_cnn", weights="none", **data, **schedule)
    assert (config["optimizer"]["type"], config["optimizer"]["params"]["lr"]) == ("Adam", 1e-3)
    assert [config[key] for key in ds_config.BATCH_KEYS] == [32, 32, 1]


def test_slurm():
    data = {"dataset": "cifar10", "val_images": 5_000, "augment": "RandomCrop(4) RandomHorizontalFlip"}
    config = config_of("slurm_zero2", model="bn_cnn_wide", epochs=100, **data)
    assert config["optimizer"] == {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}}
    assert [config[key] for key in ds_config.BATCH_KEYS] == [128, 64, 1]
    assert config["zero_optimization"]["stage"] == 2
    assert "gradient_clipping" not in config


def test_vgg19():
    sizes = {"resize": 256, "image_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    data = {"dataset": "cifar10", "val_images": 5_000, "augment": "RandomCrop(0) RandomHorizontalFlip", **sizes}
    config = config_of("vgg19", model="vgg19", weights="imagenet", epochs=20, **data)
    assert config["optimizer"] == {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}}
    assert (config["train_batch_size"], config["gradient_clipping"]) == (256, 1.0)


# --- small runs -------------------------------------------------------------------------------------------------------

SMALL = "--val-images 100 --test-images 200 --threads 1 --precision fp32"
FINAL = f"checkpoints/final/{checkpoint.PORTABLE_FILE}"
STEP = "--dataset synthetic --global-batch-size 32 --max-steps 1 --lr 1e-12"  # one step that hardly moves the weights
RUNS = {  # beside those of tests/small_trained.py
    "random": f"--recipe mnist_synthetic {SMALL} --epochs 1 --dataset random_mnist",
    "zero": f"--recipe slurm_zero2 {SMALL} --dataset synthetic --max-steps 2",
    "from a file": f"--recipe bn_cnn {SMALL} {STEP} --seed 5 --weights TRAINED/resized/{FINAL}",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, trained_once: Path) -> tuple[dict[str, Path], str]:
    """All of these runs by name -> their folders, and what RUNS printed."""
    base = tmp_path_factory.mktemp("documents")
    flags = {name: words.replace("TRAINED", str(trained_once)) for name, words in RUNS.items()}
    printed = small_trained.train_all(base, flags)
    return {**{name: trained_once / name for name in small_trained.RUNS}, **{name: base / name for name in RUNS}}, printed


def portable(folder: Path, name: str = "final") -> dict[str, Any]:
    return checkpoint.load_portable(folder / "checkpoints" / name)


@pytest.mark.parametrize("name", [*small_trained.RUNS, *RUNS])
def test_a_run_ends_well(runs, name):
    assert (summary(runs[0][name])["status"], summary(runs[0][name])["skipped_steps"]) == ("finished", 0)
    assert all(value.isfinite().all() for value in portable(runs[0][name])["module"].values())


def test_grayscale_images_are_learned(runs):
    results, file = summary(runs[0]["gray"]), portable(runs[0]["gray"], "best_model")
    assert results["train_accuracy"] > 0.3  # 0.1 by chance; 500 images are too few for more than that
    assert results["quality"] in ("Excellent", "Good", "Fair", "Poor")
    assert file["classes"] == list("0123456789")
    assert file["normalization"] == {"mean": [0.1307], "std": [0.3081]}


def test_random_labels_have_no_tier_and_are_called_random_at_the_start_and_at_the_end(runs):
    assert summary(runs[0]["random"])["quality"] is None
    assert runs[1].count("labels of random_mnist are random") == 2


def test_training_starts_from_the_weights_of_the_file(runs):
    start, end = (portable(runs[0][name])["module"] for name in ("resized", "from a file"))
    assert not same_bits(start, end)  # a step was taken
    weights = [name for name in start if "running" not in name and "num_batches" not in name]
    assert all(torch.allclose(end[name], start[name], rtol=0, atol=1e-6) for name in weights)
