"""`python -m cifar10 verify RUN`: whether a run's files are what it measured, and what its settings lead to.

First the files are held against the run's chain (run/chain.py) and against each other; then segments, from the end of one
epoch to the end of the next, are trained again: from a kept checkpoint, else from the seed. The test split stays closed
without --test. A run made before there were chains has only its logs to be held against each other.
"""

import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Annotated, Any

import tyro

from cifar10 import UsageError, reason
from cifar10.commands.common import DataDir
from cifar10.commands.evaluate import answers, first_images, split_images
from cifar10.config import settings
from cifar10.config.recipe import from_settings
from cifar10.config.settings import flattened
from cifar10.data import registry
from cifar10.data.ledger import Look
from cifar10.distributed.device import count_gpus
from cifar10.engine.full_state import weights_sha256
from cifar10.launch.command import SCRIPT, LaunchOptions, deepspeed_command
from cifar10.metrics.csv_sink import METRICS, STEPS
from cifar10.run import chain, checkpoint, trained
from cifar10.run import folder as run_folder
from cifar10.run.chain import Link
from cifar10.run.evaluation import Augmented
from cifar10.run.record import Record, Row, open_record
from cifar10.run.state import RunState
from cifar10.run.summary import quality_tier, summarize

KIND = ("commit", "torch", "deepspeed", "numpy", "processor", "instructions", "device", "world_size", "threads")  # of machine
COLUMNS = {"metrics.csv": METRICS, "steps.csv": STEPS}
ROUNDING = 5.1e-7  # of metrics.csv
# On another kind of machine: a share of the loss, and a fraction of the images, plus 1 / sqrt(images). Between the runs
# of one seed on 1, 2 and 4 ranks (records/2026-11-21_ranks_cpu) the largest were 0.014 and 0.010, and 0.095 and 0.055.
TOLERANCE = {"train": (0.05, 0.02), "val": (0.2, 0.08), "val_averaged": (0.2, 0.08)}
WITHIN = "training's accuracies within 2 points and losses within 5%, validation's within 8 and 20%"
SHOWN = 20  # findings


def differences(file: str, there: dict[str, Any], was: dict[str, Any], told: str) -> Iterator[str]:
    """A line for each key with another value in a file than in the chain."""
    for key in sorted(there.keys() | was.keys()):
        if repr(there.get(key)) != repr(was.get(key)):
            yield f"{file}: {key} is {short(there.get(key))}, {told} {short(was.get(key))}"


def short(value: Any) -> str:
    """A value as text, of hashes their beginning."""
    return str(value)[:12] if re.fullmatch("[0-9a-f]{64}", str(value)) else str(value)


# --- the files against the chain ------------------------------------------------------------------------------------------


def check_links(folder: Path, links: Sequence[Link]) -> Iterator[str]:
    path = folder / chain.FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()  # a last line may have been cut by the end of the process
    if len(links) < len(whole) or not links or links[0]["kind"] != "start":
        yield f"{chain.FILE} line {len(links) + 1}: it is no link of a chain"
    for number, link in enumerate(links, 1):
        if (content := chain.sealed(link)["hash"]) != link["hash"]:
            yield f"{chain.FILE} line {number}: its hash is {link['hash'][:12]}, that of its content is {content[:12]}"
    for number, (before, link) in enumerate(pairwise(links), 2):
        if link["prev"] != before["hash"]:
            yield f"{chain.FILE} line {number}: it follows {link['prev'][:12]}, but the line before it is {before['hash'][:12]}"
        if link["kind"] == "start" and link["step"] != before["step"]:
            yield f"{chain.FILE} line {number}: it goes on at step {link['step']}, the line before is of step {before['step']}"


