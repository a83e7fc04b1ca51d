"""Files of weights: reading and comparing state dicts, and the weights that training starts from.

Files are read as data: nothing in them is executed. torch is imported only where a file is opened, so that the launcher can
check without it that there is one.
"""

from __future__ import annotations

import fnmatch
import http.client
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar10 import UsageError, reason
from cifar10.files import download_limits, file_digest, one_process_at_a_time

if TYPE_CHECKING:
    from torch import Tensor, nn

METADATA_KEY = "about"  # of a safetensors file's header: JSON of everything but the weights


# --- ImageNet ---------------------------------------------------------------------------------------------------------


def _imagenet_url(model_name: str) -> str:
    """The URL of torchvision's weights for this network. Raises UsageError if it has none."""
    from torchvision.models import get_model_weights

    try:
        return get_model_weights(model_name.removeprefix("torchvision:")).DEFAULT.url
    except ValueError:
        raise UsageError(
            f"--weights imagenet: torchvision has none for --model {model_name}; choose --weights none or a file"
        ) from None


def _cached(url: str) -> Path:
    """The path of a download in torch.hub's cache, $TORCH_HOME/hub/checkpoints."""
    from torch import hub

    return Path(hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def _ensure_imagenet(model_name: str) -> None:
    """Return once torch.hub's cache holds torchvision's weights with the right hash, downloaded if needed."""
    from torch import hub

    url = _imagenet_url(model_name)
    file, found = _cached(url), re.search(r"-([a-f0-9]{8,})\.", url)  # torchvision's names: vgg19-dcbb9e9d.pth
    hash_prefix = found[1] if found else ""  # of the sha256

    def is_sound() -> bool:
        return file.exists() and file_digest(file, "sha256").startswith(hash_prefix)

    try:
        if is_sound():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with one_process_at_a_time(file.with_name(f".{file.name}.lock"), f"fetching {file.name}"):
            if not is_sound():  # else another process was faster
                sys.stderr.write(f"fetching ImageNet weights from {url} to {file}\n")
                with download_limits():
                    hub.download_url_to_file(url, str(file), hash_prefix, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # the network, the disk; a wrong hash
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise UsageError(
            f"--weights imagenet: cannot download {url} to {file}: {reason}; put it there, or choose --weights none or a file"
        ) from None


def ensure(weights: str, model_name: str) -> None:
    """Return once the weights that --weights names are on this machine; else raise UsageError."""
    if weights == "imagenet":
        _ensure_imagenet(model_name)
    elif weights != "none" and not os.path.isfile(weights):
        raise UsageError(f"--weights {weights} is not a file; choose a file of weights, imagenet, or none")


# --- reading, comparing, loading --------------------------------------------------------------------------------------


def read_weights(path: Path, what: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in a .pt file (plain or under "module") or a .safetensors file, and what else the file says.

    Raises UsageError, `<what> ...; <remedy>`, for a corrupt or foreign file.
    """
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about files that are refused below
                content, about = torch.load(path, map_location="cpu", weights_only=True), {}
    except MemoryError:
        raise UsageError(f"{what} does not fit into this machine's memory; use a larger one") from None
    except Exception as error:  # a corrupt or foreign file
        raise UsageError(f"{what} cannot be read as weights ({reason(error)}); {remedy}") from None
    if isinstance(content, dict) and "module" in content:
        content, about = content["module"], {name: value for name, value in content.items() if name != "module"}
    if not isinstance(content, dict) or not content or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UsageError(f"{what} holds no state dict, neither plain nor under 'module'; {remedy}")
    return dict(content), about


def first_difference(ours: dict[str, Tensor], saved: dict[str, Tensor], *, finite: bool = True) -> str | None:
    """The first reason why `saved` are not (finite) weights with our names and shapes; None if they are."""
    for name, tensor in ours.items():
        if name not in saved:
            return f"it has no {name}"
        if saved[name].shape != tensor.shape:
            return f"{name} is {list(saved[name].shape)} there, {list(tensor.shape)} here"
        if finite and not saved[name].isfinite().all():
            return f"{name} holds values that are not finite"
    extra = next((name for name in saved if name not in ours), None)
    return f"it holds {extra}, which the model does not have" if extra else None


def head_of(model: nn.Module) -> list[str]:
    """The names of the head's parameters: those of the last linear layer or convolution."""
    from torch import nn

    name, layer = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))][-1]
    return [f"{name}.{parameter}" for parameter, _ in layer.named_parameters()]


