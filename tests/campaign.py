"""A campaign of kills: runs are killed with SIGKILL again and again, resume, and must end like an undisturbed run.

    python -m tests.campaign --kills 100 --seed 0 --json FILE

A small run, on 1 rank and on 2, is trained once without a fault, then again and again in other folders; half of the kills come
at a random moment, the other half at the named points of a save (PAUSES). A start that refuses, or that does not
resume from what was saved, is a lost run; a run with other weights, rows or best model than the undisturbed one is a wrong one.
Exit code 0: neither was found. Ranks are forked when the slow imports are done.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

import cifar10_deepspeed as script
from cifar10.engine.engine import prepare
from cifar10.engine.full_state import weights_sha256
from cifar10.files import written_whole
from cifar10.run import checkpoint
from tests.workers.small_runs import become_rank, forked, free_port, shrink_the_data_sets

SMALL = "--dataset synthetic --val-images 100 --test-images 100 --global-batch-size 50 --lr 0.05 --threads 1 --epochs 5"
FLAGS = [*SMALL.split(), *"--log-every-steps 4 --save-every-epochs 1 --save-frequency 2 --keep-checkpoints 2".split()]
PAUSES = ("before state", "after state", "after manifest", "after rename", "between pointers", "after pointers")  # of a save
RANDOM = "at random"
KILLS_OF_A_RUN = 6  # then it may finish
SECONDS_ALONE = 5.0  # for a rank to notice that the other is gone; then it is killed, as a launcher would
DEADLINE_SECONDS = 300.0  # a start that takes longer hangs
LEFT_OVER = (".draft", ".tmp")


@dataclass
class Kill:
    """One start that was killed: when, which ranks, and what was saved."""

    run: int
    ranks: int
    moment: str
    victim: str
    seconds: float  # since the start
    saved_step: int  # of `latest` afterwards; 0 for none
    while_saving: bool  # a draft was left
    survivor: str = ""  # what became of the other of two ranks


@dataclass
class Found:
    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    starts: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def pause_at(moment: str, paused: Path) -> None:
    """Let this process stop at that point of a save and create `paused`: a random kill almost never hits a save."""

    def point(name: str) -> None:
        if name == moment:
            paused.touch()
            time.sleep(3600)

    def around(function: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        def replaced(*arguments: Any) -> None:
            point(before)
            function(*arguments)
            point(after)

        return replaced

    @contextmanager
    def write(path: Path) -> Iterator[BinaryIO]:
        point("before state" if path.name == "state.pt" else "")
        with written_whole(path) as file:
            yield file
        after = {"state.pt": "after state", "manifest.json": "after manifest", checkpoint.PORTABLE_FILE: ""}
        point(after.get(path.name, "between pointers"))

    checkpoint.written_whole = write
    checkpoint.sync_folder = around(checkpoint.sync_folder, "", "after rename")
    checkpoint._prune = around(checkpoint._prune, "after pointers", "")


# --- one start --------------------------------------------------------------------------------------------------------


class Start:
    """The ranks of one start of the program in `folder`, each a process; they print to `folder`.log."""

    def __init__(self, folder: Path, ranks: int, moment: str = RANDOM) -> None:
        self.began, self.began_at, self.codes = time.monotonic(), time.time(), dict[int, int]()
        self.paused = folder.with_suffix(".paused")
        self.paused.unlink(missing_ok=True)
        self._log, port = folder.with_suffix(".log"), free_port()
        self._log.unlink(missing_ok=True)
        self.ranks = [forked(self._run, rank, ranks, port, moment, folder) for rank in range(ranks)]

    def _run(self, rank: int, ranks: int, port: int, moment: str, folder: Path) -> int:
        log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        become_rank(rank, ranks, port)
        if moment != RANDOM:
            pause_at(moment, self.paused)
        sys.argv[1:] = [*FLAGS, "--output-dir", str(folder)]
        return script.main()

    @property
    def printed(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def alive(self) -> list[int]:
        """The processes that have not ended."""
        for child in self.ranks:
            if child not in self.codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                self.codes[child] = os.waitstatus_to_exitcode(ended[1])
        return [child for child in self.ranks if child not in self.codes]

    def wait(self, seconds: float, *, until_paused: bool = False) -> bool:
        """Whether all end (or, with `until_paused`, reach the point of a save) within so many seconds."""
        end = time.monotonic() + seconds
        while self.alive() and not (until_paused and self.paused.exists()):
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    def kill(self, children: list[int]) -> None:
        for child in children:
            if child in self.alive():
                os.kill(child, signal.SIGKILL)


def saved_step(folder: Path) -> int:
    """The step of the checkpoint that `latest` names; 0 if there is none."""
    latest = folder / "checkpoints" / "latest"
    return int(latest.read_text().split("_")[1]) if latest.exists() else 0


# --- the outcome of a run -----------------------------------------------------------------------------------------------

KEPT = "status steps skipped_steps train_accuracy val_accuracy test_accuracy best_step weights_sha256 ended_by".split()


def outcome(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on the kills."""
    results = json.loads((folder / "summary.json").read_text())
    checkpoints = folder / "checkpoints"
    best, final = (checkpoint.load_portable(checkpoints / name) for name in ("best_model", "final"))
    pointers = {path.name: path.read_text() for path in checkpoints.iterdir() if path.is_file()}
    with (folder / "metrics.csv").open(newline="") as file:
        metrics = [row[:-1] for row in csv.reader(file)]  # without the throughput
    return {
        **{key: results[key] for key in KEPT},
        "metrics.csv": metrics,
        "steps.csv": (folder / "steps.csv").read_text(),
        "best_model": [best["step"], best["val_accuracy"], weights_sha256(best["module"])],
        "final": weights_sha256(final["module"]),
        "pointers": {name: int(tag.split("_")[1]) for name, tag in pointers.items()},
        "damaged": [fault for tag in checkpoints.glob("step_*") if (fault := checkpoint.fault_of(tag))],
        "left over": [str(path.name) for path in folder.rglob("*") if path.name.endswith(LEFT_OVER)],
    }


