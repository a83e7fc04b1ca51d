"""What a run prints: true shapes and parameter counts in few lines, without changing the model; settings and failures."""

import sys
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
from cifar10.models import bn_cnn
from cifar10.models.registry import build_model, model_names
from cifar10.plan import Plan, make_plan

IMAGES = {"mnist_cnn": (1, 28, 28), "vgg19": (3, 64, 64)}


def plan(flags: str = "") -> Plan:
    return make_plan([*flags.split(), "--dataset", "synthetic"], 1, "x")


@pytest.mark.parametrize("name", model_names())
def test_every_parameter_is_in_one_layer_and_in_the_total(name) -> None:
    model = build_model(name, 0, 10)
    *layers, last = [int(row[-1].replace(",", "")) for row in text.model_section(model, IMAGES.get(name, (3, 32, 32))).rows]
    assert sum(layers) == last == sum(p.numel() for p in model.parameters())
    assert len(layers) <= text.MOST_LAYERS


def test_the_documents_network_in_its_true_numbers() -> None:
    section = text.model_section(build_model("bn_cnn", 0, 10), (3, 32, 32))
    assert [(*row[:3], row[3].strip()) for row in section.rows] == [
        ("conv1", "Conv2d", "16x32x32", "448"),
        ("bn1", "BatchNorm2d", "16x32x32", "32"),
        ("conv2", "Conv2d", "32x16x16", "4,640"),
        ("bn2", "BatchNorm2d", "32x16x16", "64"),
        ("fc1", "Linear", "128", "262,272"),
        ("fc2", "Linear", "10", "1,290"),
        ("total", "all trainable", "3x32x32 -> 10", "268,746"),
    ]


def test_listing_the_layers_changes_neither_the_model_nor_the_random_state() -> None:
    model = build_model("smooth_cnn", 0, 10)
    model.train()
    next(model.children()).eval()  # a mixture of modes
    modes = [module.training for module in model.modules()]
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    text.layers(model, (3, 32, 32))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Unusual(nn.Module):
    """A layer used twice, which is frozen, and a parameter outside of layers."""

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
    due = [("twice", (3, 8, 8), 12), ("twice", (3, 8, 8), 0), ("head", (10,), 40), ("", (), 7)]
    assert [(layer.name, layer.shape, layer.parameters) for layer in found] == due
    assert text.model_section(Unusual(), (3, 8, 8)).rows[-1] == ("total", "47 trainable", "3x8x8 -> 10", "59")


def test_many_layers_are_listed_as_blocks() -> None:
    section = text.model_section(build_model("vgg19", 0, 10), (3, 64, 64))
    assert [row[:2] for row in section.rows[:2]] == [("features", "16 Conv2d"), ("classifier", "3 Linear")]
    assert (section.rows[0][2], section.rows[2][3]) == ("512x2x2", "139,611,210")


@pytest.mark.parametrize("recipe", sorted(set(recipe_names()) - {"mnist_synthetic", "vgg19"}))
def test_what_a_run_prints_before_it_trains_fits_a_screen(recipe) -> None:
    made = plan(f"--recipe {recipe}")
    model = build_model(made.recipe.model, 0, 10)
    printed = list(text.opening_lines(made, Path("runs/x"), "1 rank", model, (45_000, 5_000), (0, 10, 10)))
    lines = [line for one in printed for line in (plain_lines(one) if isinstance(one, Section) else [one])]
    assert 12 <= len([line for line in lines if not line.startswith("note: ")]) <= 22
    assert max(map(len, lines)) <= 150


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--global-batch-size 96 --micro-batch-size 24", "96 images per step = 1 rank x 4 micro-batches x 24"),
        ("--patience 7", "after 7 epochs"),
        ("", "fp32; ZeRO stage 0; gradients clipped to norm 1"),
        ("--precision bf16", "bf16 (torch_autocast), weights in fp32"),
        ("--test-images 0", "test images are not used"),
        ("--tta mirror", "without and with test-time augmentation"),
        ("", "augmentation  random crop after padding by 3, random horizontal flip"),
        ("--resize 24", "sizes         resized to 24x24"),
        ("--resize 40 --image-size 32", "resized to 40x40, cropped to 32x32"),
        ("--first-sizes 16 24 --first-epochs 3 1", "16x16 in epochs 1-3, 24x24 in epoch 4, then 32x32"),
    ],
)
def test_the_sections_describe_the_settings(flags, words) -> None:
    made = plan(flags)
    printed = [line for section in (text.data_section(made), text.training_section(made)) for line in plain_lines(section)]
    assert words in "\n".join(printed)
    assert any(line.startswith("data set: sizes") for line in printed) == ("size" in flags and "batch" not in flags)


SECTION = Section("model", [("a", "[bold]", "1"), ("long", "", "1,234")], ("layer", "kind", "parameters"))


def test_a_section_without_a_terminal_has_its_title_in_each_line(capsys) -> None:
    ConsoleSink(Steps(10, last=10), 0, 32).event(SECTION)
    assert capsys.readouterr().out == "model: a     [bold]  1\nmodel: long          1,234\n"


def test_a_section_in_a_terminal_is_a_table(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    sink = ConsoleSink(Steps(10, last=10), 0, 32)
    sink.event(SECTION)
    sink.close()
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("parameters", "[bold]", "1,234", "╭", "╰")), printed


def test_a_model_with_weights_that_are_not_finite_is_refused_by_their_name(monkeypatch) -> None:
    monkeypatch.setattr(bn_cnn.CIFAR10CNNEnhanced, "_initialize", lambda self: self.conv2.bias.data.fill_(float("inf")))
    with pytest.raises(UsageError, match=r"conv2\.bias"):
        script.initial_model(plan())


def test_first_sizes_that_the_network_does_not_take_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--model bn_cnn does not accept color images of 24x24 pixels"):
        script.initial_model(plan("--first-sizes 24 --first-epochs 1"))