def load(model: nn.Module, model_name: str, weights: str) -> list[str]:
    """Load the weights that --weights names into `model`, after `ensure`; returns lines about them for the console.

    Of a file for another number of classes, such as ImageNet's, all but the last linear layer is loaded. Any other difference
    is a UsageError.
    """
    if weights == "none":
        return []
    file = _cached(_imagenet_url(model_name)) if weights == "imagenet" else Path(weights)
    saved, _ = read_weights(file, f"--weights {weights}", "choose another file")
    ours, notes = model.state_dict(), [f"initial weights: {weights}"]
    head = head_of(model)
    shapes = [(saved[name].shape, ours[name].shape) for name in head if name in saved]
    if len(shapes) == len(head) and all(theirs[1:] == own[1:] and theirs != own for theirs, own in shapes):
        (theirs, *_), (own, *_) = shapes[0]
        notes = [f"initial weights: {weights}, but for its head of {theirs} classes: {head[0]} is new, with {own}"]
        saved = {**saved, **{name: ours[name] for name in head}}
    if difference := first_difference(ours, saved):
        raise UsageError(
            f"--weights {weights} does not fit --model {model_name}: {difference}; choose another file, or --weights none"
        )
    model.load_state_dict(saved)
    return notes


def freeze(model: nn.Module, train_only: str | None) -> list[str]:
    """Leave only the parameters trainable that --train-only names, by patterns or as `head`; returns lines for the console.

    Raises UsageError for a pattern without a parameter.
    """
    if train_only is None:
        return []
    patterns = [pattern for word in train_only.split() for pattern in (head_of(model) if word == "head" else [word])]
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns or [train_only]:
        if not fnmatch.filter(names, pattern):
            first = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise UsageError(
                f"--train-only {train_only}: no parameter is called {pattern}; for example head or {names[-1]};"
                f" the names begin with {first}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())]
    norms = (
        "; BatchNorm of frozen layers keeps its running statistics" if "running_mean" in " ".join(model.state_dict()) else ""
    )
    return [f"{counts[0]:,} of {counts[1]:,} parameters are trained (--train-only {train_only}){norms}"]


# --- checks -----------------------------------------------------------------------------------------------------------


def check_initial_weights(model: nn.Module, model_name: str) -> None:
    """Raise UsageError if training would start from weights that are not finite."""
    if bad := next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None):
        raise UsageError(f"--model {model_name} starts with values in {bad} that are not finite; correct its initialization")


def check_shapes(model: nn.Module, model_name: str, shape: tuple[int, int, int], num_classes: int) -> None:
    """Raise UsageError unless `model` maps a (black) image of `shape` [C, S, S] to `num_classes` logits."""
    import torch

    was_training = model.training
    try:
        with torch.no_grad():
            outputs: Any = model.eval()(torch.zeros(1, *shape)).shape[-1]
        fault = "" if outputs == num_classes else f"its output has {outputs} classes, expected {num_classes}"
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:  # from a layer
        fault = (str(error).strip() or type(error).__name__).splitlines()[0].split("; ")[0]
    model.train(was_training)
    if fault:
        channels, size, _ = shape
        kind = "grayscale" if channels == 1 else "color"
        raise UsageError(
            f"--model {model_name} does not accept {kind} images of {size}x{size} pixels ({fault});"
            " choose another --model, --dataset, --resize or --image-size"
        )
