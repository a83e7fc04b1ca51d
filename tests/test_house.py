"""How the house is built, read from its own source: who imports whom, what importing does, and how long the story is."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import PROJECT, environment

PACKAGE = PROJECT / "cifar10"
STORY = PROJECT / "cifar10_deepspeed.py"

# Part -> the parts that it may import: one step down, never up. `UsageError` from the package itself is free.
PARTS: dict[str, set[str]] = {
    "files": set(),
    "draws": set(),
    "state": set(),
    "metrics": {"files"},
    "recipe": set(),
    "ds_json": {"settings"},
    "device": set(),
    "launchers": set(),
    "levels": {"device"},
    "loss_scale": set(),
    "world": {"device", "launchers"},
    "models": set(),
    "data": {"files"},
    "mnist": {"data", "files"},
    "datasets": {"data", "mnist"},
    "settings": set(),
    "run_folder": {"files", "recipe", "settings"},
    "overview": {"datasets", "metrics", "preflight", "recipe"},
    "report": {"datasets", "metrics", "overview", "preflight", "state", "tta"},
    "predictions": {"files"},
    "to_tensorboard": {"metrics"},
    "to_wandb": {"metrics", "run_folder"},
    "record": {"datasets", "predictions", "recipe", "run_folder", "settings"},
    "measures": {"predictions"},
    "samples": {"augment", "data", "datasets", "draws", "measures", "predictions", "recipe"},
    "pictures": {"measures", "record", "samples"},
    "pages": {"files", "measures", "metrics", "overview", "pictures", "recipe", "record", "samples", "settings"},
    "sweep": {"measures", "pages", "record"},
    "sinks": {"metrics", "pages", "preflight", "state", "to_tensorboard", "to_wandb"},
    "patience": {"recipe", "state"},
    "augment": {"draws"},
    "loader": {"augment", "draws", "ds_json", "recipe", "world"},
    "muon": set(),
    "recorder": set(),
    "tta": set(),
    "engine": {"levels", "loss_scale", "muon", "recorder", "world"},
    "stop": {"world"},
    "tape": {"state", "world"},
    "checkpoint": {"engine", "files", "settings", "state", "world"},
    "weights": {"files"},
    "preflight": {
        "datasets",
        "device",
        "ds_json",
        "levels",
        "recipe",
        "run_folder",
        "weights",
    },  # the edge: reads a command line, no torch
}
# What people start beside the story, and what only these share; they see everything, and no part sees them.
PROGRAMS = set(
    "__main__ bench bench_levels catalogue doctor evaluate export leaderboard predict reporting scaling trained".split()
)
WITHOUT_TORCH = set("__init__ launchers levels recipe ds_json data datasets mnist files settings run_folder preflight".split())
WITHOUT_TORCH |= {"record", "measures", "pictures", "pages", "sweep"}  # main.py --seeds compares runs


def modules(source: str) -> set[str]:
    """Every module that a source imports, at any depth of it: `from a.b import c` is a.b and a.b.c."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = "." * node.level + (node.module or "")
            found |= {above, *(f"{above}.{alias.name}" for alias in node.names)}
    return found


def parts(source: str) -> set[str]:
    """The parts of the package that a source imports."""
    below = (module.split(".") for module in modules(source) if module.startswith("cifar10."))
    return {words[1] for words in below} - {"UsageError"}


def name_of(path: Path) -> str:
    """cifar10/models/vgg.py -> models, cifar10/data.py -> data."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


SOURCES = sorted(PACKAGE.rglob("*.py"))
OURS = [*SOURCES, *sorted(PROJECT.glob("*.py")), *sorted((PROJECT / "recipes").glob("*.py"))]


def test_the_reader_of_imports_sees_every_form():
    source = """
import os, cifar10.tape
import cifar10.stop as halt
from cifar10 import UsageError, data
from cifar10.engine import Engine
def inside():
    from cifar10 import world as here
