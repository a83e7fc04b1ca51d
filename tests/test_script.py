"""cifar10_deepspeed.py and report.py: the network, the learning rate, the measures, and the judgements on them."""

from __future__ import annotations

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
from torch import Tensor, nn

import cifar10_deepspeed as script
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


def test_the_networks_size_names_and_shapes():
    model = CIFAR10CNNEnhanced()
    assert sum(p.numel() for p in model.parameters()) == 268_746
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    statistics = {"running_mean", "running_var"}
    assert shapes == {
        "conv1.weight": (16, 3, 3, 3),
        "conv1.bias": (16,),
        **{f"bn1.{name}": (16,) for name in ("weight", "bias", *statistics)},
        "bn1.num_batches_tracked": (),
        "conv2.weight": (32, 16, 3, 3),
        "conv2.bias": (32,),
        **{f"bn2.{name}": (32,) for name in ("weight", "bias", *statistics)},
        "bn2.num_batches_tracked": (),
        "fc1.weight": (128, 2048),
        "fc1.bias": (128,),
        "fc2.weight": (10, 128),
        "fc2.bias": (10,),
    }


def test_what_each_layer_makes_of_an_image():
    model, shapes = CIFAR10CNNEnhanced(), {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: shapes.setdefault(name, tuple(out.shape[1:])) and None)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == {
        "conv1": (16, 32, 32),
        "bn1": (16, 32, 32),
        "pool": (16, 16, 16),  # the first of two
        "conv2": (32, 16, 16),
        "bn2": (32, 16, 16),
        "fc1": (128,),
        "fc2": (10,),
    }


def test_the_initial_weights_are_kaiming_over_the_inputs_and_halved_where_linear():
    torch.manual_seed(0)
    models = [CIFAR10CNNEnhanced() for _ in range(30)]
    for name, fan_in, factor in (("conv1", 27, 1.0), ("conv2", 144, 1.0), ("fc1", 2048, 0.5), ("fc2", 128, 0.5)):
        weights = torch.cat([getattr(model, name).weight.flatten() for model in models])
        assert weights.std().item() == pytest.approx(factor * math.sqrt(2 / fan_in), rel=0.03)
        assert abs(weights.mean().item()) < 0.03 * weights.std().item()
        assert all(getattr(model, name).bias.eq(0).all() for model in models)
    for model in models[:1]:
        for norm in (model.bn1, model.bn2):
            assert norm.weight.eq(1).all()
            assert norm.bias.eq(0).all()


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


