"""Pipeline parallelism: consecutive layers as stages, one a rank, through which micro-batches pass (DeepSpeed's engine for it).

DeepSpeed orders the work (one forward, one backward: Narayanan et al. 2019, "PipeDream") and sends activations and gradients
between neighbors. What this file adds to DeepSpeed 0.19.8: the things that engine.py adds, over all stages. Rank r is at stage
r // data_ranks; the ranks of one pipeline have the same images.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cifar10 import UsageError
from cifar10.distributed.world import World
from cifar10.engine.engine import Engine, prepare
from cifar10.engine.loss import count_correct, cross_entropy


def check_layers(model: nn.Module, model_name: str, config: dict[str, Any]) -> None:
    """Raise UsageError unless the stages of a resolved config, if it has any, can each have layers of `model` to train."""
    stages = config.get("pipeline", {}).get("stages", 1)
    if stages == 1:
        return
    layers = list(model) if isinstance(model, nn.Sequential) else []
    numbered = [name for name, _ in model.named_children()] == [str(number) for number in range(len(layers))]
    if not numbered or sum(len(list(layer.parameters())) for layer in layers) != len(list(model.parameters())):
        raise UsageError(
            f"--pipeline-stages {stages} is not supported with --model {model_name}, only with an nn.Sequential whose layers"
            " share no weights; use --model vgg11"
        )
    trained = _trained(model)
    if not all(any(trained[start:end]) for start, end in pairwise(bounds(model, config))):
        count = f"{len(layers)} layers, {sum(map(bool, trained))} of them trained"
        raise UsageError(f"--pipeline-stages {stages} leaves a stage with nothing to train, of {count}; use fewer stages")


def _trained(model: nn.Module) -> list[int]:
    """Trained elements of each layer."""
    return [sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in model.children()]


def bounds(model: nn.Module, config: dict[str, Any]) -> list[int]:
    """The number of each stage's first layer, and that of all layers, as PipelineModule divides them."""
    prepare()
    from deepspeed.runtime.utils import partition_balanced, partition_uniform

    trained, stages = _trained(model), config["pipeline"]["stages"]
    return partition_uniform(len(trained), stages) if _method(config) == "uniform" else partition_balanced(trained, stages)


def _method(config: dict[str, Any]) -> str:
    """How PipelineModule divides the layers: "uniform", or "parameters", which is what "best" means."""
    return "uniform" if config["pipeline"].get("partition") == "uniform" else "parameters"


def this_stage(model: nn.Sequential, config: dict[str, Any]) -> nn.Module:
    """This rank's layers of `model`, under their names in it, to pass to `deepspeed.initialize`. Collective."""
    from deepspeed import PipelineModule, init_distributed

    init_distributed()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers
        return PipelineModule(model, config["pipeline"]["stages"], partition_method=_method(config))


