"""HTML reports: report.html of one run, with its plots as PNGs too, and a comparison of several runs.

Each is a single file without scripts or external resources; images are inlined, and all text is escaped.
"""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar10 import UsageError
from cifar10.config.recipe import load
from cifar10.config.settings import flattened
from cifar10.data import augment
from cifar10.files import written_whole
from cifar10.report import stats
from cifar10.report.stats import Spread, spread
from cifar10.run.record import Record, by_experiment, differing, open_record

REPORT, PLOTS = "report.html", "report"  # in a run's folder
FIRST_FACTS = ("processor", "commit", "command", "time", "python", "torch", "torchvision", "deepspeed", "numpy")


def percent(value: float | None) -> str:
    """`82.30%`, or a dash for None."""
    return "–" if value is None else f"{value:.2%}"


def mean_and_sd(values: Sequence[float | None]) -> str:
    """`82.30 ± 0.36%`, ignoring None."""
    found = spread([value for value in values if value is not None])
    if found is None or found.sd is None:
        return percent(found.mean if found else None)
    return f"{100 * found.mean:.2f} ± {100 * found.sd:.2f}%"


def interval(found: Spread | None) -> str:
    """`81.42 to 83.18%`: the 95% confidence interval of a mean accuracy, clipped to 0..100%."""
    if found is None or found.half_width is None:
        return "–"
    low, high = max(0.0, found.mean - found.half_width), min(1.0, found.mean + found.half_width)
    return f"{100 * low:.2f} to {100 * high:.2f}%"


def short(value: Any, letters: int = 300) -> str:
    """A setting's value as text, truncated."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= letters else text[:letters] + "…"


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def tile_png(pixels: np.ndarray) -> bytes:
    """One image as PNG at its own size: uint8 [S, S, 3]."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def _render(template: str, **values: Any) -> bytes:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(percent=percent, **values).encode()


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheets:
    """The image grids; they need the data set, so `left_out` says why they are missing."""

    mistakes: list[Any]  # samples.Mistake
    augmented: list[tuple[np.ndarray, str]]  # pixels, class
    augmentation: str
    left_out: list[str]


def _sheets(record: Record, data_dir: Path) -> Sheets:
    """Images for the grids, from data that is already there."""
    from cifar10.report import samples

    mistakes, augmented, words, left_out = [], [], "", []
    try:
        recipe = load(str(record.folder / "recipe.json")).recipe
        if record.predictions is not None:
            test = samples.read_images(recipe, "test", data_dir)
            mistakes = samples.mistakes(record.predictions, test, list(record.dataset.classes))
        images = samples.read_images(recipe, "train", data_dir)
        pixels, labels = samples.first_augmented(recipe, images)
        augmented = [(image, record.dataset.classes[label]) for image, label in zip(pixels, labels, strict=True)]
        words = augment.describe(augment.parse(recipe.augment))
    except UsageError as error:
        left_out.append(f"images: {error}")
    return Sheets(mistakes, augmented, words, left_out)