def check_settings(folder: Path, links: Sequence[Link]) -> Iterator[str]:
    starts = [link for link in links if link["kind"] == "start"]
    for file, was in (("recipe.json", starts[0]["recipe.json"]), ("ds_config.json", starts[0]["deepspeed"])):
        there = run_folder.read_json(folder / file) or {}
        yield from differences(file, flattened(there), flattened(was), "the run was started with")
    recorded = (run_folder.read_json(folder / "environment.json") or {}).get("starts", [])
    for start in starts:
        if changed := settings.differences(
            *({key: one[key] for key in ("recipe.json", "deepspeed")} for one in (starts[0], start))
        ):
            yield f"{chain.FILE}: the run went on at step {start['step']} with other settings, {changed}"
        was = {key: value for key, value in start["machine"].items() if key != "instructions"}
        if not any(was.items() <= one.items() for one in recorded if isinstance(one, dict)):
            yield f"environment.json: no start was as the chain says, by commit {was.get('commit')} on {was.get('processor')}"


def check_rows(folder: Path, links: Sequence[Link]) -> Iterator[str]:
    first, last = links[0], links[-1]
    for name, expected in chain.rows_of(links).items():
        where = "epoch" if name == "metrics.csv" else "step"
        path = folder / name
        there = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:] if path.exists() else []
        numbers = [int(row.split(",")[0]) if row.split(",")[0].isdecimal() else 0 for row in there]
        begin = next((n for n, number in enumerate(numbers) if number > first[where]), len(there)) if first[where] else 0
        if last["kind"] != "end":  # rows that no link has reached
            there = [row for row, number in zip(there, numbers, strict=True) if number <= last[where]]
            expected = [row for row in expected if int(row.split(",")[0]) <= last[where]]
        for number, (row, was) in enumerate(zip_longest(there[begin:], expected), 2 + begin):
            if row is None or was is None:
                what = f"is missing; the run measured {was}" if row is None else f"is {row}, which the run has not measured"
                yield f"{name} row {number} {what}"
                continue
            cells = zip_longest(COLUMNS[name], row.split(","), was.split(","))
            for column, cell, measured in cells if row != was else ():
                if cell != measured:
                    about = ",".join(was.split(",")[:2])
                    yield f"{name} row {number} ({about}): {column} is {cell}, the run measured {measured}"


def measured_summary(record: Record, link: Link) -> dict[str, Any]:
    """What the summary says where the run stood at a link, as far as the link knows it."""
    recipe, config = record.settings, record.ds_config
    per_epoch = (record.dataset.train_images - recipe["val_images"]) // config["train_batch_size"]
    times = {key: value for key, value in link["times"].items() if key != "chain_seconds"}
    found = vars(summarize(RunState.from_dict({**link["state"], **times}), per_epoch, "running"))
    hidden = [
        "status",
        "process_seconds",
        *(["val_accuracy", "best_step", "best_is_averaged"] if found["best_step"] is None else []),
    ]
    known = {field_.name for field_ in fields(RunState)} | {"epochs", "steps", "images_per_second", "val_accuracy"}
    known |= {name for name in found if name.startswith(("first_", "train_", "best_"))}
    return {key: value for key, value in found.items() if key in known and key not in hidden}


def check_summary(record: Record, links: Sequence[Link]) -> Iterator[str]:
    there, last = record.summary, links[-1]
    if last["kind"] == "end":
        yield from differences("summary.json", there, last["summary"], "the run measured")
    at = [link for link in links if link["kind"] in ("epoch", "stop") and link["step"] == there.get("steps")]
    if at:
        was = measured_summary(record, at[-1])
        was["resumed_at_steps"] += [link["step"] for link in links[links.index(at[-1]) :] if link["kind"] == "start"]
        yield from differences("summary.json", {key: there.get(key) for key in was}, was, "where the run stood it had")
    elif record.is_finished or record.status == "stopped":
        yield f"summary.json: steps is {there.get('steps')}, at which no link of {chain.FILE} is"
    elif there.get("status") not in ("running", "failed"):
        yield f"summary.json: status is {there.get('status')}"


