"""The parts that `cifar10_deepspeed.py` is built from; each module knows one thing. Importing the package imports none."""


class UsageError(Exception):
    """What was asked for cannot be done. The message is one line that says why and what to type instead.

    Nearly always raised before anything is written; entry points print it and exit with code 2. What comes from files and
    other libraries may hold anything, and stays one line of printable characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(char if char.isprintable() else " " for char in message))
