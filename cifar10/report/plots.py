"""Plots of one or several runs: matplotlib figures and their PNGs, without pyplot or a display.

The colors are Okabe and Ito's colorblind-safe palette; the width suits a phone's screen.
"""

# ruff: noqa: E402

import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

_backend = os.environ.pop("MPLBACKEND", None)  # no import succeeds with one that is not installed, as Jupyter's in a child
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from cifar10.report.paired import Pairing
from cifar10.report.stats import BINS, Calibration, wilson
from cifar10.run.record import Record, Row

if _backend is not None:
    os.environ["MPLBACKEND"] = _backend
    with suppress(ValueError):
        mpl.rcParams["backend"] = _backend

INK, PALE, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLORS = {"train": "#0072b2", "val": "#d55e00", "test": "#009e73"}
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH, DPI = 6.4, 150  # inches, pixels per inch
MANY = 20  # classes; more are placed closer together, without their counts
FEWEST = 10  # images in a bin; the accuracy of fewer is not shown
STYLE = {  # whatever a matplotlibrc or a notebook has set
    **{name: value for name, value in mpl.rcParamsDefault.items() if name != "backend"},
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"font.size": 11.5, "font.family": "DejaVu Sans"},  # the font ships with matplotlib
    **{"axes.titlesize": 12.5, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    **{"axes.edgecolor": PALE, "grid.color": GRID},
    "text.parse_math": False,  # a class may be called $x$
}
BESIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": 9.5, "reverse": True}  # a legend
DASHED = {"linestyle": "--", "linewidth": 1.3}


def png(plot: Callable[..., Figure], *data: Any) -> bytes:
    """Render `plot(*data)` as PNG, without warnings about glyphs that the font lacks."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings(), mpl.rc_context(STYLE):
        warnings.simplefilter("ignore")
        file = io.BytesIO()
        plot(*data).savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def _figure(height: float, panels: int = 1, width: float = WIDTH, **options: Any) -> tuple[Figure, Any]:
    """A figure and its Axes, or an array of them for several panels below each other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(panels, 1, **options)


