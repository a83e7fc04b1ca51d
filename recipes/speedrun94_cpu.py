"""94% of the test images (with test-time augmentation) on two CPU cores in about twelve minutes.

uv run python cifar10_deepspeed.py --recipe speedrun94_cpu
"""

from cifar10.recipe import Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(
        model="speednet",
        epochs=8,
        warmup_epochs=0,
        lr_shape="linear",
        val_images=0,
        first_sizes=(24, 28),
        first_epochs=(3, 2),
        crop_padding=2,
        alternate_flip=True,
        label_smoothing=0.2,
        std=(0.2470, 0.2435, 0.2616),
        patience=0,
        tta="mirror_translate",
    ),
    deepspeed_config="recipes/speedrun94_cpu.json",
)
