"""A CNN with a mixture of experts (Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2021, "Switch", arXiv 2101.03961).

Here the layer is plain PyTorch and complete, for evaluation, prediction and export, and no token is ever dropped. In training
`deepspeed.moe` takes its place, with the same weights (see engine/experts.py).
"""

import torch
from torch import Tensor, nn


class MixtureOfExperts(nn.Module):
    """A gate chooses `top_k` of the experts for each token, whose outputs are weighted by the gate's probabilities.

    For training: each expert takes at most its share of a rank's tokens x `capacity_factor`, and the rest is dropped; with 0
    none is. `balance_loss` is the coefficient of the auxiliary loss, which is lowest where the experts get equal shares.
    """

    def __init__(self, width: int, experts: int, top_k: int, capacity_factor: float, balance_loss: float) -> None:
        super().__init__()
        self.top_k, self.capacity_factor, self.balance_loss = top_k, capacity_factor, balance_loss
        self.gate = nn.Linear(width, experts, bias=False)
        layers = (nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(experts))
        self.experts = nn.ModuleList(layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """float32 [..., width] -> the same shape; every expert computes every token, most of which then weigh nothing."""
        probabilities = self.gate(tokens).softmax(dim=-1)  # [..., experts]
        largest, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            largest = largest / largest.sum(dim=-1, keepdim=True)
        weights = torch.zeros_like(probabilities).scatter(-1, chosen, largest)
        outputs = torch.stack([expert(tokens) for expert in self.experts], dim=-1)  # [..., width, experts]
        return (outputs * weights.unsqueeze(-2)).sum(dim=-1)


class MoECNN(nn.Module):
    """Three convolutions with GroupNorm, a layer of four experts with a shortcut, the mean over positions, a linear layer."""

    def __init__(self, num_classes: int, channels: int, top_k: int, capacity_factor: float, balance_loss: float) -> None:
        super().__init__()
        widths = (channels, 16, 32, 64)
        convs = [nn.Conv2d(i, o, 3, stride, padding=1) for i, o, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)]
        self.stem = nn.Sequential(*(nn.Sequential(conv, nn.GroupNorm(4, conv.out_channels), nn.GELU()) for conv in convs))
        self.norm = nn.LayerNorm(64)
        self.moe = MixtureOfExperts(64, 4, top_k, capacity_factor, balance_loss)
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, C, S, S] -> logits [B, classes]."""
        x = self.stem(images).flatten(2).transpose(1, 2)  # a token for each position: [B, S * S / 16, 64]
        x = x + self.moe(self.norm(x))
        return self.head(x.mean(dim=1))


def moe_cnn(
    num_classes: int = 10, channels: int = 3, top_k: int = 1, capacity_factor: float = 0.0, balance_loss: float = 0.01
) -> MoECNN:
    """A small CNN with four experts, 91,146 parameters at 10 classes, of which an expert has 16,576."""
    return MoECNN(num_classes, channels, top_k, capacity_factor, balance_loss)