"""
    assert parts(source) == {"tape", "stop", "data", "engine", "world"}
    assert all(module.startswith(".") for module in modules("from . import x\nfrom ..y import z"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_part_imports_only_what_lies_below_it(path):
    source = read(path)
    assert not any(module.startswith(".") for module in modules(source)), "relative imports would not be seen here"
    assert not any(module.split(".")[0] in ("recipes", "tests", "main") for module in modules(source))
    part = name_of(path)
    if part in PROGRAMS:
        return
    if part == "__init__":
        assert parts(source) == set()
        return
    assert part in PARTS, f"a new part: give {part} its place in the table above"
    assert parts(source) - {part} <= PARTS[part]
    assert "cifar10_deepspeed" not in modules(source)


def test_the_table_has_no_circle_and_no_part_that_is_gone():
    there = {name_of(path) for path in SOURCES}
    assert PARTS.keys() <= there
    placed: set[str] = set()
    while open_parts := PARTS.keys() - placed:
        ready = {part for part in open_parts if PARTS[part] <= placed}
        assert ready, f"a circle among {sorted(open_parts)}"
        placed |= ready


def test_only_the_engine_imports_deepspeed():
    importing = {path.name for path in OURS if any(module.split(".")[0] == "deepspeed" for module in modules(read(path)))}
    assert importing == {"engine.py"}


def test_what_is_checked_before_a_run_imports_no_torch():
    importing = {path.stem for path in SOURCES if any(module.split(".")[0] == "torch" for module in modules(read(path)))}
    assert importing & WITHOUT_TORCH == set()
    assert {"engine", "world", "augment"} <= importing


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
print("facts", json.dumps(facts))
"""


def after_importing(module: str, folder: Path) -> dict:
    """What a fresh process in an empty folder looks like after `import module`, which must not print anything."""
    variables = environment(PYTHONPATH=str(PROJECT), PYTHONDONTWRITEBYTECODE="1", HOME=str(folder))
    command = [sys.executable, "-c", REPORT.format(module=module)]
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    word, _, facts = result.stdout.partition(" ")
    assert word == "facts"
    assert list(folder.rglob("*")) == []
    return json.loads(facts)


def test_importing_the_checks_loads_neither_torch_nor_deepspeed(tmp_path):
    facts = after_importing("cifar10.preflight", tmp_path)
    assert facts["loaded"] == []


def test_importing_the_story_does_nothing(tmp_path):
    facts = after_importing("cifar10_deepspeed", tmp_path)
    assert facts["loaded"] == ["torch"]
    assert facts["threads"] == ["MainThread"]
    assert facts["environment"] == []
    assert facts["group"] is False


# --- how it is written ------------------------------------------------------------------------------------------------


def test_the_story_can_be_read_in_one_sitting():
    assert len(read(STORY).splitlines()) <= 470


def compares_recipes_by_name(source: str) -> list[str]:
    """Comparisons of a recipe's name with something: what a recipe does belongs into the recipe."""
    subjects = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Eq, ast.NotEq, ast.In, ast.NotIn)) for op in node.ops):
            subjects += [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            subjects.append(node.subject)
    texts = (ast.unparse(subject) for subject in subjects if isinstance(subject, (ast.Name, ast.Attribute)))
    return [text for text in texts if text.split(".")[-1] in ("recipe", "recipe_name") or text.endswith("recipe.name")]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('if options.recipe == "x": pass', ["options.recipe"]),
        ('y = 1 if "x" != plan.options.recipe else 2', ["plan.options.recipe"]),
        ('if recipe.name in ("x", "y"): pass', ["recipe.name"]),
        ('match recipe.name:\n    case "x": pass', ["recipe.name"]),
        ('if recipe.dataset == "synthetic": pass', []),
    ],
)
def test_the_finder_of_branches_on_a_recipes_name_finds_them(source, found):
    assert compares_recipes_by_name(source) == found


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_nothing_branches_on_a_recipes_name(path):
    assert compares_recipes_by_name(read(path)) == []


def test_no_file_in_git_is_large_or_locks_versions():
    listing = subprocess.run(["git", "-C", str(PROJECT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listing.stdout.split("\0") if (PROJECT / name).is_file()]
    assert "cifar10_deepspeed.py" in names
    assert [name for name in names if (PROJECT / name).stat().st_size > 2**20] == []
    assert "uv.lock" not in names
