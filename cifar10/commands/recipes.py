"""`python -m cifar10 recipes`: the recipes as a table for docs/recipes.md, with what runs in records/ have measured."""

import importlib
import json
from dataclasses import replace

from cifar10.config.recipe import PROJECT, load, recipe_names
from cifar10.data import registry
from cifar10.files import data_folder


def _measured(name: str) -> str:
    """`82.30 ± 0.36% of cifar10's test images (n = 3, 50 epochs)`: the finished runs in records/ of a recipe as it is.

    If none took all its epochs, the shorter ones.
    """
    recipe, found = load(name).recipe, []
    for file in sorted((PROJECT / "records").glob("*_cpu/seed_*/summary.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        if run["recipe"] == name and run["status"] == "finished":
            theirs = load(str(file.with_name("recipe.json"))).recipe
            if theirs == replace(recipe, seed=theirs.seed, epochs=theirs.epochs):
                found.append((theirs.epochs, run))
    runs = [run for epochs, run in found if epochs == max(epochs for epochs, _ in found)]
    if not runs:
        return "not measured"
    from cifar10.report.html import mean_and_sd

    cut = "" if runs[0]["epochs"] == recipe.epochs else f" of its {recipe.epochs:g}"
    how = f"n = {len(runs)}, {runs[0]['epochs']:g}{cut} epochs"
    views = [run["test_accuracy_tta"] for run in runs if run.get("test_accuracy_tta") is not None]
    also = f"; {mean_and_sd(views)} with test-time augmentation" if len(views) == len(runs) else ""
    return f"{mean_and_sd([run['test_accuracy'] for run in runs])} of {recipe.dataset}'s test images ({how}){also}"


def table() -> str:
    """Markdown: a row for each file in recipes/."""
    from cifar10.models.registry import build_model

    rows = ["| flag | what it is | parameters | measured on two CPU cores |", "|---|---|---:|---|"]
    for name in recipe_names():
        what = importlib.import_module(f"recipes.{name}").__doc__.splitlines()[0].rstrip(".")
        recipe = load(name).recipe
        classes = registry.of(recipe).describe(data_folder()).classes
        model = build_model(recipe.model, 0, len(classes))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows.append(f"| `--recipe {name}` | {what} | {parameters:,} | {_measured(name)} |")
    return "\n".join(rows)


def run() -> None:
    """Print the recipes as a table in Markdown: network, parameters, and what was measured."""
    print(table())
