"""Networks by name: every public function in the other files of this folder builds one, like torchvision's `resnet18()`.

A new network is a new file with such a function. Names are read from the sources, without importing torch.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cifar10 import UsageError, nearest

if TYPE_CHECKING:
    from torch import nn

NOT_NETWORKS = {"__init__", "registry", "weights"}


@cache
def _files() -> dict[str, str]:
    """Network -> the module that builds it: {"bn_cnn_wide": "bn_cnn", ...}."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in NOT_NETWORKS:
            body = ast.parse(path.read_text(encoding="utf-8")).body
            found |= {node.name: path.stem for node in body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
    return found


def model_names() -> list[str]:
    """Valid values of --model."""
    return sorted(_files())


def refuse_unknown_model(name: str) -> None:
    """Raise UsageError with the nearest name unless `name` is a network."""
    if name not in _files():
        raise UsageError(f"--model {name} is unknown{nearest(name, model_names())}")


def source_file(name: str) -> Path:
    """The file that defines the network called `name`."""
    return Path(__file__).with_name(f"{_files()[name]}.py")


def build_model(name: str, seed: int, num_classes: int) -> nn.Module:
    """The network called `name` with a head for `num_classes` and initial weights from `seed`. Raises UsageError."""
    import torch

    refuse_unknown_model(name)
    module = importlib.import_module(f"cifar10.models.{_files()[name]}")
    torch.manual_seed(seed)
    return getattr(module, name)(num_classes=num_classes)
