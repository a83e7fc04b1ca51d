"""HTML reports: report.html of one run, with its plots as PNGs too, and a comparison of several runs.

Each is a single file without scripts or external resources; images are inlined, and all text is escaped.
"""

import base64
import io
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar10 import UsageError
from cifar10.config.recipe import load
from cifar10.config.settings import flattened
from cifar10.data import augment, ledger, registry
from cifar10.data.ledger import Look
from cifar10.files import written_whole
from cifar10.report import stats
from cifar10.report.paired import Pairing, by_seed
from cifar10.report.stats import Spread, spread
from cifar10.run.record import Record, by_experiment, differing, open_record

REPORT, PLOTS = "report.html", "report"  # in a run's folder
PLOT_NAMES = ("curves", "optimization", "confusion", "classes", "calibration")
Plot = Callable[..., None]  # renders a figure under a name
FIRST_FACTS = ("processor", "commit", "time", "python", "torch", "torchvision", "deepspeed", "numpy")


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


def tile(pixels: np.ndarray) -> str:
    """The data URI of one image at its own size: uint8 [S, S, 3]."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return data_uri(file.getvalue())


def _render(template: str, **values: Any) -> bytes:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(percent=percent, short=short, **values).encode()


def write(files: dict[Path, bytes]) -> None:
    """Write files whole, and the folders that they are in. Raises UsageError."""
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as file:
                file.write(content)
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error.strerror}); free some space or choose another path") from None


# --- one run ----------------------------------------------------------------------------------------------------------


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    """The key numbers as (name, value, explanation); every accuracy names its split."""
    tiles, images, held = [], record.number("test_images"), record.settings.get("val_images")
    if (test := record.number("test_accuracy")) is not None and images:
        low, high = stats.wilson(np.array(round(test * images)), np.array(images))
        model = "last model" if held == 0 else "best model"
        how = f"{model}, {images:,.0f} images{_nth_look(record)}; 95% interval {low:.1%} to {high:.1%}"
        tiles.append(("test accuracy", percent(test), how))
    if (augmented := record.number("test_accuracy_tta")) is not None:
        how = f"the same images, test-time augmentation ({short(record.settings.get('tta', '?'))})"
        tiles.append(("test accuracy with TTA", percent(augmented), how))
    if (val := record.number("val_accuracy")) is not None:
        how = "best model" if record.is_finished else "best model so far"
        tiles.append(("val accuracy", percent(val), f"{how}, {held:,} held-out images" if isinstance(held, int) else how))
    if (train := record.number("train_accuracy")) is not None:
        tiles.append(("train accuracy", percent(train), f"last epoch: {_train_means(record)}"))
    if seconds := record.number("train_seconds"):
        speed = record.number("images_per_second")
        how = f"of training, at {speed:,.0f} images/s" if speed else "of training"
        tiles.append(("time", f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s", how))
    return tiles


def _nth_look(record: Record) -> str:
    """`, the 4th look at them by runs of this recipe`, as the ledger said when the run's own test opened the images."""
    for entry in ledger.read([record.folder / ledger.FILE]):
        if isinstance(nth := entry["recipes"].get(ledger.recipe_of(record.folder)), int):
            ending = "th" if nth // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(nth % 10, "th")
            return f", the {nth}{ending} look at them by runs of this recipe"
    return ""


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


def _is_mixed(settings: dict[str, Any]) -> bool:
    return any(kind.__name__ in str(settings.get("augment")) for kind in augment.MIXING)


def _train_means(record: Record) -> str:
    """What the train accuracy is measured on."""
    settings, smoothing = record.settings, record.settings.get("label_smoothing")
    words = ["augmented images"] if settings.get("augment") != "none" or settings.get("first_sizes") else []
    words += ["mixed two by two, of which the larger share's class counts"] if _is_mixed(settings) else []
    words += ["measured during training"]
    words += [f"targets smoothed by {smoothing:g}"] if isinstance(smoothing, float) and smoothing else []
    return ", ".join(words)


