"""What commands share: arguments, tables of numbers, and ratios by round."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from cifar10 import UsageError
from cifar10.distributed import device
from cifar10.files import written_whole
from cifar10.run.trained import Which

_arg, RUNS = tyro.conf.arg, "A run's folder, its checkpoints/best_model or checkpoints/final, a file of weights, or an export."
Run = Annotated[tyro.conf.Positional[Path], _arg(metavar="RUN", help=RUNS, help_behavior_hint="")]
Runs = Annotated[
    tyro.conf.Positional[tuple[Path, ...]],
    _arg(metavar="RUN [RUN ...]", help=RUNS + " Several are an ensemble.", help_behavior_hint=""),
]
WhichModel = Annotated[Which, _arg(help="Of a run's folder, the model that validation chose or the last one.")]
WHERE = "Where the data set is, or is downloaded to (default: where the run had it, else $CIFAR10_DIR, else data/)."
DataDir = Annotated[Path | None, _arg(metavar="FOLDER", help=WHERE, help_behavior_hint="")]
_THREADS = "CPU threads (default: $OMP_NUM_THREADS, else the cores of this machine)."
Threads = Annotated[int | None, _arg(metavar="N", help=_THREADS, help_behavior_hint="")]
Device = Annotated[device.Choice, _arg(help="Where to compute; auto is a GPU, if there is any sign of one.")]
Sealed = Annotated[
    bool, _arg(help="Refuse to open the test split (default: no, unless $CIFAR10_SEALED is 1).", help_behavior_hint="")
]
Count = Annotated[int | None, _arg(metavar="N", help_behavior_hint="")]
JsonFile = Annotated[
    Path | None, _arg(name="json", metavar="FILE", help="Write the numbers of every round to this file.", help_behavior_hint="")
]


def settle(asked: device.Choice) -> None:
    """Take --device, and say on stderr if the environment asks for the CPU. Raises UsageError for GPUs that cannot be used."""
    if note := device.choose(asked):
        print(note, file=sys.stderr)


def write_picture(output: Path, png: bytes) -> None:
    """Write a PNG. Raises UsageError if it cannot be written."""
    try:
        with written_whole(output) as file:
            file.write(png)
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written ({error.strerror}); choose another file") from None


def as_flags(settings: dict[str, Any]) -> list[str]:
    """{"--threads": 1, "--data-dir": None} -> ["--threads", "1"]"""
    return [str(word) for flag, value in settings.items() if value is not None for word in (flag, value)]


def number_table(*heads: str, texts: int = 1, title: str | None = None) -> Table:
    """A table whose first columns are text, and the others numbers, aligned on the right."""
    table = Table(title=title)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < texts else "right", no_wrap=number < texts)
    return table


def span(values: Sequence[float], spec: str = ".2f") -> str:
    return f"{min(values):{spec}} .. {max(values):{spec}}"


def quotients(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Of each round: only what was measured in one round can be compared."""
    return [this / that for this, that in zip(values, base, strict=True)]
