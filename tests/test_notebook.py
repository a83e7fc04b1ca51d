"""Runs inside another program: many in one process, in a thread, in an event loop; docs/notebook.ipynb in a Jupyter kernel."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import WORKERS, launch
from tests.launching import DEADLINE_SECONDS, PROJECT, environment, run, summary

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


def test_a_run_does_not_wait_for_imports_that_it_does_not_need(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["first"]["imported"] == []


def test_a_notebooks_run_says_how_to_continue_it_in_a_shell(outcomes: dict[str, dict[str, Any]], base: Path) -> None:
    """The command of environment.json is the script's, not Jupyter's."""
    start = json.loads((base / "stopped" / "environment.json").read_text())["starts"][0]
    program, *flags = shlex.split(start["command"])
    assert Path(program).name == "cifar10_deepspeed.py"
    assert Path(program).is_file()
    assert flags[-1] == str(base / "stopped")


def test_the_notebook_of_the_documentation_runs_in_a_jupyter_kernel(tmp_path: Path) -> None:
    """Every cell; as in a shell started from it, Jupyter's MPLBACKEND and FORCE_COLOR are set."""
    notebook = nbformat.read(PROJECT / "docs" / "notebook.ipynb", as_version=4)
    kernel = {"cwd": str(PROJECT / "docs"), "env": environment(NOTEBOOK_RUN=str(tmp_path), CIFAR10_REPORT="1")}
    NotebookClient(notebook, timeout=DEADLINE_SECONDS).execute(**kernel)
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert printed.count("finished (max_steps)") == 2
    assert "\x1b" not in printed
    assert "failed" not in printed
    for name in ("first", "second"):
        assert summary(tmp_path / name)["status"] == "finished"
        assert (tmp_path / name / "report.html").exists()
    assert "image/png" in notebook.cells[-1].outputs[0].data


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "TkAgg", "module://nowhere"])
def test_a_report_does_not_use_the_environments_backend(backend: str) -> None:
    """Nor does it take it away from the program around it."""
    code = "import os; from cifar10.report import plots; print(len(plots.png(plots.Figure)), os.environ['MPLBACKEND'])"
    process = run([sys.executable, "-c", code], PYTHONPATH=str(PROJECT), MPLBACKEND=backend)
    assert process.returncode == 0, process.stderr
    size, kept = process.stdout.split()
    assert (int(size) > 500, kept) == (True, backend)
