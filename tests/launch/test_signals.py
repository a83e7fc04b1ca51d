"""A chain of cells of tests/signals.py; signals to main.py during training are in test_launchers.py."""

import pytest

from tests.signals import AT_ONCE, Cell, carry_out, command_for, fault_of, undisturbed, weights_of

pytestmark = pytest.mark.slow

CHAIN = [
    Cell("main.py", "SIGUSR1", AT_ONCE),
    Cell("rank 0", "SIGKILL"),
    Cell("runner", "SIGKILL"),
]
STEPS = 1_000


def test_a_signal_to_any_process_ends_all_and_the_same_command_finishes_the_run(tmp_path) -> None:
    command = command_for(tmp_path / "run", STEPS)
    for cell in CHAIN:
        outcome = carry_out(cell, command, tmp_path / "run")
        assert fault_of(cell, outcome) == "", (cell, outcome)
    assert weights_of(command, tmp_path / "run") == undisturbed(tmp_path, STEPS)
