"""RUN/chain.jsonl: what a run set and measured, link by link, each with the hash of the one before it.

start  at every start: the settings, how they were run, the program and the machine, a hash of the data set's training images
epoch  after each epoch: where the run stands, a hash of each part of the full state, and the new rows of the CSV files
stop   the same where a run was stopped inside an epoch
end    the summary, and the test's row

`python -m cifar10 verify` holds the files of a run against its chain, and trains parts of it again. Who changes a link must
change all that follow, and the last hash, which may have been published; who also makes the states fit has trained the run.
On a resume the chain is cut where the checkpoint was saved, as the CSV files are. A run from another run's checkpoint begins
with that run's hash.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar10.config.cli import Options
from cifar10.data.dataset import Images
from cifar10.run.folder import read_json
from cifar10.run.state import RunState
from cifar10.run.summary import Status, Summary

FILE = "chain.jsonl"
LOGS = ("metrics.csv", "steps.csv")
CHANGING = ("train_seconds", "seconds_before_epoch", "resumed_at_steps", "chain")  # of a RunState: not decided by its settings
HOW = ("engine_level", "log_every_steps", "gradient_checkpointing", "deterministic")  # the options that decide bits
Link = dict[str, Any]


def _feed(digest: Any, value: Any) -> None:
    """Add a value of plain types, tensors and arrays: types, shapes and bytes, and the keys of dicts in their order."""
    if isinstance(value, dict):
        digest.update(f"{{{len(value)}".encode())
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for one in value:
            _feed(digest, one)
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(memoryview(value.contiguous().flatten().view(torch.uint8).numpy()))
    else:
        digest.update(f"{value!r};".encode())


def hash_of(value: Any) -> str:
    """SHA-256 of a value of plain types and tensors."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def hashes(state: dict[str, Any]) -> dict[str, str]:
    """The hash of each part of what `full_state` returns, and of each part of the averaged weights."""
    average = {f"average {part}": value for part, value in (state.get("average") or {}).items()}
    return {part: hash_of(value) for part, value in {**state, **average}.items() if part != "average"}


def images_sha256(images: Images) -> str:
    """SHA-256 of a split's pixels and labels."""
    return hash_of([torch.from_numpy(images.pixels), torch.from_numpy(images.labels)])


def sealed(link: Link) -> Link:
    """A link with its hash, of all else in it."""
    content = {key: value for key, value in link.items() if key != "hash"}
    return {**content, "hash": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def read(folder: Path) -> list[Link]:
    """The links of a run, up to the first line that is none; [] if it has no chain."""
    links: list[Link] = []
    try:
        lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return links
    for line in lines:
        try:
            link = json.loads(line)
            if {type(link[key]) for key in ("kind", "hash", "prev")} != {str} or type(link["step"]) is not int:
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        links.append(link)
    return links


def rows_of(links: Iterable[Link]) -> dict[str, list[str]]:
    """The rows of the CSV files that these links came with, without those that a resume has cut."""
    rows: dict[str, list[str]] = {name: [] for name in LOGS}
    for link in links:
        for name, limit in zip(LOGS, (link["epoch"], link["step"]), strict=True):
            if link["kind"] == "start":
                rows[name] = [row for row in rows[name] if int(row.split(",")[0]) <= limit and row.split(",")[1] != "test"]
            rows[name] += link.get(name, [])
    return rows


class Chain:
    """The chain of a run in progress, on rank 0; without a folder, on other ranks and in a dry run, nothing is written.

    Opened when the CSV files have been. A disk that will not take a link does not end the run: it is reported, and the chain
    ends there.
    """

    def __init__(
        self, folder: Path | None, state: RunState, ds_config: dict[str, Any], options: Options, images: Images
    ) -> None:
        self._folder, self._seconds, self._last = folder, 0.0, state.chain
        if folder is None:
            return
        began = time.perf_counter()
        links = read(folder)
        kept = [number for number, link in enumerate(links, 1) if link["hash"] == state.chain]
        self._rows = {name: len(self._lines(name)) for name in LOGS}
        start = (read_json(folder / "environment.json") or {"starts": [{}]})["starts"][-1]
        machine = {key: value for key, value in start.items() if key not in ("time", "command", "data_dir")}
        facts = {
            "recipe.json": read_json(folder / "recipe.json"),
            "deepspeed": ds_config,
            "how": {name: getattr(options, name) for name in HOW},
            "machine": {**machine, "instructions": torch.backends.cpu.get_cpu_capability()},
            "images": images_sha256(images),
        }
        self._write(links[: kept[-1]] if kept else [], "w")
        self._add("start", state, facts, began)

    def add(self, status: Status, state: RunState, full_state: dict[str, Any]) -> dict[str, Any]:
        """A link for where the run stands, which checkpoints refer to from now on; returns the engine's full state."""
        began, values = time.perf_counter(), state.as_dict()
        facts = {
            "state": {key: value for key, value in values.items() if key not in CHANGING},
            "hashes": hashes(full_state) if self._folder else {},
            "times": {**{key: values[key] for key in CHANGING if key != "chain"}, "chain_seconds": self._seconds},
        }
        self._add("stop" if status == "stopped" else "epoch", state, facts, began)
        state.chain = self._last
        return full_state

    def end(self, state: RunState, summary: Summary) -> None:
        """The last link, of a finished run."""
        if summary.status == "finished":
            self._add("end", state, {"summary": vars(summary), "times": {"chain_seconds": self._seconds}}, time.perf_counter())

    def _lines(self, name: str) -> list[str]:
        path = self._folder / name
        return path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []

    def _add(self, kind: str, state: RunState, facts: dict[str, Any], began: float) -> None:
        if self._folder is None:
            return
        new = {name: self._lines(name)[count:] for name, count in self._rows.items()}
        self._rows = {name: count + len(new[name]) for name, count in self._rows.items()}
        where = {"kind": kind, "step": state.step, "epoch": state.epoch}
        link = sealed({**where, **facts, **{name: rows for name, rows in new.items() if rows}, "prev": self._last})
        if self._write([link], "a"):
            self._last = link["hash"]
        self._seconds += time.perf_counter() - began

    def _write(self, links: list[Link], mode: str) -> bool:
        try:
            with (self._folder / FILE).open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(link) + "\n" for link in links)
                file.flush()
                os.fsync(file.fileno())
            return True
        except OSError as error:
            print(f"{self._folder / FILE} could not be written ({error.strerror}); the chain ends here", file=sys.stderr)
            self._folder = None
            return False
