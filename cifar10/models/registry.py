"""Networks by name: every public function in the other files of this folder builds one, like torchvision's `resnet18()`.

A new network is a new file with such a function. Its arguments say what can be chosen: `num_classes`; `image_size` and
`channels`, which are the data set's; the names in `Recipe.network_options`, which are flags; and a `name` if it builds a
library's networks, which are called `function:name`. They are read from the sources, without importing torch.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar10 import UsageError, nearest

if TYPE_CHECKING:
    from torch import nn

NOT_NETWORKS = {"__init__", "registry", "weights"}


@cache
def _functions() -> dict[str, tuple[str, list[str]]]:
    """Function -> its file and its arguments: {"bn_cnn_wide": ("bn_cnn", ["num_classes"]), ...}."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body if path.stem not in NOT_NETWORKS else []
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name[0] != "_":
                if node.name in found:
                    raise UsageError(f"two networks are called {node.name}: in {found[node.name][0]}.py and {path.name}")
                found[node.name] = path.stem, [argument.arg for argument in node.args.args]
    return found


def model_names() -> list[str]:
    """Valid values of --model, but for those of libraries."""
    return sorted(name for name, (_, arguments) in _functions().items() if "name" not in arguments)


def _library_names(library: str) -> list[str]:
    """The classifiers of torchvision or timm. Raises UsageError if it is not installed."""
    if library == "torchvision":
        from torchvision import models

        return models.list_models(module=models)
    try:
        import timm
    except ImportError:
        raise UsageError("--model timm:NAME needs timm, which is not installed; type uv sync --extra timm") from None
    return timm.list_models()


def refuse_unknown_model(name: str, **options: float | None) -> None:
    """Raise UsageError unless `name` is a network, with its nearest name, and has those `options` that are not None."""
    function, colon, inner = name.partition(":")
    arguments = _functions().get(function, ("", []))[1]
    if not arguments or bool(colon) != ("name" in arguments):
        raise UsageError(f"--model {name} is unknown{nearest(name, [*model_names(), 'torchvision:NAME', 'timm:NAME'])}")
    if colon and inner not in (known := _library_names(function)):
        near = nearest(inner, known).partition("; there are")[0]
        raise UsageError(f"--model {name} is unknown to {function}{near or f', which has {len(known)} others'}")
    for option, value in options.items():
        if value is not None and option not in arguments:
            having = ", ".join(sorted(function for function, (_, arguments) in _functions().items() if option in arguments))
            raise UsageError(f"--{option.replace('_', '-')} is not supported by --model {name}; these have it: {having}")


def can_fuse(name: str) -> bool:
    """Whether the network called `name` has layers for --engine-level fused."""
    return "def norm_pool_relu(" in source_file(name).read_text(encoding="utf-8")


def has_experts(name: str) -> bool:
    """Whether the network called `name` has layers of experts."""
    return "top_k" in _functions()[name.partition(":")[0]][1]


def source_file(name: str) -> Path:
    """The file that defines the network called `name`."""
    return Path(__file__).with_name(f"{_functions()[name.partition(':')[0]][0]}.py")


def is_sequence(name: str) -> bool:
    """Whether the network's function is annotated as returning an nn.Sequential, which is what a pipeline divides."""
    for node in ast.parse(source_file(name).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name.partition(":")[0]:
            return node.returns is not None and ast.unparse(node.returns) == "nn.Sequential"
    return False


def arguments_of(
    name: str, num_classes: int, image_shape: tuple[int, int, int] = (3, 32, 32), **options: float | None
) -> dict[str, Any]:
    """The arguments of the network's function, for images [C, S, S]; options that are None keep the network's own values."""
    function, _, inner = name.partition(":")
    chosen = {"image_size": image_shape[1], "channels": image_shape[0], **options, "name": inner}
    known = _functions()[function][1]
    return {"num_classes": num_classes} | {key: chosen[key] for key in known if chosen.get(key) is not None}


def build_model(
    name: str, seed: int, num_classes: int, image_shape: tuple[int, int, int] = (3, 32, 32), **options: float | None
) -> nn.Module:
    """The network called `name` with a head for `num_classes` and initial weights from `seed`.

    `options` are `Recipe.network_options`; None keeps the network's own. Raises UsageError.
    """
    import torch

    refuse_unknown_model(name, **options)
    function, (file, _) = name.partition(":")[0], _functions()[name.partition(":")[0]]
    torch.manual_seed(seed)
    try:
        build = getattr(importlib.import_module(f"cifar10.models.{file}"), function)
        return build(**arguments_of(name, num_classes, image_shape, **options))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # of a library's network, or an image size
        raise UsageError(f"--model {name} cannot be built for images of {image_shape[1]}x{image_shape[1]}: {error}") from None