def _repeat(record: Record) -> str:
    """The command that repeats this run in a new folder."""
    ranks, summary = record.summary.get("world_size", 1), record.summary
    words = ["python", "main.py", "--recipe", str(record.folder / "recipe.json")]
    words += ["--num-gpus", str(ranks)] if ranks != 1 else []
    words += ["--max-steps", str(summary.get("steps"))] if summary.get("ended_by") == "max_steps" else []
    threads = record.starts[-1].get("threads") if record.starts else None
    return shlex.join([*words, "--threads", str(threads)] if threads else words)


def _predictions(record: Record, plot: Plot) -> tuple[dict[str, Any], list[str]]:
    """Template values and plots from the test predictions, and a line for each part that is left out."""
    from cifar10.report import plots

    found = record.predictions
    if found is None:
        return {"tested": 0}, ["confusion matrix, calibration and mistakes: the run has no test_predictions.npz (yet)"]
    classes, counts = record.dataset.classes, stats.confusion(found)
    plot("confusion", plots.confusion_matrix, counts, classes)
    plot("classes", plots.class_accuracy, counts, classes)
    top = [(classes[true], classes[predicted], images) for true, predicted, images in stats.most_confused(counts, 3)]
    values = {"tested": f"{counts.sum():,}", "wrong": f"{counts.sum() - np.trace(counts):,}", "top": top}
    if not np.isfinite(found.logits).all():
        return values, ["calibration: not all logits are finite"]
    values["calibration"] = calibration = stats.calibration(found)
    plot("calibration", plots.reliability, calibration)
    return values | {"accuracy": found.accuracy, "confidence": float(found.probabilities.max(axis=1).mean())}, []


def _sheets(record: Record, data_dir: Path, plot: Plot, sealed: bool) -> tuple[dict[str, Any], list[str]]:
    """Template values and plots of the image grids; they need the data set, which is not downloaded for them."""
    from cifar10.report import plots, samples

    values, classes = {"mistakes": [], "augmented": [], "augmentation": ""}, record.dataset.classes
    try:
        recipe = load(str(record.folder / "recipe.json")).recipe
        if record.predictions is not None:
            look = Look([record.folder], samples.SHOWN, sealed, shows_only=True)
            test = registry.images(recipe, "test", data_dir, look)
            if mistakes := samples.mistakes(record.predictions, test, list(classes)):
                captions = [
                    (plots.short(one.true), f"as {plots.short(one.predicted)} {one.probability:.1%}") for one in mistakes
                ]
                plot("mistakes", plots.sheet, [one.pixels for one in mistakes], captions)
                values["mistakes"] = [(one, tile(one.pixels)) for one in mistakes]
        batch, train = record.ds_config.get("train_batch_size"), registry.images(recipe, "train", data_dir)
        pixels, labels = samples.first_augmented(recipe, train, batch if isinstance(batch, int) else samples.SHOWN)
    except UsageError as error:
        return values, [f"images: {error}"]
    names = [classes[label] if label.ndim == 0 else f"{label.max():.0%} {classes[label.argmax()]}" for label in labels]
    plot("augmented", plots.sheet, pixels, [(plots.short(name),) for name in names])
    values["augmented"] = [(name, tile(image)) for name, image in zip(names, pixels, strict=True)]
    return values | {"augmentation": augment.describe(augment.parse(recipe.augment))}, []