# --- a run that is killed -----------------------------------------------------------------------------------------------


class Campaign:
    """Runs on one number of ranks, each killed up to KILLS_OF_A_RUN times, until every planned kill has been done."""

    def __init__(self, base: Path, ranks: int, found: Found, chance: random.Random) -> None:
        self._base, self._ranks, self._found, self._chance = base, ranks, found, chance

    def carry_out(self, moments: list[str]) -> None:
        whole = self._base / f"whole_{self._ranks}"
        undisturbed = Start(whole, self._ranks)
        if not undisturbed.wait(DEADLINE_SECONDS) or any(undisturbed.codes.values()):
            undisturbed.kill(undisturbed.alive())
            raise SystemExit(f"the undisturbed run on {self._ranks} ranks fails:\n{undisturbed.printed}")
        self._seconds, self._right = time.monotonic() - undisturbed.began, outcome(whole)
        print(f"{self._ranks} ranks, undisturbed: {self._seconds:.1f} seconds, {self._right['weights_sha256']}", flush=True)
        self._chance.shuffle(moments)
        while moments:
            self._run(moments)

    def _run(self, moments: list[str]) -> None:
        """One run: killed at some of `moments`, which are removed from the list, and finished."""
        self._found.runs += 1
        folder, kills = self._base / f"run_{self._found.runs:03d}", 0
        while True:
            moment = moments[-1] if moments and kills < KILLS_OF_A_RUN else None
            saved, start = saved_step(folder), Start(folder, self._ranks, moment or RANDOM)
            self._found.starts += 1
            killed = moment is not None and self._kill(start, folder, moment)
            if not killed and not start.wait(DEADLINE_SECONDS):
                start.kill(start.alive())
                start.wait(DEADLINE_SECONDS)
                return self._lose(folder, start, "hangs")
            if (
                resumed := re.search(r"^resumed at step (\d+)$", start.printed, re.M)
            ) is None and "recipe bn_cnn" in start.printed:
                resumed = re.search("(0)", "0")
            if resumed and int(resumed[1]) < saved:
                return self._lose(folder, start, f"resumed at step {resumed[1]}, and {saved} was saved")
            if killed:
                moments.pop()
                kills += 1
            elif any(start.codes.values()):
                return self._lose(folder, start, f"ended with {list(start.codes.values())}")
            else:
                return self._compare(folder)

    def _kill(self, start: Start, folder: Path, moment: str) -> bool:
        """Kill the start at its moment, unless it ends before."""
        victims = ["all"] if self._ranks == 1 else ["rank 0", "all"] if moment != RANDOM else ["rank 0", "rank 1", "all"]
        victim = self._chance.choice(victims)
        if moment == RANDOM:
            start.wait(self._chance.uniform(0, self._seconds))
        else:
            start.wait(DEADLINE_SECONDS, until_paused=True)
        if len(start.alive()) < self._ranks:
            return False
        seconds = time.monotonic() - start.began
        start.kill(start.ranks if victim == "all" else [start.ranks[int(victim[-1])]])
        survivor = ""
        if victim != "all":
            survivor = "ended by itself" if start.wait(SECONDS_ALONE) else "was killed"
            start.kill(start.alive())
        start.wait(DEADLINE_SECONDS)
        draft = folder / "checkpoints" / ".draft"  # an older one is from an earlier kill
        while_saving = moment != RANDOM or (draft.exists() and draft.stat().st_mtime > start.began_at)
        facts = round(seconds, 3), saved_step(folder), while_saving, survivor
        self._found.kills.append(Kill(self._found.runs, self._ranks, moment, victim, *facts))
        return True

    def _lose(self, folder: Path, start: Start, why: str) -> None:
        self._found.lost.append(
            f"{folder.name}, {self._ranks} ranks, {why}: {self._killed()}; printed: {start.printed[-2000:]}"
        )
        print(f"LOST {self._found.lost[-1]}", flush=True)

    def _killed(self) -> list[str]:
        return [f"{kill.moment} ({kill.victim})" for kill in self._found.kills if kill.run == self._found.runs]

    def _compare(self, folder: Path) -> None:
        found = outcome(folder)
        if differing := {key: (value, found[key]) for key, value in self._right.items() if found[key] != value}:
            self._found.wrong.append(f"{folder.name}, {self._ranks} ranks, killed {self._killed()}: {differing}")
            print(f"WRONG {self._found.wrong[-1]}", flush=True)
        else:
            print(f"{folder.name}: {self._ranks} ranks, killed {self._killed()}: right", flush=True)
            shutil.rmtree(folder)


