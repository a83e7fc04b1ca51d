"""The program on GPUs that compute nothing (see stand_in.py): what it asks of a GPU, and that it runs to its end."""

from tests.stand_in import StandIn


def test_the_stand_in_is_found_by_torch() -> None:
    ended = StandIn.or_skip()("-c", "import torch; print(torch.cuda.device_count())", gpus=3)
    assert (ended.returncode, ended.stdout) == (0, "3\n"), ended.stderr
