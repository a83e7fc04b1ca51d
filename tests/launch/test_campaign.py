"""A short campaign of kills: no run is lost, and each ends like an undisturbed run."""

import json
import sys

import pytest

from tests.campaign import PAUSES
from tests.launching import run

pytestmark = pytest.mark.slow


def test_runs_killed_at_any_moment_resume_to_the_right_end(tmp_path) -> None:
    """One kill at each point of a save, and four at random, on one rank and two."""
    found = tmp_path / "found.json"
    kills = ["--kills", str(len(PAUSES) + 4), "--seed", "1", "--json", str(found)]
    process = run([sys.executable, "-m", "tests.campaign", *kills], OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stdout + process.stderr
    counts = json.loads(found.read_text())
    assert (counts["lost"], counts["wrong"]) == ([], [])
    assert counts["at"] == {**dict.fromkeys(PAUSES, 1), "at random": 4}
    assert {kill["ranks"] for kill in counts["each"]} == {1, 2}
