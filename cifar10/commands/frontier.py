"""`python -m cifar10 frontier`: how accurate which recipe is after how many epochs, from finished runs; for main.py --budget.

Runs count if they differ from their recipe in nothing but seed, epochs, held-out images, the epochs of its first sizes and
precision. The accuracy is that on validation images where runs hold some out, so that the choice opens no test image. A recipe
is left out if others were as accurate at every length for less work: arithmetic, and something for each step.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import tyro

from cifar10 import UsageError
from cifar10.commands.leaderboard import finished_runs
from cifar10.config import ds_config
from cifar10.config.recipe import from_settings, load, recipe_names
from cifar10.config.settings import flattened
from cifar10.launch.budget import Candidate, Point
from cifar10.plan import make_plan
from cifar10.run.folder import write_json
from cifar10.run.record import Record

DATASET = "cifar10"
FLOPS_OF_A_STEP = 1e9  # what a step costs beside its images: about 10 ms at 100 GFLOP/s
FREE = ("seed", "epochs", "val_images", "first_epochs")
TRAINED_WITH = ("optimizer.", "scheduler.", "train_batch_size", "gradient_clipping")  # of DeepSpeed's JSON


def is_of_its_recipe(record: Record) -> bool:
    """Whether a run to the end is that of a recipe as it is, at some length."""
    if record.recipe not in recipe_names() or record.settings.get("dataset", DATASET) != DATASET:
        return False
    if record.summary.get("ended_by", "epochs") != "epochs" or record.number("epochs") != record.settings["epochs"]:
        return False
    experiment, theirs = load(record.recipe), from_settings(record.settings)
    if theirs != replace(experiment.recipe, **{name: getattr(theirs, name) for name in FREE}):
        return False
    own = flattened(ds_config.read(experiment.deepspeed))
    config = flattened(record.ds_config)
    return all(config.get(key) == value for key, value in own.items() if key.startswith(TRAINED_WITH))


def point_of(runs: Sequence[Record]) -> Point:
    """What runs of one recipe and length say; those that hold images out, if there are any."""
    held_out = [run for run in runs if run.number("val_accuracy") is not None]
    split, used = ("val", held_out) if held_out else ("test", list(runs))
    views = [run.number("test_tta_seconds") / run.number("test_seconds") for run in used if run.number("test_tta_seconds")]
    accuracy = fmean(run.number(f"{split}_accuracy") for run in used)
    return Point(used[0].number("epochs"), round(accuracy, 5), len(used), split, round(fmean(views or [0.0]), 3))


def flops_and_flags(recipe: str) -> tuple[float, tuple[str, ...]]:
    """Of a forward pass of one image; and bf16 only where the machine computes in it, for a recipe that asks for it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cifar10.models.registry import build_model

    plan = make_plan(["--recipe", recipe, "--dry-run"], 1, "frontier")
    model = build_model(plan.recipe.model, 0, len(plan.dataset.classes), plan.image_shape, **plan.recipe.network_options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *plan.image_shape))
    asks_for_bf16 = plan.precision == "bf16" or "bf16" in load(recipe).precision
    return float(counter.get_total_flops()), ("--precision", "bf16", "fp32") if asks_for_bf16 else ()


def work_of(record: Record, flops: float) -> float:
    """Arithmetic of a run, with `flops` for a forward pass of an image: a backward pass takes twice as much."""
    return (record.number("steps") or 0) * (3 * flops * record.ds_config["train_batch_size"] + FLOPS_OF_A_STEP)


def frontier(records: Iterable[Record]) -> list[Candidate]:
    """The candidates that these runs make, without those that others outdo at every length."""
    groups: dict[str, dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in filter(is_of_its_recipe, records):
        groups[record.recipe][record.settings["epochs"]].append(record)
    points = {name: {epochs: point_of(runs) for epochs, runs in sorted(of.items())} for name, of in groups.items()}
    known = {name: flops_and_flags(name) for name in groups}
    work = {(name, epochs): work_of(runs[0], known[name][0]) for name, of in groups.items() for epochs, runs in of.items()}

    def is_outdone(name: str, epochs: float) -> bool:
        ours = points[name][epochs].accuracy
        return any(
            points[other][length].accuracy >= ours and theirs < work[name, epochs]
            for (other, length), theirs in work.items()
            if other != name
        )

    kept = [name for name in sorted(points) if not all(is_outdone(name, epochs) for epochs in points[name])]
    return [Candidate(name, *known[name], tuple(points[name].values())) for name in kept]


def as_json(candidates: Sequence[Candidate]) -> dict[str, Any]:
    return {"made_by": "python -m cifar10 frontier --output recipes/frontier.json", "candidates": list(map(asdict, candidates))}


def run(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[FOLDER ...]")] = (Path("records"),),
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
) -> None:
    """Print how accurate which recipe is after how many epochs, from all finished runs in these folders.

    Args:
        folders: Folders that hold runs, at any depth.
        output: Write it to this file, for main.py --budget, which reads recipes/frontier.json.
    """
    found = frontier(record for folder in folders for record in finished_runs(folder))
    if not found:
        raise UsageError(f"no finished run of a recipe as it is in {', '.join(map(str, folders))}")
    for candidate in found:
        for point in candidate.points:
            print(f"{candidate.recipe}  {point.epochs:g} epochs  {point.split} {point.accuracy:.2%}  n = {point.n}")
    if output is not None:
        write_json(output, as_json(found))
