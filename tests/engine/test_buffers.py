"""A model's buffers in one block of memory."""

import torch
from torch import nn

from cifar10.engine.buffers import KeptBuffers
from tests.helpers import CountOperations


def model_with_buffers() -> nn.Module:
    """Statistics, counts, a layout of its own, a scalar, an empty buffer, and one that two modules share."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(5), nn.Linear(2, 2))
    model[2].register_buffer("filters", torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    model[2].register_buffer("one", torch.tensor(0.5, dtype=torch.bfloat16))
    model[2].register_buffer("nothing", torch.empty(0))
    model[2].register_buffer("flags", torch.tensor([True, False, True]))
    model[0].register_buffer("shared", model[2].filters)
    return model


def test_buffers_stay_what_they_are() -> None:
    model = model_with_buffers()
    before = {name: (buffer, buffer.clone(), buffer.stride()) for name, buffer in model.named_buffers()}
    KeptBuffers(model)
    for name, buffer in model.named_buffers():
        same, value, stride = before[name]
        assert buffer is same
        assert torch.equal(buffer, value)
        assert buffer.stride() == stride
    assert model[0].shared is model[2].filters
    assert len({buffer.untyped_storage().data_ptr() for buffer in model.buffers() if buffer.numel()}) == 1


def test_a_skipped_step_puts_them_back_to_the_bit() -> None:
    model = model_with_buffers()
    kept = KeptBuffers(model)
    for skipped in (1.0, 0.0):
        start = {name: buffer.clone() for name, buffer in model.named_buffers()}
        kept.keep()
        model[0](torch.randn(4, 3, 2, 2) * float("nan"))
        model[1](torch.randn(4, 5, 2, 2))
        model[2].flags.logical_not_()
        changed = {name: buffer.clone() for name, buffer in model.named_buffers()}
        assert not torch.equal(start["0.running_mean"], changed["0.running_mean"])
        with CountOperations() as operations:
            kept.put_back(torch.tensor(skipped))
        assert operations.counts["aten.where.self_out"] == 1
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, (start if skipped else changed)[name], rtol=0, atol=0, equal_nan=True)


def test_a_model_without_buffers() -> None:
    kept = KeptBuffers(nn.Linear(2, 2))
    kept.keep()
    kept.put_back(torch.tensor(1.0))
