"""Averages of the weights: EMA and SWA equal PyTorch's, and a skipped step leaves them as they are."""

from copy import deepcopy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar10.engine.engine import Engine
from cifar10.models.registry import build_model
from tests.helpers import batch, largest_difference, make_engine, one_rank, one_step, same_bits

BN_CNN = "bn_cnn"
ZERO_2 = {"zero_optimization": {"stage": 2}}


def averaged(engine: Engine) -> dict[str, torch.Tensor]:
    return engine.portable_state(averaged=True)


@pytest.mark.parametrize("config", [{}, ZERO_2], ids=["ZeRO 0", "ZeRO 2"])
def test_ema_follows_as_pytorchs_does(config) -> None:
    decay, steps = 0.2, 6  # (1 + n) / (10 + n) is below it at first only
    engine = make_engine(one_rank(), build_model(BN_CNN, 0, 10), ema=decay, **config)
    plain = build_model(BN_CNN, 0, 10)
    reference = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    reference.update_parameters(plain)  # the first call copies
    assert not engine.has_average
    for number in range(steps):
        one_step(engine, [batch(32, number)])
        plain.load_state_dict(engine.portable_state())
        reference.multi_avg_fn = get_ema_multi_avg_fn(min(decay, (1 + number) / (10 + number)))
        reference.update_parameters(plain)
    ours, theirs = averaged(engine), deepcopy(reference.module).state_dict()
    counts = [name for name in ours if "num_batches" in name]  # whole numbers, which are not averaged
    assert (
        largest_difference(
            {k: v for k, v in ours.items() if k not in counts}, {k: v for k, v in theirs.items() if k not in counts}
        )
        < 1e-6
    )
    assert largest_difference(ours, engine.portable_state()) > 1e-3


def test_swa_is_the_mean_of_the_weights_that_were_added() -> None:
    engine = make_engine(one_rank(), build_model(BN_CNN, 0, 10), swa=True)
    seen = []
    for number in range(3):
        one_step(engine, [batch(32, number)])
        engine.average.add()
        seen.append(engine.portable_state())
    mean = {name: sum(state[name] for state in seen) / 3 for name in seen[0] if "num_batches" not in name}
    assert largest_difference({name: averaged(engine)[name] for name in mean}, mean) < 1e-6


def test_a_skipped_step_leaves_the_average_and_the_weights_are_untouched_by_it() -> None:
    engine = make_engine(one_rank(), build_model(BN_CNN, 0, 10), ema=0.9)
    one_step(engine, [batch(32, 0)])
    weights, average, updates = engine.portable_state(), averaged(engine), engine.average.updates.clone()
    assert same_bits(weights, engine.portable_state())
    images, labels = batch(32, 1)
    one_step(engine, [(images.fill_(float("nan")), labels)])
    assert engine.skipped == 1
    assert same_bits(averaged(engine), average)
    assert engine.average.updates == updates
