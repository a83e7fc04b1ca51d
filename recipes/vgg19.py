"""torchvision's VGG19 from ImageNet weights, fine-tuned on CIFAR-10 at 224x224, as the VGG19 document describes it.

    uv run torchrun --standalone --nproc_per_node=4 cifar10_deepspeed.py --recipe vgg19

Images are resized to 256 and cropped to 224, at the center in evaluation; ImageNet's normalization; 5,000 images held out;
global batch 256. The document shows sample rows of its metrics, train 71.32% and val 79.10% in the first epoch, and claims no
final accuracy. Of the learning rate it gives only the rule, base * global batch / 256; base, momentum, weight decay, clipping
and schedule are ours.
"""

from cifar10.config.recipe import Experiment, Recipe

EXPERIMENT = Experiment(
    Recipe(
        model="vgg19",
        weights="imagenet",
        epochs=20,
        warmup_epochs=1,
        val_images=5_000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        resize=256,
        image_size=224,
        augment="RandomCrop(0) RandomHorizontalFlip",
        lr_reference_batch=256,
    ),
    deepspeed={
        "train_batch_size": 256,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}},
        "fp16": {"enabled": True},
        "gradient_clipping": 1.0,
    },
    precision=("fp16", "bf16", "fp32"),
)
