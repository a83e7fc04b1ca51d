"""cifar10_deepspeed.py: the network, the learning rate schedule, accuracy and loss, the summary and the closing lines."""

import copy
import dataclasses
import doctest
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cifar10.config import schedule
from cifar10.config.recipe import Recipe, load
from cifar10.data.dataset import Description
from cifar10.data.loader import EvaluationLoader
from cifar10.data.registry import find
from cifar10.metrics import text
from cifar10.models.registry import build_model
from cifar10.run.evaluation import evaluate
from cifar10.run.state import RunState, Sums
from cifar10.run.summary import Summary, quality_tier, summarize
from cifar10_deepspeed import CIFAR10CNNEnhanced, calculate_accuracy, get_lr_schedule, lr_multiplier

CPU = torch.device("cpu")

# --- the network ------------------------------------------------------------------------------------------------------


class DocumentsCNN(CIFAR10CNNEnhanced):
    """The forward pass as the reference document writes it: ReLU, then pooling."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.pool(F.relu(self.bn2(self.conv2(x))))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        return self.fc2(x)


def test_the_networks_names_and_shapes():
    weights = {"conv1": (16, 3, 3, 3), "conv2": (32, 16, 3, 3), "fc1": (128, 2048), "fc2": (10, 128)}
    due = {f"{layer}.weight": shape for layer, shape in weights.items()}
    due |= {f"{layer}.bias": shape[:1] for layer, shape in weights.items()}
    for layer, channels in (("bn1", 16), ("bn2", 32)):
        due |= {f"{layer}.{name}": (channels,) for name in ("weight", "bias", "running_mean", "running_var")}
        due[f"{layer}.num_batches_tracked"] = ()
    assert {name: tuple(value.shape) for name, value in CIFAR10CNNEnhanced().state_dict().items()} == due


def test_the_initial_weights_are_kaiming_over_the_inputs_and_halved_where_linear():
    torch.manual_seed(0)
    models = [CIFAR10CNNEnhanced() for _ in range(30)]
    for name, fan_in, factor in (("conv1", 27, 1.0), ("conv2", 144, 1.0), ("fc1", 2048, 0.5), ("fc2", 128, 0.5)):
        weights = torch.cat([getattr(model, name).weight.flatten() for model in models])
        assert weights.std().item() == pytest.approx(factor * math.sqrt(2 / fan_in), rel=0.03)
        assert abs(weights.mean().item()) < 0.03 * weights.std().item()
        assert all(getattr(model, name).bias.eq(0).all() for model in models)
    assert all(norm.weight.eq(1).all() and norm.bias.eq(0).all() for norm in (models[0].bn1, models[0].bn2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_forward_pass_and_its_gradients_are_the_documents_to_the_bit(layout):
    ours, documents = build_model("bn_cnn", 3, 10), DocumentsCNN()
    documents.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        images = torch.randn(16, 3, 32, 32, generator=generator).contiguous(memory_format=layout)
        labels = torch.randint(0, 10, (16,), generator=generator)
        logits = []
        for model in (ours, documents):
            out = model(images)
            F.cross_entropy(out, labels).backward()  # gradients add up over the rounds
            logits.append(out)
        assert torch.equal(*logits)
    for (name, p), q in zip(ours.named_parameters(), documents.parameters(), strict=True):
        assert p.grad.abs().sum() > 0, name
        assert torch.equal(p.grad, q.grad), name
    for (name, b), c in zip(ours.named_buffers(), documents.buffers(), strict=True):
        assert torch.equal(b, c), name
    assert torch.equal(ours.eval()(images), documents.eval()(images))


# --- the learning rate ------------------------------------------------------------------------------------------------


def multipliers(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    """The learning rate's multiplier at each step of a whole run."""
    steps = max(1, round(recipe.epochs * steps_per_epoch))
    return [lr_multiplier(recipe, step, steps_per_epoch) for step in range(steps)]


def test_the_documents_schedule_at_the_documents_epochs():
    rates = [get_lr_schedule(epoch, 0.01, 5, 50) for epoch in range(50)]
    assert rates[0] == pytest.approx(0.002, rel=1e-12)
    assert rates[25] == pytest.approx(0.005868240888, rel=1e-9)
    assert rates[49] == pytest.approx(1.217974870e-05, rel=1e-9)
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert max(rates) == 0.01
    assert sorted(rates[5:], reverse=True) == rates[5:]
    for warmup in (0.05, 0.1, 0.5, 1, 5):  # over one epoch
        assert 0 < get_lr_schedule(0, 0.01, warmup, 1) <= 0.01


