"""Segments of a run trained again, for the command `verify`: from a kept checkpoint, else from the seed."""

import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar10 import UsageError
from cifar10.commands.verify_files import COLUMNS, differences, short
from cifar10.config import settings
from cifar10.distributed.device import count_gpus
from cifar10.launch.command import SCRIPT, LaunchOptions, deepspeed_command
from cifar10.run import chain
from cifar10.run import folder as run_folder
from cifar10.run.chain import Link
from cifar10.run.record import Record

KIND = ("commit", "torch", "deepspeed", "numpy", "processor", "instructions", "device", "world_size", "threads")  # of machine
# On another kind of machine: a share of the loss, and a fraction of the images, plus 1 / sqrt(images). Between the runs
# of one seed on 1, 2 and 4 ranks (records/2026-11-21_ranks_cpu) the largest were 0.014 and 0.010, and 0.095 and 0.055.
TOLERANCE = {"train": (0.05, 0.02), "val": (0.2, 0.08), "val_averaged": (0.2, 0.08)}
WITHIN = "training's accuracies within 2 points and losses within 5%, validation's within 8 and 20%"


def check_again(
    record: Record, links: list[Link], intact: dict[str, str], segments: str, data_dir: Path | None
) -> tuple[list[str], list[str], bool]:
    """Findings of training segments again, what was trained, and whether this is the same kind of machine."""
    trainings, chance = choose(links, intact, segments)
    found, told, same = [], [], True
    for base, target in trainings:
        again = Recomputation(record.folder, links, base, target, run_folder.data_dir_of(record.folder, data_dir))
        tag = intact.get(links[base]["hash"])
        begin = f"trained again from {tag or 'the seed'}"
        print(f"training steps {links[base]['step'] + 1} to {links[target]['step']} again ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="verify-") as work:
            found += again.compare(again.train(Path(work), tag))
        if again.exact:
            told.append(f"{begin}, the same to the bit: epochs {again.exact[0]} to {again.exact[-1]}")
        if again.close:
            epochs = f"epochs {again.close[0]} to {again.close[-1]}"
            told.append(f"{begin}, otherwise than the run ({again.other}), {WITHIN}: {epochs}; less than that goes unseen")
        told += again.told
        same = same and not again.close
    return found, [*told, chance], same


def setup(start: Link) -> dict[str, Any]:
    """What decides the bits of a run, beside its recipe and images."""
    machine = {key: start["machine"].get(key) for key in KIND}
    return {"machine": machine, "deepspeed": start["deepspeed"], "how": start["how"]}


def is_exact(found: dict[str, Any]) -> bool:
    """Whether the same setup gives the same bits again."""
    return found["machine"]["device"] == "cpu" or found["how"]["deterministic"]


def started(links: Sequence[Link], at: int) -> Link:
    """The start that was in force when a link was written."""
    return next(link for link in reversed(links[: at + 1]) if link["kind"] == "start")


@dataclass
class Recomputation:
    """Training from link `base` (a start: from the seed) to link `target` once more, in a folder of its own."""

    folder: Path
    links: list[Link]
    base: int
    target: int
    data_dir: Path
    exact: list[str] = field(default_factory=list)  # epochs that were the same to the bit
    close: list[str] = field(default_factory=list)  # within the tolerance
    other: str = ""  # how the two differ: the machine, or how the run was started
    told: list[str] = field(default_factory=list)

    def legs(self) -> Iterator[tuple[Link, int]]:
        """(start, last step): the run's own legs where a new one began at the end of an epoch, or of --max-steps."""
        for at in range(self.base + 1, self.target):
            here, after = self.links[at], self.links[at + 1]
            is_leg = here["kind"] == "epoch" and after["kind"] == "start"
            if is_leg and (here["state"]["epoch_step"] or setup(started(self.links, at)) != setup(after)):
                yield started(self.links, at), here["step"]
        yield started(self.links, self.target), self.links[self.target]["step"]

    def train(self, work: Path, tag: str | None) -> list[Link]:
        """The links of the new run. Raises UsageError if it fails."""
        if tag:
            saved = work / "run" / "checkpoints"
            shutil.copytree(self.folder / "checkpoints" / tag, saved / tag)
            (saved / "latest").write_text(tag)
        for start, last_step in self.legs():
            for file, content in (("recipe.json", start["recipe.json"]), ("ds_config.json", start["deepspeed"])):
                run_folder.write_json(work / file, content)
            switches = [
                f"--{name.replace('_', '-')}" for name in ("gradient_checkpointing", "deterministic") if start["how"][name]
            ]
            values = {
                "max-steps": last_step,
                "log-every-steps": start["how"]["log_every_steps"],
                "engine-level": start["how"]["engine_level"],
            }
            values |= {"threads": start["machine"]["threads"], "data-dir": self.data_dir, "output-dir": work / "run"}
            flags = ["--recipe", str(work / "recipe.json"), "--sealed", "--no-tensorboard", "--no-report", "--wandb", "off"]
            flags += ["--save-every-epochs", "0", *switches, *(str(w) for k, v in values.items() for w in (f"--{k}", v))]
            launch(start["machine"]["world_size"], flags, work)
        return chain.read(work / "run")

    def compare(self, again: list[Link]) -> Iterator[str]:
        """What differs, epoch by epoch."""
        ours = {link["step"]: at for at, link in enumerate(again) if link["kind"] == "epoch"}
        before = self.links[self.base]
        rows, new_rows = (
            {(name, *row.split(",")[:2]): row.split(",") for name, all_rows in chain.rows_of(some).items() for row in all_rows}
            for some in (self.links[: self.target + 1], again)
        )
        for at in range(self.base + 1, self.target + 1):
            link = self.links[at]
            if link["kind"] != "epoch":
                continue
            epoch = str(math.ceil(link["epoch"] + (link["state"]["epoch_step"] > 0)))
            if link["step"] not in ours:
                yield f"{chain.FILE} line {at + 1}: trained again, no epoch ends at step {link['step']}"
                return
            there = again[ours[link["step"]]]
            was = [setup(started(self.links, n)) for n in range(self.base + 1, at + 1) if self.links[n]["kind"] != "start"]
            now = [setup(one) for one in again[: ours[link["step"]]] if one["kind"] == "start"]
            same = all(one in now and is_exact(one) for one in was) and all(one in was for one in now)
            mine = [
                key
                for key in dict.fromkeys([*rows, *new_rows])
                if (key[0] == "metrics.csv" and key[1] == epoch and key[2] != "test")
                or (key[0] == "steps.csv" and key[2] == epoch and before["step"] < int(key[1]) <= link["step"])
            ]
            measured = {**{f"state {key}": value for key, value in link["state"].items()}, **link["hashes"]}
            measured_again = {**{f"state {key}": value for key, value in there["state"].items()}, **there["hashes"]}
            found = [
                line
                for key in mine
                for line in differing_row(key, rows.get(key, []), new_rows.get(key, []), same, self.links[0])
            ]
            if same:
                found += differences(
                    f"{chain.FILE} line {at + 1} (epoch {epoch})", measured, measured_again, "trained again it is"
                )
            if found:
                yield from found
                self.told.append(f"after epoch {epoch} nothing was compared")
                return
            (self.exact if same or measured == measured_again else self.close).append(epoch)
            if not same:
                gpu = "" if all(map(is_exact, was)) else "a GPU without --deterministic"
                self.other = settings.differences(was[-1], now[-1]) or gpu or "other ranks, micro-batches or ZeRO on the way"
        if self.target == max(n for n, link in enumerate(self.links) if link["kind"] == "epoch") and self.exact:
            ends = [link["summary"]["weights_sha256"] for link in (self.links[-1], again[-1]) if link["kind"] == "end"]
            if len(ends) == 2 and ends[0] != ends[1] and not self.close:
                yield f"summary.json: weights_sha256 is {short(ends[0])}, trained again it is {short(ends[1])}"


def differing_row(key: tuple[str, ...], was: list[str], now: list[str], same: bool, start: Link) -> Iterator[str]:
    """A line for each cell that another training has otherwise: any but times, or any beyond the tolerance."""
    place = f"{key[0]} row of {','.join(key[1:])}"
    if not was or not now:
        yield f"{place}: there is {'one' if was else 'none'}, trained again there is {'one' if now else 'none'}"
    held_out = start["recipe.json"]["settings"]["val_images"]
    images = start["recipe.json"]["dataset"]["train_images"] - held_out if key[2] == "train" else held_out
    for column, cell, again in zip(COLUMNS[key[0]], was, now, strict=False):
        if cell == again or column == "throughput" or (not same and key[0] == "steps.csv" and column not in ("lr", "skipped")):
            continue
        if not same and column in ("loss", "accuracy"):
            one, other, (share, fraction) = float(cell), float(again), TOLERANCE[key[2]]
            if abs(one - other) <= (share * max(one, other) if column == "loss" else fraction + images**-0.5):
                continue
        yield f"{place}: {column} is {cell}, trained again it is {again}"


def launch(ranks: int, flags: list[str], work: Path) -> None:
    """Train with these flags, quietly. Raises UsageError with the last line of what went wrong."""
    environment = {**os.environ, "CIFAR10_REPORT": "0"}
    command = [sys.executable, str(SCRIPT), *flags]
    if ranks > 1:
        command, environment = deepspeed_command(LaunchOptions(), ranks, count_gpus(), flags, work / "hostfile")
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise UsageError(f"it cannot be trained again: {said[-1] if said else done.returncode}")


def choose(links: list[Link], intact: dict[str, str], segments: str) -> tuple[list[tuple[int, int]], str]:
    """(base, target) of each training, and what is left to chance. Raises UsageError if nothing can be trained again."""
    epochs = [at for at, link in enumerate(links) if link["kind"] == "epoch"]
    from_seed = links[0]["step"] == 0
    if not epochs:
        raise UsageError("the run has not come to the end of an epoch; there is nothing to train again")
    if segments == "all":
        if not from_seed:
            raise UsageError(
                f"its chain begins at step {links[0]['step']}, after {links[0]['prev'][:12] or 'no link'}; use --segments 1"
            )
        return [(0, epochs[-1])], "all epochs were trained again"
    base = {
        at: next((b for b in range(at - 1, -1, -1) if links[b]["kind"] == "epoch" and links[b]["hash"] in intact), 0)
        for at in epochs
    }
    pool = [at for at in epochs if from_seed or links[base[at]]["kind"] == "epoch"]
    if not pool:
        raise UsageError(f"its chain begins at step {links[0]['step']}, and no checkpoint before its last epoch is left")
    chosen = random.SystemRandom().sample(pool, min(int(segments), len(pool)))
    last = {base[at]: max(other for other in chosen if base[other] == base[at]) for at in chosen}
    lost = len(epochs) - len(pool)
    missed = f"{1 if lost else 1 - len(chosen) / len(pool):.0%} at most{f', {lost} cannot be trained again' if lost else ''}"
    chance = f"{len(chosen)} of {len(epochs)} epochs, chosen at random: one forged epoch is missed with probability {missed}"
    return [*last.items()], chance