# --- the whole ----------------------------------------------------------------------------------------------------------


def moments_for(kills: int, worlds: int) -> list[list[str]]:
    """Half of the kills at the points of a save, equally often, the others at random, distributed over so many worlds."""
    each = max(1, round(kills / 2 / len(PAUSES)))
    moments = [*(point for point in PAUSES for _ in range(each)), *[RANDOM] * (kills - each * len(PAUSES))]
    return [moments[number::worlds] for number in range(worlds)]


def table(found: Found) -> list[str]:
    ranks = sorted({kill.ranks for kill in found.kills})
    lines = [f"| killed | {' | '.join(f'{n} rank' + 's' * (n > 1) for n in ranks)} | all |", "|---" * (len(ranks) + 2) + "|"]
    for moment in (*PAUSES, RANDOM):
        counts = [sum(kill.moment == moment and kill.ranks == n for kill in found.kills) for n in ranks]
        lines.append(f"| {moment} | {' | '.join(map(str, counts))} | {sum(counts)} |")
    totals = [sum(kill.ranks == n for kill in found.kills) for n in ranks]
    lines.append(f"| total | {' | '.join(map(str, totals))} | {sum(totals)} |")
    return [*lines, "", f"{found.runs} runs, {found.starts} starts: {len(found.lost)} lost, {len(found.wrong)} wrong"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="how many, over all numbers of ranks")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="the numbers of ranks")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    options = parser.parse_args()
    prepare()
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # for its first optimizer PyTorch imports its compiler
    found, began, chance = Found(), time.monotonic(), random.Random(options.seed)
    with tempfile.TemporaryDirectory() as base:
        for ranks, moments in zip(options.ranks, moments_for(options.kills, len(options.ranks)), strict=True):
            Campaign(Path(base), ranks, found, chance).carry_out(moments)
    seconds = time.monotonic() - began
    print("\n".join(["", *table(found), f"{seconds:.0f} seconds"]))
    if options.json:
        facts = {"command": " ".join(sys.argv[1:]), "seed": options.seed, "seconds": round(seconds)}
        moments = Counter(kill.moment for kill in found.kills)
        content = {**facts, "kills": len(found.kills), "at": moments, "each": [asdict(kill) for kill in found.kills]}
        content |= {"runs": found.runs, "starts": found.starts, "lost": found.lost, "wrong": found.wrong}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if found.lost or found.wrong else 0


if __name__ == "__main__":
    shrink_the_data_sets()
    sys.exit(main())