def make_report(folder: Path, data_dir: Path, sealed: bool = False) -> Path:
    """Write report.html and report/*.png into a run's folder. Raises UsageError if it is not a run's, or corrupt."""
    from cifar10.report import plots

    record, pngs = open_record(folder), {}

    def plot(name: str, figure: Any, *data: Any) -> None:
        pngs[name] = plots.png(figure, *data)

    if record.epochs:
        plot("curves", plots.curves, record)
    if record.steps:
        plot("optimization", plots.optimization, record)
    predicted, no_predictions = _predictions(record, plot)
    sheets, no_images = _sheets(record, data_dir, plot, sealed)
    last = record.starts[-1] if record.starts else {}
    facts = [*(name for name in FIRST_FACTS if name in last), *(name for name in last if name not in FIRST_FACTS)]
    html = _render(
        "run.html",
        title=f"{record.recipe}: {record.name}",
        record=record,
        headline=_headline(record),
        tiles=_tiles(record),
        plots=dict.fromkeys(PLOT_NAMES) | {name: data_uri(png) for name, png in pngs.items()},
        train_means=_train_means(record),
        bins=stats.BINS,
        fewest=plots.FEWEST,
        left_out=no_predictions + no_images,
        repeat=_repeat(record),
        config=flattened(record.ds_config),
        environment={name: last[name] for name in facts if name != "command"},
        **predicted,
        **sheets,
    )
    write({folder / PLOTS / f"{name}.png": png for name, png in pngs.items()} | {folder / REPORT: html})
    return folder / REPORT


# --- several runs -----------------------------------------------------------------------------------------------------


def group_labels(groups: list[list[Record]]) -> list[str]:
    """Labels such as `bn_cnn`; if groups share a name, with up to three of the settings in which they differ."""
    keys, labels = [key for key in differing(groups) if key != "recipe"], []
    for first, *_ in groups:
        same_name = [other[0].experiment for other in groups if other[0].recipe == first.recipe]
        distinct = [key for key in keys if len({repr(experiment.get(key) or None) for experiment in same_name}) > 1]
        given = {key.removesuffix(".enabled").split(".")[-1]: first.experiment.get(key) for key in distinct[:3]}
        words = [f"{key} {'off' if value in (None, False) else short(value, 20)}" for key, value in given.items()]
        labels.append(", ".join([first.recipe, *words]))
    return labels


def labeled_groups(folders: Sequence[Path]) -> list[tuple[str, list[Record]]]:
    """Runs that differ in nothing but their seed, under a label. Raises UsageError for a folder that is not a run's."""
    groups = by_experiment(open_record(folder) for folder in folders)
    return list(zip(group_labels(groups), groups, strict=True))


def make_comparison(
    labeled: Sequence[tuple[str, list[Record]]], output: Path, pairings: Sequence[Pairing] | None = None
) -> Path:
    """Write a comparison of several experiments' runs, of which those with the same seeds are paired."""
    from cifar10.report import plots

    groups, rows, notes = [group for _, group in labeled], [], []
    for label, group in labeled:
        done = [record for record in group if record.is_finished]
        of = {split: [record.number(f"{split}_accuracy") for record in done] for split in ("train", "val", "test")}
        found = spread([value for value in of["test"] if value is not None])
        if len({repr(record.settings.get("seed")) for record in done}) < len(done):
            found = None
            notes.append(f"{label}: some runs have the same seed, so they are not independent and there is no interval.")
        if unfinished := [record.name for record in group if not record.is_finished]:
            notes.append(f"{label}: not finished, so not included: {', '.join(unfinished)}.")
        rows.append({"label": label, "n": len(done), "interval": interval(found)} | {k: mean_and_sd(v) for k, v in of.items()})
    experiments = [group[0].experiment for group in groups]
    different = {key: [experiment.get(key, "–") for experiment in experiments] for key in differing(groups)}
    number = sum(map(len, groups))
    title = f"{number} runs of {labeled[0][0]}" if len(rows) == 1 else f"{number} runs, {len(rows)} experiments"
    pairings = by_seed(labeled) if pairings is None else pairings
    pairs = [(pair, data_uri(plots.png(plots.differences, pair))) for pair in pairings if pair.at_the_end.n]
    curves = {of: data_uri(plots.png(plots.overlaid, labeled, of)) for of in ("accuracy", "loss")}
    shown = {"rows": rows, "labeled": labeled, "different": different, "notes": notes, "curves": curves, "pairs": pairs}
    write({output: _render("compare.html", title=title, **shown)})
    return output
