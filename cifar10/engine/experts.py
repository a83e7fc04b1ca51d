"""Mixture of experts in training: `deepspeed.moe` in the place of a network's plain layers, and what is whole of it.

Of R ranks, neighbors form groups of N: a group holds each expert once, and tokens travel to their expert's rank and back. The
groups hold copies. The plain layer's names stay, an expert's number being its own on whichever rank it is.

DeepSpeed's auxiliary loss is of one rank's tokens, and a mean of it over ranks is another loss than that of all tokens: it is a
product of two means, each expert's probability and its share. Here the share is that of all ranks.
"""

import contextlib
import io
import math
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cifar10.distributed.world import World
from cifar10.models.moe import MixtureOfExperts

T = TypeVar("T")


class ExpertLayer(nn.Module):
    """A MixtureOfExperts of which this rank has 1 / `size` of the experts. After a forward pass, `balance` is the auxiliary
    loss, and `seen` counts this rank's tokens: [those dropped, those that chose each expert ...]."""

    def __init__(self, plain: MixtureOfExperts, size: int, world: World) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        drops = plain.capacity_factor > 0
        how = {"capacity_factor": plain.capacity_factor or 1.0, "drop_tokens": drops, "use_rts": drops}
        how |= {"k": plain.top_k, "top2_2nd_expert_sampling": False}  # no noise: the second choice is the second largest
        layer = MoE(plain.gate.in_features, plain.experts[0], len(plain.experts), size, **how)
        layer.set_deepspeed_parallelism = partial(_quietly, layer.set_deepspeed_parallelism)
        inner, own = layer.deepspeed_moe, layer.deepspeed_moe.experts.deepspeed_experts
        first, inner.gate.wg = world.rank % size * len(own), plain.gate
        for number, like in enumerate(own):
            own[number] = plain.experts[first + number]
            for parameter, theirs in zip(own[number].parameters(), like.parameters(), strict=True):
                parameter.allreduce, parameter.group_name = theirs.allreduce, theirs.group_name  # DeepSpeed's marks
        inner.gate.register_forward_hook(self._watch)
        self.world, self.size, self.balance_loss = world, size, plain.balance_loss
        self.gate = plain.gate
        self.experts = nn.ModuleDict({str(first + number): expert for number, expert in enumerate(own)})
        self.deepspeed = layer  # after those two, whose names its parameters have

    def _watch(self, _gate: nn.Module, _inputs: Any, routed: tuple[Any, ...]) -> None:
        experts, counts = routed[3], routed[6]  # [top_k, tokens], -1 for those over the expert's capacity; [experts]
        self.seen = torch.cat(((experts < 0).sum().view(1), counts)).to(torch.float32)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        output, _, _ = self.deepspeed(tokens)
        probabilities = F.softmax(self.gate(tokens.flatten(0, -2).float()), dim=1)
        shares = F.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).float().mean(dim=0)
        shares = self.world.total(shares) / self.world.size
        self.balance = len(shares) * (probabilities.mean(dim=0) * shares).sum()
        return output


def _quietly(create_groups: Any, *arguments: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints that there is no group yet
        create_groups(*arguments)


def divide(model: nn.Module, world: World, size: int | None) -> None:
    """Replace a model's plain layers of experts, before `deepspeed.initialize`: each is divided over `size` ranks, by default
    over as many as divide both the ranks and the experts."""
    for name, plain in [(name, layer) for name, layer in model.named_modules() if isinstance(layer, MixtureOfExperts)]:
        model.set_submodule(name, ExpertLayer(plain, size or math.gcd(world.size, len(plain.experts)), world))


class Experts:
    """All layers of experts of a model in training."""

    def __init__(self, model: nn.Module, world: World, accumulation: int) -> None:
        self.layers = [layer for layer in model.modules() if isinstance(layer, ExpertLayer)]
        self.world, self.accumulation = world, accumulation
        self.size = max((layer.size for layer in self.layers), default=1)  # ranks over which each is divided
        experts = {parameter for layer in self.layers for parameter in layer.experts.parameters()}
        self.own = {name: parameter for name, parameter in model.named_parameters() if parameter in experts}

    def __bool__(self) -> bool:
        return bool(self.layers)

    @property
    def drop_tokens(self) -> bool:
        """Whether tokens are dropped, and so at random."""
        return any(layer.deepspeed.deepspeed_moe.gate.drop_tokens for layer in self.layers)

    def balance_loss(self) -> Tensor:
        """The auxiliary loss of the last forward pass, with its coefficient, to add to a micro-batch's loss."""
        return sum(layer.balance_loss * layer.balance for layer in self.layers)

    def seen(self) -> Tensor:
        """What the last forward pass is counted by: [auxiliary loss, tokens dropped, tokens per expert ...], to be summed over
        micro-batches and ranks."""
        balance = sum(layer.balance.detach() for layer in self.layers) / (self.accumulation * self.world.size)
        return torch.cat((balance.view(1), sum(layer.seen for layer in self.layers)))

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of this rank's gradients and those of other ranks' experts, each counted once: the same on every rank, and
        not finite if any is not."""
        experts = {p.grad for p in self.own.values() if p.requires_grad} if self.size > 1 else set()
        if not experts:
            return torch.nn.utils.get_total_norm(gradients, foreach=True)
        own, dense = ([gradient for gradient in gradients if (gradient in experts) is which] for which in (True, False))
        squares = torch.nn.utils.get_total_norm(own, foreach=True).square()
        dist.all_reduce(squares, group=self.layers[0].deepspeed.deepspeed_moe.ep_group)
        return (torch.nn.utils.get_total_norm(dense, foreach=True).square() + squares).sqrt()

    def of_all_ranks(self, values: dict[str, T]) -> dict[str, T]:
        """This rank's values by parameter name, and the other ranks' of their experts. Collective if experts are divided."""
        if self.size == 1:
            return values
        own = {name: value for name, value in values.items() if name in self.own}
        groups = self.world.gather(own if self.world.rank < self.size else {})  # the first group has them all
        dense = {name: value for name, value in values.items() if name not in own}
        return dense | {name: value for experts in groups for name, value in experts.items()}