@pytest.mark.parametrize("steps_per_epoch", [3, 1562])
def test_per_epoch_is_the_document_at_every_epoch(steps_per_epoch):
    found = multipliers(load("bn_cnn_document").recipe, steps_per_epoch)
    due = [get_lr_schedule(epoch, 0.01, 5, 50) for epoch in range(50)]
    for at in (0, steps_per_epoch - 1):  # an epoch's first and last step
        assert [0.01 * rate for rate in found[at::steps_per_epoch]] == pytest.approx(due, rel=1e-12)


@pytest.mark.parametrize("epochs", [1, 1.5, 2, 10, 49, 100])
def test_a_shortened_per_epoch_run_reaches_the_full_rate_and_ends_above_zero(epochs):
    found = multipliers(dataclasses.replace(load("bn_cnn_document").recipe, epochs=epochs), 100)
    assert max(found) == pytest.approx(1, abs=0.01)
    assert min(found) > 0


@pytest.mark.parametrize("epochs", [0.02, 0.1, 0.5, 1, 3, 10, 50])
def test_per_step_every_length_of_run_rises_to_the_full_rate_and_falls(epochs):
    found = multipliers(Recipe(epochs=epochs, warmup_epochs=5, val_images=0), 10_000)
    peak = found.index(max(found))
    assert 0.99 <= max(found) <= 1
    assert peak <= len(found) / 10 + 1
    assert found == sorted(found[:peak]) + sorted(found[peak:], reverse=True)
    assert 0 < found[-1] < 0.01 * max(found)
    assert found[0] > 0


def test_a_warmup_shorter_than_a_tenth_is_kept():
    found = multipliers(Recipe(epochs=50, warmup_epochs=1, val_images=0), 1_000)
    assert found.index(max(found)) in (999, 1_000)
    assert found[499] == pytest.approx(0.4995)


def test_without_a_warmup_the_run_starts_at_the_full_rate():
    for per_epoch in (False, True):
        schedule = f"cosine(per_epoch={per_epoch})"
        found = multipliers(Recipe(epochs=2, warmup_epochs=0, val_images=0, lr_schedule=schedule), 100)
        assert max(found) == found[0] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("steps_per_epoch", [351, 390, 1562])
@pytest.mark.parametrize("epochs", [1e-9, 0.0001, 0.001, 0.01, 0.25, 0.5, 0.75, 1.5, 2.5, 3])
def test_every_step_of_every_run_learns(epochs, steps_per_epoch):
    recipe = Recipe(epochs=epochs, warmup_epochs=5, val_images=0)
    for found in multipliers(recipe, steps_per_epoch):
        assert 1e-12 < found <= 1


# --- accuracy and loss -----------------------------------------------------------------------------------------------------


def test_accuracy_in_percent_is_exact_for_every_count_of_32():
    for correct in range(33):
        targets = torch.arange(32) % 10
        outputs = F.one_hot(targets, 10).float()
        outputs[correct:] = F.one_hot((targets[correct:] + 1) % 10, 10).float()
        assert calculate_accuracy(outputs, targets) == correct / 32 * 100


NUM_IMAGES = 37