def _plain_powers(axis: Axis) -> None:
    """Label a logarithmic axis with 0.01, 0.1, 1: matplotlib's own labels are mathematics, which STYLE does not parse."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


# --- training ---------------------------------------------------------------------------------------------------------


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, **options: Any) -> None:
    """Plot a curve, with markers if it has few points."""
    axes.plot(x, y, linewidth=1.8, marker="o" if len(x) <= 12 else None, markersize=4, **options)


def curves(record: Record) -> Figure:
    """Accuracy and loss of each split over the epochs; the test is one point, at the epoch of the tested model."""
    figure, (above, below) = _figure(5.8, 2, sharex=True)
    best, per_epoch = record.number("best_step"), record.steps_per_epoch
    for axes, measure in ((above, "accuracy"), (below, "loss")):
        for split in ("train", "val"):
            if rows := record.epochs.get(split):
                _line(axes, _column(rows, "epoch"), _column(rows, measure), color=COLORS[split], label=split)
        if rows := record.epochs.get("test"):
            where = best / per_epoch if best and per_epoch else rows[-1]["epoch"]
            which = "last" if record.settings.get("val_images") == 0 else "best"
            star = {"markersize": 14, "markeredgecolor": "white", "zorder": 5, "label": f"test ({which} model)"}
            axes.plot([where], [rows[-1][measure]], "*", color=COLORS["test"], **star)
    above.set_title("Accuracy")
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    above.legend()
    below.set(title="Loss (cross-entropy)", xlabel="epoch")
    below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    return figure


def optimization(record: Record) -> Figure:
    """Learning rate and gradient norm, from steps.csv."""
    per_epoch = record.steps_per_epoch
    x = _column(record.steps, "step") / (per_epoch or 1)
    figure, (above, below) = _figure(5.8, 2, sharex=True)
    _line(above, x, _column(record.steps, "lr"), color=SERIES[0])
    above.set(title="Learning rate", ylim=(0, None))
    norms = _column(record.steps, "grad_norm")
    _line(below, x, norms, color=SERIES[0])
    positive = norms[np.isfinite(norms) & (norms > 0)]
    if len(positive) and positive.max() > 30 * positive.min():
        below.set_yscale("log")
        _plain_powers(below.yaxis)
    else:
        below.set_ylim(bottom=0)
    limit = record.ds_config.get("gradient_clipping")
    if isinstance(limit, (int, float)) and limit > 0:
        below.axhline(limit, color=COLORS["val"], **DASHED, label=f"clipped at {limit:g}")
    skipped = _column(record.steps, "skipped") > 0
    if skipped.any():
        low = below.get_ylim()[0]
        below.plot(x[skipped], np.full(skipped.sum(), low), "^", color="black", clip_on=False, label="skipped steps")
    below.set(title="Gradient norm before clipping", xlabel="epoch" if per_epoch else "step")
    if below.get_legend_handles_labels()[0]:
        below.legend()
    return figure


def schedule(rates: Sequence[float], steps_per_epoch: int, title: str) -> Figure:
    """The learning rate at each step of a run."""
    figure, axes = _figure(3.2)
    axes.plot((np.arange(len(rates)) + 0.5) / steps_per_epoch, rates, color=SERIES[0], linewidth=1.8)
    axes.set(title=title, xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    return figure


def lr_range(rates: Sequence[float], losses: Sequence[float], marked: dict[str, float]) -> Figure:
    """The smoothed loss at growing learning rates, and the ones that are suggested."""
    figure, axes = _figure(3.2)
    axes.plot(rates, losses, color=SERIES[0], linewidth=1.8)
    for color, (name, rate) in zip(SERIES[1:], marked.items(), strict=False):
        axes.axvline(rate, color=color, **DASHED, label=f"{rate:.2g}, {name}")
    highest = max(losses[: len(losses) // 2])  # what diverges may leave the picture
    axes.set(title="Learning rate range test", xlabel="learning rate", ylabel="smoothed loss", xscale="log")
    axes.set_ylim(top=highest + 0.5 * (highest - min(losses)) + 0.1)
    _plain_powers(axes.xaxis)
    axes.legend(loc="lower left")
    return figure


# --- the model's predictions ------------------------------------------------------------------------------------------------


def short(name: str, letters: int = 14) -> str:
    """A class's name, truncated."""
    return name if len(name) <= letters else name[: letters - 1] + "…"


def confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Rows are true classes, columns predicted ones. Blue: correct; darker orange: more frequent confusion."""
    size = len(classes)
    width = max(WIDTH, 0.18 * size)  # room for a line of text per class
    figure, axes = _figure(width * 0.95, width=width)
    right = np.eye(size, dtype=bool)
    wrong = np.where(right, 0, counts)
    axes.imshow(np.ma.masked_where(~right, counts), cmap="Blues", vmin=0, vmax=2 * max(1, counts.max()))
    axes.imshow(np.ma.masked_where(right, counts), cmap="Oranges", vmin=0, vmax=2 * max(1, wrong.max()))
    if size <= MANY:
        for row, column in np.ndindex(counts.shape):
            if counts[row, column]:
                weight = "bold" if row == column else "normal"
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=9.5, weight=weight)
    names = [short(name) for name in classes]
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
    font = {} if size <= MANY else {"fontsize": 9}
    axes.set_xticks(range(size), names, **turned, **font)
    axes.set_yticks(range(size), names, **font)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    return figure


def class_accuracy(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Recall of each class on the test images, highest at the top, with 95% intervals."""
    right, total = np.diag(counts), counts.sum(axis=1)
    order = np.argsort(right / np.maximum(total, 1), kind="stable")
    share, (low, high) = right / np.maximum(total, 1), wilson(right, total)
    figure, axes = _figure(1.2 + (0.44 if len(classes) <= MANY else 0.26) * len(classes))
    places = np.arange(len(classes))
    bars = np.abs(np.stack([share - low, high - share])[:, order])
    axes.errorbar(share[order], places, xerr=bars, fmt="o", color=SERIES[0], markersize=7, elinewidth=2, capsize=4)
    for place, index in enumerate(order):
        beside = {"textcoords": "offset points", "va": "center", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
        axes.annotate(f"{share[index]:.1%}", (high[index], place), (8, 0), fontsize=10.5, **beside)
    mean = right.sum() / max(1, total.sum())
    axes.axvline(mean, color=PALE, **DASHED)
    above = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
    axes.annotate(f"all classes {mean:.1%}", (mean, 1.0), (0, 4), color=PALE, fontsize=10.5, **above)
    axes.set_yticks(places, [short(classes[index]) for index in order])
    axes.set(xlim=(max(0, low.min() - 0.03), min(1.08, high.max() + 0.08)), ylim=(-0.7, len(classes) - 0.3))
    axes.set_xlabel("test accuracy with 95% interval")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure


def reliability(found: Calibration) -> Figure:
    """Reliability diagram: accuracy by confidence, and the number of images in each bin."""
    figure, (above, below) = _figure(5.8, 2, sharex=True, height_ratios=(2.3, 1))
    shown = found.counts >= FEWEST
    x, y, n = found.confidence[shown], found.accuracy[shown], found.counts[shown]
    low, high = wilson(np.round(y * n), n)
    above.plot([0, 1], [0, 1], color=PALE, **DASHED, label="perfectly calibrated")
    bars = np.abs(np.stack([y - low, high - y]))
    above.errorbar(x, y, yerr=bars, fmt="o-", color=SERIES[0], elinewidth=1.6, capsize=3, label="this model, 95% intervals")
    above.set(title=f"Expected calibration error {found.error:.1%}", ylabel="test accuracy", ylim=(0, 1.02))
    above.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    above.legend(loc="lower right")
    below.bar((np.arange(BINS) + 0.5) / BINS, found.counts, width=0.9 / BINS, color=SERIES[5])
    below.set(xlabel="confidence: probability of the predicted class", ylabel="images", xlim=(0, 1.01))
    below.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    below.grid(axis="x", visible=False)
    return figure


# --- image grids ---------------------------------------------------------------------------------------------------


def sheet(images: Sequence[np.ndarray], captions: Sequence[tuple[str, ...]], columns: int = 6) -> Figure:
    """Images in a grid with captions of one or two lines; all are one array, because one Axes per image is slow."""
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


# --- several runs -------------------------------------------------------------------------------------------------------


def overlaid(groups: Sequence[tuple[str, list[Record]]], measure: str) -> Figure:
    """Accuracy or loss over the epochs of labeled groups of runs: one color per group, or per run if there is only one.

    On the validation split if all runs have one, else on the training split.
    """
    split = "val" if all(record.epochs.get("val") for _, records in groups for record in records) else "train"
    lines = [(f"{label} ({len(records)} run{'s' * (len(records) > 1)})", records) for label, records in groups]
    if len(groups) == 1:
        lines = [(f"seed {record.settings.get('seed', '?')}", [record]) for record in groups[0][1]]
    figure, axes = _figure(3.6 + 0.25 * len(lines))
    for number, (label, records) in enumerate(lines):
        style = {"color": SERIES[number % len(SERIES)], "linestyle": ("-", "--", ":")[number // len(SERIES) % 3], "alpha": 0.85}
        for index, record in enumerate(records):
            rows = record.epochs.get(split, [])
            named = {"label": short(label, 60)} if index == 0 else {}
            _line(axes, _column(rows, "epoch"), _column(rows, measure), **style, **named)
    if measure == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(title=f"{split} {measure}", xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    figure.legend(loc="outside lower left")  # there may be many
    return figure


def differences(pair: Pairing) -> Figure:
    """B - A of each pair of runs, and after each pair their mean and the interval of means that is not excluded."""
    found = pair.at_the_end
    numbers, points = np.arange(1, found.n + 1), 100 * np.array(found.values)
    ends = {n: [100 * end for end in found.interval(n)] for n in numbers.tolist()}
    known = {n: both for n, both in ends.items() if np.isfinite(both).all()}
    figure, axes = _figure(3.6)
    axes.axhline(0, color=INK, linewidth=1)
    if known:
        bars = {"color": SERIES[5], "alpha": 0.5, "linewidth": 7, "label": "interval of the mean"}
        axes.vlines(list(known), *np.array(list(known.values())).T, **bars)
    axes.plot(numbers, points.cumsum() / numbers, color=SERIES[0], linewidth=1.8, label="mean so far")
    axes.plot(numbers, points, "o", color=SERIES[1], markersize=6, label="one pair of runs")
    reach = 1.15 * max(np.abs(points).max(), 0.01)
    bottom, top = ends[found.n] if found.n in known else (0, 0)
    axes.set(title="Difference in points of val accuracy", xlabel="pair", ylim=(min(-reach, bottom), max(reach, top)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(loc="outside lower left", ncols=3)
    return figure


# --- what ranks hold and send -------------------------------------------------------------------------------------------


def xray(found: dict[str, Any]) -> Figure:
    """For each number of ranks and each column a rank's memory by kind, and what it sends: predicted beside measured."""
    figure, panels = _figure(3.4 * 2 * len(found), 2 * len(found), width=1.25 * WIDTH, squeeze=False)
    for number, (ranks, of_ranks) in enumerate(found.items()):
        columns, count = of_ranks["columns"], f"{ranks} rank{'s' * (ranks != '1')}"
        memory, sent = {}, {}
        for name, one in columns.items():
            kinds = one["measured"][0]["memory"]
            most = {kind: max(rank["memory"][kind] for rank in one["measured"]) for kind in kinds}
            memory[name] = one["predicted"]["memory"], most
            sent[name] = one["predicted"]["sent"], {kind: row["sent"] for kind, row in one["measured"][0]["traffic"].items()}
        above, below = panels[2 * number : 2 * number + 2, 0]
        _stacks(above, memory, f"Memory of a rank, each kind at its most ({count})")
        _stacks(below, sent, f"Sent by a rank in a step ({count})")
        papers = [one["predicted"]["paper"] for one in columns.values()]
        for where, paper in ((where, paper) for where, paper in enumerate(papers) if paper):
            label = {} if where else {"label": "ZeRO paper"}
            below.plot([where - 0.42, where + 0.42], [paper / 1e6] * 2, color=INK, linewidth=1.8, **label)
        below.legend(**BESIDE)
        for axes in (above, below):
            axes.set_ylim(0, 1.08 * max(axes.dataLim.y1, 1e-6))
    return figure


def _stacks(axes: Axes, columns: dict[str, tuple[dict[str, float], dict[str, float]]], title: str) -> None:
    """Two stacked bars of bytes for each column: predicted, which is pale, and measured."""
    kinds = list(dict.fromkeys(kind for pair in columns.values() for one in pair for kind, size in one.items() if size > 0))
    for kind, color in zip(kinds, SERIES, strict=False):
        for side, alpha in enumerate((0.4, 1.0)):
            sizes = np.array([pair[side].get(kind, 0) for pair in columns.values()]) / 1e6
            below = [sum(pair[side].get(one, 0) for one in kinds[: kinds.index(kind)]) / 1e6 for pair in columns.values()]
            where = np.arange(len(columns)) + 0.4 * side - 0.2
            axes.bar(where, sizes, 0.36, bottom=below, color=color, alpha=alpha, label=kind if side else None)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set(title=title, ylabel="MB, predicted (pale), measured")
    axes.legend(**BESIDE)
    axes.grid(axis="x", visible=False)
