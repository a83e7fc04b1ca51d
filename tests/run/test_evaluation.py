"""Test-time augmentation: the weights of the views, and independence of the batch."""

import pytest
import torch
from torch import Tensor, nn

from cifar10.run.evaluation import VIEWS, Augmented, views
from tests.helpers import batch


class Corner(nn.Module):
    """Outputs pixels, so that views can be distinguished: those at (0, 0) and (16, 16) of the first channel."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return torch.stack([images[:, 0, 0, 0], images[:, 0, 16, 16]], dim=1)


def test_mirror_is_the_mean_with_the_flip():
    images, _ = batch(4)
    expected = (Corner()(images) + Corner()(images.flip(-1))) / 2
    assert torch.allclose(views(Corner(), images, "mirror"), expected)


def test_the_unshifted_image_counts_as_much_as_the_shifted_ones_together():
    images, model = torch.zeros(1, 3, 32, 32), Corner()
    images[0, 0, 15, 15] = 8.0  # at (16, 16) of the image moved down and to the right
    moved = views(model, images, "mirror+translate")[0, 1].item()
    assert moved == pytest.approx(8 / 8)  # 1/4 of the pair, half of which is not flipped
    images[0, 0, 15, 15], images[0, 0, 16, 16] = 0, 8.0
    assert views(model, images, "mirror+translate")[0, 1].item() == pytest.approx(8 / 4)
    constant = torch.full((2, 3, 32, 32), 5.0)
    assert torch.equal(views(model, constant, "mirror+translate"), torch.full((2, 2), 5.0))


@pytest.mark.parametrize("kind", VIEWS)
def test_every_image_has_the_stated_number_of_views(kind):
    images, model = batch(5)[0], Corner()
    Augmented(model, kind)(images)
    assert model.images == 5 * VIEWS[kind]


@pytest.mark.parametrize("kind", VIEWS)
def test_only_uncertain_images_get_more_views(kind):
    images = torch.zeros(6, 3, 32, 32)
    images[:3, 0, 0, 0] = 10.0  # sure of the first class
    images[3:, 0, 0, 0] = torch.tensor([0.1, 0.2, 0.3])
    model = Corner()
    logits = Augmented(model, kind, below=0.9)(images)
    assert model.images == 6 + 3 * VIEWS[kind]
    assert torch.equal(logits[:3], Corner()(images)[:3])
    assert torch.equal(logits[3:], views(Corner(), images[3:], kind))


def test_an_images_logits_do_not_depend_on_its_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)).double()
    images = batch(20)[0].double()
    augmented = Augmented(model, "mirror+translate", below=0.14)
    together = augmented(images)
    alone = torch.cat([augmented(image[None]) for image in images])
    assert torch.allclose(together, alone)
    assert 0 < (model(images).softmax(dim=1).amax(dim=1) < 0.14).sum() < 20