class PipelineEngine(Engine):
    """The engine of one stage: `train_batch` in place of forward, backward and step; weights and state are of all stages."""

    def __init__(self, deepspeed_engine: Any, world: World, seed: int = 0, *, ema: float = 0.0, swa: bool = False) -> None:
        grid = deepspeed_engine.grid
        self.pipe = world.split(grid.pipe_groups)  # the stages that have this rank's images
        seed += 2**32 * (self.pipe.size - 1 - self.pipe.rank)  # of dropout; on the last stage as without stages
        super().__init__(deepspeed_engine, world.split(grid.dp_groups), seed, ema=ema, swa=swa)
        self._shape = torch.Size()  # of a micro-batch's images
        self._trained = self.pipe.gather(sum(p.requires_grad for p in self.module.parameters()))  # parameters of each stage
        deepspeed_engine._config.steps_per_print = None  # it would print the loss
        deepspeed_engine.pipeline_enable_backward_allreduce = self.world.size > 1 or self.stage > 0
        if not deepspeed_engine.gradient_clipping():
            deepspeed_engine._config.gradient_clipping = float("inf")  # or DeepSpeed would not call what measures the norm
        self.module.register_forward_pre_hook(self._before_forward)
        self.module.register_forward_hook(lambda _module, _inputs, output: _sendable(output))

    def _before_forward(self, _module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Before each micro-batch: frozen BatchNorm, which DeepSpeed's train_batch puts in training mode; dropout's seed; and
        the layout that images have."""
        for norm in self._frozen_norms:
            norm.eval()
        if self.seeds_dropout:
            self.seed_dropout()
        self._micro_batch += 1
        return tuple(map(_as_images, inputs))

    def train_batch(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], loss_of: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """One update of the weights, in place of forward, backward and step: the mean loss over all images.

        `loss_of(logits, labels)` is called for each micro-batch on the last stage, which alone needs labels; the first alone
        needs images.
        """
        self.module.loss_fn = loss_of
        if self._shape != (shape := micro_batches[0][0].shape):  # progressive resizing
            self.deepspeed.reset_activation_shape()
            self._shape = shape
        self._buffers.keep()
        loss = self.deepspeed.train_batch(iter(micro_batches))
        self.deepspeed.timers("train_batch").reset()  # on a GPU it keeps two events of every step
        self._end_step()
        return loss

    def _total_norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm over all stages, added up in the order of an engine without stages, so that it has the same bits."""
        norms, first = torch.zeros(sum(self._trained), device=self.world.device), sum(self._trained[: self.pipe.rank])
        norms[first : first + len(gradients)] = torch.stack(torch._foreach_norm(gradients))
        return torch.linalg.vector_norm(self.pipe.total(norms))

    # --- all stages' weights and state, on every rank ---------------------------------------------------------------

    def portable_state(self, *, averaged: bool = False) -> dict[str, Tensor]:
        return _merged(self.pipe.gather(super().portable_state(averaged=averaged)))

    def full_state(self) -> dict[str, Any]:
        return _merged(self.pipe.gather(super().full_state()))

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from what an engine with any number of stages, or without, has saved. Raises on all ranks alike."""
        names, failed = self.pipe.gather([*self.module.state_dict()]), None
        others = {name for number, stage in enumerate(names) for name in stage if number != self.pipe.rank}
        try:
            super().restore(_without(saved, others))
        except Exception as error:
            failed = error
        if failed := next(filter(None, self.pipe.gather(failed)), None):
            raise failed


def train_step(
    engine: PipelineEngine, micro_batches: Sequence[tuple[Tensor, Tensor]], smoothing: float
) -> tuple[Tensor, Tensor]:
    """The script's train_step in stages. Not of this rank alone: the loss is the mean over all images; how many of its images
    were classified correctly is known to the last stage, and 0 elsewhere."""
    corrects = [torch.zeros((), device=engine.world.device)]

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(logits.float(), labels, smoothing)
        value = loss.detach()
        loss.register_hook(lambda gradient: gradient.add(value, alpha=0))  # as in Engine.backward
        corrects.append(count_correct(logits, labels))
        return loss

    loss = engine.train_batch(micro_batches, loss_of)
    return loss, torch.stack(corrects).sum()


def _as_images(x: Tensor) -> Tensor:
    """`x` in the layout of images, as without stages, or other kernels would add up in another order.

    A clone, because contiguous() leaves an image of one pixel as it is: it has both layouts, and convolutions take the other.
    """
    return x.clone(memory_format=torch.channels_last) if x.dim() == 4 else x


def _sendable(output: Tensor) -> Tensor:
    """A stage's output, contiguous as gloo needs it; its gradient will arrive so, too, and is given back its layout."""
    sent = output.contiguous()
    if sent.requires_grad:
        sent.register_hook(_as_images)
    return sent


def _merged(parts: list[Any]) -> Any:
    """Nested dicts and lists of the stages as one: the union of dicts, lists element by element; of other values, the first."""
    if isinstance(parts[0], dict):
        keys = dict.fromkeys(key for part in parts for key in part)
        return {key: _merged([part[key] for part in parts if key in part]) for key in keys}
    return [_merged(list(same)) for same in zip(*parts, strict=True)] if isinstance(parts[0], list) else parts[0]


def _without(value: Any, names: set[str]) -> Any:
    """`value` without these keys, at any depth."""
    if isinstance(value, dict):
        return {key: _without(inner, names) for key, inner in value.items() if key not in names}
    return [_without(inner, names) for inner in value] if isinstance(value, list) else value