def check_tags(folder: Path, links: Sequence[Link], intact: dict[str, str]) -> Iterator[str]:
    """Checkpoints against the links that they name; those that are what they were go to `intact`: hash of the link -> tag."""
    by_hash = {link["hash"]: link for link in links}
    for tag in sorted((folder / "checkpoints").glob("step_*")):
        if fault := checkpoint.fault_of(tag):
            yield f"checkpoints/{tag.name}: {fault}"
            continue
        content = checkpoint.load(tag)
        state, link = content["run_state"].as_dict(), by_hash.get(content["run_state"].chain)
        if link is None:
            yield f"checkpoints/{tag.name}: it names {state['chain'][:12] or 'nothing'}, which is no link of {chain.FILE}"
            continue
        ours = {f"state {key}": value for key, value in state.items() if key in link["state"]} | chain.hashes(content["engine"])
        was = {f"state {key}": value for key, value in link["state"].items()} | link["hashes"]
        found = [*differences(f"checkpoints/{tag.name}", ours, was, "at that link it was")]
        yield from found
        if not found:
            intact[link["hash"]] = tag.name


def chained(tag: Path) -> bool:
    """Whether a checkpoint names a link of a chain."""
    return not checkpoint.fault_of(tag) and bool(checkpoint.load(tag)["run_state"].chain)


def check_weights(record: Record, links: Sequence[Link]) -> Iterator[str]:
    """best_model and final against the links of their steps."""
    by_step = {link["step"]: link for link in links if link["kind"] in ("epoch", "stop")}
    for which in ("best_model", "final"):
        file = record.folder / "checkpoints" / which / checkpoint.PORTABLE_FILE
        if not file.exists():
            continue
        found, expected = trained.load(record.folder, which), record.summary.get("steps")
        expected = record.summary.get("best_step") or expected if which == "best_model" else expected
        link, name = by_step.get(found.step), f"checkpoints/{which}"
        if (found.step != expected and record.is_finished) or link is None:
            yield f"{name}: it is of step {found.step}, the run's is of step {expected}"
            continue
        averaged = which == "best_model" and bool(record.summary.get("best_is_averaged"))
        part = "average " if averaged else ""
        ours = {f"{part}parameters": chain.hash_of(dict(found.model.named_parameters()))}
        if len(record.starts) and all(start.get("world_size") == 1 for start in record.starts):  # else a mean over ranks
            ours[f"{part}buffers"] = chain.hash_of([dict(found.model.named_buffers())])
        yield from differences(name, ours, {key: link["hashes"].get(key) for key in ours}, "at its step it was")
        if which == "final" and record.is_finished:
            sha = weights_sha256(checkpoint.load_portable(file.parent)["module"])
            yield from differences(
                name, {"weights_sha256": sha}, {"weights_sha256": record.summary.get("weights_sha256")}, "in summary.json"
            )


def check_images(record: Record, links: Sequence[Link], data_dir: Path | None) -> tuple[list[str], str]:
    """Findings about the training images, and what was looked at."""
    where = run_folder.data_dir_of(record.folder, data_dir)
    try:
        images = registry.images(from_settings(record.settings), "train", where)
    except UsageError as error:
        return [], f"the training images are not there to be checked ({error})"
    ours = chain.images_sha256(images)
    bad = [link["images"] for link in links if link["kind"] == "start" and link["images"] != ours]
    found = [f"the training images in {where}: their hash is {ours[:12]}, those of the run had {bad[0][:12]}"] if bad else []
    return found, f"{len(images):,} training images"


# --- the files against each other -----------------------------------------------------------------------------------------


