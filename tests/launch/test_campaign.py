"""A short campaign of kills: no run is lost, and every one comes to the same end as the run that nobody killed."""

from __future__ import annotations

import json
import sys

import pytest

from tests.campaign import PAUSES
from tests.launching import run

pytestmark = pytest.mark.slow


def test_runs_that_are_killed_at_any_moment_go_on_to_the_right_end(tmp_path) -> None:
    """One kill at each point of a save, and four at random, over one rank and two."""
    found = tmp_path / "found.json"
    kills = ["--kills", str(len(PAUSES) + 4), "--seed", "1", "--json", str(found)]
    process = run([sys.executable, "-m", "tests.campaign", *kills], OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stdout + process.stderr
    counts = json.loads(found.read_text())
    assert (counts["lost"], counts["wrong"]) == ([], [])
    assert counts["at"] == {**dict.fromkeys(PAUSES, 1), "at random": 4}
    assert {kill["ranks"] for kill in counts["each"]} == {1, 2}
