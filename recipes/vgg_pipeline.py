"""VGG-11 for 32x32 images, a plain sequence of layers that --pipeline-stages N trains as a pipeline of N ranks.

    uv run python main.py --recipe vgg_pipeline --num-gpus 2 --pipeline-stages 2

Without --pipeline-stages it trains as any other network. Global batch 128 in eight micro-batches; 5,000 images held
out. The hyperparameters are not tuned.
"""

from cifar10.config.recipe import Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(model="vgg11", epochs=30, warmup_epochs=3, val_images=5_000),
    deepspeed={
        "train_batch_size": 128,
        "gradient_accumulation_steps": 8,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}},
        "gradient_clipping": 1.0,
        "pipeline": {"partition": "uniform"},
    },
)
