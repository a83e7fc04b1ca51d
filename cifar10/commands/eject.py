"""`python -m cifar10 eject [flags of a run]`: the run as one short file of plain DeepSpeed, without this program.

It trains the same run: the same initial weights, and the same images in the same order with the same crops and flips. Losses
agree to rounding; tests/commands/test_eject.py compares them.
"""

import ast
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Annotated

import tyro

from cifar10 import UsageError
from cifar10.config import schedule
from cifar10.config.cli import split_options
from cifar10.data import augment, rng
from cifar10.engine import muon
from cifar10.models.registry import source_file
from cifar10.plan import Plan, make_plan

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST"}
NETWORKS = ("bn_cnn", "lenet", "mnist_cnn", "smooth_cnn")  # files with one class
SCHEDULES = {
    schedule.Cosine: "0.5 * (1 + math.cos(math.pi * {progress}))",
    schedule.Linear: "1 - {progress}",
    schedule.Constant: "1",
}
GENERATED = {"synthetic": "", "synthetic_mnist": "[:, 2:30, 2:30, 1:2].copy()"}


@dataclass(frozen=True)
class EjectOptions:
    """Where the file goes."""

    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """File to write (default: the file is printed)."""


HEAD = '''\
"""Recipe $recipe in plain DeepSpeed: python FILE, deepspeed --num_gpus=2 FILE, or torchrun --nproc_per_node=2 FILE.

The training of `$command`,
without its validation, early stopping, checkpoints and test. MAX_STEPS=20 in the environment ends it after 20 steps.
"""

import math
import os

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
$torchvision
SEED, EPOCHS, LR = $seed, $epochs, $lr
MEAN, STD = torch.tensor($mean), torch.tensor($std)
CONFIG = $config


'''

LOAD_FILES = """
data = datasets.$name(os.environ.get("CIFAR10_DIR", "data"))
images, labels = torch.from_numpy(np.asarray(data.data).reshape(len(data), $size, $size, -1)), torch.tensor(data.targets)
"""

LOAD_GENERATED = '''

def words(seed, stream, count):
    """Random uint64, in their fixed order."""
    return np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(count)


# Synthetic images: three patterns of each class, shifted, dimmed, brightened, with noise.
field = (words(0, 2, 1440) & np.uint64(255)).astype(np.int64).reshape(10, 3, 4, 4, 3) - 128
for axis in (2, 3):  # 4 cells -> 32 pixels, bilinear
    rows = [(8 - k) * field + k * np.roll(field, -1, axis) for k in range(8)]
    field = np.stack(rows, axis + 1).reshape(*field.shape[:axis], 32, *field.shape[axis + 1 :])
field = np.pad((field >> 6).astype(np.int16), [(0, 0), (0, 0), (0, 16), (0, 16), (0, 0)], mode="wrap")
windows = np.lib.stride_tricks.sliding_window_view(field, (32, 32), axis=(2, 3)).transpose(0, 1, 2, 3, 5, 6, 4)
draws, labels = words($split_seed, 0, ($train_images, 385)).astype("<u8").view(np.uint8), np.arange($train_images) % 10
noise = draws[:, :3072].reshape(-1, 32, 32, 3).astype(np.int16) - 128
pattern, dy, dx, contrast, light = draws[:, 3072:3077].T.astype(np.int16)
images = windows[labels, pattern % 3, dy % 17, dx % 17] * (64 + contrast // 4)[:, None, None, None] >> 8
images = (128 + images + (light // 8 - 16)[:, None, None, None] + (noise >> 2)).astype(np.uint8)$cut
images, labels = torch.from_numpy(images), torch.from_numpy(labels)  # uint8 [N, H, W, C], int64 [N]
'''

SPLIT = """\
shuffled = np.random.Philox(key=np.array([$split_seed, 0], np.uint64)).random_raw(len(labels)).argsort(kind="stable")
by_class, counts = shuffled[labels.numpy()[shuffled].argsort(kind="stable")], np.bincount(labels)
share = (np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts) + 0.5) / np.repeat(counts, counts)
kept = np.sort(by_class[share.argsort(kind="stable")[$val_images:]])  # all but $val_images to validate with, evenly by class
images, labels = images[kept], labels[kept]
"""

DRAW = '''

def draw(epoch, purpose, indices):
    """A random int64 per image, a function of seed, epoch and image alone (splitmix64)."""
    z, golden = torch.zeros((), dtype=torch.int64), -7046029254386353131
    for word in (SEED + golden, epoch + golden, purpose + golden, indices * golden):
        z = z + word
        z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
        z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
        z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return z

'''

