"""The architecture, read from the source: who imports whom, what importing does, and how long the script is."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import PROJECT, environment

PACKAGE = PROJECT / "cifar10"
SCRIPT = PROJECT / "cifar10_deepspeed.py"

# From the bottom up: a package imports only from earlier lines. What `cifar10` itself defines is for everyone.
FLOORS = (
    {"files", "streams"},
    {"distributed"},
    {"ops"},
    {"config", "models"},
    {"data", "engine"},
    {"run"},
    {"plan", "report"},
    {"metrics", "launch"},
    {"trainer"},
    {"commands", "__main__"},
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules(source: str) -> set[str]:
    """Every module that a source imports, also inside functions: `from a.b import c` is a.b and a.b.c."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = "." * node.level + (node.module or "")
            found |= {above, *(f"{above}.{alias.name}" for alias in node.names)}
    return found


def packages(source: str) -> set[str]:
    """The packages of cifar10 (and its files beside them) that a source imports."""
    below = (module.split(".") for module in modules(source) if module.startswith("cifar10."))
    return {words[1] for words in below} - {"RunFailed", "UsageError", "at_home", "nearest", "reason"}


def name_of(path: Path) -> str:
    """cifar10/models/vgg.py -> models, cifar10/plan.py -> plan."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_imports_run_downward():
    upward = []
    for path in SOURCES:
        found, name = packages(read(path)) - {name_of(path)}, name_of(path)
        upward += [f"{path}: {other}" for other in found if name != "__init__" and FLOOR[other] >= FLOOR[name]]
        outside = modules(read(path)) & {"main", "recipes", "tests", "cifar10_deepspeed"}
        upward += [f"{path}: {other}" for other in outside if (name, other) != ("commands", "cifar10_deepspeed")]
        assert not any(module.startswith(".") for module in modules(read(path))), "relative imports are not seen here"
    assert upward == []


def test_only_the_engine_imports_deepspeed():
    assert {name_of(path) for path in SOURCES if "deepspeed" in {module.split(".")[0] for module in modules(read(path))}} == {
        "engine"
    }


# --- what importing does ----------------------------------------------------------------------------------------------

REPORT = """
import json, os, sys, threading
before = set(os.environ.items())
import {module}
facts = {{
    "loaded": sorted(set(sys.modules) & {{"torch", "deepspeed", "wandb", "torchvision", "mpi4py"}}),
    "threads": [thread.name for thread in threading.enumerate()],
    "environment": sorted(key for key, _ in set(os.environ.items()) ^ before),
}}
if "torch" in sys.modules:
    import torch
    facts["group"] = torch.distributed.is_initialized()
print(json.dumps(facts))
"""


def after_importing(module: str, folder: Path) -> dict:
    """What a fresh process in an empty folder looks like after `import module`, which must not print anything."""
    variables = environment(PYTHONPATH=str(PROJECT), PYTHONDONTWRITEBYTECODE="1", HOME=str(folder))
    command = [sys.executable, "-c", REPORT.format(module=module)]
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert list(folder.rglob("*")) == []
    return json.loads(result.stdout)


def test_importing_the_checks_loads_no_torch_and_importing_the_script_does_nothing(tmp_path):
    nothing = {"loaded": [], "threads": ["MainThread"], "environment": []}
    assert after_importing("cifar10.plan", tmp_path) == nothing
    assert after_importing("cifar10_deepspeed", tmp_path) == {**nothing, "loaded": ["torch"], "group": False}


# --- how it is written ------------------------------------------------------------------------------------------------


def test_the_script_can_be_read_in_one_sitting():
    assert len(read(SCRIPT).splitlines()) <= 400


def test_nothing_branches_on_a_recipes_name():
    """What a recipe does is said by its fields."""
    found = []
    for path in [*SOURCES, *PROJECT.glob("*.py"), *(PROJECT / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(read(path))):
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            subjects = [ast.unparse(part) for part in [*compared, *([node.subject] if isinstance(node, ast.Match) else [])]]
            found += [(path, part) for part in subjects if re.search(r"(\brecipe_name|\brecipe\.name|options\.recipe)$", part)]
    assert found == []


def test_no_file_in_git_is_large_or_locks_versions():
    listing = subprocess.run(["git", "-C", str(PROJECT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listing.stdout.split("\0") if (PROJECT / name).is_file()]
    assert "cifar10_deepspeed.py" in names
    assert [name for name in names if (PROJECT / name).stat().st_size > 2**20] == []
    assert "uv.lock" not in names
