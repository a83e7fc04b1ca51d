"""The reference document's run to the letter: learning rate 0.01, global batch 32, 50 epochs, all 50,000 images.

uv run python main.py --recipe bn_cnn_document
"""

from cifar10.recipe import Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(epochs=50, warmup_epochs=5, val_images=0, lr_moves="per-epoch"),
    deepspeed_config="recipes/bn_cnn_document.json",
)