def evaluation_loader(rank: int, size: int, batch_images: int) -> tuple[EvaluationLoader, Tensor, Tensor]:
    """One rank's share of random images, and all of them, normalized, with their labels."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (NUM_IMAGES, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, NUM_IMAGES)
    recipe = Recipe(epochs=1, warmup_epochs=0, val_images=0)
    loader = EvaluationLoader.of(images, labels, recipe, SimpleNamespace(device=CPU, rank=rank, size=size))
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
    plain = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return dataclasses.replace(loader, batch_images=batch_images), plain, torch.from_numpy(labels)


@pytest.mark.parametrize(("size", "batch_images"), [(1, 10), (2, 10), (3, 10), (1, 1), (1, 36), (1, 37), (1, 1_000)])
def test_evaluation_equals_a_plain_computation_at_any_world_and_batch_size(size, batch_images):
    model = build_model("bn_cnn", 0, 10)
    model(torch.randn(64, 3, 32, 32))  # batch statistics that are not the initial ones
    before, results = copy.deepcopy(model.state_dict()), []
    for rank in range(size):
        loader, images, labels = evaluation_loader(rank, size, batch_images)
        results.append(evaluate(model.train(), loader, SimpleNamespace(device=CPU, total=lambda tensor: tensor)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        logits = model.eval()(images)
    correct = (logits.argmax(1) == labels).sum().item()
    assert sum(r.accuracy for r in results) == pytest.approx(correct / NUM_IMAGES, rel=1e-12)
    assert sum(r.loss for r in results) == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert all(r.images == NUM_IMAGES for r in results)  # of the whole split, as the sums are


# --- the summary and the closing lines ----------------------------------------------------------------------------------


def describe(dataset: str) -> Description:
    return find(dataset).describe(Path("nowhere"))


@pytest.mark.parametrize(("dataset", "excellent", "good", "fair"), [("cifar10", 0.8, 0.7, 0.6), ("mnist", 0.9, 0.7, 0.5)])
def test_the_quality_tiers_at_their_thresholds(dataset, excellent, good, fair):
    tiers = {1.0: "Excellent", excellent: "Excellent", excellent - 1e-4: "Good", good: "Good", good - 1e-4: "Fair"}
    tiers |= {fair: "Fair", fair - 1e-4: "Poor", 0.0: "Poor"}
    assert {accuracy: quality_tier(accuracy, describe(dataset).tiers) for accuracy in tiers} == tiers


def finished_summary(state: RunState | None = None, **changes: Any) -> Summary:
    if state is None:
        state = RunState(step=100, trained_images=3_200, train_seconds=10.0, best_accuracy=0.75, best_step=80)
        state.last_epoch_sums = Sums(steps=10, images=320, correct=240)
    results = {"test_accuracy": 0.7123, "test_images": 10_000, "quality": "Good", "ended_by": "epochs"}
    return dataclasses.replace(summarize(state, 50, "finished"), **results | changes)


def closing_lines(summary: Summary, val_images: int = 5_000, dataset: str = "cifar10", is_augmented: bool = True) -> list[str]:
    recipe = SimpleNamespace(is_augmented=is_augmented, augment="none")
    plan = SimpleNamespace(dataset=describe(dataset), recipe=recipe)
    return text.closing_lines(summary, val_images, plan)


def test_a_summary_in_numbers():
    summary = finished_summary()
    assert (summary.epochs, summary.steps, summary.images_per_second) == (2, 100, 320)
    assert (summary.train_accuracy, summary.val_accuracy, summary.best_step) == (0.75, 0.75, 80)
    empty = dataclasses.asdict(summarize(RunState(), 50, "running"))
    assert [empty[k] for k in ("train_accuracy", "val_accuracy", "best_step", "images_per_second")] == [None] * 4


def test_every_accuracy_names_its_split_and_what_was_not_measured_is_not_claimed():
    _, train, _, val, test = closing_lines(finished_summary())
    for line, *parts in (
        (train, "train accuracy", "75.00%", "augmented"),
        (val, "val accuracy", "75.00%", "5,000 images", "best_model"),
        (test, "test accuracy", "71.23%", "all 10,000 images", "Good"),
    ):
        assert all(part in line for part in parts), line
    assert "augmented" not in closing_lines(finished_summary(), is_augmented=False)[1]
    assert "first 500 of 10,000 images" in closing_lines(finished_summary(test_images=500))[-1]
    nothing = finished_summary(test_accuracy=None, test_images=0, val_accuracy=None, quality=None)
    assert [line.split()[0] for line in closing_lines(nothing, val_images=0) if "%" in line] == ["train"]


def test_the_closing_lines_say_how_far_the_run_has_come():
    state = RunState(step=150, best_accuracy=0.75, best_step=80)
    for epoch, (correct, loss) in enumerate(((96, 22.5), (256, 5.0), (240, 7.5))):
        state.epoch = epoch
        state.remember_epoch(Sums(steps=10, images=320, loss=loss, correct=correct), val_accuracy=0.25 + epoch / 10)
    summary = finished_summary(state)
    assert (summary.first_train_accuracy, summary.train_accuracy, summary.best_train_accuracy) == (0.3, 0.75, 0.8)
    _, train, loss, val, _ = closing_lines(summary)
    assert all(part in train for part in ("30.00%", "+45.00 points", "80.00%"))
    assert all(part in loss for part in ("0.7500", "2.2500"))
    assert all(part in val for part in ("25.00%", "+50.00 points"))
    assert not any("points" in line for line in closing_lines(dataclasses.replace(summary, epochs=1.0)))


def test_random_labels_have_no_quality_tier_and_their_accuracy_means_nothing():
    assert quality_tier(0.99, describe("random_mnist").tiers) is None
    summary = finished_summary(test_accuracy=0.1015, test_images=2_000, quality=None)
    *_, note = closing_lines(summary, val_images=1_000, dataset="random_mnist")
    assert "chance, 10%" in note


def test_the_numbers_in_the_docstrings_are_what_the_code_gives():
    results = doctest.testmod(schedule)
    assert results.attempted > 0
    assert results.failed == 0
