"""The MNIST document's network on learnable synthetic 28x28 images, since its own are noise: Adam, global batch 32, 50 epochs.

    uv run python main.py --recipe mnist_synthetic                              learnable images in MNIST's shape
    uv run python main.py --recipe mnist_synthetic --dataset mnist              the real MNIST, which is downloaded
    uv run python main.py --recipe mnist_synthetic --dataset random_mnist       the document's data: noise with random labels

The document expects 15.75% of its training images, which are noise, after 50 epochs, and 98 to 99% on the real MNIST, where
99.16 +- 0.10% were measured (3 seeds, records/2026-11-27_mnist_cpu). Noise cannot be learned: such a run measures how fast the
network memorizes.
"""

from cifar10.config.recipe import Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(
        model="mnist_cnn",
        dataset="synthetic_mnist",
        epochs=50,
        warmup_epochs=5,
        val_images=1_000,
        lr_schedule="cosine(per_epoch=True)",
        mean=(0.1307,),
        std=(0.3081,),
        augment="none",
    ),
    deepspeed={
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
        "fp16": {"enabled": True},
    },
    precision=("fp16", "bf16", "fp32"),
)
