"""Standard output and error as a long run needs them.

A character that their encoding lacks is escaped. In a run, whatever happens to a reader (`| head -1`, a closed terminal, a full
disk under `> log`), what is printed then is lost and the run goes on; a reader that sleeps (`| less`, Ctrl-S) delays it once.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any

PATIENCE_SECONDS = 10.0  # with a reader that sleeps; until it is awake again, none
ATOMIC_BYTES = 512  # POSIX's least PIPE_BUF: what can be written without blocking if select says that a pipe is writable
LOST = b"\n[output is missing here: nobody was reading it]\n"


class _Lasting(io.RawIOBase):
    """A file descriptor to which a write never fails, nor blocks for ever."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._lost = descriptor, b""  # what to say of the part that was not read

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, content: Any) -> int:
        with suppress(OSError):
            if select.select((), (self._descriptor,), (), PATIENCE_SECONDS if self._lost == b"" else 0)[1]:
                os.write(self._descriptor, self._lost)
                self._lost = b""
                return os.write(self._descriptor, content[: ATOMIC_BYTES - len(LOST)])
            self._lost = LOST
        return len(content)


def prepare(*, lasting: bool = False) -> None:
    """At the start of a program; `lasting` for one that trains. Streams that were replaced (a notebook's) stay as they are."""
    for descriptor in range(3):  # one that was closed would become the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and (lasting or stream is None) and os.name == "posix":
            if stream is None:  # its descriptor may be another file's by now
                descriptor = os.open(os.devnull, os.O_WRONLY)
            else:
                stream.flush()
            writer = io.BufferedWriter(_Lasting(descriptor))
            encoding = getattr(stream, "encoding", "utf-8")
            setattr(sys, name, io.TextIOWrapper(writer, encoding, "backslashreplace", line_buffering=True))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
