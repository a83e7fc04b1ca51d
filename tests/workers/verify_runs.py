"""Honest runs and forgeries on a small data set, and what `python -m cifar10 verify` says of each.

    python tests/workers/verify_runs.py FOLDER [--forgeries 100] [--honest NAME,NAME]

Writes FOLDER/outcomes.json: {"honest": {name: [findings, what was checked]}, "forged": {name: the same}}. A training is a fork
of this process, also where verify trains again.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import small_runs
import torch

import cifar10_deepspeed as script
from cifar10.commands import verify, verify_again
from cifar10.data import registry, synthetic
from cifar10.data.dataset import Images
from cifar10.engine.engine import prepare
from cifar10.files import file_digest
from cifar10.run import chain, checkpoint
from cifar10.run import folder as run_folder
from cifar10.run.predictions import TEST_FILE

SMALL = "--dataset synthetic --val-images 100 --test-images 200 --global-batch-size 64 --log-every-steps 3 --threads 1".split()
SMALL += "--no-tensorboard --no-report --epochs 3 --model lenet".split()
ADAMW = {"type": "AdamW", "params": {"lr": 0.003}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.05, "warmup_num_steps": 8}}
Hook = Callable[[], None]


# --- runs ---------------------------------------------------------------------------------------------------------------


def start(folder: Path, flags: str = "", ranks: int = 1, hook: Hook | None = None, **more: Any) -> None:
    """One start of the program in `folder`, after `hook` in its process."""
    how = {"ranks": ranks, "flags": [*SMALL, *flags.split(), "--output-dir", str(folder)], **more}
    port = small_runs.free_port()

    def rank_of(rank: int) -> int:
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115
        if hook:
            hook()
        return small_runs.run_rank(how, rank, port)

    codes = small_runs.ended([small_runs.forked(rank_of, rank) for rank in range(ranks)])
    assert codes == [more.get("code", 0)] * ranks, (folder, codes)


def launch(ranks: int, flags: list[str], work: Path) -> None:
    """In place of verify's."""
    how, port = {"ranks": ranks, "flags": flags, "stderr": str(work / "stderr")}, small_runs.free_port()

    def rank_of(rank: int) -> int:
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115
        return small_runs.run_rank(how, rank, port)

    if any(small_runs.ended([small_runs.forked(rank_of, rank) for rank in range(ranks)])):
        raise script.UsageError(f"it cannot be trained again: {(work / 'stderr').read_text().strip().splitlines()[-1:]}")


def config(base: Path, name: str, **keys: Any) -> str:
    file = base / f"{name}.json"
    file.write_text(json.dumps({"train_batch_size": 64, "optimizer": ADAMW, **keys}))
    return f"--deepspeed-config {file}"


def honest(base: Path) -> dict[str, list[tuple[str, int, int | None]]]:
    """Every kind of run: its starts, each with flags, ranks and the step after which it is stopped; at -N it is killed, at 0 as
    it opens the test split."""
    averaged = "--model bn_cnn --ema 0.9"
    one_start = {
        "lenet": "",
        "bn_cnn": "--model bn_cnn",
        "ZeRO 3 and AdamW": config(base, "zero", zero_optimization={"stage": 3}),
        "EMA": averaged,
        "SWA": "--swa-epochs 2",
        "nothing held out": "--val-images 0 --ema 0.9",
        "early stopping": "--epochs 9 --patience 2 --plateau-patience 1 --plateau-lr-factor 0.5 --min-improvement 9",
        "every second epoch": "--save-every-epochs 2 --save-frequency 2",
        "max steps": "--max-steps 12",
        "scheduler": config(base, "scheduler", scheduler=WARMUP),
        "accumulation and MixUp": "--micro-batch-size 16 --augment MixUp",
        "bf16 and TTA": "--precision bf16 --tta mirror",
    }
    return {
        **{name: [(flags, 1, None)] for name, flags in one_start.items()},
        "two ranks": [("--model bn_cnn", 2, None)],
        "two ranks and ZeRO 2": [("--model bn_cnn --set zero_optimization.stage=2", 2, None)],
        "stopped": [("", 1, 11)],
        "stopped and resumed": [("", 1, 11), ("", 1, None)],
        "stopped twice": [(averaged, 1, 3), (averaged, 1, 5), (averaged, 1, None)],
        "two ranks stopped": [("--model bn_cnn", 2, 11), ("--model bn_cnn", 2, None)],
        "killed": [("--epochs 4 --save-every-epochs 2", 1, -24), ("--epochs 4 --save-every-epochs 2", 1, None)],
        "killed in its test": [("", 1, 0), ("", 1, None)],
        "extended": [("--max-steps 12", 1, None), ("", 1, None)],
        "from two ranks to one": [("--model bn_cnn", 2, 11), ("--model bn_cnn", 1, None)],
        "from another run": [(f"--resume {base / 'stopped'} --lr 0.02", 1, None)],
    }


