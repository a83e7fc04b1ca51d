"""The SLURM document's run: the BatchNorm CNN with twice the channels, SGD with weight decay under ZeRO 2, 100 epochs.

    uv run torchrun --standalone --nproc_per_node=2 cifar10_deepspeed.py --recipe slurm_zero2

The document expects about 81% "on the CIFAR-10 test set", best between epochs 80 and 90. Its batch of 128 = 64 x 1 is for two
ranks; other numbers of ranks keep the 128. It does not mention clipping, so DeepSpeed's default of 1.0 applies. The linear
layers, warmup and schedule are those of the BatchNorm CNN's document; 5,000 images are held out to select the best epoch.
"""

from cifar10.config.recipe import Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(model="bn_cnn_wide", epochs=100, warmup_epochs=5, val_images=5_000),
    deepspeed={
        "train_batch_size": 128,
        "train_micro_batch_size_per_gpu": 64,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}},
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2},
    },
    precision=("fp16", "bf16", "fp32"),
    engine_level="fused",
)