def check_numbers(record: Record) -> Iterator[str]:
    """What the summary says against metrics.csv, the test's predictions and the settings; all that an old record allows."""
    summary, rows, config = record.summary, record.epochs, record.ds_config
    train, validated = rows.get("train", []), [*rows.get("val", []), *rows.get("val_averaged", [])]
    recipe, resumed = record.settings, bool(summary.get("resumed_at_steps"))

    def compared(key: str, measured: float | None, source: str, tolerance: float = ROUNDING) -> Iterator[str]:
        value = summary.get(key)
        if value is not None and measured is not None and not abs(value - measured) <= tolerance * max(1, abs(measured)):
            yield f"summary.json: {key} is {value}, {source} says {measured:.10g}"

    def of(kind: str, row: list[Row], which: int, column: str) -> Iterator[str]:
        where = f"the {'last' if which else 'first'} row of metrics.csv"
        yield from compared(f"{kind}{column}", row[which][column.split("_")[1]] if row else None, where)

    yield from of("", train, -1, "train_accuracy")
    yield from of("", train, -1, "train_loss")
    if train and train[0]["epoch"] == 1:
        yield from of("first_", train, 0, "train_accuracy")
        yield from of("first_", train, 0, "train_loss")
    per_epoch = max(1, (record.dataset.train_images - recipe.get("val_images", 0)) // config.get("train_batch_size", 1))
    if record.is_finished:
        steps, last = summary.get("steps", 0), max((row["epoch"] for row in train), default=None)
        yield from compared("epochs", steps / per_epoch, "its steps and ds_config.json")
        if last is not None and not (last - 1) * per_epoch < steps <= last * per_epoch:
            yield f"summary.json: steps is {steps}, metrics.csv ends with epoch {last:.0f}, of {per_epoch} steps each"
    if validated and not resumed:
        best = max(row["accuracy"] for row in validated)
        yield from compared("val_accuracy", best, "the best row of metrics.csv")
        at = {min(int(row["epoch"]) * per_epoch, summary.get("steps", 0)) for row in validated if row["accuracy"] == best}
        if (
            summary.get("best_step") is not None
            and summary["best_step"] not in at
            and len(validated) == len(rows.get("val", []))
        ):
            yield f"summary.json: best_step is {summary['best_step']}, the best row of metrics.csv is of step {min(at)}"
    for row in rows.get("test", [])[-1:]:
        yield from compared("test_accuracy", row["accuracy"], "metrics.csv")
    if record.predictions is not None:
        yield from compared("test_accuracy", record.predictions.accuracy, "test_predictions.npz", 1e-9)
        yield from compared("test_images", len(record.predictions.labels), "test_predictions.npz")
    if summary.get("quality") and summary.get("test_accuracy") is not None:
        tier = quality_tier(summary["test_accuracy"], record.dataset.tiers)
        if summary["quality"] != tier:
            yield f"summary.json: quality is {summary['quality']}, its test_accuracy is {tier}"
    yield from compared("seed", recipe["seed"], "recipe.json")
    sizes = [config.get(key) for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    if not resumed and all(sizes):
        yield from compared("world_size", sizes[0] / sizes[1] / sizes[2], "ds_config.json")
    if summary.get("train_seconds") and not resumed and not summary.get("skipped_steps") and sizes[0]:
        rate = summary.get("steps", 0) * sizes[0] / summary["train_seconds"]
        yield from compared("images_per_second", rate, "its steps and train_seconds", 1e-6)


# --- training again -------------------------------------------------------------------------------------------------------


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


# --- the command ----------------------------------------------------------------------------------------------------------


def check_test(record: Record, data_dir: Path | None, same: bool) -> Iterator[str]:
    """Measure the test accuracy once more: a look at the test split, in the ledger."""
    found, count = trained.load(record.folder), record.summary.get("test_images")
    look = Look([record.folder], count)
    images = first_images(split_images(found, "test", data_dir, look), count, "--test")
    world = trained.alone(record.starts[-1].get("threads") if record.starts else None)
    result, _ = answers(found.model.to(world.device), images, found, world)
    measured = {"test_accuracy": result.accuracy}
    if record.summary.get("test_accuracy_tta") is not None:
        model = Augmented(found.model, found.recipe.tta, found.recipe.tta_below)
        measured["test_accuracy_tta"] = answers(model, images, found, world)[0].accuracy
    look.learned(accuracy=result.accuracy)
    for row in record.epochs.get("test", [])[-1:]:
        if abs(row["loss"] - result.loss) > (2 * ROUNDING if same else 0.002):
            yield f"metrics.csv row of the test: loss is {row['loss']}, measured again it is {result.loss:.6f}"
    for key, value in measured.items():
        if abs(value - record.summary.get(key, math.nan)) > (1e-9 if same else 0.002):
            yield f"summary.json: {key} is {record.summary.get(key)}, measured again it is {value}"


def check_files(record: Record, links: list[Link] | None, data_dir: Path | None) -> tuple[list[str], str, dict[str, str]]:
    """Findings, what was looked at, and the checkpoints that are what they were: hash of their link -> tag."""
    folder, intact, found, images = record.folder, {}, [], ""
    try:
        found += [*check_numbers(record)]
        if links is None:
            return found, "", intact
        found += check_links(folder, links)
        if links and links[0]["kind"] == "start":
            found += [*check_settings(folder, links), *check_rows(folder, links), *check_summary(record, links)]
            found += [*check_tags(folder, links, intact), *check_weights(record, links)]
            about_images, images = check_images(record, links, data_dir)
            found += about_images
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        found.append(f"a file is not as this program writes it ({reason(error)})")
    rows = sum(map(len, chain.rows_of(links).values())) if images else 0
    last = f"; the last hash is {links[-1]['hash']}" if links else ""
    return found, f"files: {len(links)} links, {rows} rows, {len(intact)} checkpoints and {images}{last}", intact


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


def verify(folder: Path, segments: str, test: bool, data_dir: Path | None) -> tuple[list[str], list[str], bool]:
    """Findings, what was checked, and whether there is a chain. Raises UsageError if it cannot be checked."""
    record, links = open_record(folder), chain.read(folder)
    if not (folder / chain.FILE).exists() and not any(chained(tag) for tag in (folder / "checkpoints").glob("step_*")):
        logs = ", ".join(name for name in ("metrics.csv", "test_predictions.npz") if (folder / name).exists())
        told = f"made without a chain: summary.json was held against {logs or 'no logs'} and its settings"
        return check_files(record, None, data_dir)[0], [told], False
    found, looked, intact = check_files(record, links, data_dir)
    told, same = [looked], True
    if found or segments == "0":
        told.append("nothing was trained again")
    else:
        found, more, same = check_again(record, links, intact, segments, data_dir)
        told += more
    if test:
        found += check_test(record, data_dir, same)
        told.append("the test accuracy was measured again")
    elif record.summary.get("test_accuracy") is not None:
        told.append("the test split was not opened; --test measures the test accuracy again")
    return [*{line.partition(" is ")[0]: line for line in reversed(found)}.values()][::-1], told, True  # each place once


def run(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")],
    segments: str = "1",
    test: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    data_dir: DataDir = None,
) -> int:
    """Whether a run's files are what it measured, and what its settings lead to when trained again.

    Exit code: 0 if all agrees, 1 if something does not, 2 if that cannot be checked.

    Args:
        runs: Folders of runs, or of records.
        segments: How many epochs to train again, chosen at random: a number, 0 for none, or all.
        test: Measure the test accuracy again, which the ledger counts as a look at the test split.
    """
    if segments != "all" and not segments.isdecimal():
        raise UsageError(f"invalid value for --segments: {segments}, expected a number or all, for example --segments 1")
    code = 0
    for folder in runs:
        found, told, has_chain = verify(folder, segments, test, data_dir)
        for line in found[:SHOWN]:
            print(f"{folder}: {line}")
        if len(found) > SHOWN:
            print(f"{folder}: and {len(found) - SHOWN:,} more findings")
        for line in told:
            print(f"{folder}: {line}")
        good = "passes" if has_chain else "its logs agree with each other; no more can be shown"
        bad = f"does not pass, {len(found):,} finding{'s' * (len(found) > 1)}"
        print(f"{folder}: {bad if found else good}", flush=True)
        code = 1 if found else code
    return code
