"""The packages that `cifar10_deepspeed.py` is built from. Importing this one imports none of them."""

import difflib
import os


class UsageError(Exception):
    """What was asked for cannot be done. The message is one line that says why and what to type instead.

    Nearly always raised before anything is written; entry points print it and exit with code 2. What comes from files and
    other libraries may hold anything, and stays one line of printable characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(char if char.isprintable() else " " for char in message))


class RunFailed(Exception):
    """Training cannot go on, and the message says why in one line; the exit code is 1. All ranks raise it."""


def at_home(words: list[str]) -> list[str]:
    """A command line with each leading ~ expanded where the shell has not: --data-dir=~/data, and what a notebook passes."""
    split = (word.partition("=") if word.startswith("-") else ("", "", word) for word in words)
    return [flag + equals + os.path.expanduser(value) for flag, equals, value in split]


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean X?` for a misspelt word, or the list of what there is."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(sorted(known))}"


def reason(error: Exception) -> str:
    """The type of an error and the first line of its message, for a message of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
