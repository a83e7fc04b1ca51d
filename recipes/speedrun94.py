"""Meant for 94% of the test images (with test-time augmentation) on one GPU, in nine passes, six of them on smaller images.

    uv run python cifar10_deepspeed.py --recipe speedrun94

Batch, learning rates, borders, brightness, contrast and the sizes of the first epochs follow hiverge's and Fulcrum's entries
(github.com/hiverge/cifar10-speedrun); for two CPU cores there is speedrun94_cpu. No GPU has run it yet, so the 94% is an aim.
"""

from cifar10.config.recipe import Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(
        model="speednet",
        epochs=8.875,
        warmup_epochs=0,
        lr_shape="linear",
        val_images=0,
        first_sizes=(24, 28),
        first_epochs=(3, 3),
        crop_padding=2,
        padding_mode="reflect",
        brightness=0.14,
        contrast=0.13,
        alternate_flip=True,
        label_smoothing=0.09,
        std=(0.2470, 0.2435, 0.2616),
        patience=0,
        tta="mirror+translate",
    ),
    deepspeed_config="recipes/speedrun94.json",
)
