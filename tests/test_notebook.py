"""Runs inside another program: many in one process, in a thread, in an event loop; docs/notebook.ipynb in a Jupyter kernel."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import WORKERS, launch

pytestmark = pytest.mark.slow
FINISHED = (
    "first",
    "second",
    "in a thread",
    "in an event loop",
    "after a fault",
    "after Ctrl-C twice",
    "after another network",
)
OUTCOMES = {  # a start -> its status, and a part of the error that it raises
    **dict.fromkeys(FINISHED, ("finished", "")),
    "the same folder again": ("finished", ""),
    "a command that is refused": (None, "UsageError: invalid value for --lr"),
    "Jupyter's own arguments": (None, "UsageError: unknown flag -f"),
    "a fault": ("failed", "RuntimeError: a fault in the middle"),
    "Ctrl-C": ("stopped", ""),
    "after Ctrl-C": ("finished", ""),
    "Ctrl-C twice": ("running", "KeyboardInterrupt"),
    "another network and ZeRO": ("finished", ""),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one process")


@pytest.fixture(scope="module")
def outcomes(base: Path) -> dict[str, dict[str, Any]]:
    launch(1, WORKERS / "one_process.py", str(base))
    return json.loads((base / "outcomes.json").read_text())


@pytest.mark.parametrize("name", OUTCOMES)
def test_run_in_one_process(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    status, error = OUTCOMES[name]
    found = outcomes[name]
    assert (found.get("status"), found.get("error", "")[: len(error)]) == (status, error)
    assert bool(error) or "error" not in found
    assert found["clean"], "signal handlers, process groups, locks and variables are as before"
    if name in FINISHED or name == "after Ctrl-C":
        assert found["weights_sha256"] == outcomes["first"]["weights_sha256"]


def test_a_notebooks_run_says_how_to_continue_it_in_a_shell(outcomes: dict[str, dict[str, Any]], base: Path) -> None:
    """The command of environment.json is the script's, not Jupyter's."""
    start = json.loads((base / "stopped" / "environment.json").read_text())["starts"][0]
    program, *flags = shlex.split(start["command"])
    assert Path(program).name == "cifar10_deepspeed.py"
    assert Path(program).is_file()
    assert flags[-1] == str(base / "stopped")
