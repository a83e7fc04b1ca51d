"""Vision transformers (Dosovitskiy et al. 2020, arXiv 2010.11929) for small images, trained from scratch."""

from torch import nn
from torchvision.models import VisionTransformer
from torchvision.ops import StochasticDepth


def vit_tiny(num_classes: int = 10, image_size: int = 32, dropout: float = 0.0, drop_path: float = 0.0) -> nn.Module:
    """float32 [B, 3, S, S], S a multiple of 4 -> logits [B, classes]; 5,362,762 parameters at 10 classes of 32x32 images.

    torchvision's with ViT-Tiny's 12 layers of width 192 and patches of 4x4 pixels. `drop_path` is the last
    layer's; it grows from 0.
    Published reference: 88% on CIFAR-10 after 500 epochs, 80% after 200 (github.com/kentaroy47/vision-transformers-cifar10, a
    ViT of the same patches).
    """
    sizes = {"patch_size": 4, "num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    model = VisionTransformer(image_size, **sizes, dropout=dropout, num_classes=num_classes)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision's zeros would hide the layers below from the first step
    for place, block in enumerate(model.encoder.layers if drop_path else ()):
        depth = StochasticDepth(drop_path * place / (len(model.encoder.layers) - 1), "row")
        block.dropout, block.mlp = nn.Sequential(block.dropout, depth), block.mlp.append(depth)
    return model
