"""The tools beside training: measure it, and use what it left behind."""

from __future__ import annotations

import sys

import tyro

from cifar10 import UsageError, bench, catalogue, scaling

COMMANDS = {
    "bench": bench.run,
    "recipes": catalogue.run,
    "scaling": scaling.run,
}


def main() -> int:
    """Carry out `python -m cifar10 COMMAND ...`; returns the exit code, 2 for a command that cannot be carried out."""
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m cifar10", description=__doc__)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
