"""How many CPU cores this process may use, and how many threads that makes. Imports no torch."""

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cpu_quota() -> float | None:
    """The CPUs that the container or the cgroups around this process grant, such as 0.5 of `docker run --cpus 0.5`.

    Version 2 has cpu.max, "quota period"; version 1 two files. None where nothing is limited.
    """
    found = []
    with suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            names = Path(path.strip("/")).parts
            folders = [Path(*names[:depth]) for depth in range(len(names) + 1)]  # a limit above also limits what is below
            for folder in folders:
                with suppress(OSError, ValueError, ZeroDivisionError):
                    if not controllers:
                        quota, period = map(float, (CGROUPS / folder / "cpu.max").read_text().split())
                    elif "cpu" in controllers.split(","):
                        files = (CGROUPS / "cpu" / folder / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
                        quota, period = (float(file.read_text()) for file in files)
                    else:
                        continue
                    found += [quota / period] if quota > 0 else []
    return min(found, default=None)


def cores() -> int:
    """Number of CPU cores that this process may use at a time: of its affinity, and of its quota, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, math.ceil(cpu_quota() or allowed))


def threads(launcher: str = "python", ranks: int = 1) -> int:
    """Threads for each of `ranks` on this machine: $OMP_NUM_THREADS, else an equal share of the cores.

    torchrun sets the variable to 1 where the user has not, so that 1 says nothing there.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) and not (asked == "1" and launcher == "torchrun" and ranks > 1):
        return int(asked)
    return max(1, cores() // ranks)
