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
        lr_schedule="linear",
        val_images=0,
        first_sizes=(24, 28),
        first_epochs=(3, 3),
        augment="RandomCrop(2, reflect) AlternatingFlip BrightnessContrast(0.14, 0.13)",
        label_smoothing=0.09,
        std=(0.2470, 0.2435, 0.2616),
        patience=0,
        tta="mirror+translate",
    ),
    deepspeed={
        "train_batch_size": 1536,
        "optimizer": {
            "type": "MuonWithSGD",
            "params": {"lr": 0.205, "momentum": 0.655, "bias_lr": 88, "head_lr": 832, "sgd_momentum": 0.825, "decay": 0.0016},
        },
        "gradient_clipping": 0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 0},
    },
    engine_level="captured",
)
