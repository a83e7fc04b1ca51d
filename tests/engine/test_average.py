"""The average of the weights: equal to torch.optim.swa_utils', left alone by a skipped step, at any ZeRO stage and level."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar10.models.registry import build_model
from cifar10_deepspeed import train_step
from tests.helpers import make_engine, make_loader, one_step, same_bits

DECAY = 0.5


def batches(world, count):
    return list(islice(make_loader(world, global_images=32).epoch(0), count))


