"""true shapes and parameter counts, told in few lines, and nothing about the model changed by telling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import cifar10_deepspeed as script
from cifar10 import UsageError
from cifar10.config.recipe import recipe_names
from cifar10.metrics import text
from cifar10.metrics.console import ConsoleSink, plain_lines
from cifar10.metrics.sink import Section, Steps
from cifar10.models import bn_cnn, weights
from cifar10.models.registry import build_model, model_names
from cifar10.plan import Plan, make_plan

IMAGES = {"mnist_cnn": (1, 28, 28), "vgg19": (3, 64, 64)}


def plan(*flags: str) -> Plan:
    """Of a command line on images that need no disk."""
    return make_plan([*flags, "--dataset", "synthetic"], 1, "x")


@pytest.mark.parametrize("name", model_names())
def test_every_parameter_is_in_one_layer_and_in_the_total(name) -> None:
    model = build_model(name, 0, 10)
    total = sum(p.numel() for p in model.parameters())
    section = text.model_section(model, IMAGES.get(name, (3, 32, 32)))
    *layers, last = [int(row[-1].replace(",", "")) for row in section.rows]
    assert sum(layers) == last == total
    assert len(layers) <= text.MOST_LAYERS


def test_the_documents_network_in_its_true_numbers() -> None:
    section = text.model_section(build_model("bn_cnn", 0, 10), (3, 32, 32))
    assert [(row[0], row[1], row[2], row[3].strip()) for row in section.rows] == [
        ("conv1", "Conv2d", "16x32x32", "448"),
        ("bn1", "BatchNorm2d", "16x32x32", "32"),
        ("conv2", "Conv2d", "32x16x16", "4,640"),
        ("bn2", "BatchNorm2d", "32x16x16", "64"),
        ("fc1", "Linear", "128", "262,272"),
        ("fc2", "Linear", "10", "1,290"),
        ("total", "all of them trained", "3x32x32 -> 10", "268,746"),
    ]


def test_looking_at_a_model_changes_nothing_and_draws_nothing() -> None:
    model = build_model("smooth_cnn", 0, 10)
    model.train()
    next(model.children()).eval()  # modes of its own
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    text.layers(model, (3, 32, 32))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Unusual(nn.Module):
    """One layer used twice, a frozen one, and a parameter outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 1)
        self.scale = nn.Parameter(torch.ones(7))
        self.head = nn.Linear(3, 10)
        self.twice.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.twice(self.twice(images)).mean(dim=(2, 3))) * self.scale.sum()


def test_a_layer_counts_once_and_what_lies_outside_of_layers_too() -> None:
    found = text.layers(Unusual(), (3, 8, 8))
    assert [(layer.name, layer.shape, layer.parameters) for layer in found] == [
        ("twice", (3, 8, 8), 12),
        ("twice", (3, 8, 8), 0),
        ("head", (10,), 40),
        ("", (), 7),
    ]
    *_, total = text.model_section(Unusual(), (3, 8, 8)).rows
    assert total == ("total", "47 of them trained", "3x8x8 -> 10", "59")


def test_many_layers_are_told_as_their_blocks() -> None:
    section = text.model_section(build_model("vgg19", 0, 10), (3, 64, 64))
    assert [row[:2] for row in section.rows] == [
        ("features", "16 Conv2d"),
        ("classifier", "3 Linear"),
        ("total", "all of them trained"),
    ]
    assert section.rows[0][2] == "512x2x2"
    assert section.rows[2][3] == "139,611,210"


@pytest.mark.parametrize("recipe", sorted(set(recipe_names()) - {"mnist_synthetic", "vgg19"}))
def test_what_a_run_says_before_it_trains_fits_a_screen(recipe) -> None:
    made = plan("--recipe", recipe)
    model = build_model(made.recipe.model, 0, 10)
    said = list(text.opening_lines(made, Path("runs/x"), "1 rank", model, (45_000, 5_000), (0, 10, 10)))
    lines = [line for one in said for line in (plain_lines(one) if isinstance(one, Section) else [one])]
    assert 12 <= len([line for line in lines if not line.startswith("note: ")]) <= 20
    assert max(map(len, lines)) <= 150


