"""`python -m cifar10 leaderboard`: all finished runs in some folders as one table; it writes records/README.md."""

import re
from collections.abc import Iterable, Sequence
from os.path import relpath
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import tyro

from cifar10 import UsageError
from cifar10.report.html import group_labels, interval, mean_and_sd, write
from cifar10.report.stats import spread
from cifar10.run.record import Record, by_experiment, open_record

HEADER = """# Leaderboard

Accuracy in percent over n seeds: mean ± sample standard deviation; the interval is the 95% confidence interval of the mean of
the test accuracy (Student's t; one run has none). Val and test belong to the best model, and the test images are opened once
per run. Runs in one row differ in nothing but their seed. Minutes are those of training, beside whatever else the machine did.
"""
MADE_BY = "(`python -m cifar10 leaderboard --output records/README.md` writes this page from the run folders)"
COLUMNS = "recipe|data set|epochs|n|test accuracy|95% interval|val accuracy|minutes|hardware|commit".split("|")


def finished_runs(folder: Path) -> list[Record]:
    """All finished runs in a folder or below it. Raises UsageError for a damaged one."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder, expected one that holds runs, for example runs")
    found = sorted(path.parent for path in folder.rglob("recipe.json") if (path.parent / "summary.json").exists())
    return [record for record in map(open_record, found) if record.is_finished]


def _range(values: Iterable[float], digits: int) -> str:
    """`4.9 to 7.5`, or one number where both are the same."""
    texts = list(dict.fromkeys(f"{value:.{digits}f}" for value in sorted(values)))
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}" if texts else "–"


def _hardware(group: Sequence[Record]) -> str:
    """`AMD EPYC, 2 ranks of 1 thread`"""
    starts = [record.starts[-1] for record in group if record.starts]
    device = {str(start.get("processor") if start.get("device") == "cpu" else start.get("device")) for start in starts}
    threads = {start["threads"] for start in starts if isinstance(start.get("threads"), int)}
    ranks = group[0].experiment["ranks"]
    many = f"{_range(threads, 0)} thread{'' if threads == {1} else 's'}"
    return f"{', '.join(sorted(device)) or '?'}, {ranks} rank{'' if ranks == 1 else 's'} of {many}"


def _commits(group: Sequence[Record]) -> str:
    commits = {str(record.starts[0].get("commit") or "?") for record in group if record.starts}
    return ", ".join(sorted({commit[:7] + commit[40:] for commit in commits})) or "?"  # may end in -dirty


def _cell(text: str) -> str:
    """Escape a name, so that it cannot start a cell, a line, a link or a tag."""
    return " ".join(re.sub(r"([\\|\[\]])", r"\\\1", text).replace("<", "&lt;").split())


def _row(label: str, link: str, group: Sequence[Record]) -> tuple[tuple[str, float], str]:
    """The key that a row is sorted by, and its Markdown."""
    val, test = ([record.number(f"{split}_accuracy") for record in group] for split in ("val", "test"))
    tested = spread([value for value in test if value is not None])
    dataset = str(group[0].settings.get("dataset", "cifar10"))
    cells = [
        f"[{_cell(label)}]({link})",
        _cell(dataset),
        _range((record.number("epochs") or 0 for record in group), 0),
        str(len(group)),
        f"**{mean_and_sd(test)}**",
        interval(tested),
        "none held out" if group[0].settings.get("val_images") == 0 else mean_and_sd(val),
        _range(((record.number("train_seconds") or 0) / 60 for record in group), 1),
        _cell(_hardware(group)),
        _cell(_commits(group)),
    ]
    return (dataset, -(tested.mean if tested else -1.0)), f"| {' | '.join(cells)} |"


def page(folders: Sequence[Path], output: Path | None = None) -> str:
    """Markdown: a row for each experiment in each campaign (a folder of runs); by data set, best first.

    Links to campaigns are relative to the folder of `output`, or without one to the folder that they were found in.
    """
    groups, links = [], []
    for root in folders:
        campaigns: dict[Path, list[Record]] = {}
        for record in finished_runs(root):
            campaigns.setdefault(record.folder.parent, []).append(record)
        for campaign, records in campaigns.items():
            for group in by_experiment(records):
                groups.append(group)
                links.append(f"{quote(Path(relpath(campaign, output.parent if output else root)).as_posix())}/")
    rows = sorted(_row(*one) for one in zip(group_labels(groups), links, groups, strict=True))
    right = {"epochs", "n", "minutes"}
    head = [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join('---:' if name in right else '---' for name in COLUMNS)}|"]
    return "\n".join([HEADER, *head, *(row for _, row in rows), "", MADE_BY]) + "\n"


def run(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[FOLDER ...]")] = (Path("records"),),
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
) -> None:
    """Print a table of all finished runs in these folders, one row for the seeds of an experiment.

    Args:
        folders: Folders that hold runs, at any depth.
        output: Write the table to this file.
    """
    text = page(folders, output)
    if output is None:
        print(text, end="")
    else:
        write({output: text.encode()})
