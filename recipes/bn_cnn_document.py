"""The reference document's run to the letter: learning rate 0.01, global batch 32, 50 epochs, all 50,000 images.

    uv run python main.py --recipe bn_cnn_document

The document expects "81% test accuracy", which is its accuracy on training images. Measured on the real CIFAR-10, 3 seeds
(records/2026-11-21_bn_cnn_document_cpu): 78.49 +- 0.14% of the test images, 78.94 +- 0.10% of the augmented training images.
"""

from cifar10.config.recipe import Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(epochs=50, warmup_epochs=5, val_images=0, lr_schedule="cosine(per_epoch=True)"),
    deepspeed={
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
        "gradient_clipping": 1.0,
        "fp16": {"enabled": False},
    },
    engine_level="fused",
)
