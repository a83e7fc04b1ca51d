"""The recipes in one table, for the README: what each is, and what runs in records/ have measured of it."""

from __future__ import annotations

import json
from statistics import mean, stdev

from cifar10.recipe import PROJECT, load, recipe_names


def _measured(name: str) -> str:
    """`82.30 ± 0.36% of the test images (n = 3, 50 epochs)`, of the finished runs of a recipe in records/."""
    summaries = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((PROJECT / "records").glob("*_cpu/seed_*/summary.json"))
    ]
    runs = [run for run in summaries if run["recipe"] == name and run["status"] == "finished"]
    if not runs:
        return "not measured"
    accuracies = [100 * run["test_accuracy"] for run in runs]
    spread = f" ± {stdev(accuracies):.2f}" if len(runs) > 1 else ""
    epochs, whole = runs[0]["epochs"], load(name).recipe.epochs
    cut = "" if epochs == whole else f" of {whole:g}"
    return f"{mean(accuracies):.2f}{spread}% of the test images (n = {len(runs)}, {epochs:g}{cut} epochs)"


def table() -> str:
    """Markdown: a row for each file in recipes/."""
    from cifar10_deepspeed import build_model

    rows = ["| `--recipe` | network | parameters | measured on two CPU cores |", "|---|---|---:|---|"]
    for name in recipe_names():
        model = load(name).recipe.model
        parameters = sum(parameter.numel() for parameter in build_model(model, 0).parameters())
        rows.append(f"| `{name}` | {model} | {parameters:,} | {_measured(name)} |")
    return "\n".join(rows)


def run() -> None:
    """Print the recipes as a table in Markdown: network, parameters, and what was measured."""
    print(table())
