"""The reference documents' own code for loading a trained model, as printed, in the folder of a run.

Ours are only `test_images`, which they leave to the reader, and the grayscale snippet's module name and loaded weights.
"""

from pathlib import Path

import pytest
import torch

from cifar10.data import synthetic
from cifar10.run.predictions import TEST_FILE, read

BASIC = """
import torch
from cifar10_deepspeed import Net

# Load model
model = Net()
checkpoint = torch.load('./checkpoints/final/mp_rank_00_model_states.pt')
model.load_state_dict(checkpoint['module'])
model.eval()

# Make predictions
classes = ('plane', 'car', 'bird', 'cat', 'deer',
           'dog', 'frog', 'horse', 'ship', 'truck')

with torch.no_grad():
    outputs = model(test_images)
    _, predicted = torch.max(outputs, 1)
    print(f'Predicted: {classes[predicted[0]]}')
"""

ENHANCED = BASIC.replace("Net", "CIFAR10CNNEnhanced").replace("/final/", "/best_model/")  # so it differs, comments apart

GRAY = """
import torch
from cifar10_deepspeed import CNNModelEnhanced

# Load model
model = CNNModelEnhanced()
# Load trained weights if saved
model.load_state_dict(torch.load('./checkpoints/best_model/mp_rank_00_model_states.pt')['module'])

# Test inference
model.eval()
with torch.no_grad():
    # Create a sample image (28x28 grayscale)
    sample_image = torch.randn(1, 1, 28, 28)

    # Get predictions
    outputs = model(sample_image)
    probabilities = torch.softmax(outputs, dim=1)
    predicted_class = torch.argmax(probabilities, dim=1)

    print(f"Predicted class: {predicted_class.item()}")
    print(f"Confidence: {probabilities[0][predicted_class].item():.4f}")
"""


def normalized(run: Path) -> torch.Tensor:
    """The synthetic test images as the run's model takes them: float32 [200, 3, 32, 32]."""
    facts = torch.load(run / "checkpoints" / "final" / "mp_rank_00_model_states.pt")["normalization"]
    mean, std = (torch.tensor(facts[name]).view(-1, 1, 1) for name in ("mean", "std"))
    images = torch.from_numpy(synthetic.synthetic("test", 200, 0).pixels.copy()).permute(0, 3, 1, 2)
    return (images / 255 - mean) / std


@pytest.mark.parametrize(("snippet", "name"), [(BASIC, "all trained on"), (ENHANCED, "color")])
def test_a_loaded_model_predicts_what_the_run_did(trained, monkeypatch, capsys, snippet, name):
    monkeypatch.chdir(trained / name)
    names = {"test_images": normalized(trained / name)}
    exec(snippet, names)
    expected = read(trained / name / TEST_FILE)
    assert names["predicted"].tolist()[: len(expected.labels)] == expected.predicted.tolist()
    assert capsys.readouterr().out == f"Predicted: {names['classes'][expected.predicted[0]]}\n"


def test_a_grayscale_model_is_loaded(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained / "gray")
    names = {}
    exec(GRAY, names)
    best = names["probabilities"].max().item()
    assert capsys.readouterr().out == f"Predicted class: {names['outputs'].argmax().item()}\nConfidence: {best:.4f}\n"
