"""cifar10/models and the script's networks: sizes, shapes, initial weights, and the documents' own names for them."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cifar10_deepspeed as script
from cifar10 import UsageError
from cifar10.data import synthetic
from cifar10.models.registry import build_model
from cifar10.plan import make_plan
from tests.launching import PROJECT, environment

SHAPES = {"mnist_cnn": (1, 28, 28)}  # of the images that a network takes, where they are not CIFAR-10's
PARAMETERS = {
    "bn_cnn": 268_746,
    "bn_cnn_wide": 545_290,
    "lenet": 62_006,
    "mnist_cnn": 215_370,
    "smooth_cnn": 11_642,
    "speednet": 1_971_328,
    "speednet_large": 9_915_392,
    "speednet_small": 294_336,
    "vgg19": 139_611_210,
}


def build(name: str) -> nn.Module:
    """The network by name; the large one without memory for its weights."""
    with torch.device("meta" if name == "vgg19" else "cpu"):
        return build_model(name, 0, 10)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_answers(name):
    model = build(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    device = next(model.parameters()).device
    assert model(torch.zeros(2, *SHAPES.get(name, (3, 32, 32)), device=device)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        (
            "lenet",
            {"conv1": (6, 28, 28), "pool": (6, 14, 14), "conv2": (16, 10, 10), "fc1": (120,), "fc2": (84,), "fc3": (10,)},
        ),
        ("mnist_cnn", {"conv1": (16, 28, 28), "pool": (16, 14, 14), "conv2": (32, 14, 14), "fc1": (128,), "fc2": (10,)}),
        (
            "bn_cnn_wide",
            {"conv1": (32, 32, 32), "bn1": (32, 32, 32), "pool": (32, 16, 16), "conv2": (64, 16, 16), "bn2": (64, 16, 16)}
            | {"fc1": (128,), "fc2": (10,)},
        ),
    ],
)
def test_what_each_layer_makes_of_an_image(name, shapes):
    model, found = build(name), {}
    for layer, module in model.named_children():
        module.register_forward_hook(lambda _, __, out, layer=layer: found.setdefault(layer, tuple(out.shape[1:])) and None)
    model(torch.randn(2, *SHAPES.get(name, (3, 32, 32))))
    assert found == shapes


class DocumentsNet(nn.Module):
    """The forward pass of the LeNet document's network, in the words of the tutorial that it follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def test_lenet_is_the_documents_network_in_pytorchs_own_initialisation():
    ours = build_model("lenet", 5, 10)
    torch.manual_seed(5)
    documents = DocumentsNet()
    assert ours.state_dict().keys() == documents.state_dict().keys()
    assert all(torch.equal(value, documents.state_dict()[name]) for name, value in ours.state_dict().items())
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(ours(images), documents(images))


def test_the_grey_networks_initial_weights_are_kaiming_over_the_outputs():
    models = [build_model("mnist_cnn", seed, 10) for seed in range(30)]
    for name, fan_out in (("conv1", 16 * 25), ("conv2", 32 * 25), ("fc1", 128), ("fc2", 10)):
        weights = torch.cat([getattr(model, name).weight.flatten() for model in models])
        assert weights.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
        assert abs(weights.mean().item()) < 0.03 * weights.std().item()
        assert all(getattr(model, name).bias.eq(0).all() for model in models)


def test_the_documents_import_their_networks_from_the_script():
    source = """
import sys
from cifar10_deepspeed import CIFAR10CNNEnhanced, CNNModelEnhanced, Net
print(Net.__module__, CNNModelEnhanced.__module__, CIFAR10CNNEnhanced.__module__, "torchvision" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", source], env=environment(PYTHONPATH=str(PROJECT)), capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
    assert result.stdout.split() == ["cifar10.models.lenet", "cifar10.models.mnist_cnn", "cifar10.models.bn_cnn", "False"]


def test_a_name_that_the_script_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'NetEnhanced'"):
        _ = script.NetEnhanced


def test_speednet_whitens_patches_of_the_images_it_starts_from():
    model = build_model("speednet_small", 0, 10)
    images = synthetic.synthetic("train", 500, seed=0).pixels
    images = torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5
    model.start_from_images(images)
    patches = F.conv2d(images, model.whitening)
    half = patches[:, :12].permute(0, 2, 3, 1).reshape(-1, 12)
    moments = half.T @ half / len(half)
    assert torch.allclose(moments - torch.diag(moments.diagonal()), torch.zeros(12, 12), atol=1e-3)
    assert moments.diagonal().max() < 1.01  # eigenvalue / (eigenvalue + 5e-4)
    assert torch.equal(patches[:, 12:], -patches[:, :12])


def test_speednet_passes_signals_through_at_the_start():
    first = build_model("speednet_small", 0, 10).groups[0].conv2
    images = torch.randn(2, 32, 8, 8)
    assert torch.equal(first(images), images)


def test_speednet_answers_for_images_of_any_size():
    model = build_model("speednet_small", 0, 10)
    assert all(model(torch.randn(2, 3, size, size)).shape == (2, 10) for size in (16, 24, 28, 32))


@pytest.mark.parametrize(("name", "near"), [("smoth_cnn", "smooth_cnn"), ("bn_cnm", "bn_cnn"), ("zzz", "speednet_small")])
def test_an_unknown_model_is_refused_with_the_nearest_or_all_names(name, near):
    for refuse in (lambda: build_model(name, 0, 10), lambda: make_plan(["--model", name], 1, "main.py")):
        with pytest.raises(UsageError, match=f"^--model {name} is unknown; .*{near}"):
            refuse()
