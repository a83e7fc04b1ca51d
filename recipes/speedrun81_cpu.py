"""81% of the test images on two CPU cores in less than a minute, from the start of the process to the number printed

    uv run python cifar10_deepspeed.py --recipe speedrun81_cpu

Measured on the real CIFAR-10, 5 seeds (records/2026-11-21_speedrun81_cpu): 82.42 +- 0.31% of the test images, 83.81 +- 0.18%
with more views of those it is unsure of, 38.9 to 41.4 seconds after the process began. Chosen on validation images.
"""

from cifar10.config.recipe import Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(
        model="speednet_small",
        epochs=2.5,
        warmup_epochs=0,
        lr_schedule="linear",
        val_images=0,
        resize=24,
        augment="RandomCrop(1) AlternatingFlip",
        label_smoothing=0.2,
        std=(0.2470, 0.2435, 0.2616),
        patience=0,
        tta="mirror+translate",
        tta_below=0.6,
    ),
    deepspeed={
        "train_batch_size": 500,
        "optimizer": {
            "type": "MuonWithSGD",
            "params": {"lr": 0.24, "momentum": 0.6, "bias_lr": 26.5, "head_lr": 335, "sgd_momentum": 0.85, "decay": 0.001},
        },
        "gradient_clipping": 0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 0},
    },
)
