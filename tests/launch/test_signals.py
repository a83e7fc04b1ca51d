"""A chain of cells of tests/signals.py; test_launchers.py has signals to main.py in training, test_failing.py a killed rank."""

import pytest

from tests.signals import AT_ONCE, Cell, carry_out, command_for, fault_of, undisturbed, weights_of

pytestmark = pytest.mark.slow

CHAIN = [
    Cell("main.py", "SIGUSR1", AT_ONCE),
    Cell("runner", "SIGKILL"),
]
STEPS = 600


def test_a_signal_to_any_process_ends_all_and_the_same_command_finishes_the_run(tmp_path) -> None:
    command = command_for(tmp_path / "run", STEPS)
    for cell in CHAIN:
        outcome = carry_out(cell, command, tmp_path / "run")
        assert fault_of(cell, outcome) == "", (cell, outcome)
    assert weights_of(command, tmp_path / "run") == undisturbed(tmp_path, STEPS)
