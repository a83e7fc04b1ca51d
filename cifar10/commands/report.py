"""`python -m cifar10 report`: one run as an HTML page with plots, or several side by side."""

from pathlib import Path
from typing import Annotated

import tyro

from cifar10 import UsageError
from cifar10.report import html
from cifar10.run.folder import data_dir_of


def run(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")],
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None,
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None,
    sealed: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False,
) -> None:
    """Write a run's report.html and plots into its folder; for several runs, one page that compares them.

    Args:
        runs: Folders of runs, finished or not.
        output: The file for a comparison (default: compare.html).
        data_dir: Where the data set is, for sample images (default: where the run had it, else as in training); nothing is
            downloaded.
        sealed: Refuse to open the test split, for the most confident mistakes (default: no, unless $CIFAR10_SEALED is 1).
    """
    if not runs:
        raise UsageError("no RUN is given, expected folders of runs, for example runs/mine")
    if len(runs) == 1 and output is None:
        made = html.make_report(runs[0], data_dir_of(runs[0], data_dir), sealed)
    else:
        made = html.make_comparison(html.labeled_groups(runs), output or Path("compare.html"))
    print(f"report: {made}")
