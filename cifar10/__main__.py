"""The tools beside training: measure it, use what it left behind, and find out what is wrong.

Only the command that is carried out is imported, so that `doctor` can speak where a library of another is missing.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from cifar10 import UsageError

COMMANDS = {  # each is the `run` of a file in cifar10/commands
    "evaluate": "what a trained model answers on a split: loss, accuracy by class, confusions, calibration",
    "predict": "the label and the confidence for image files of any kind and size",
    "export": "safetensors, state dict, torch.export, ONNX and INT8 ONNX, each checked against the model",
    "report": "runs as pages: curves, confusions, calibration, mistakes; several side by side",
    "leaderboard": "all finished runs in some folders as a table in Markdown",
    "doctor": "whether this machine can train, and what to type where it cannot",
    "bench": "images per second beside a plain PyTorch loop and a stock DeepSpeed one",
    "scaling": "what more ranks gain, and what the engine costs at each ZeRO stage and precision",
    "recipes": "the recipes as a table in Markdown: network, parameters, and what was measured",
}
PROGRAM = "python -m cifar10"


def _called(run: Callable[..., Any], argv: list[str], command: str) -> int:
    """Call `run` with the flags in `argv`; returns its exit code. Without flags it takes no library to read them."""
    try:
        import tyro
    except ImportError:
        if argv:
            raise UsageError("tyro, which reads flags, is not installed; type uv sync") from None
        return run() or 0
    return tyro.cli(run, args=argv, prog=f"{PROGRAM} {command}") or 0


def _listed() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    return f"usage: {PROGRAM} COMMAND ...\n\n" + "\n".join(lines) + f"\n\n{PROGRAM} COMMAND --help says more."


def main(argv: list[str] | None = None) -> int:
    """Carry out `python -m cifar10 COMMAND ...`; returns the exit code, 2 for a command that cannot be carried out."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("--help", "-h"):
        print(_listed())
        return 0
    try:
        if command not in COMMANDS:
            raise UsageError(f"unknown command {command}; there are: {', '.join(COMMANDS)}")
        return _called(importlib.import_module(f"cifar10.commands.{command}").run, rest, command)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our lines has seen enough of them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
