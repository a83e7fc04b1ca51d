"""Command line tools: `python -m cifar10 COMMAND`.

Only the requested command is imported, so that `doctor` works even if another command's dependency is missing.
"""

import importlib
import os
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

from cifar10 import UsageError, at_home, streams

COMMANDS = {  # each is the `run` of a file in cifar10/commands
    "evaluate": "evaluate a trained model on a split: loss, per-class accuracy, confusion matrix, calibration",
    "predict": "classify image files of any format and size",
    "export": "export to safetensors, state dict, torch.export, ONNX and INT8 ONNX, each verified against the model",
    "report": "write the HTML report of a run (curves, confusion matrix, calibration, mistakes), or compare several",
    "compare": "train recipes or settings with the same seeds until one is better on validation images",
    "ledger": "list every opening of a test split: when, by which run, and what was learned",
    "verify": "check a run against its chain of hashes, and train parts of it again",
    "leaderboard": "print a Markdown table of all finished runs in some folders",
    "doctor": "check whether this machine can train, and suggest fixes",
    "bench": "measure images per second beside a plain PyTorch loop and a stock DeepSpeed loop",
    "gpu-check": "run the first checks on a GPU, about half an hour, in stages that each leave their results",
    "scaling": "measure the speedup with more ranks, and the engine's overhead at each ZeRO stage and precision",
    "schedule": "draw the learning rate over a run: a picture, and a line in the terminal",
    "lr-finder": "find a learning rate: the loss at growing rates, on training images",
    "xray": "show what each rank holds and sends at each ZeRO stage: predicted, and measured",
    "eject": "write a run as one short file of plain DeepSpeed, without this program",
    "frontier": "collect how accurate recipes are after how many epochs, from runs, for main.py --budget",
    "recipes": "print a Markdown table of the recipes: model, parameters, measured results",
}
PROGRAM = "python -m cifar10"


def _called(run: Callable[..., Any], argv: list[str], command: str) -> int:
    """Call `run` with the flags in `argv`; returns the exit code. Without flags, tyro is not required."""
    if list(signature(run).parameters) == ["argv"]:  # it takes the flags of a run
        return run(argv) or 0
    try:
        import tyro
    except ImportError:
        if argv:
            raise UsageError("flags need tyro, which is not installed; run uv sync") from None
        return run() or 0
    return tyro.cli(run, args=argv, prog=f"{PROGRAM} {command}") or 0


def _listed() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    how = f"To train: python main.py. Run {PROGRAM} COMMAND --help for details."
    return f"usage: {PROGRAM} COMMAND ...\n\n" + "\n".join(lines) + f"\n\n{how}"


def main(argv: list[str] | None = None) -> int:
    """Run `python -m cifar10 COMMAND ...`; returns the exit code, 2 for a usage error."""
    streams.prepare()
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("--help", "-h"):
        print(_listed())
        return 0
    try:
        if command not in COMMANDS:
            raise UsageError(f"unknown command {command}; commands: {', '.join(COMMANDS)}")
        run = importlib.import_module(f"cifar10.commands.{command.replace('-', '_')}").run
        code = _called(run, at_home(rest), command)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # for example, the output was piped to head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