def test_initial_weights_are_a_function_of_the_seed():
    first, again, other = (build_model("bn_cnn", seed, 10).fc1.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_model_by_name_is_the_one_of_its_file():
    assert type(build_model("smooth_cnn", 0, 10)).__module__ == "cifar10.models.smooth_cnn"
    assert type(build_model("bn_cnn", 0, 10)) is CIFAR10CNNEnhanced


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


def test_the_documents_schedule_over_one_epoch_never_exceeds_the_base_rate():
    for warmup in (0.05, 0.1, 0.5, 1, 5):
        assert 0 < get_lr_schedule(0, 0.01, warmup, 1) <= 0.01


@pytest.mark.parametrize("steps_per_epoch", [3, 1562])
def test_per_epoch_is_the_document_at_every_epoch(steps_per_epoch):
    recipe = load("bn_cnn_document").recipe
    found = [
        0.01 * lr_multiplier(recipe, e * steps_per_epoch + s, steps_per_epoch)
        for e in range(50)
        for s in (0, steps_per_epoch - 1)
    ]
    due = [get_lr_schedule(e, 0.01, 5, 50) for e in range(50) for _ in (0, 1)]
    assert found == pytest.approx(due, rel=1e-12)


@pytest.mark.parametrize("epochs", [1, 1.5, 2, 10, 49, 100])
def test_a_shortened_per_epoch_run_reaches_the_full_rate_and_ends_above_zero(epochs):
    found = multipliers(dataclasses.replace(load("bn_cnn_document").recipe, epochs=epochs), 100)
    assert max(found) == pytest.approx(1, abs=0.01)
    assert min(found) > 0


@pytest.mark.parametrize("epochs", [0.02, 0.1, 0.5, 1, 3, 10, 50])
def test_per_step_every_length_of_run_rises_to_the_full_rate_and_falls(epochs):
    steps_per_epoch = 10_000
    recipe = Recipe(epochs=epochs, warmup_epochs=5, val_images=0)
    found = multipliers(recipe, steps_per_epoch)
    peak = found.index(max(found))
    assert 0.99 <= max(found) <= 1
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert peak <= len(found) / 10 + 1
    assert found[0] > 0
    assert found[-1] > 0
    assert found[-1] < 0.01 * max(found)


def test_a_warmup_shorter_than_a_tenth_is_kept():
    found = multipliers(Recipe(epochs=50, warmup_epochs=1, val_images=0), 1_000)
    assert found.index(max(found)) in (999, 1_000)
    assert found[499] == pytest.approx(0.4995)


def test_without_a_warmup_the_run_starts_at_the_full_rate():
    for moves in ("per-step", "per-epoch"):
        found = multipliers(Recipe(epochs=2, warmup_epochs=0, val_images=0, lr_moves=moves), 100)
        assert max(found) == found[0] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("steps_per_epoch", [351, 390, 1562])
@pytest.mark.parametrize("epochs", [1e-9, 0.0001, 0.001, 0.01, 0.25, 0.5, 0.75, 1.5, 2.5, 3])
def test_every_step_of_every_run_learns(epochs, steps_per_epoch):
    recipe = Recipe(epochs=epochs, warmup_epochs=5, val_images=0)
    for found in multipliers(recipe, steps_per_epoch):
        assert 1e-12 < found <= 1


def test_max_steps_plays_no_part_in_the_schedule():
    names = {field.name for field in dataclasses.fields(Recipe)}
    assert "max_steps" not in names  # and the schedule sees nothing but a recipe, a step and the steps of an epoch
    assert lr_multiplier.__code__.co_varnames[: lr_multiplier.__code__.co_argcount] == ("recipe", "step", "steps_per_epoch")


# --- the measures -----------------------------------------------------------------------------------------------------


def test_accuracy_in_percent_is_exact_for_every_count_of_32():
    for correct in range(33):
        targets = torch.arange(32) % 10
        outputs = F.one_hot(targets, 10).float()
        outputs[correct:] = F.one_hot((targets[correct:] + 1) % 10, 10).float()
        assert calculate_accuracy(outputs, targets) == correct / 32 * 100


NUM_IMAGES = 37


def evaluation_loader(rank: int, size: int, labels: np.ndarray | None = None, batch_images: int = 10):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_IMAGES, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, NUM_IMAGES) if labels is None else labels
    here = SimpleNamespace(device=CPU, rank=rank, size=size)
    recipe = Recipe(epochs=1, warmup_epochs=0, val_images=0)
    loader = EvaluationLoader.of(images, labels, recipe, here)
    plain = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - torch.tensor(recipe.mean)[:, None, None]) / (
        torch.tensor(recipe.std)[:, None, None]
    )
    return dataclasses.replace(loader, batch_images=batch_images), plain, torch.from_numpy(labels)


def alone(tensor: Tensor) -> Tensor:
    """The sum over ranks where there is one, or where a test sums by itself."""
    return tensor


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_every_image_of_a_split_goes_to_exactly_one_rank(size):
    numbers = np.arange(NUM_IMAGES)
    visited = [n for rank in range(size) for _, ids in evaluation_loader(rank, size, numbers)[0] for n in ids.tolist()]
    assert sorted(visited) == numbers.tolist()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_equals_a_plain_computation_at_any_world_size(size):
    model = build_model("bn_cnn", 0, 10)
    model(torch.randn(64, 3, 32, 32))  # batch statistics that are not the initial ones
    results = []
    for rank in range(size):
        loader, images, labels = evaluation_loader(rank, size)
        model.train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        results.append(evaluate(model, loader, SimpleNamespace(device=CPU, total=alone)))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        logits = model.eval()(images)
    correct = (logits.argmax(1) == labels).sum().item()
    assert sum(r.accuracy for r in results) == pytest.approx(correct / NUM_IMAGES, rel=1e-12)
    assert sum(r.loss for r in results) == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert all(r.images == NUM_IMAGES for r in results)  # of the whole split, as the sums are


def test_evaluation_does_not_depend_on_how_the_split_is_cut():
    model, results = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), []
    for batch_images in (1, 10, 36, 37, 1_000):
        loader, _, _ = evaluation_loader(0, 1, batch_images=batch_images)
        results.append(evaluate(model, loader, SimpleNamespace(device=CPU, total=alone)))
    assert {r.accuracy for r in results} == {results[0].accuracy}
    assert [r.loss for r in results] == pytest.approx([results[0].loss] * 5, rel=1e-6)


# --- the report -------------------------------------------------------------------------------------------------------


def describe(dataset: str) -> Description:
    return find(dataset).describe(Path("nowhere"))


@pytest.mark.parametrize(
    ("dataset", "least"), [("cifar10", (0.8, 0.7, 0.6)), ("synthetic", (0.8, 0.7, 0.6)), ("mnist", (0.9, 0.7, 0.5))]
)
def test_the_quality_tiers_at_their_thresholds(dataset, least):
    excellent, good, fair = least
    tiers = {1.0: "Excellent", excellent: "Excellent", excellent - 1e-4: "Good", good: "Good", good - 1e-4: "Fair"}
    tiers |= {fair: "Fair", fair - 1e-4: "Poor", 0.0: "Poor"}
    assert {accuracy: quality_tier(accuracy, describe(dataset).tiers) for accuracy in tiers} == tiers