def killed_at(at: int) -> Hook:
    """A process that ends without a word at a step."""

    def hook() -> None:
        train_step, taken = script.train_step, 0

        def step(*given: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == at:
                os._exit(9)
            return train_step(*given)

        script.train_step = step
        if not at:
            script.measure_best_model = lambda *_: os._exit(9)

    return hook


# --- forgeries ------------------------------------------------------------------------------------------------------------


def edit_json(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content, indent=2))


def write_tag(tag: Path, content: dict[str, Any]) -> None:
    """A checkpoint with a manifest that fits it."""
    torch.save(content, tag / checkpoint.STATE_FILE)
    facts = {"bytes": (tag / checkpoint.STATE_FILE).stat().st_size}
    facts["sha256"] = file_digest(tag / checkpoint.STATE_FILE, "sha256")
    (tag / checkpoint.MANIFEST_FILE).write_text(json.dumps({checkpoint.STATE_FILE: facts}))


def chained_again(folder: Path, edit: Callable[[dict[str, Any]], None], settings: Callable[[Any], None] | None = None) -> None:
    """What a forger does who knows of the chain: every link is edited and gets its hash, and checkpoints name the new links."""
    new, last = {}, ""
    links = chain.read(folder)
    for link in links:
        edit(link)
        new[link["hash"]] = last = chain.sealed({**link, "prev": last})["hash"]
    lines, last = [], ""
    for link in links:
        lines.append(chain.sealed({**link, "prev": last}))
        last = lines[-1]["hash"]
    (folder / chain.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for tag in (folder / "checkpoints").glob("step_*"):
        content = torch.load(tag / checkpoint.STATE_FILE, weights_only=True)
        content["run_state"]["chain"] = new[content["run_state"]["chain"]]
        if settings:
            settings(content["settings"])
        write_tag(tag, content)


def a_cell(folder: Path, random_: random.Random, columns: tuple[int, ...]) -> tuple[str, str, str]:
    """Change a digit of a cell; returns the file's name, the old row and the new one."""
    name = random_.choice(chain.LOGS)
    file = folder / name
    rows = file.read_text().splitlines()
    number = random_.randrange(1, len(rows) - (name == "metrics.csv"))  # not the test's
    cells = rows[number].split(",")
    column = random_.choice(columns)
    digit = next(at for at in range(len(cells[column]) - 1, -1, -1) if cells[column][at].isdigit())
    cells[column] = cells[column][:digit] + str((int(cells[column][digit]) + 1) % 10) + cells[column][digit + 1 :]
    before, rows[number] = rows[number], ",".join(cells)
    file.write_text("\n".join(rows) + "\n")
    return name, before, rows[number]


def cell(folder: Path, random_: random.Random) -> None:
    a_cell(folder, random_, (2, 3, 4))


def cell_and_chain(folder: Path, random_: random.Random) -> None:
    name, before, after = a_cell(folder, random_, (2, 3))
    chained_again(folder, lambda link: link.update({name: [after if row == before else row for row in link.get(name, [])]}))


SETTINGS = {"label_smoothing": 0.05, "seed": 77, "augment": "none", "warmup_epochs": 0.2, "split_seed": 5}


def setting(folder: Path, random_: random.Random) -> None:
    key = random_.choice([*SETTINGS])
    edit_json(folder / "recipe.json", lambda content: content["settings"].update({key: SETTINGS[key]}))


def setting_and_chain(folder: Path, random_: random.Random) -> None:
    key = random_.choice([*SETTINGS, "lr"])

    def edit(content: dict[str, Any]) -> None:
        content["settings"].update({key: SETTINGS[key]})

    def edit_lr(config: dict[str, Any]) -> None:
        config["optimizer"]["params"]["lr"] *= 1.1

    if key == "lr":
        edit_json(folder / "ds_config.json", edit_lr)
        of_link = lambda link: edit_lr(link["deepspeed"]) if link["kind"] == "start" else None  # noqa: E731
        chained_again(folder, of_link, lambda saved: edit_lr(saved["deepspeed"]))
        return
    edit_json(folder / "recipe.json", edit)
    if key == "seed":
        edit_json(folder / "summary.json", lambda content: content.update(seed=SETTINGS["seed"]))

    def of_link(link: dict[str, Any]) -> None:
        if link["kind"] == "start":
            edit(link["recipe.json"])
        if link["kind"] == "end" and key == "seed":
            link["summary"]["seed"] = SETTINGS["seed"]

    chained_again(folder, of_link, lambda saved: saved["recipe"].update({key: SETTINGS[key]}))


def another_step(at: int) -> Hook:
    """Training in which one step, from 1, has a slightly larger learning rate than the settings say."""

    def hook() -> None:
        train_step, taken = script.train_step, 0

        def step(engine: Any, *given: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == at:
                engine.set_lr(1.01 * engine.lrs[0] / engine.base_lrs[0])
            return train_step(engine, *given)

        script.train_step = step

    return hook


def swapped_image(at: int) -> Hook:
    """Training in which one image has another one's pixels."""

    def hook() -> None:
        load = synthetic.Generated.load

        def loaded(self: Any, split: str, *given: Any) -> Images:
            images = load(self, split, *given)
            if split == "train":
                pixels = np.array(images.pixels)
                pixels[at] = pixels[at - 1]
                images = Images(pixels, images.labels)
            return images

        synthetic.Generated.load = loaded

    return hook


def row_and_chain(folder: Path, random_: random.Random) -> None:
    """A row that nobody is to see."""
    rows = (folder / "steps.csv").read_text().splitlines()
    row = rows.pop(random_.randrange(1, len(rows)))
    (folder / "steps.csv").write_text("\n".join(rows) + "\n")
    chained_again(folder, lambda link: link.update({"steps.csv": [one for one in link.get("steps.csv", []) if one != row]}))


def setting_on_the_way(folder: Path, random_: random.Random) -> None:
    """A resume with another learning rate, in a program that does not refuse it."""

    def hook() -> None:
        checkpoint.differences = run_folder.differences = lambda *_: ""

    shutil.rmtree(folder)
    start(folder, stop_after=random_.randint(1, 20))
    start(folder, "--lr 0.101", hook=hook)


def step(folder: Path, random_: random.Random) -> None:
    shutil.rmtree(folder)
    start(folder, hook=another_step(random_.randint(1, 21)))


def image(folder: Path, random_: random.Random) -> None:
    shutil.rmtree(folder)
    start(folder, "--val-images 0", hook=swapped_image(random_.randrange(600)))


def image_and_chain(folder: Path, random_: random.Random) -> None:
    image(folder, random_)
    true = chain.images_sha256(registry.DATASETS["synthetic"].load("train", Path("."), 0))
    chained_again(folder, lambda link: link.update({"images": true} if link["kind"] == "start" else {}))


def exchanged(folder: Path, random_: random.Random) -> None:
    """A file of weights from a run with another seed."""
    which = random_.choice(["best_model", "final"])
    shutil.copy(*(run / "checkpoints" / which / checkpoint.PORTABLE_FILE for run in (folder.parent / "other seed", folder)))


def exchanged_tag(folder: Path, random_: random.Random) -> None:
    """A checkpoint with the state of another run's, and a manifest that fits."""
    tag = random_.choice(sorted((folder / "checkpoints").glob("step_*")))
    theirs = torch.load(folder.parent / "other seed" / "checkpoints" / tag.name / checkpoint.STATE_FILE, weights_only=True)
    ours = torch.load(tag / checkpoint.STATE_FILE, weights_only=True)
    write_tag(tag, {**ours, "engine": theirs["engine"]})


def exchanged_and_chain(folder: Path, random_: random.Random) -> None:
    """The same, with a chain that has the hashes of that state."""
    exchanged_tag(folder, random_)
    for tag in (folder / "checkpoints").glob("step_*"):
        content = torch.load(tag / checkpoint.STATE_FILE, weights_only=True)
        step_, hashes = content["run_state"]["step"], chain.hashes(content["engine"])
        of_link = {"kind": "epoch", "step": step_}
        chained_again(folder, lambda link, of_link=of_link, hashes=hashes: link.update(
            {"hashes": hashes} if of_link.items() <= link.items() else {}))  # fmt: skip


FIELDS = "train_accuracy val_accuracy test_accuracy train_loss first_train_accuracy best_step steps images_per_second".split()


def summary(folder: Path, random_: random.Random) -> None:
    key = random_.choice([*FIELDS, "train_seconds"])
    edit_json(folder / "summary.json", lambda content: content.update({key: content[key] * 0.9}))


def summary_and_chain(folder: Path, random_: random.Random) -> None:
    key = random_.choice([name for name in FIELDS if name != "test_accuracy"])
    edit_json(folder / "summary.json", lambda content: content.update({key: content[key] * 0.9}))
    chained_again(folder, lambda link: link.get("summary", {}).update(json.loads((folder / "summary.json").read_text()))
                  if link["kind"] == "end" else None)  # fmt: skip


def test_result(folder: Path, random_: random.Random) -> None:
    """The test accuracy in every file: only another look at the test split can tell."""
    saved = dict(np.load(folder / TEST_FILE))
    wrong = np.flatnonzero(saved["logits"].argmax(1) != saved["labels"])[:3]
    saved["logits"][wrong, saved["labels"][wrong]] += 99
    np.savez_compressed(folder / TEST_FILE, **saved)
    accuracy = float((saved["logits"].argmax(1) == saved["labels"]).mean())
    assert len(wrong) == 3
    edit_json(folder / "summary.json", lambda content: content.update(test_accuracy=accuracy))
    rows = (folder / "metrics.csv").read_text().splitlines()
    before, cells = rows[-1], rows[-1].split(",")
    cells[3] = f"{accuracy:.6f}"
    rows[-1] = ",".join(cells)
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")

    def edit(link: dict[str, Any]) -> None:
        if link["kind"] == "end":
            link["summary"]["test_accuracy"] = accuracy
            link["metrics.csv"] = [rows[-1] if row == before else row for row in link["metrics.csv"]]

    chained_again(folder, edit)


FORGERIES = (
    *(cell, cell_and_chain, row_and_chain, setting, setting_and_chain, setting_on_the_way, step, image, image_and_chain),
    *(exchanged, exchanged_tag, exchanged_and_chain, summary, summary_and_chain, test_result),
)


def outcome(folder: Path, segments: str, test: bool = False) -> list[list[str]]:
    try:
        return [*verify.verify(folder, segments, test, None)[:2]]
    except script.UsageError as error:
        return [[f"error: {error}"], []]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--forgeries", type=int, default=100)
    parser.add_argument("--honest", default="", help="default: all")
    asked = parser.parse_args()
    base = asked.folder.absolute()
    base.mkdir(parents=True, exist_ok=True)
    small_runs.shrink_the_data_sets()
    small_runs.stop.TIMED_STEPS, small_runs.stop.SECONDS_BETWEEN_AGREEMENTS = 2, 0.0
    prepare()
    torch.set_num_threads(1)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    verify_again.launch = launch
    outcomes: dict[str, Any] = {"honest": {}, "forged": {}}
    only = [name for name in asked.honest.split(",") if name]
    for name, starts in honest(base).items():
        if only and name not in only:
            continue
        for flags, ranks, stop in starts:
            if stop is not None and stop <= 0:
                start(base / name, flags, ranks, hook=killed_at(-stop), code=9)
            else:
                start(base / name, flags, ranks, **({"stop_after": stop} if stop else {}))
        with tempfile.TemporaryDirectory() as elsewhere:  # a copy is as good as the run
            copied = shutil.copytree(base / name, Path(elsewhere) / "copy")
            segments = "1" if name == "from another run" else "all"
            outcomes["honest"][name] = outcome(copied, segments, test=(copied / TEST_FILE).exists())
        print("honest", name, *outcomes["honest"][name], sep="\n  ", flush=True)
    original = base / "original"
    if asked.forgeries:
        start(original)
        start(base / "other seed", "--seed 8")
    for number in range(asked.forgeries):
        forge = FORGERIES[number % len(FORGERIES)]
        name, folder = f"{forge.__name__} {number // len(FORGERIES)}", base / "forged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        forge(folder, random.Random(number))
        outcomes["forged"][name] = outcome(folder, "all", test=forge is test_result)
        print("forged", name, *outcomes["forged"][name], sep="\n  ", flush=True)
    (base / "outcomes.json").write_text(json.dumps(outcomes, indent=1))
    caught = sum(bool(found) for found, _ in outcomes["forged"].values())
    passed = sum(not found for found, _ in outcomes["honest"].values())
    print(f"{caught} of {len(outcomes['forged'])} forgeries caught, {passed} of {len(outcomes['honest'])} honest runs pass")