AUGMENTED = '''
def augmented(indices, epoch):
    """uint8 [B, H, W, C]: a $describe."""
    cells = ((draw(epoch, $crop_stream, indices) >> 24) & 0xFFFFFFF) * $cells >> 28
    padded, crops = F.pad(images[indices], (0, 0, $padding, $padding, $padding, $padding)), []
    for image, cell in zip(padded, cells.tolist()):
        y, x = divmod(cell // $sides, $offsets)
        crops.append(image[y : y + $size, x : x + $size].flip([1] * (cell % $sides)))
    return torch.stack(crops)

'''

TRAIN = """
alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
os.environ.update({name: value for name, value in alone.items() if name not in os.environ})  # plain `python`: one rank
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would need a C++ compiler, and is not used
deepspeed.init_distributed()
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(SEED)
model = $model
engine, optimizer, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
batch, steps_per_epoch, step = engine.train_batch_size(), len(labels) // engine.train_batch_size(), 0
steps = min(round(EPOCHS * steps_per_epoch), int(os.environ.get("MAX_STEPS", 10**9)))
for epoch in range(math.ceil(steps / steps_per_epoch)):
    order = draw(epoch, $order_stream, torch.arange(len(labels))).argsort(stable=True)[: steps_per_epoch * batch]
    for mine in order.view(steps_per_epoch, ranks, -1)[: steps - step, rank]:  # this rank's images of each step
${set_lr}        total = torch.zeros((), device=engine.device)
        for part in mine.split(engine.train_micro_batch_size_per_gpu()):
            inputs = (($batch / 255 - MEAN) / STD).permute(0, 3, 1, 2).to(engine.device)
            loss = F.cross_entropy(engine(inputs).float(), labels[part].to(engine.device)$smoothing)
            engine.backward(loss)  # averages the gradients over the ranks$kept
            engine.step()  # only the last micro-batch's call does anything: it clips, updates the weights, zeroes the gradients
            total += loss.detach() * len(part) / batch
        dist.all_reduce(total)
        step += 1
        if rank == 0:
            print(f"step {step} loss {total.item():.8f}", flush=True)
dist.destroy_process_group()
"""

KEPT = (  # by ZeRO stage
    "",
    "; each has a part of the optimizer's state",
    "; each keeps a part, also of the optimizer's state",
    "; each keeps a part of them, of the state and of the weights",
)
SET_LR = """\
        now = $now  # in epochs: $lr_words
        optimizer.param_groups[0]["lr"] = LR * ($factor)
"""


def _refuse_what_it_cannot_hold(plan: Plan) -> None:
    """Raise UsageError for what would take more than a few lines of plain DeepSpeed."""
    recipe = plan.recipe
    operations = augment.parse(recipe.augment)
    crop = augment.find(operations, augment.RandomCrop)
    held = (augment.RandomCrop, augment.RandomHorizontalFlip)
    reasons = {
        f"--augment {recipe.augment}": any(type(one) not in held for one in operations)
        or (crop and crop.padding_mode != "constant"),
        f"--dataset {recipe.dataset}": recipe.dataset not in {*TORCHVISION, *GENERATED},
        "images of another size": recipe.resize or recipe.image_size or recipe.first_sizes,
        f"--weights {recipe.weights}": recipe.weights != "none",
        f"--lr-schedule {recipe.lr_schedule}": type(schedule.parse(recipe.lr_schedule)) not in SCHEDULES,
        "--sync-bn": recipe.sync_bn,
        "averages of the weights": recipe.ema or recipe.swa_epochs,
        "--plateau-lr-factor": recipe.plateau_lr_factor != 1,
        f"the optimizer {muon.NAME}": plan.ds_config["optimizer"]["type"] == muon.NAME,
        f"--model {recipe.model}": source_file(recipe.model).stem not in NETWORKS,
        "--dropout, --drop-path, --train-only": (recipe.dropout, recipe.drop_path, recipe.train_only) != (None, None, None),
    }
    if too_much := [what for what, holds in reasons.items() if holds]:
        raise UsageError(f"eject writes short files, which cannot hold {', '.join(too_much)}; try --recipe bn_cnn or lenet")


