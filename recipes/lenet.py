"""The first reference document's LeNet: Adam with a warmup of 1,000 steps, global batch 4, 2 epochs, no augmentation.

    uv run python main.py --recipe lenet

The document expects 60 to 65% of the test images after 2 epochs, and 75 to 80% after 20 with augmentation, which it leaves to
the reader. Measured on the real CIFAR-10: 56.25 +- 0.94% after 2 epochs (3 seeds, records/2026-11-21_lenet_cpu), 64.10% after
20 with --augment "RandomCrop(4) RandomHorizontalFlip" (1 seed, records/2026-11-27_lenet_20_epochs_cpu). Its JSON is unchanged;
it does not mention clipping, so DeepSpeed's default of 1.0 applies.
"""

from cifar10.config.recipe import Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(
        model="lenet",
        epochs=2,
        warmup_epochs=0,  # the config's scheduler sets the learning rate
        val_images=0,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        augment="none",
        patience=0,
    ),
    deepspeed={
        "train_batch_size": 4,
        "steps_per_print": 2000,
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000},
        },
        "wall_clock_breakdown": False,
    },
)
