"""A run's files held against its chain (run/chain.py) and against each other, for the command `verify`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from cifar10 import UsageError, reason
from cifar10.config import settings
from cifar10.config.recipe import from_settings
from cifar10.config.settings import flattened
from cifar10.data import registry
from cifar10.engine.full_state import weights_sha256
from cifar10.metrics.csv_sink import METRICS, STEPS
from cifar10.run import chain, checkpoint, trained
from cifar10.run import folder as run_folder
from cifar10.run.chain import Link
from cifar10.run.record import Record, Row
from cifar10.run.state import RunState
from cifar10.run.summary import quality_tier, summarize

COLUMNS = {"metrics.csv": METRICS, "steps.csv": STEPS}
ROUNDING = 5.1e-7  # of metrics.csv


def differences(file: str, there: dict[str, Any], was: dict[str, Any], told: str) -> Iterator[str]:
    """A line for each key with another value in a file than in the chain."""
    for key in sorted(there.keys() | was.keys()):
        if repr(there.get(key)) != repr(was.get(key)):
            yield f"{file}: {key} is {short(there.get(key))}, {told} {short(was.get(key))}"


def short(value: Any) -> str:
    """A value as text, of hashes their beginning."""
    return str(value)[:12] if re.fullmatch("[0-9a-f]{64}", str(value)) else str(value)


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