def test_the_sections_say_what_the_settings_are() -> None:
    made = plan("--lr", "0.05", "--global-batch-size", "96", "--micro-batch-size", "24", "--epochs", "20", "--patience", "7")
    training = "\n".join(plain_lines(text.training_section(made)))
    for words in (
        "96 images a step: 1 rank x 4 micro-batches x 24",
        "lr 0.05",
        "momentum 0.9",
        "over 2 epochs",
        "after 7 epochs",
    ):
        assert words in training, words
    assert "fp32; ZeRO stage 0; gradients clipped to norm 1" in training
    assert "never" in "\n".join(plain_lines(text.training_section(plan("--patience", "0"))))
    in_bf16 = plain_lines(text.training_section(plan("--precision", "bf16")))
    assert "bf16 (torch_autocast), weights in fp32" in "\n".join(in_bf16)
    assert "the JSON's WarmupLR" in "\n".join(plain_lines(text.training_section(plan("--recipe", "lenet"))))
    data = "\n".join(plain_lines(text.data_section(plan("--augment", "none"))))
    assert "augmentation  none" in data
    assert "10,000 test images" in data
    assert "unopened" in "\n".join(plain_lines(text.data_section(plan("--test-images", "0"))))


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        ("", {"augmentation": "random crop after padding by 3, random horizontal flip"}),
        ("--augment none", {"augmentation": "none"}),
        ("--resize 24", {"sizes": "resized to 24x24"}),
        ("--resize 40 --image-size 32", {"sizes": "resized to 40x40, cropped to 32x32"}),
        ("--first-sizes 16 24 --first-epochs 3 1", {"sizes": "16x16 in epochs 1-3, 24x24 in epoch 4, then 32x32"}),
    ],
)
def test_sizes_and_augmentation_are_described(flags, rows) -> None:
    said = dict(text.data_section(make_plan([*flags.split(), "--dataset=synthetic"], 1, "x")).rows)
    assert said.items() >= rows.items()
    assert ("sizes" in said) == ("sizes" in rows)


def test_the_learning_rates_shape_and_the_second_test_are_told() -> None:
    made = plan("--lr-shape", "linear", "--tta", "mirror")
    told = [line for section in (text.training_section(made), text.data_section(made)) for line in plain_lines(section)]
    assert any(", then a line to 0" in line for line in told)
    assert any("without and with test-time augmentation" in line for line in told)


SECTION = Section("model", [("a", "[bold]", "1"), ("long", "", "1,234")], ("layer", "kind", "parameters"))


def test_a_section_without_a_terminal_has_its_title_in_each_line(capsys) -> None:
    ConsoleSink(Steps(10, last=10), 0, 32).event(SECTION)
    assert capsys.readouterr().out == "model: a     [bold]  1\nmodel: long          1,234\n"


def test_a_section_in_a_terminal_is_a_table(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    sink = ConsoleSink(Steps(10, last=10), 0, 32)
    sink.event(SECTION)
    sink.close()
    printed = capsys.readouterr().out
    for words in ("parameters", "[bold]", "1,234", "╭", "╰"):
        assert words in printed, words


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = build_model("bn_cnn", 0, 10)
    weights.check_initial_weights(model, "bn_cnn")
    model.fc1.weight.data[3, 4] = float("nan")
    with pytest.raises(UsageError, match=r"fc1\.weight that are not finite"):
        weights.check_initial_weights(model, "bn_cnn")


def test_first_sizes_that_the_network_does_not_take_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--model bn_cnn does not accept color images of 24x24 pixels"):
        script.initial_model(plan("--first-sizes", "24", "--first-epochs", "1"))


def test_a_run_is_refused_whose_weights_are_not_finite(monkeypatch) -> None:
    monkeypatch.setattr(bn_cnn.CIFAR10CNNEnhanced, "_initialize", lambda self: self.conv2.bias.data.fill_(float("inf")))
    with pytest.raises(UsageError, match=r"conv2\.bias"):
        script.initial_model(plan())
