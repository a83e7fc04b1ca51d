"""What --budget asks for, uses and reaches on this machine, as a table.

    python -m tests.budget_table 60s 3m 10m [--seeds 3] [--cores 0] [--busy] [flags of main.py]

Times are taken from outside, from the start of main.py until a test accuracy is on its standard output. `best` is what one
could have expected who knew the costs that the probe measured: the best recipe of recipes/frontier.json at the length that
fits, without a probe and a reserve. It is compared to `expected`, since both come from the frontier. The harder cases are
--cores 0 (one core, with taskset) and --busy (beside a process that computes on all cores). Nothing else should run then.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from cifar10.launch.budget import FILE, Cost, read_frontier, seconds

NEIGHBOUR = "import torch\nx = torch.randn(1500, 1500)\nwhile True: x = (x @ x).tanh()"


def best_accuracy(budget: str, written: dict[str, Any]) -> float:
    """Of the candidates that were measured, without the time for that and without a reserve."""
    found = []
    for candidate in read_frontier():
        if candidate.recipe in written["measured"]:
            cost = Cost(**written["measured"][candidate.recipe])
            steps = cost.most_steps(candidate, seconds(budget) - written["started"])
            found += [candidate.accuracy(steps / cost.steps_per_epoch)] if steps else []
    return max(found)


def measure(command: list[str], folder: Path) -> float:
    """Run main.py to its end; returns the seconds until it printed the last line of test accuracy."""
    began, printed, lines = time.perf_counter(), 0.0, []
    with subprocess.Popen([*command, "--output-dir", str(folder)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            printed = time.perf_counter() - began if line.startswith("test accuracy") else printed
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines[-9:])}")
    (folder / "console.log").write_text("".join(lines), encoding="utf-8")
    return printed


def mean_and_sd(values: list[float], digits: int = 2) -> str:
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def row(budget: str, command: list[str], output: Path, seeds: int) -> str:
    """A row of the table: one budget, with each seed."""
    used, shares, tested, expected, best, chosen = [], [], [], [], [], set()
    for seed in range(seeds):
        folder = output / f"{budget}_seed_{seed}"
        used.append(measure([*command, "--budget", budget, "--seed", str(seed)], folder))
        shares.append(100 * used[-1] / seconds(budget))
        summary, written = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("summary.json", FILE))
        tested.append(100 * max(summary["test_accuracy"], summary["test_accuracy_tta"] or 0))
        expected.append(100 * written["choice"]["accuracy"])
        best.append(100 * best_accuracy(budget, written))
        chosen.add(" ".join(written["choice"]["flags"][1:4:2]))
    cells = [budget, str(seeds), mean_and_sd(used, 1), f"{min(shares):.0f} to {max(shares):.0f}%", mean_and_sd(tested)]
    return " | ".join(["", *cells, mean_and_sd(expected), mean_and_sd(best), ", ".join(sorted(chosen)), ""]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budgets", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cores")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs") / "budget_table")
    options, flags = parser.parse_known_args()
    command = [*(["taskset", "-c", options.cores] if options.cores else []), sys.executable, "-u", "main.py", *flags]
    neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) if options.busy else None
    try:
        case = f"cores {options.cores or 'all'} of {os.cpu_count()}, {'beside a busy process' if options.busy else 'alone'}"
        print(f"{case}, load {os.getloadavg()[0]:.2f} before; accuracies in percent\n")
        print("| asked | n | used, s | share | test, with views | expected | best | chosen, epochs |")
        print("|---|---:|---:|---|---:|---:|---:|---|", flush=True)
        for budget in options.budgets:
            folder = options.output / f"{options.cores or 'all'}_{'busy' if options.busy else 'alone'}"
            print(row(budget, command, folder, options.seeds), flush=True)
    finally:
        if neighbour:
            neighbour.kill()


if __name__ == "__main__":
    main()
