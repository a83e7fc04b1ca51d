"""Plots of one or several runs: matplotlib figures and their PNGs, without pyplot or a display.

The colors are Okabe and Ito's colorblind-safe palette; the width suits a phone's screen.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cifar10.report.stats import BINS, Calibration, wilson
from cifar10.run.record import Record, Row

if TYPE_CHECKING:  # samples.py needs torch, a comparison of runs does not
    from cifar10.report.samples import Mistake

INK, PALE, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLORS = {"train": "#0072b2", "val": "#d55e00", "test": "#009e73"}
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH, DPI = 6.4, 150  # inches, pixels per inch
MANY = 20  # classes; more are placed closer together, without their counts
FEWEST = 10  # images in a bin; the accuracy of fewer is not shown
STYLE = {
    "font.size": 11.5,
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x$
    "axes.edgecolor": PALE,
    "axes.labelcolor": INK,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def png(plot: Callable[..., Figure], *data: Any) -> bytes:
    """Render `plot(*data)` as PNG, without warnings about glyphs that the font lacks."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings(), mpl.rc_context(STYLE):
        warnings.simplefilter("ignore")
        file = io.BytesIO()
        plot(*data).savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def _panels(count: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels below each other, `height` inches each."""
    figure = Figure(figsize=(WIDTH, height * count), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(count, 1, **options)))


# --- training ---------------------------------------------------------------------------------------------------------


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, **options: Any) -> None:
    """Plot a curve, with markers if it has few points."""
    axes.plot(x, y, linewidth=1.8, marker="o" if len(x) <= 12 else None, markersize=4, **options)


def curves(record: Record) -> Figure:
    """Accuracy and loss of each split over the epochs; the test is one point, at the epoch of the tested model."""
    figure, (above, below) = _panels(2, 2.9, sharex=True)
    best, per_epoch = record.number("best_step"), record.steps_per_epoch
    for axes, measure in ((above, "accuracy"), (below, "loss")):
        for split in ("train", "val"):
            if rows := record.epochs.get(split):
                _line(axes, _column(rows, "epoch"), _column(rows, measure), color=COLORS[split], label=split)
        if rows := record.epochs.get("test"):
            where = best / per_epoch if best and per_epoch else rows[-1]["epoch"]
            options = {
                "color": COLORS["test"],
                "marker": "*",
                "markersize": 14,
                "linestyle": "none",
                "markeredgecolor": "white",
            }
            which = "last" if record.settings.get("val_images") == 0 else "best"
            axes.plot([where], [rows[-1][measure]], label=f"test ({which} model)", zorder=5, **options)
    above.set_title("Accuracy")
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set_title("Loss (cross-entropy)")
    below.set_xlabel("epoch")
    below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    above.legend(loc="best")
    return figure


def optimization(record: Record) -> Figure:
    """Learning rate and gradient norm, from steps.csv."""
    per_epoch = record.steps_per_epoch
    x = _column(record.steps, "step") / (per_epoch or 1)
    figure, (above, below) = _panels(2, 2.9, sharex=True)
    _line(above, x, _column(record.steps, "lr"), color=SERIES[0])
    above.set_title("Learning rate")
    above.set_ylim(bottom=0)
    norms = _column(record.steps, "grad_norm")
    _line(below, x, norms, color=SERIES[0])
    positive = norms[np.isfinite(norms) & (norms > 0)]
    if len(positive) and positive.max() > 30 * positive.min():
        below.set_yscale("log")
    else:
        below.set_ylim(bottom=0)
    limit = record.ds_config.get("gradient_clipping")
    if isinstance(limit, (int, float)) and limit > 0:
        below.axhline(limit, color=COLORS["val"], linestyle="--", linewidth=1.3, label=f"clipped at {limit:g}")
    skipped = _column(record.steps, "skipped") > 0
    if skipped.any():
        low = below.get_ylim()[0]
        below.plot(x[skipped], np.full(skipped.sum(), low), "^", color="black", clip_on=False, label="skipped steps")
    below.set_title("Gradient norm before clipping")
    below.set_xlabel("epoch" if per_epoch else "step")
    if below.get_legend_handles_labels()[0]:
        below.legend(loc="best")
    return figure


# --- the model's predictions ------------------------------------------------------------------------------------------------


def _short(name: str, letters: int = 14) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"


def confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Rows are true classes, columns predicted ones. Blue: correct; darker orange: more frequent confusion."""
    size = len(classes)
    width = max(WIDTH, 0.18 * size)  # room for a line of text per class
    figure = Figure(figsize=(width, width * 0.95), layout="constrained")
    axes = figure.subplots()
    right, wrong = np.eye(size, dtype=bool), np.where(np.eye(size, dtype=bool), 0, counts)
    axes.imshow(np.ma.masked_where(~right, counts), cmap="Blues", vmin=0, vmax=2 * max(1, counts.max()))
    axes.imshow(np.ma.masked_where(right, counts), cmap="Oranges", vmin=0, vmax=2 * max(1, wrong.max()))
    if size <= MANY:
        for row, column in np.ndindex(counts.shape):
            if counts[row, column]:
                weight = "bold" if row == column else "normal"
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=9.5, weight=weight)
    names = [_short(name) for name in classes]
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
    font = {} if size <= MANY else {"fontsize": 9}
    axes.set_xticks(range(size), names, **turned, **font)
    axes.set_yticks(range(size), names, **font)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return figure


