"""A mixture of experts: a CNN in which each of an image's 64 tokens goes to one of four experts, divided over the ranks.

uv run python main.py --num-gpus 2 --recipe moe
"""

from cifar10.config.recipe import Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(model="moe_cnn", epochs=20, warmup_epochs=1, val_images=5_000),
    deepspeed={
        "train_batch_size": 128,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}},
        "gradient_clipping": 1.0,
    },
)
