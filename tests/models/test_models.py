"""Networks: parameters, shapes, initial weights, and the names that the reference documents import."""

import contextlib
import importlib
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.data import synthetic
from cifar10.models.registry import build_model, model_names, source_file
from cifar10.plan import make_plan
from tests.launching import PROJECT, environment

IMAGE_SHAPES = [(3, 32, 32), (1, 28, 28)]


@pytest.mark.parametrize("name", model_names())
def test_a_network_has_the_parameters_that_its_docstring_states_and_a_logit_per_class(name):
    with torch.device("meta"):  # without memory for the weights
        model, batches = build_model(name, 0, 10), [torch.zeros(2, *shape) for shape in IMAGE_SHAPES]
    build = getattr(importlib.import_module(f"cifar10.models.{source_file(name).stem}"), name)
    if stated := re.search(r"([\d,]+) parameters", build.__doc__ or ""):
        assert sum(p.numel() for p in model.parameters()) == int(stated[1].replace(",", ""))
    accepted = []
    for images in batches:
        with contextlib.suppress(RuntimeError, AssertionError):  # of another size or number of channels
            accepted.append(model(images).shape)
    assert accepted
    assert set(accepted) == {(2, 10)}


@pytest.mark.parametrize(
    ("name", "image", "shapes"),
    [
        ("lenet", (3, 32, 32), {"conv1": (6, 28, 28), "pool": (6, 14, 14), "conv2": (16, 10, 10), "fc1": (120,), "fc2": (84,)}),
        ("mnist_cnn", (1, 28, 28), {"conv1": (16, 28, 28), "pool": (16, 14, 14), "conv2": (32, 14, 14), "fc1": (128,)}),
        ("bn_cnn_wide", (3, 32, 32), {"conv1": (32, 32, 32), "pool": (32, 16, 16), "conv2": (64, 16, 16), "fc1": (128,)}),
    ],
)
def test_the_documents_layers_have_the_documents_shapes(name, image, shapes):
    model, found = build_model(name, 0, 10), {}
    for layer, module in model.named_children():
        module.register_forward_hook(lambda _, __, out, layer=layer: found.setdefault(layer, tuple(out.shape[1:])) and None)
    model(torch.randn(2, *image))
    assert shapes.items() <= found.items()


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


def test_lenet_is_the_documents_network_with_pytorchs_initialization():
    ours = build_model("lenet", 5, 10)
    torch.manual_seed(5)
    documents = DocumentsNet()
    assert ours.state_dict().keys() == documents.state_dict().keys()
    assert all(torch.equal(value, documents.state_dict()[name]) for name, value in ours.state_dict().items())
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(ours(images), documents(images))


def test_the_gray_networks_initial_weights_are_kaiming_over_the_outputs():
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


def test_speednet_accepts_images_of_any_size():
    model = build_model("speednet_small", 0, 10)
    assert all(model(torch.randn(2, 3, size, size)).shape == (2, 10) for size in (16, 24, 28))


@pytest.mark.parametrize(("name", "near"), [("smoth_cnn", "smooth_cnn"), ("bn_cnm", "bn_cnn"), ("zzz", "speednet_small")])
def test_an_unknown_model_is_refused_with_the_nearest_or_all_names(name, near):
    for refuse in (lambda: build_model(name, 0, 10), lambda: make_plan(["--model", name], 1, "main.py")):
        with pytest.raises(UsageError, match=f"^--model {name} is unknown; .*{near}"):
            refuse()
