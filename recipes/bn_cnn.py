"""The default: the reference document's BatchNorm CNN and schedule, tuned on the validation split.

uv run python main.py
"""

from cifar10.recipe import Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(epochs=50, warmup_epochs=5, val_images=5_000, crop_padding=3, label_smoothing=0.1),
    deepspeed_config="ds_config.json",
)