def _tiles(record: Record) -> list[dict[str, str]]:
    """The key numbers; every accuracy names its split."""
    tiles, images = [], record.number("test_images")
    if (test := record.number("test_accuracy")) is not None and images:
        low, high = stats.wilson(np.array(round(test * images)), np.array(images))
        how = f"{_tested_model(record)}, {images:,.0f} images used once; 95% interval {low:.1%} to {high:.1%}"
        tiles.append({"what": "test accuracy", "value": percent(test), "how": how})
    if (augmented := record.number("test_accuracy_tta")) is not None:
        how = f"the same images, test-time augmentation ({short(record.settings.get('tta', '?'))})"
        tiles.append({"what": "test accuracy with TTA", "value": percent(augmented), "how": how})
    if (val := record.number("val_accuracy")) is not None:
        held, which = record.settings.get("val_images"), "best model" if record.is_finished else "best model so far"
        how = f"{which}, {held:,} held-out images" if isinstance(held, int) else which
        tiles.append({"what": "val accuracy", "value": percent(val), "how": how})
    if (train := record.number("train_accuracy")) is not None:
        tiles.append({"what": "train accuracy", "value": percent(train), "how": f"last epoch: {_train_means(record)}"})
    seconds, speed = record.number("train_seconds"), record.number("images_per_second")
    if seconds:
        how = f"of training, at {speed:,.0f} images/s" if speed else "of training"
        tiles.append({"what": "time", "value": f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s", "how": how})
    return tiles


def _holds_out(record: Record) -> bool:
    return record.settings.get("val_images") != 0


def _tested_model(record: Record) -> str:
    """Without validation images, best_model is the last one."""
    return "best model" if _holds_out(record) else "last model"


def _headline(record: Record) -> str:
    """`bn_cnn on cifar10, seed 0, 50 epochs (35,150 steps), 1 rank on cpu`."""
    settings, epochs, steps = record.settings, record.number("epochs"), record.number("steps")
    words = [f"{short(settings.get('model', '?'))} on {short(settings.get('dataset', '?'))}, seed {settings.get('seed', '?')}"]
    if epochs is not None and steps is not None:
        of = f" of {short(settings.get('epochs'))}" if settings.get("epochs") != epochs else ""
        words.append(f"{epochs:.4g}{of} epochs ({steps:,.0f} steps)")
    if record.starts:
        size, device = record.starts[-1].get("world_size", 1), record.starts[-1].get("device", "?")
        words.append(f"{size} rank{'s' if size != 1 else ''} on {short(device)}")
    return ", ".join(words)


def _train_means(record: Record) -> str:
    smoothing = record.settings.get("label_smoothing")
    words = ["measured during training"]
    if record.settings.get("augment") != "none" or record.settings.get("first_sizes"):
        words.insert(0, "augmented images")
    return ", ".join([*words, f"targets smoothed by {smoothing:g}"] if isinstance(smoothing, float) and smoothing else words)


def _repeat(record: Record) -> str:
    """The command that repeats this run in a new folder."""
    ranks, summary = record.summary.get("world_size", 1), record.summary
    words = ["python", "main.py", "--recipe", str(record.folder / "recipe.json")]
    words += ["--num-gpus", str(ranks)] if ranks != 1 else []
    words += ["--max-steps", str(summary.get("steps"))] if summary.get("ended_by") == "max_steps" else []
    threads = record.starts[-1].get("threads") if record.starts else None
    words += ["--threads", str(threads)] if threads else []
    return shlex.join(words)


def _environment(record: Record) -> list[tuple[str, str]]:
    """The environment of the last start, with the most useful facts first."""
    if not record.starts:
        return []
    last = record.starts[-1]
    names = [name for name in FIRST_FACTS if name in last and name != "command"]
    return [(name, short(last[name])) for name in [*names, *(name for name in last if name not in FIRST_FACTS)]]


def _predictions(record: Record, plot: Any) -> tuple[dict[str, Any], list[str]]:
    """Template values and plots from the test predictions, and a line for each part that is left out."""
    from cifar10.report import plots

    found = record.predictions
    if found is None:
        return {"tested": 0}, ["confusion matrix, calibration and mistakes: the run has no test_predictions.npz (yet)"]
    classes, counts = record.dataset.classes, stats.confusion(found)
    plot("confusion", plots.confusion_matrix, counts, classes)
    plot("classes", plots.class_accuracy, counts, classes)
    wrong = counts - np.diag(np.diag(counts))
    pairs = [divmod(int(place), len(classes)) for place in np.argsort(-wrong, axis=None, kind="stable")[:3]]
    top = [{"true": classes[t], "predicted": classes[p], "count": int(wrong[t, p])} for t, p in pairs if wrong[t, p]]
    values = {"tested": f"{counts.sum():,}", "wrong": f"{wrong.sum():,}", "top": top}
    if not np.isfinite(found.logits).all():
        return values, ["calibration: not all logits are finite"]
    calibration = stats.calibration(found)
    plot("calibration", plots.reliability, calibration)
    mean, right = float(found.probabilities.max(axis=1).mean()), found.accuracy
    way = "overconfident" if mean > right else "underconfident"
    values["calibration_words"] = (
        f"Mean confidence is {mean:.1%} and accuracy is {right:.1%}: overall the model is {way}."
        f" The expected calibration error is {calibration.error:.2%}."
    )
    return values, []


def make_report(folder: Path, data_dir: Path) -> Path:
    """Write report.html and report/*.png into a run's folder. Raises UsageError if it is not a run's, or corrupt."""
    from cifar10.report import plots

    record, pngs = open_record(folder), {}

    def plot(name: str, figure: Any, *data: Any) -> None:
        pngs[name] = plots.png(figure, *data)

    if record.epochs:
        plot("curves", plots.curves, record)
    if record.steps:
        plot("optimization", plots.optimization, record)
    predicted, left_out = _predictions(record, plot)
    sheets = _sheets(record, data_dir)
    if sheets.mistakes:
        plot("mistakes", plots.mistakes_sheet, sheets.mistakes)
    if sheets.augmented:
        plot("augmented", plots.augmented_sheet, [image for image, _ in sheets.augmented], [n for _, n in sheets.augmented])
    html = _render(
        "run.html",
        title=f"{record.recipe}: {record.name}",
        record=record,
        headline=_headline(record),
        tiles=_tiles(record),
        plots={**dict.fromkeys(("curves", "optimization", "confusion", "classes", "calibration")), **_uris(pngs)},
        train_means=_train_means(record),
        holds_out=_holds_out(record),
        bins=stats.BINS,
        fewest=plots.FEWEST,
        mistakes=[{"mistake": one, "image": data_uri(tile_png(one.pixels))} for one in sheets.mistakes],
        augmented=[{"name": name, "image": data_uri(tile_png(image))} for image, name in sheets.augmented],
        augmentation=sheets.augmentation,
        left_out=[*left_out, *sheets.left_out],
        repeat=_repeat(record),
        started=[f"python {short(start['command'])}" for start in record.starts if "command" in start],
        settings=[(name, short(value)) for name, value in record.settings.items()],
        config=[(name, short(value)) for name, value in flattened(record.ds_config).items()],
        environment=_environment(record),
        **predicted,
    )
    _write({folder / PLOTS / f"{name}.png": png for name, png in pngs.items()} | {folder / REPORT: html})
    return folder / REPORT


def _uris(pngs: dict[str, bytes]) -> dict[str, str]:
    return {name: data_uri(png) for name, png in pngs.items()}


def _write(files: dict[Path, bytes]) -> None:
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as file:
                file.write(content)
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error.strerror}); free some space or choose another path") from None