def on(dataset: str, augments: bool = True) -> SimpleNamespace:
    """What the closing lines read of a plan."""
    return SimpleNamespace(dataset=describe(dataset), recipe=SimpleNamespace(is_augmented=augments))


def test_random_labels_have_no_quality_tier_and_their_accuracy_is_said_to_mean_nothing():
    assert quality_tier(0.99, describe("random_mnist").tiers) is None
    summary = finished_summary(test_accuracy=0.1015, test_images=2_000, quality=None)
    *_, test, note = text.closing_lines(summary, val_images=1_000, plan=on("random_mnist"))
    assert test.endswith("(best_model; all 2,000 images)")
    assert "memorizing" in note
    assert "chance, 10%" in note


def finished_summary(state: RunState | None = None, **changes: Any) -> Summary:
    if state is None:
        state = RunState(step=100, trained_images=3_200, train_seconds=10.0, best_accuracy=0.75, best_step=80)
        state.last_epoch_sums = Sums(steps=10, images=320, correct=240)
    results = {"test_accuracy": 0.7123, "test_images": 10_000, "quality": "Good", "ended_by": "epochs"}
    return dataclasses.replace(summarize(state, 50, "finished"), **results | changes)


def test_a_summary_in_numbers():
    summary = finished_summary()
    assert (summary.epochs, summary.steps, summary.images_per_second) == (2, 100, 320)
    assert (summary.train_accuracy, summary.val_accuracy, summary.best_step) == (0.75, 0.75, 80)
    empty = dataclasses.asdict(summarize(RunState(), 50, "running"))
    assert [empty[k] for k in ("train_accuracy", "val_accuracy", "best_step", "images_per_second")] == [None] * 4


def test_every_accuracy_of_the_closing_lines_carries_its_split():
    lines = text.closing_lines(finished_summary(), val_images=5_000, plan=on("cifar10"))
    with_numbers = [line for line in lines if "%" in line]
    assert [line.split()[:2] for line in with_numbers] == [["train", "accuracy"], ["val", "accuracy"], ["test", "accuracy"]]
    train, val, test = with_numbers
    assert "75.00%" in train
    assert "augmented" in train
    assert "5,000 images" in val
    assert "best_model" in val
    assert "71.23%" in test
    assert "all 10,000 images" in test
    assert test.endswith("Good")
    assert "minutes" in lines[0]


def test_the_closing_lines_say_how_far_the_run_has_come():
    state = RunState(step=150, best_accuracy=0.75, best_step=80)
    for epoch, (correct, loss) in enumerate(((96, 22.5), (256, 5.0), (240, 7.5))):
        state.epoch = epoch
        state.remember_epoch(Sums(steps=10, images=320, loss=loss, correct=correct), val_accuracy=0.25 + epoch / 10)
    summary = finished_summary(state)
    assert (summary.first_train_accuracy, summary.train_accuracy, summary.best_train_accuracy) == (0.3, 0.75, 0.8)
    _, train, loss, val, _ = text.closing_lines(summary, val_images=5_000, plan=on("cifar10"))
    assert "first epoch 30.00%, gain +45.00 points, best 80.00%" in train
    assert loss == "training loss  0.7500  (last epoch; first epoch 2.2500)"
    assert "first epoch 25.00%, gain +50.00 points" in val
    one_epoch = dataclasses.replace(summary, epochs=1.0)
    assert not any("gain" in line for line in text.closing_lines(one_epoch, val_images=5_000, plan=on("cifar10")))


def test_a_part_of_the_test_split_is_named_as_one():
    lines = text.closing_lines(finished_summary(test_images=500), val_images=5_000, plan=on("cifar10"))
    assert "first 500 of 10,000 images" in lines[-1]


def test_images_are_called_augmented_where_they_are():
    train = [text.closing_lines(finished_summary(), 0, on("cifar10", augmented))[1] for augmented in (True, False)]
    assert ["augmented" in line for line in train] == [True, False]
    assert all("weights still moving" in line for line in train)


def test_what_was_not_measured_is_not_claimed():
    nothing = finished_summary(test_accuracy=None, test_images=0, val_accuracy=None, quality=None)
    lines = text.closing_lines(nothing, val_images=0, plan=on("cifar10"))
    assert not any(line.startswith(("val", "test")) for line in lines)
    assert [line.split()[:2] for line in lines if "%" in line] == [["train", "accuracy"]]


def test_the_numbers_in_the_docstrings_are_what_the_code_gives():
    results = doctest.testmod(script)
    assert results.attempted > 0
    assert results.failed == 0