def _model_source(name: str) -> tuple[str, str]:
    """The class that the network called `name` is built of, and the call that builds it."""
    text = source_file(name).read_text(encoding="utf-8")
    lines, body = text.splitlines(), ast.parse(text).body
    (kind,) = (node for node in body if isinstance(node, ast.ClassDef))
    (built,) = (node.body[-1].value for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
    return "\n".join(lines[kind.lineno - 1 : kind.end_lineno]), ast.unparse(built)


def _learning_rate(plan: Plan, steps_per_epoch: int) -> str:
    """The lines that set the learning rate; none if the config has a scheduler."""
    recipe, found = plan.recipe, schedule.parse(plan.recipe.lr_schedule)
    if plan.ds_config.get("scheduler"):
        return ""
    length = max(1, round(recipe.epochs * steps_per_epoch)) / steps_per_epoch
    warmup = found.warmup(recipe.warmup_epochs, length)
    progress = f"(now - {warmup:.17g}) / {length - warmup:.17g}"
    factor = SCHEDULES[type(found)].format(progress=progress)
    warm = f"min(1, (now + 1) / {warmup:.17g})" if found.per_epoch else f"now / {warmup:.17g}"
    return Template(SET_LR).substitute(
        now="epoch" if found.per_epoch else "(step + 0.5) / steps_per_epoch",
        lr_words=f"a linear warmup, then a {found.describe()}" if warmup else found.describe(),
        factor=f"{warm} if now < {warmup:.17g} else {factor}" if warmup else factor,
    )


def _config(plan: Plan) -> str:
    """DeepSpeed's config for any number of ranks, as Python."""
    dropped = ("gradient_accumulation_steps", "timers")  # the first follows from the batch sizes
    config = {
        key: value
        for key, value in plan.ds_config.items()
        if key not in dropped and value not in ({"enabled": False}, {"stage": 0})
    }
    if plan.batch.accumulation == 1:
        del config["train_micro_batch_size_per_gpu"]
    said = {
        "train_batch_size": "images of a step, over all ranks",
        "train_micro_batch_size_per_gpu": "images of a pass on a rank",
    }
    lines = []
    for key, value in config.items():
        line = f"    {key!r}: {value!r},".replace("'", '"')
        comment = f"  # {said[key]}" if key in said and len(line) + len(said[key]) < 124 else ""
        lines.append((line if len(line) < 128 else line.replace(', "params"', ',\n        "params"')) + comment)
    return "\n".join(["{", *lines, "}"])


def source(plan: Plan, command: str) -> str:
    """The file's text. Raises UsageError for a run that it cannot hold."""
    _refuse_what_it_cannot_hold(plan)
    recipe, dataset, generated = plan.recipe, plan.dataset, plan.recipe.dataset in GENERATED
    operations = augment.parse(recipe.augment)
    crop, flip = (augment.find(operations, kind) for kind in augment.GATHERED)
    padding, sides = crop.padding if crop else 0, 2 if flip else 1
    network, model = _model_source(recipe.model)
    steps_per_epoch = (dataset.train_images - recipe.val_images) // plan.batch.global_images
    values = {
        "recipe": plan.options.recipe,
        "command": command,
        "torchvision": "" if generated else "from torchvision import datasets\n",
        "seed": recipe.seed,
        "epochs": f"{recipe.epochs:g}",
        "lr": plan.ds_config["optimizer"]["params"].get("lr", 1e-3) * recipe.lr_scale(plan.batch.global_images),
        "mean": list(recipe.mean),
        "std": list(recipe.std),
        "config": _config(plan),
        "kept": KEPT[plan.ds_config.get("zero_optimization", {}).get("stage", 0)],
        "name": TORCHVISION.get(recipe.dataset),
        "cut": GENERATED.get(recipe.dataset),
        "train_images": dataset.train_images,
        "val_images": recipe.val_images,
        "split_seed": recipe.split_seed,
        "size": dataset.size,
        "describe": augment.describe(operations),
        "padding": padding,
        "sides": sides,
        "offsets": 2 * padding + 1,
        "cells": (2 * padding + 1) ** 2 * sides,
        "crop_stream": rng.stream("crop"),
        "order_stream": rng.stream("order"),
        "model": model.replace("num_classes", str(len(dataset.classes))),
        "set_lr": _learning_rate(plan, steps_per_epoch),
        "batch": "augmented(part, epoch)" if operations else "images[part]",
        "smoothing": f", label_smoothing={recipe.label_smoothing:g}" if recipe.label_smoothing else "",
    }
    parts = [HEAD, network.replace("$", "$$"), "\n\n", LOAD_GENERATED if generated else LOAD_FILES]
    parts += [SPLIT if recipe.val_images else "", DRAW, AUGMENTED if operations else "", TRAIN]
    return Template("".join(parts)).substitute(values)


def run(argv: list[str]) -> None:
    """Print the run that the flags describe as one file of plain DeepSpeed, or write it to --output FILE."""
    options, flags = split_options(argv, EjectOptions)
    plan = make_plan(flags, 1, "python -m cifar10 eject", __doc__, EjectOptions)
    text = source(plan, shlex.join(["python", "cifar10_deepspeed.py", *flags]))
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text, encoding="utf-8")
