"""The default: the reference document's BatchNorm CNN and schedule, tuned on the validation split.

    uv run python main.py

Measured on the real CIFAR-10, 5 seeds (records/2026-11-21_bn_cnn_cpu): 82.14 +- 0.34% of the test images, in 4.9 to 7.8
minutes of training on two shared CPU cores. Batch, base learning rate, weight decay, the size of the crops and
label smoothing differ from the document's; what was tried is in records/LOG.md.
"""

from cifar10.config.recipe import PROJECT, Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(epochs=50, warmup_epochs=5, val_images=5_000, augment="RandomCrop(3) RandomHorizontalFlip", label_smoothing=0.1),
    deepspeed=PROJECT / "ds_config.json",  # in a file of its own, for users to edit
    engine_level="fused",
)