# --- several runs -----------------------------------------------------------------------------------------------------


def group_labels(groups: list[list[Record]]) -> list[str]:
    """Labels such as `bn_cnn`; if groups share a name, with up to three of the settings in which they differ."""
    names, keys = [group[0].recipe for group in groups], [key for key in differing(groups) if key != "recipe"]
    labels = []
    for group, name in zip(groups, names, strict=True):
        same_name = [other[0].experiment for other, its_name in zip(groups, names, strict=True) if its_name == name]
        distinct = [key for key in keys if len({repr(experiment.get(key)) for experiment in same_name}) > 1]
        words = [f"{key.split('.')[-1]} {short(group[0].experiment.get(key), 20)}" for key in distinct[:3]]
        labels.append(", ".join([name, *words]))
    return labels


def _are_independent(group: list[Record]) -> bool:
    seeds = [repr(record.settings.get("seed")) for record in group if record.is_finished]
    return len(set(seeds)) == len(seeds)


def _notes(groups: list[list[Record]], labels: list[str]) -> list[str]:
    """Caveats for the readers of the table."""
    notes = []
    for group, label in zip(groups, labels, strict=True):
        if not _are_independent(group):
            notes.append(f"{label}: some runs have the same seed, so they are not independent and there is no interval.")
        if unfinished := [record.name for record in group if not record.is_finished]:
            notes.append(f"{label}: not finished, so not included: {', '.join(unfinished)}.")
    return notes


def make_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Write a comparison of several runs. Raises UsageError for a folder that is not a run's."""
    from cifar10.report import plots

    groups = by_experiment(open_record(folder) for folder in folders)
    labels = group_labels(groups)
    plotted = [
        plots.Group(f"{label} ({len(group)} run{'s' * (len(group) > 1)})", group)
        for label, group in zip(labels, groups, strict=True)
    ]
    rows, runs = [], []
    for label, group in zip(labels, groups, strict=True):
        done = [record for record in group if record.is_finished]
        of = {split: [record.number(f"{split}_accuracy") for record in done] for split in ("train", "val", "test")}
        found = spread([value for value in of["test"] if value is not None]) if _are_independent(group) else None
        rows.append({"label": label, "n": len(done), "interval": interval(found)} | {k: mean_and_sd(v) for k, v in of.items()})
        for record in group:
            seconds, epochs = record.number("train_seconds"), record.number("epochs")
            accuracies = {split: percent(record.number(f"{split}_accuracy")) for split in ("train", "val", "test")}
            progress = {"epochs": f"{epochs or 0:.4g}", "minutes": f"{(seconds or 0) / 60:.1f}", "status": record.status}
            runs.append(
                {"name": record.name, "label": label, "seed": record.settings.get("seed", "?"), **progress, **accuracies}
            )
    different = [
        {"name": key, "of_each": [short(group[0].experiment.get(key, "–"), 60) for group in groups]}
        for key in differing(groups)
    ]
    title = f"{len(runs)} runs of {rows[0]['label']}" if len(rows) == 1 else f"{len(runs)} runs, {len(rows)} experiments"
    shown = {"groups": rows, "runs": runs, "different": different, "notes": _notes(groups, labels)}
    curves = {of: data_uri(plots.png(plots.overlaid, plotted, of)) for of in ("accuracy", "loss")}
    _write({output: _render("compare.html", title=title, curves=curves, **shown)})
    return output