def class_accuracy(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Recall of each class on the test images, highest at the top, with 95% intervals."""
    right, total = np.diag(counts), counts.sum(axis=1)
    order = np.argsort(right / np.maximum(total, 1), kind="stable")
    share, (low, high) = right / np.maximum(total, 1), wilson(right, total)
    figure = Figure(figsize=(WIDTH, 1.2 + (0.44 if len(classes) <= MANY else 0.26) * len(classes)), layout="constrained")
    axes, places = figure.subplots(), np.arange(len(classes))
    bars = np.abs(np.stack([share - low, high - share])[:, order])
    axes.errorbar(share[order], places, xerr=bars, fmt="o", color=SERIES[0], markersize=7, elinewidth=2, capsize=4)
    for place, index in enumerate(order):
        beside = {"textcoords": "offset points", "va": "center", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
        axes.annotate(f"{share[index]:.1%}", (high[index], place), (8, 0), fontsize=10.5, **beside)
    mean = right.sum() / max(1, total.sum())
    axes.axvline(mean, color=PALE, linestyle="--", linewidth=1.3)
    above = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
    axes.annotate(f"all classes {mean:.1%}", (mean, 1.0), (0, 4), color=PALE, fontsize=10.5, **above)
    axes.set_yticks(places, [_short(classes[index]) for index in order])
    axes.set_ylim(-0.7, len(classes) - 0.3)
    axes.set_xlim(max(0, low.min() - 0.03), min(1.08, high.max() + 0.08))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("test accuracy with 95% interval")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure


def reliability(found: Calibration) -> Figure:
    """Reliability diagram: accuracy by confidence, and the number of images in each bin."""
    figure, (above, below) = _panels(2, 2.9, sharex=True, height_ratios=(2.3, 1))
    shown = found.counts >= FEWEST
    x, y, n = found.confidence[shown], found.accuracy[shown], found.counts[shown]
    low, high = wilson(np.round(y * n), n)
    above.plot([0, 1], [0, 1], color=PALE, linestyle="--", linewidth=1.3, label="perfectly calibrated")
    bars = np.abs(np.stack([y - low, high - y]))
    above.errorbar(x, y, yerr=bars, fmt="o-", color=SERIES[0], elinewidth=1.6, capsize=3, label="this model, 95% intervals")
    above.set_ylim(0, 1.02)
    above.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    above.set_ylabel("test accuracy")
    above.set_title(f"Expected calibration error {found.error:.1%}")
    above.legend(loc="lower right")
    below.bar((np.arange(BINS) + 0.5) / BINS, found.counts, width=0.9 / BINS, color=SERIES[5])
    below.set_ylabel("images")
    below.set_xlabel("confidence: probability of the predicted class")
    below.set_xlim(0, 1.01)
    below.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    below.grid(axis="x", visible=False)
    return figure


# --- image grids ---------------------------------------------------------------------------------------------------


def _sheet(images: Sequence[np.ndarray], captions: Sequence[tuple[str, ...]], columns: int = 6) -> Figure:
    """Images in a grid with captions; all are one array, because one Axes per image is slow."""
    side, lines = images[0].shape[0], len(captions[0])
    gap, line = max(1, side // 8), side * 0.15  # image pixels
    across, down = side + gap, side + gap + round(line * lines)
    rows, columns = math.ceil(len(images) / columns), min(columns, len(images))
    canvas = np.full((down * rows, across * columns, 3), 255, np.uint8)
    inches = WIDTH * 1.25 / 6  # per column
    figure = Figure(figsize=(inches * columns, inches * columns * canvas.shape[0] / canvas.shape[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    for place, (image, words) in enumerate(zip(images, captions, strict=True)):
        top, left = place // columns * down + gap // 2, place % columns * across + gap // 2
        canvas[top : top + side, left : left + side] = image
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor=PALE, linewidth=0.6))
        for number, (word, color) in enumerate(zip(words, (INK, COLORS["val"]), strict=False)):
            where = left + (side - 1) / 2, top + side * 1.03 + line * number
            axes.text(*where, word, ha="center", va="top", fontsize=8, color=color)
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()
    return figure


def mistakes_sheet(found: Sequence[Mistake]) -> Figure:
    """The most confident mistakes, with the true class, the predicted class and its probability."""
    captions = [(_short(one.true), f"as {_short(one.predicted)} {one.probability:.1%}") for one in found]
    return _sheet([one.pixels for one in found], captions)


def augmented_sheet(images: np.ndarray, names: Sequence[str]) -> Figure:
    """The first augmented training images, with their classes."""
    return _sheet(list(images), [(_short(name),) for name in names])


# --- several runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    records: list[Record]


def overlaid(groups: Sequence[Group], measure: str) -> Figure:
    """Accuracy or loss of all runs over the epochs: one color per group, or per run if there is only one group.

    On the validation split if all runs have one, else on the training split.
    """
    split = "val" if all(record.epochs.get("val") for group in groups for record in group.records) else "train"
    lines = [(group.label, group.records) for group in groups]
    if len(groups) == 1:
        lines = [(f"seed {record.settings.get('seed', '?')}", [record]) for record in groups[0].records]
    figure = Figure(figsize=(WIDTH, 3.6 + 0.25 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for number, (label, records) in enumerate(lines):
        style = {"color": SERIES[number % len(SERIES)], "linestyle": ("-", "--", ":")[number // len(SERIES) % 3], "alpha": 0.85}
        for index, record in enumerate(records):
            rows = record.epochs.get(split, [])
            named = {"label": _short(label, 60)} if index == 0 else {}
            _line(axes, _column(rows, "epoch"), _column(rows, measure), **style, **named)
    if measure == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(f"{split} {measure}")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    figure.legend(loc="outside lower left")  # there may be many
    return figure
